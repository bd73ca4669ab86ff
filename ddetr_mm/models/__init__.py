"""The network; importing this package registers its classes with mmdet."""

from ddetr_mm.models.backbones import TorchvisionDilatedResNet, feature_channels
from ddetr_mm.models.data_preprocessor import FixedPadDetDataPreprocessor
from ddetr_mm.models.detector import TAODeformableDETR
from ddetr_mm.models.gcvit import GCViT
from ddetr_mm.models.head import TAODeformableDETRHead

__all__ = [
    "FixedPadDetDataPreprocessor",
    "GCViT",
    "TAODeformableDETR",
    "TAODeformableDETRHead",
    "TorchvisionDilatedResNet",
    "feature_channels",
]
