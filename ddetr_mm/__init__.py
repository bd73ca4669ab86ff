"""NVIDIA TAO's ``deformable_detr`` on MMDetection 3.x: the same specs, subtasks and artifacts.

Importing the package is light: it checks by their metadata that the installed versions fit, and puts
an import hook in place that answers for mmcv's compiled ops where mmcv has none (so import it before
mmdet there). Torch and mmdet are imported only by the parts that use them.

To register every class with mmdet, import :mod:`ddetr_mm.register`.

Raises:
    ddetr_mm.stack.versions.StackImportError: a required package is missing or does not fit.
"""

from ddetr_mm.stack.image_limit import limit_decoded_images
from ddetr_mm.stack.mmcv_ops import install_stand_in
from ddetr_mm.stack.versions import check_on_import

__version__ = "0.1.0"

check_on_import()
limit_decoded_images()
install_stand_in()
