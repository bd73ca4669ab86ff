"""Weights that a training starts from: a backbone, or a whole model of any known format."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.runtime.sharded_runner import whole_model
from ddetr_mm.weights import load_backbone, load_for_model


@HOOKS.register_module()
class PretrainedWeightsHook(Hook):
    """Loads weights by name before the first step, and reports every key that did not fit.

    A resumed run keeps the weights it was resumed with.

    Args:
        backbone_path: checkpoint for the backbone alone (torchvision, timm, or any full checkpoint).
        model_path: checkpoint for the whole model; loaded after the backbone, so it wins.
    """

    priority = "VERY_HIGH"

    def __init__(self, backbone_path: str | None = None, model_path: str | None = None) -> None:
        self.backbone_path = backbone_path
        self.model_path = model_path

    def before_train(self, runner: Any) -> None:
        """Load, unless the run goes on from a checkpoint.

        Raises:
            WeightsError: when a file is missing, is no checkpoint or does not fit the model.
        """
        if runner.iter > 0:
            runner.logger.info("The run goes on from a checkpoint: pretrained weights are not loaded.")
            return
        with whole_model(runner) as model:
            if self.backbone_path:
                report = load_backbone(model.backbone, self.backbone_path)
                runner.logger.info(f"Backbone from {self.backbone_path}:\n{report.summary()}")
            if self.model_path:
                classes = runner.train_dataloader.dataset.metainfo.get("classes")
                report = load_for_model(model, self.model_path, class_names=classes)
                runner.logger.info(f"Model from {self.model_path}:\n{report.summary()}")
