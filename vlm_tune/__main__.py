"""Entry point of `python -m vlm_tune`."""

import sys


def is_stop(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or one that it led to: while a class is made, or in a library's clean-up."""
    came_of = error and (error.__cause__ or error.__context__)
    return isinstance(error, KeyboardInterrupt) or (came_of is not None and is_stop(came_of))


if __name__ == "__main__":
    try:
        from vlm_tune.cli import main

        sys.exit(main())
    except (KeyboardInterrupt, Exception) as error:  # during the imports; plain ones later are handled by `main`
        if not is_stop(error):
            raise
        sys.stderr.write("\nstopped.\n")
        sys.exit(130)
