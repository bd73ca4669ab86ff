"""The detector's forward pass for export: one input size, no padding, few nodes.

Shape legend: B batch · Q queries · C hidden dim · M heads · D = C / M · L levels · P points ·
S feature points of all levels together.

With a fixed input size everything but the batch is static: feature sizes, sine positions, reference points of
the encoder and the first self-attention of the decoder are constants. The memory is (B, S, C) with plugin
nodes and (B, 1, S, C) with standard operators, where 1x1 convolutions do the large projections (see
:mod:`ddetr_mm.deploy.graph_attention`).

The detector's own modules and weights are used; only the order of reshapes and the constants differ from
:class:`mmdet.models.DeformableDETR`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr_mm.deploy.graph_attention import PluginAttention, StandardAttention, pointwise
from ddetr_mm.errors import ExportError, Problem

INVERSE_SIGMOID_EPS = 1e-5
"""mmdet clamps probabilities by this before it takes their logit."""


class ExportGraph(nn.Module):
    """``(B, 3, H, W)`` normalised RGB → ``pred_logits (B, Q, classes)``, ``pred_boxes (B, Q, 4)``.

    Boxes are ``(cx, cy, w, h)`` relative to the input, in 0..1. The image fills the input; there is no
    padding mask.

    Args:
        detector: a Deformable DETR of mmdet or this package, one-stage, in eval mode.
        input_size_hw: height and width in pixels.
        plugin: sample with plugin nodes instead of standard operators: ``nvidia`` for TensorRT's own,
            ``mmdeploy`` for the one of mmdeploy's library.

    Raises:
        ExportError: the detector is two-stage (its first queries depend on the image), or the backbone cannot
            use the size.
    """

    def __init__(
        self, detector: nn.Module, input_size_hw: tuple[int, int], plugin: str | None = None
    ) -> None:
        super().__init__()
        if detector.as_two_stage:
            raise ExportError(
                Problem(
                    "a two-stage Deformable DETR cannot be exported", hint="train with as_two_stage=False"
                )
            )
        self.detector = detector
        self.plugin = plugin
        device = detector.level_embed.device
        with torch.no_grad():
            features = extract_features(detector, input_size_hw, device)
            self.sizes_hw = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
            positions, centres = self._positions(features), self._encoder_centres(device)
            self.register_buffer("positions", positions if plugin else positions[:, None])
            self.register_buffer("encoder_centres", self._in_sampling_form(centres))
            self._prepare_decoder()
            form = functools.partial(PluginAttention, plugin=plugin) if plugin else StandardAttention
            self.encoder_attention = nn.ModuleList(
                form(layer.self_attn, positions.shape[1], self.sizes_hw, box_references=False)
                for layer in detector.encoder.layers
            )
            self.decoder_attention = nn.ModuleList(
                form(
                    layer.cross_attn,
                    detector.num_queries,
                    self.sizes_hw,
                    box_references=detector.with_box_refine and index > 0,
                )
                for index, layer in enumerate(detector.decoder.layers)
            )

    @property
    def output_sizes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the outputs without the batch."""
        num_queries = self.detector.num_queries
        return {
            "pred_logits": (num_queries, self.detector.bbox_head.cls_out_channels),
            "pred_boxes": (num_queries, 4),
        }

    def _positions(self, features: tuple[Tensor, ...]) -> Tensor:
        """Sine positions plus level embedding of every feature point, ``(1, S, C)``."""
        encoding = self.detector.positional_encoding
        parts = [
            encoding(None, input=feature).flatten(2).transpose(1, 2) + self.detector.level_embed[level]
            for level, feature in enumerate(features)
        ]
        return torch.cat(parts, dim=1)

    def _encoder_centres(self, device: torch.device) -> Tensor:
        """Centre of every feature point as (x, y) in 0..1, ``(1, S, 2)``."""
        centres = []
        for height, width in self.sizes_hw:
            y = (torch.arange(height, device=device) + 0.5) / height
            x = (torch.arange(width, device=device) + 0.5) / width
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            centres.append(torch.stack([grid_x, grid_y], -1).reshape(-1, 2))
        return torch.cat(centres)[None]

    def _in_sampling_form(self, centres: Tensor) -> Tensor:
        """Convert centres (B, n, 2) in 0..1 to the range and axes that the attention takes."""
        return centres[:, :, None] if self.plugin else (2 * centres - 1)[:, None]

    def _prepare_decoder(self) -> None:
        """Precompute queries, their positions and first references, which are the same for every image."""
        detector = self.detector
        width = detector.embed_dims
        query_pos, query = torch.split(detector.query_embedding.weight[None], width, dim=2)
        first = detector.decoder.layers[0]
        after_self_attention = first.norms[0](
            self_attention(first.self_attn, detector.num_queries, query, query_pos)
        )
        self.register_buffer("query_pos", query_pos.detach().clone())
        self.register_buffer("first_query", after_self_attention.detach().clone())
        references = detector.reference_points_fc(query_pos).sigmoid()
        self.register_buffer("first_reference_logits", clamped_logits(torch.logit(references)).detach())
        self.register_buffer("first_centres", self._in_sampling_form(references).detach())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.detector.extract_feat(inputs)
        width = self.detector.embed_dims
        planes = torch.cat(
            [
                feature.reshape(-1, width, height * length)
                for feature, (height, length) in zip(features, self.sizes_hw, strict=True)
            ],
            dim=2,
        )
        memory = planes.transpose(1, 2)
        if not self.plugin:
            memory = memory[:, None]
        for layer, attend in zip(self.detector.encoder.layers, self.encoder_attention, strict=True):
            attended = attend(memory + self.positions, memory, self.encoder_centres)
            memory = layer.norms[0](memory + attended)
            changes = feed_forward(layer.ffn, memory) if self.plugin else pointwise(layer.ffn.layers, memory)
            memory = layer.norms[1](memory + changes)
        return self._decode(memory)

    def _decode(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run the decoder and the last prediction layer on the encoder's memory."""
        detector, head = self.detector, self.detector.bbox_head
        layers = list(detector.decoder.layers)
        query = self.first_query.expand(memory.shape[0], -1, -1)
        box_logits = None
        for index, (layer, attend) in enumerate(zip(layers, self.decoder_attention, strict=True)):
            if index > 0:
                query = layer.norms[0](
                    self_attention(layer.self_attn, detector.num_queries, query, self.query_pos)
                )
            if box_logits is None:
                centres, sizes = self.first_centres, None
            else:
                boxes = box_logits.sigmoid()
                centres = self._in_sampling_form(boxes[..., :2])
                sizes = boxes[:, :, None, 2:] if self.plugin else boxes[:, None, :, 2:]
            query = layer.norms[1](query + self._attend(attend, query, memory, centres, sizes))
            query = layer.norms[2](query + feed_forward(layer.ffn, query))
            last = index == len(layers) - 1
            if detector.with_box_refine or last:
                offsets = head.reg_branches[index](query)
                references = self.first_reference_logits if box_logits is None else box_logits
                box_logits = add_reference(offsets, references)
                if not last:
                    box_logits = clamped_logits(box_logits)
        logits = head.cls_branches[len(layers) - 1](query)
        return logits, box_logits.sigmoid()

    def _attend(
        self, attend: nn.Module, query: Tensor, memory: Tensor, centres: Tensor, sizes: Tensor | None
    ) -> Tensor:
        """Cross attention of queries (B, Q, C) to a memory of either form."""
        positioned = query + self.query_pos
        if self.plugin:
            return attend(positioned, memory, centres, sizes)
        return attend(positioned[:, None], memory, centres, sizes)[:, 0]


def extract_features(
    detector: nn.Module, input_size_hw: tuple[int, int], device: torch.device
) -> tuple[Tensor, ...]:
    """Return the feature levels of an empty image.

    Raises:
        ExportError: backbone or neck cannot use the size.
    """
    problem = Problem(
        "cannot be used by the backbone",
        where="export.input_height, export.input_width",
        value=input_size_hw,
        hint="choose a larger size, multiples of 32",
    )
    try:
        features = detector.extract_feat(torch.zeros(1, 3, *input_size_hw, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(dataclasses.replace(problem, what=f"{problem.what} ({reason})")) from error
    if any(0 in feature.shape for feature in features):
        raise ExportError(problem)
    return features


def self_attention(module: nn.Module, num_queries: int, query: Tensor, query_pos: Tensor) -> Tensor:
    """Compute mmcv's ``MultiheadAttention`` among the queries with its residual: (B, Q, C) → (B, Q, C)."""
    attention = module.attn
    width, heads = attention.embed_dim, attention.num_heads
    positioned = query + query_pos
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query_key = F.linear(positioned, weight[: 2 * width], bias[: 2 * width])
    value = F.linear(query, weight[2 * width :], bias[2 * width :])

    def per_head(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, num_queries, heads, width // heads).transpose(1, 2)

    queries, keys = per_head(query_key[..., :width]), per_head(query_key[..., width:])
    scores = queries @ keys.transpose(2, 3) * (1 / math.sqrt(width // heads))
    mixed = (scores.softmax(-1) @ per_head(value)).transpose(1, 2).reshape(-1, num_queries, width)
    return query + attention.out_proj(mixed)


def feed_forward(module: nn.Module, inputs: Tensor) -> Tensor:
    """Compute mmcv's ``FFN`` without its residual."""
    return module.layers(inputs)


def clamped_logits(logits: Tensor) -> Tensor:
    """Compute mmdet's ``inverse_sigmoid(sigmoid(logits))``: logits clamped near ±11.5."""
    bound = math.log(1 / INVERSE_SIGMOID_EPS)
    return logits.clamp(-bound, bound)


def add_reference(offsets: Tensor, reference_logits: Tensor) -> Tensor:
    """Add box offsets (B, Q, 4) to reference boxes (…, 4) or to the centres of reference points (…, 2)."""
    if reference_logits.shape[-1] == 4:
        return offsets + reference_logits
    return offsets + F.pad(reference_logits, (0, 2))
