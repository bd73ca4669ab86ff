"""Names of the reference's modules in the words of the mmdet detector."""

from __future__ import annotations

from collections.abc import Iterable

OUR_MODULE_NAMES: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone",),
    "backbone.0": ("backbone",),
    "backbone.0.body": ("backbone",),
    "input_proj": ("neck",),
    "transformer": ("encoder", "decoder", "level_embed", "reference_points_fc"),
    "transformer.encoder": ("encoder",),
    "transformer.decoder": ("decoder",),
    "transformer.level_embed": ("level_embed",),
    "transformer.reference_points": ("reference_points_fc",),
    "query_embed": ("query_embedding",),
    "class_embed": ("bbox_head.cls_branches",),
    "bbox_embed": ("bbox_head.reg_branches",),
}
"""Module of the reference → modules or parameters of the mmdet detector."""


def our_module_names(names: Iterable[str]) -> list[str]:
    """The detector's names for the reference's; deeper paths keep their rest, unknown names stay as they are.

    ``model.`` and ``model.model.`` in front, as in the reference's checkpoints, are accepted.
    """
    found: list[str] = []
    for name in names:
        plain = name
        while plain.startswith("model."):
            plain = plain.removeprefix("model.")
        found += _translated(plain)
    return list(dict.fromkeys(found))


def _translated(name: str) -> list[str]:
    prefix = name
    while prefix:
        if prefix in OUR_MODULE_NAMES:
            return [ours + name[len(prefix) :] for ours in OUR_MODULE_NAMES[prefix]]
        prefix = prefix.rpartition(".")[0]
    return [name]
