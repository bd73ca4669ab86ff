"""The root of an experiment spec."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.common import WandbConfig
from ddetr_mm.spec.schema.dataset import DatasetConfig
from ddetr_mm.spec.schema.deploy import GenTrtEngineConfig
from ddetr_mm.spec.schema.fields import OURS, section, spec_field
from ddetr_mm.spec.schema.model import ModelConfig
from ddetr_mm.spec.schema.own import OwnSection
from ddetr_mm.spec.schema.quantize import QuantizeConfig
from ddetr_mm.spec.schema.tasks import EvaluateConfig, ExportConfig, InferenceConfig
from ddetr_mm.spec.schema.train import TrainConfig


@dataclass
class ExperimentSpec:
    """Everything that train, evaluate, inference, export and gen_trt_engine read."""

    model_name: str | None = spec_field(None, doc="A name of your own for the model; null: none.")
    encryption_key: str | None = spec_field(
        None, secret=True, doc="Key that encrypts and decrypts checkpoints; null: no encryption."
    )
    results_dir: str | None = spec_field(
        "/results",
        doc="""Folder for all results: each subtask writes to a sub-folder of its own name, unless its
        own results_dir says otherwise.""",
    )
    wandb: WandbConfig = section(WandbConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    inference: InferenceConfig = section(InferenceConfig)
    export: ExportConfig = section(ExportConfig)
    gen_trt_engine: GenTrtEngineConfig = section(GenTrtEngineConfig)
    quantize: QuantizeConfig = section(QuantizeConfig)
    ddetr_mm: OwnSection = section(OwnSection, origin=OURS)
