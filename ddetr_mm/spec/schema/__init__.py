"""The schema of TAO's Deformable DETR specs as documented dataclasses, one module per section."""

from ddetr_mm.spec.schema.common import DistributedTask, WandbConfig
from ddetr_mm.spec.schema.convert import ConvertSpec
from ddetr_mm.spec.schema.dataset import AugmentationConfig, DatasetConfig, DataSource, InferSource
from ddetr_mm.spec.schema.deploy import CalibrationConfig, GenTrtEngineConfig, TensorrtConfig
from ddetr_mm.spec.schema.experiment import ExperimentSpec
from ddetr_mm.spec.schema.fields import FieldMeta, section, spec_field
from ddetr_mm.spec.schema.model import ModelConfig
from ddetr_mm.spec.schema.own import OwnConvertSection, OwnSection
from ddetr_mm.spec.schema.quantize import LayerQuantizationConfig, QuantizeConfig, TensorQuantizationConfig
from ddetr_mm.spec.schema.tasks import EvaluateConfig, ExportConfig, InferenceConfig
from ddetr_mm.spec.schema.train import CheckpointerConfig, CudnnConfig, OptimConfig, TrainConfig

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
