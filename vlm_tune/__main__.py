"""python -m vlm_tune"""

import sys

from vlm_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
