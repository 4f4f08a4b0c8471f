"""Entry point of `python -m vlm_tune`."""

import sys

if __name__ == "__main__":
    try:
        from vlm_tune.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # during the imports; later ones are handled by `main`
        sys.stderr.write("\nstopped.\n")
        sys.exit(130)
