"""``python -m harmony`` is ``harmony-run``."""

import sys

from harmony.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
