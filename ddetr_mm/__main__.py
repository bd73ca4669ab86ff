"""``python -m ddetr_mm``: the same as the ``ddetr-mm`` command."""

import sys

from ddetr_mm.cli import main

if __name__ == "__main__":
    sys.exit(main())
