"""Deformable DETR as TAO trains it, assembled from mmdet's detector.

Source: Zhu et al., arXiv 2010.04159. The main steps are ``record_function`` regions for torch's profiler:
backbone, encoder, decoder, loss, matching.

Shapes: B images, C channels, H, W of the padded input, L levels, h, w of a level, S sum of all levels' h*w,
Q queries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from mmdet.models.detectors import DeformableDETR
from mmdet.models.layers import SinePositionalEncoding
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import reduce_mean
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.profiler import record_function

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.models.backbones import fold_frozen_norms
from ddetr_mm.models.deformable_attention import (
    DeformableAttention,
    SizesHW,
    host_to_device,
    level_layout,
    no_autocast,
)
from ddetr_mm.models.transformer import DeformableDecoder, DeformableEncoder

# --- Scalars for the log ---


class HostScalars(Mapping[str, Tensor]):
    """Named scalars of a device, copied to the host in one asynchronous transfer.

    Reading a value waits for the transfer only, not for work that was queued on the device later, as
    ``.item()`` would.

    Args:
        scalars: tensors of one element on one device.
        mean_over_ranks: whether to average them over all ranks, which must all call this then.
    """

    def __init__(self, scalars: Mapping[str, Tensor], mean_over_ranks: bool = False) -> None:
        self._names = tuple(scalars)
        self._event: torch.cuda.Event | None = None
        stacked = torch.stack([scalar.detach().reshape(()).float() for scalar in scalars.values()])
        if mean_over_ranks:
            stacked = reduce_mean(stacked)
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(stacked.device))
        else:
            host = stacked.cpu()
        self._values = dict(zip(self._names, host.unbind(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """Return a scalar as a float32 tensor without dimensions on the CPU."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- Padding of the feature levels ---


def refuse_non_finite_detections(sample: DetDataSample) -> None:
    """Refuse detections of an image that are NaN or infinite.

    Raises:
        WeightsError: they are; names the image.
    """
    found = sample.pred_instances
    if not (torch.isfinite(found.scores).all() and torch.isfinite(found.bboxes).all()):
        raise WeightsError(
            Problem(
                "the network gives NaN or infinite detections",
                file=sample.metainfo.get("img_path"),
                hint="use an earlier checkpoint, or ddetr_mm.predict_precision: fp32",
            )
        )


def level_padding(
    valid_sizes_hw: SizesHW,
    input_size_hw: tuple[int, int],
    level_sizes_hw: SizesHW,
    device: torch.device | str,
) -> tuple[list[Tensor | None], Tensor]:
    """Compute padding masks and valid ratios of every level, for images padded at the right and bottom.

    A level's mask is the input's mask at the nearest pixels (``F.interpolate``), as in TAO. Nothing is read
    back from ``device``.

    Args:
        valid_sizes_hw: unpadded height and width of each of the B images, in pixels, at least 1.
        input_size_hw: (H, W) of the padded batch.
        level_sizes_hw: (h, w) of every level.
        device: of the result.

    Returns:
        A mask (B, h, w) of each level, True in the padding, or None for all levels when nothing is padded;
        and the valid ratios (B, L, 2) as (x, y), 0..1, float32 (1, L, 2 when nothing is padded).
    """
    if all(tuple(size) == tuple(input_size_hw) for size in valid_sizes_hw):
        return [None] * len(level_sizes_hw), torch.ones(1, len(level_sizes_hw), 2, device=device)
    valid = host_to_device([tuple(size) for size in valid_sizes_hw], device, torch.int64)
    rows = _inside(valid[:, 0], input_size_hw[0])
    columns = _inside(valid[:, 1], input_size_hw[1])
    masks: list[Tensor | None] = []
    ratios: list[Tensor] = []
    for height, width in level_sizes_hw:
        level_rows = F.interpolate(rows, size=height)[:, 0]
        level_columns = F.interpolate(columns, size=width)[:, 0]
        masks.append((level_rows[:, :, None] * level_columns[:, None, :]) == 0)
        ratios.append(torch.stack([level_columns.mean(1), level_rows.mean(1)], -1))
    return masks, torch.stack(ratios, 1)


def _inside(valid: Tensor, size: int) -> Tensor:
    """(B, 1, size) float32: 1 at positions below ``valid`` (B,), else 0."""
    positions = torch.arange(size, device=valid.device)
    return (positions < valid[:, None]).float()[:, None]


def feature_sizes_hw(features: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return height and width of every feature map as Python integers."""
    return tuple((int(feature.shape[-2]), int(feature.shape[-1])) for feature in features)


# --- The detector ---


LEAST_SIDE_OF_CHANNELS_LAST = 256
"""Shorter side of a batch, in pixels, from which training on a CPU in bfloat16 uses channels-last."""


@MODELS.register_module()
class TAODeformableDETR(DeformableDETR):
    """mmdet's DeformableDETR with TAO's treatment of padding.

    ::

        images ─ backbone ─ neck ─ levels ─┬─ pre_transformer ── forward_encoder ── pre_decoder ─┐
                                           │   masks, sine         memory            queries,    │
        img_shape of the samples ──────────┘   positions                             references  │
        logits, boxes ── bbox_head ── forward_decoder ───────────────────────────────────────────┘

    Differences from mmdet:

    - Padding affects the sine positions and the valid ratios only; attention values in the padding are
      used as they are. ``zero_padded_values=True`` sets them to zero, as mmdet and the original authors do:
      then a prediction does not depend on the padding of its batch.
    - ``forward(mode='tensor')`` works without data samples (nothing is padded then) and in training mode.
    - The caller's config is not changed.
    - Nothing is read back from a GPU between images and predictions.
    - Backbone and neck compute in channels-last memory format where that is faster: on GPUs, and on a CPU in
      prediction. Frozen batch norms are folded into the convolutions before them in training, too
      (:func:`~ddetr_mm.models.backbones.fold_frozen_norms`).

    Initial weights are mmdet's and TAO's: Xavier in the transformer and the neck (gain 1, bias 0), sampling
    offsets on eight rays, level embeddings and queries normal. Give ResNet ``zero_init_residual=False`` where
    its norms are frozen and no pretrained weights are loaded, else its residual branches stay zero.

    Args:
        zero_padded_values: whether attention values in the padding are set to zero.
        activation_checkpoint: whether encoder and decoder layers recompute their activations in the backward
            pass (less memory, more time, equal gradients).
        frozen_modules: dotted names of modules or parameters that are not trained, e.g. ``"encoder"``;
            a module that is used several times may be given by any of its names.
        attention: the GPU implementation of deformable attention, see
            :func:`~ddetr_mm.models.deformable_attention.sample_values`.
        deterministic_attention: whether the gradients of deformable attention are equal bit for bit each
            time; on a GPU that is slower.
        compiled: the modules given to ``torch.compile``: ``none``, ``backbone``, or ``all`` (backbone, neck,
            encoder, decoder).
        compile_options: arguments of ``torch.compile``, e.g. ``{"mode": "reduce-overhead"}``.
        predict_dtype: ``float16`` or ``bfloat16`` runs :meth:`predict` under autocast.
        **kwargs: mmdet's.

    Raises:
        ValueError: ``compiled`` or ``predict_dtype`` has another value, or ``frozen_modules`` a name that
            fits nothing.
    """

    def __init__(
        self,
        *args,
        decoder: dict,
        bbox_head: dict,
        zero_padded_values: bool = False,
        activation_checkpoint: bool = False,
        frozen_modules: Sequence[str] = (),
        attention: str = "auto",
        deterministic_attention: bool = False,
        compiled: str = "none",
        compile_options: dict | None = None,
        predict_dtype: str | None = None,
        encoder: dict,
        data_preprocessor: dict | nn.Module | None = None,
        **kwargs,
    ) -> None:
        # Unless mmdet is the default scope, mmengine looks the preprocessor up in its own registry.
        if isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.build(copy.deepcopy(data_preprocessor))
        # mmdet changes the configs it is given.
        super().__init__(
            *args,
            encoder=copy.deepcopy(encoder),
            decoder=copy.deepcopy(decoder),
            bbox_head=copy.deepcopy(bbox_head),
            data_preprocessor=data_preprocessor,
            **kwargs,
        )
        self.zero_padded_values = zero_padded_values
        self.activation_checkpoint = activation_checkpoint
        if activation_checkpoint:
            for layer in (*self.encoder.layers, *self.decoder.layers):
                layer.activation_checkpoint = True
        for name in frozen_modules:
            self._freeze(name)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.choose_implementation(attention, deterministic_attention)
        if predict_dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f"predict_dtype must be float16, bfloat16 or None, not {predict_dtype!r}")
        self.predict_dtype = predict_dtype
        # Memory format of images and features: None for what suits the device.
        self.channels_last: bool | None = None
        self._has_folded_norms = False
        # Set where predictions are results: validation does not end a training run that has diverged.
        self.requires_finite = False
        self.host_losses: HostScalars | None = None  # the last step's, for hooks
        self._compile_parts(compiled, compile_options or {})

    def _compile_parts(self, compiled: str, options: dict) -> None:
        """Compile modules at their first call, in place: names of weights do not change."""
        parts = {
            "none": (),
            "backbone": ("backbone",),
            "all": ("backbone", "neck", "encoder", "decoder"),
        }
        if compiled not in parts:
            raise ValueError(f"compiled must be one of {tuple(parts)}, not {compiled!r}")
        for part in parts[compiled]:
            getattr(self, part).compile(**options)

    def _freeze(self, name: str) -> None:
        """Freeze a module's parameters, or one parameter.

        Raises:
            ValueError: nothing has this name.
        """
        frozen = {
            id(parameter): parameter
            for path, parameter in self.named_parameters(remove_duplicate=False)
            if path == name or path.startswith(f"{name}.")
        }
        if not frozen:
            known = [path for path, _ in (*self.named_modules(), *self.named_parameters()) if path]
            near = get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"frozen_modules: no module or parameter is named {name!r}{hint}")
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        print_log(f"Freezed module [{name}]: {len(frozen)} parameters", "current")

    def _init_layers(self) -> None:
        """Build all modules but backbone, neck and head, with mmdet's parameter names."""
        self.positional_encoding = SinePositionalEncoding(**self.positional_encoding)
        self.encoder = DeformableEncoder(**self.encoder)
        self.decoder = DeformableDecoder(**self.decoder)
        self.embed_dims = self.encoder.embed_dims
        if self.positional_encoding.num_feats * 2 != self.embed_dims:
            raise ValueError(
                f"positional_encoding.num_feats must be half of the {self.embed_dims} channels, "
                f"not {self.positional_encoding.num_feats}"
            )
        self.level_embed = nn.Parameter(torch.empty(self.num_feature_levels, self.embed_dims))
        nn.init.normal_(self.level_embed)
        if self.as_two_stage:
            self.memory_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
            self.memory_trans_norm = nn.LayerNorm(self.embed_dims)
            self.pos_trans_fc = nn.Linear(self.embed_dims * 2, self.embed_dims * 2)
            self.pos_trans_norm = nn.LayerNorm(self.embed_dims * 2)
        else:
            self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims * 2)
            self.reference_points_fc = nn.Linear(self.embed_dims, 2)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the raw outputs of every decoder layer: ``forward(mode='tensor')``.

        Args:
            batch_inputs: (B, 3, H, W), normalised.
            batch_data_samples: samples with ``img_shape`` and ``batch_input_shape``; None when nothing is
                padded.

        Returns:
            Logits (layers, B, Q, classes) and boxes (layers, B, Q, 4) as (cx, cy, w, h), 0..1 over
            the unpadded image.
        """
        features = self.extract_feat(batch_inputs)
        outputs = self.forward_transformer(features, batch_data_samples)
        return self.bbox_head(outputs["hidden_states"], outputs["references"])

    @record_function("backbone")
    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the neck's L feature levels, (B, C, h, w) each, of images (B, 3, H, W)."""
        if self.channels_last is not None:
            channels_last = self.channels_last
        elif batch_inputs.is_cuda:
            # cuDNN's kernels for tensor cores read this layout; others transpose before and after each. The
            # weights follow the images' layout in each convolution: as parameters they keep theirs, for
            # checkpoints, and because fused optimizers pair parameters and states by position in memory.
            channels_last = True
        else:
            # oneDNN's convolutions take a seventh less time, and the levels have the layout in which they
            # are flattened. Not in training in float32: oneDNN's gradient of some 1x1 convolutions reads out
            # of bounds (AVX-512, tiny maps) and ends the process. In bfloat16 other kernels are used, which
            # otherwise copy every map twice: a fifth of the step; no crash is known there, and small images,
            # whose maps are tiny, are left out all the same.
            trains_in_bf16 = (
                torch.is_autocast_enabled("cpu")
                and torch.get_autocast_dtype("cpu") == torch.bfloat16
                and min(batch_inputs.shape[-2:]) >= LEAST_SIDE_OF_CHANNELS_LAST
            )
            channels_last = batch_inputs.device.type == "cpu" and (
                not torch.is_grad_enabled() or trains_in_bf16
            )
        if channels_last and not torch.jit.is_tracing():
            batch_inputs = batch_inputs.contiguous(memory_format=torch.channels_last)
        return super().extract_feat(batch_inputs)

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]) -> dict:
        """Compute the losses as mmdet does, from the first call on with frozen batch norms folded.

        Args:
            batch_inputs: (B, 3, H, W), normalised.
            batch_data_samples: with ground truth.

        Returns:
            Losses by name.
        """
        if not self._has_folded_norms:
            self._has_folded_norms = True
            fold_frozen_norms(self.backbone)
        return super().loss(batch_inputs, batch_data_samples)

    def parse_losses(self, losses: dict) -> tuple[Tensor, HostScalars]:
        """Sum the losses for the backward pass, and start copying them to the host for the log.

        Args:
            losses: tensors or lists of tensors by name; those with ``loss`` in their name are summed.

        Returns:
            The sum for the backward pass; the sum (as ``loss``) and means by name for the log.
        """
        total, scalars = super().parse_losses(losses)
        self.host_losses = HostScalars(scalars, mean_over_ranks=True)
        return total, self.host_losses

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample], rescale: bool = True
    ) -> Sequence[DetDataSample]:
        """Predict as mmdet does, under autocast with ``predict_dtype``; scores and boxes stay float32.

        Raises:
            WeightsError: ``requires_finite`` is set, and an image's detections are NaN or infinite.
        """
        if self.predict_dtype is None:
            samples = super().predict(batch_inputs, batch_data_samples, rescale)
        else:
            with torch.autocast(batch_inputs.device.type, dtype=getattr(torch, self.predict_dtype)):
                samples = super().predict(batch_inputs, batch_data_samples, rescale)
        if self.requires_finite:
            for sample in samples:
                refuse_non_finite_detections(sample)
        return samples

    @record_function("encoder")
    def pre_transformer(
        self,
        mlvl_feats: Sequence[Tensor],
        batch_data_samples: Sequence[DetDataSample] | None = None,
    ) -> tuple[dict, dict]:
        """Flatten the levels, and compute positions and padding.

        Args:
            mlvl_feats: L features (B, C, h, w).
            batch_data_samples: samples with ``img_shape`` and ``batch_input_shape``, both (height,
                width); None when nothing is padded.

        Returns:
            Arguments of :meth:`forward_encoder` and, in part, of :meth:`forward_decoder`.

        Raises:
            ValueError: the neck gives another number of levels than ``num_feature_levels``.
        """
        if len(mlvl_feats) != self.num_feature_levels:
            raise ValueError(
                f"the neck gives {len(mlvl_feats)} levels, num_feature_levels is {self.num_feature_levels}"
            )
        device = mlvl_feats[0].device
        level_sizes_hw = feature_sizes_hw(mlvl_feats)
        if batch_data_samples is None:
            input_size_hw, valid_sizes_hw = (1, 1), [(1, 1)]
        else:
            input_size_hw = tuple(batch_data_samples[0].batch_input_shape[:2])
            valid_sizes_hw = [tuple(sample.img_shape[:2]) for sample in batch_data_samples]
        masks, valid_ratios = level_padding(valid_sizes_hw, input_size_hw, level_sizes_hw, device)
        positions = [
            self._level_positions(level, mask, size_hw, device)
            for level, (mask, size_hw) in enumerate(zip(masks, level_sizes_hw, strict=True))
        ]
        spatial_shapes, level_start_index = level_layout(level_sizes_hw, device)
        padded = None if masks[0] is None else torch.cat([mask.flatten(1) for mask in masks], 1)
        shared = {
            "spatial_shapes": spatial_shapes,
            "level_start_index": level_start_index,
            "valid_ratios": valid_ratios,
            "level_sizes_hw": level_sizes_hw,
        }
        encoder_inputs = dict(
            feat=torch.cat([feature.flatten(2).transpose(1, 2) for feature in mlvl_feats], 1),
            feat_mask=padded,
            feat_pos=torch.cat(positions, 1),
            **shared,
        )
        return encoder_inputs, dict(memory_mask=padded, **shared)

    def _level_positions(
        self, level: int, mask: Tensor | None, size_hw: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Sine positions plus the level's embedding, (B, h*w, C); (1, h*w, C) without padding."""
        template = None if mask is not None else torch.zeros(1, 1, *size_hw, device=device)
        positions = self.positional_encoding(mask, input=template)
        return positions.flatten(2).transpose(1, 2) + self.level_embed[level]

    @record_function("encoder")
    def forward_encoder(
        self,
        feat: Tensor,
        feat_mask: Tensor | None,
        feat_pos: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        level_sizes_hw: SizesHW | None = None,
    ) -> dict:
        """Run the encoder.

        Args:
            feat: (B, S, C) features.
            feat_mask: (B, S), True in the padding, or None.
            feat_pos: (B or 1, S, C) positions.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            valid_ratios: (B or 1, L, 2) as (x, y).
            level_sizes_hw: ``spatial_shapes`` as integers.

        Returns:
            Arguments of :meth:`pre_decoder`: ``memory`` (B, S, C), ``memory_mask``, ``spatial_shapes``.
        """
        memory = self.encoder(
            query=feat,
            query_pos=feat_pos,
            key_padding_mask=feat_mask if self.zero_padded_values else None,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
            level_sizes_hw=level_sizes_hw,
        )
        return {"memory": memory, "memory_mask": feat_mask, "spatial_shapes": spatial_shapes}

    @record_function("decoder")
    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[dict, dict]:
        """Return mmdet's queries and initial references, computed in float32 under autocast.

        Args:
            memory: (B, S, C).
            memory_mask: (B, S), True in the padding, or None; used with two stages only.
            spatial_shapes: (L, 2) as (height, width); used with two stages only.

        Returns:
            Arguments of :meth:`forward_decoder` and, in training, of the head's loss.
        """
        if self.as_two_stage:
            memory = memory.to(self.level_embed.dtype)
        with no_autocast(memory.device):
            return super().pre_decoder(memory, memory_mask, spatial_shapes)

    def get_proposal_pos_embed(
        self, proposals: Tensor, num_pos_feats: int | None = None, temperature: int = 10000
    ) -> Tensor:
        """Return the sine encoding of two-stage proposals (B, Q, 4), as wide as ``pos_trans_fc`` needs it.

        mmdet's always has 512 values, which fits a transformer of 256 channels only.
        """
        return super().get_proposal_pos_embed(proposals, num_pos_feats or self.embed_dims // 2, temperature)

    @record_function("decoder")
    def forward_decoder(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        level_sizes_hw: SizesHW | None = None,
    ) -> dict:
        """Run the decoder.

        Args:
            query: (B, Q, C).
            query_pos: (B, Q, C).
            memory: (B, S, C).
            memory_mask: (B, S), True in the padding, or None.
            reference_points: (B, Q, 2) as (cx, cy) or (B, Q, 4), 0..1 over the unpadded image.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            valid_ratios: (B or 1, L, 2) as (x, y).
            level_sizes_hw: ``spatial_shapes`` as integers.

        Returns:
            ``hidden_states`` (layers, B, Q, C) and ``references``, a list of layers + 1 tensors.
        """
        states, references = self.decoder(
            query=query,
            value=memory,
            query_pos=query_pos,
            key_padding_mask=memory_mask if self.zero_padded_values else None,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
            reg_branches=self.bbox_head.reg_branches if self.with_box_refine else None,
            level_sizes_hw=level_sizes_hw,
        )
        return {"hidden_states": states, "references": [reference_points, *references]}
