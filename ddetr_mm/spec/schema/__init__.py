"""The schema of TAO's Deformable DETR specs as documented dataclasses, one module per section."""

from .common import DistributedTask, WandbConfig
from .convert import ConvertSpec
from .dataset import AugmentationConfig, DatasetConfig, DataSource, InferSource
from .deploy import CalibrationConfig, GenTrtEngineConfig, TensorrtConfig
from .experiment import ExperimentSpec
from .fields import FieldMeta, section, spec_field
from .model import ModelConfig
from .own import OwnConvertSection, OwnSection
from .quantize import LayerQuantizationConfig, QuantizeConfig, TensorQuantizationConfig
from .tasks import EvaluateConfig, ExportConfig, InferenceConfig
from .train import CheckpointerConfig, CudnnConfig, OptimConfig, TrainConfig

__all__ = [
    "AugmentationConfig",
    "CalibrationConfig",
    "CheckpointerConfig",
    "ConvertSpec",
    "CudnnConfig",
    "DataSource",
    "DatasetConfig",
    "DistributedTask",
    "EvaluateConfig",
    "ExperimentSpec",
    "ExportConfig",
    "FieldMeta",
    "GenTrtEngineConfig",
    "InferSource",
    "InferenceConfig",
    "LayerQuantizationConfig",
    "ModelConfig",
    "OptimConfig",
    "OwnConvertSection",
    "OwnSection",
    "QuantizeConfig",
    "TensorQuantizationConfig",
    "TensorrtConfig",
    "TrainConfig",
    "WandbConfig",
    "section",
    "spec_field",
]
