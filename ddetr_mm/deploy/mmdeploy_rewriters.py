"""Rewriter of the detector for mmdeploy: name this module in a deploy config's ``codebase_config.module``.

mmdeploy replaces the detector by :class:`DeployedDetector` before it traces, so that its graph is that of
:mod:`ddetr_mm.deploy.graph` followed by the choice of detections. Outputs are mmdeploy's: ``dets``
(N, K, 5) as x1, y1, x2, y2, score in pixels of the network's input, and ``labels`` (N, K).

``codebase_config.attention`` chooses the sampling: ``standard`` (GridSample, the default), ``nvidia``
(TensorRT's own plugin) or ``mmdeploy`` (the plugin of mmdeploy's runtime library).
"""

from __future__ import annotations

from typing import Any

import torch
from mmdeploy.core import MODULE_REWRITER
from mmdeploy.utils import get_codebase_config, get_input_shape, is_dynamic_shape
from torch import Tensor, nn

from ddetr_mm.deploy.graph import ExportGraph
from ddetr_mm.errors import ExportError, Problem
from ddetr_mm.models.head import top_detections

ATTENTIONS = {"standard": None, "nvidia": "nvidia", "mmdeploy": "mmdeploy"}


@MODULE_REWRITER.register_rewrite_module("ddetr_mm.models.detector.TAODeformableDETR")
class DeployedDetector(nn.Module):
    """The detector as mmdeploy exports it.

    Args:
        module: a :class:`~ddetr_mm.models.detector.TAODeformableDETR` with its weights.
        cfg: the deploy config.

    Raises:
        ExportError: the input size is not fixed, or the attention is unknown.
    """

    def __init__(self, module: nn.Module, cfg: Any) -> None:
        super().__init__()
        # While it exports, mmdeploy keeps a second `ir_config` that has lost the input's shape.
        shape_wh = cfg.get("onnx_config", {}).get("input_shape") or get_input_shape(cfg)
        if shape_wh is None or is_dynamic_shape(cfg):
            raise ExportError(
                Problem(
                    "needs a fixed height and width",
                    where="onnx_config.input_shape",
                    value=shape_wh,
                    hint="give input_shape=(width, height) and dynamic_axes for axis 0 only",
                )
            )
        attention = get_codebase_config(cfg).get("attention", "standard")
        if attention not in ATTENTIONS:
            where = "codebase_config.attention"
            raise ExportError(Problem("is unknown", where=where, value=attention, allowed=list(ATTENTIONS)))
        size_hw = (int(shape_wh[1]), int(shape_wh[0]))
        # A float32 model on the CPU is what mmdeploy traces, whatever its device argument says.
        self.graph = ExportGraph(module.eval().float().cpu(), size_hw, ATTENTIONS[attention]).eval()
        self.register_buffer("size_hw", torch.tensor([size_hw], dtype=torch.float32))
        head = module.bbox_head
        self.max_per_img = min(head.max_per_img, module.num_queries * head.cls_out_channels)
        self.background_column = head.background_column

    def forward(self, batch_inputs: Tensor, data_samples: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return ``dets`` and ``labels`` of images (N, 3, H, W); the samples are ignored."""
        logits, boxes_cxcywh = self.graph(batch_inputs)
        scores, labels, boxes_xyxy = top_detections(
            logits, boxes_cxcywh, self.size_hw, self.max_per_img, self.background_column
        )
        return torch.cat([boxes_xyxy, scores[..., None]], -1), labels
