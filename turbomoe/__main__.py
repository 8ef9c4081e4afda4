"""``python -m turbomoe`` is the same as ``turbomoe``."""

import sys

from turbomoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
