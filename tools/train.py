"""Train from an mmengine config or a TAO spec: ``python tools/train.py CONFIG_OR_SPEC [options]``.

The options are those of mmdet's ``tools/train.py``, which does the work.
"""

import sys

from ddetr_mm.tasks.mmdet_tools import main

if __name__ == "__main__":
    sys.exit(main("train"))
