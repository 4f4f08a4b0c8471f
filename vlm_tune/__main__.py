"""Entry point of `python -m vlm_tune`."""

import sys


def is_stop(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or what Python 3.11 makes of one that comes while a class is made."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or is_stop(error.__cause__))


if __name__ == "__main__":
    try:
        from vlm_tune.cli import main

        sys.exit(main())
    except (KeyboardInterrupt, RuntimeError) as error:  # during the imports; later ones are handled by `main`
        if not is_stop(error):
            raise
        sys.stderr.write("\nstopped.\n")
        sys.exit(130)
