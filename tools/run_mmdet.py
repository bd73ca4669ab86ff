"""Run any tool of the installed mmdet: ``python tools/run_mmdet.py TOOL [its arguments]``.

TOOL is its path below mmdet's ``tools``, e.g. ``analysis_tools/get_flops``. A TAO spec counts where the
tool's first argument is a config, and mmcv needs no compiled ops.
"""

import sys

from ddetr_mm.tasks.mmdet_tools import main_of_any

if __name__ == "__main__":
    sys.exit(main_of_any())
