"""``python -m crmbridge``: hands over to the command line."""

import sys

from crmbridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
