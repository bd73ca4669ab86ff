"""The network and what belongs to it; importing this package registers its classes with mmdet."""

from .detector import TAODeformableDETR
from .feature_channels import FeatureInfo, feature_channels, feature_info
from .gcvit import GCViT
from .head import TAODeformableDETRHead
from .preprocessor import FixedPadDetDataPreprocessor
from .resnet import TorchvisionDilatedResNet

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
