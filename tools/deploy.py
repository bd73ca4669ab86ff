"""Convert a detector with mmdeploy: ``tools/deploy.py DEPLOY_CFG MODEL_CFG CHECKPOINT IMAGE [options]``.

The arguments are those of mmdeploy's tool; an experiment spec may replace the model config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddetr_mm.tasks.mmdeploy_tool import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
