"""Test a config or a TAO spec: ``python tools/test.py CONFIG_OR_SPEC CHECKPOINT [options]``.

The options are those of mmdet's ``tools/test.py``, which does the work. The checkpoint may have any format
that ``ddetr-mm weights`` reads.
"""

import sys

from ddetr_mm.tasks.mmdet_tools import main

if __name__ == "__main__":
    sys.exit(main("test"))
