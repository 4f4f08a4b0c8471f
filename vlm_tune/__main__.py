"""python -m vlm_tune"""

import sys

if __name__ == "__main__":
    try:
        from vlm_tune.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # during the imports: `main` answers for what comes after them
        sys.stderr.write("\nstopped.\n")
        sys.exit(130)
