"""The network and what belongs to it; importing this package registers its classes with mmdet."""

from ddetr_mm.models.backbones import FeatureInfo, TorchvisionDilatedResNet, feature_channels, feature_info
from ddetr_mm.models.data_preprocessor import FixedPadDetDataPreprocessor
from ddetr_mm.models.detector import TAODeformableDETR
from ddetr_mm.models.gcvit import GCViT
from ddetr_mm.models.head import TAODeformableDETRHead

__all__ = [
    "FeatureInfo",
    "FixedPadDetDataPreprocessor",
    "GCViT",
    "TAODeformableDETR",
    "TAODeformableDETRHead",
    "TorchvisionDilatedResNet",
    "feature_channels",
    "feature_info",
]
