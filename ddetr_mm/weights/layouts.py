"""Whose names the keys of a file are, and what precedes them: found by the longest set of expected names.

A :class:`Layout` knows the names that one implementation gives to a detector's parts or to a backbone.
:func:`find_prefixes` compares the end of every key, at each of its dots, with these names and counts what
precedes them; the prefix with the most names is where the network is. No prefix is listed anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ddetr_mm.weights import formats, gcvit
from ddetr_mm.weights.formats import FormatTable

# --- Wrappers ---


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Return each key without the names that wrapping modules add anywhere in it.

    These are ``module`` (data parallel) and every part that begins with an underscore (``_orig_mod`` of
    ``torch.compile``, ``_forward_module`` of Fabric, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``
    …): no parameter of a network is below such a name. Keys that would become equal stay as they are.
    """
    keys = list(keys)
    names = {key: _unwrapped(key) for key in keys}
    owners: dict[str, int] = {}
    for name in names.values():
        owners[name] = owners.get(name, 0) + 1
    return {key: name if owners[name] == 1 else key for key, name in names.items()}


def _unwrapped(key: str) -> str:
    *parents, leaf = key.split(".")
    return ".".join([*(part for part in parents if part != "module" and not part.startswith("_")), leaf])


# --- Layouts ---


@dataclass(frozen=True)
class Layout:
    """The names of one implementation.

    Attributes:
        name: in messages.
        usual_name: an expected name → the usual one (see the constants below), None for any other name.
        table: the format's table, for layouts of whole detectors.
    """

    name: str
    usual_name: Callable[[str], str | None]
    table: FormatTable | None = None


def _patterns(table: FormatTable) -> list[str]:
    """Return the regular expressions of a table's names, without those that fit any name."""
    templates: list[str] = []
    for rule in table.rules:
        templates += [rule.theirs] if isinstance(rule.theirs, str) else rule.theirs
    templates += [spelling for spelling, _usual in table.alternatives]
    return [formats.pattern_of(template) for template in templates if "{rest}" not in template]


def _aliases(table: FormatTable) -> list[str]:
    return [formats.pattern_of(rule.alias) for rule in table.aliases]


_NUMBERED = re.compile(r"\(\?P<\w+>")


def _recogniser(patterns: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function that returns a name which fits any of the patterns, else None."""
    # Named groups may occur once only in an expression.
    union = re.compile("|".join(f"(?:{_NUMBERED.sub('(?:', pattern)})" for pattern in patterns))
    return lambda name: name if union.fullmatch(name) else None


def _detector_layouts() -> tuple[Layout, ...]:
    joined = r"(?:in_proj_(?:weight|bias)|out_proj\.(?:weight|bias))"
    ours = [rule.ours for rule in formats.OFFICIAL.rules if "{rest}" not in rule.ours]
    canonical = [formats.pattern_of(template) for template in ours]
    canonical.append(r"decoder\.layers\.\d+\.self_attn\.attn\." + joined)
    official = [
        *_patterns(formats.OFFICIAL),
        *_aliases(formats.OFFICIAL),
        r"transformer\.decoder\.layers\.\d+\.self_attn\." + joined,
    ]
    hf = [*_patterns(formats.HF), *_aliases(formats.HF)]
    headless = [pattern.removeprefix(r"model\.") for pattern in hf if pattern.startswith(r"model\.")]
    mmdet_2 = [*_patterns(formats.MMDET_2), *_aliases(formats.MMDET_2)]
    mmdet_2 += [
        r"bbox_head\.transformer\.(?:encoder|decoder)\.layers\.\d+\."
        r"(?:attentions\.[01]|ffns\.0|norms\.[012])\..+",
        r"bbox_head\.(?:cls|reg)_branches\..+",
    ]
    bare = _recogniser(headless)
    return (
        Layout("the original authors' names", _recogniser(official), formats.OFFICIAL),
        Layout("Hugging Face's names", _recogniser(hf), formats.HF),
        Layout(
            "Hugging Face's names without heads",
            lambda name: f"model.{name}" if bare(name) else None,
            formats.HF,
        ),
        Layout("mmdet's names", _recogniser(canonical), formats.MMDET),
        Layout("mmdet 2's names", _recogniser(mmdet_2), formats.MMDET_2),
    )


DETECTORS = _detector_layouts()
"""Layouts of detectors; the usual name is that of the layout's table (TAO's without its prefixes)."""

TRANSFORMER = re.compile(
    r"(?:transformer|bbox_head\.transformer|model\.encoder|model\.decoder|encoder|decoder)\..+"
)
"""Usual names inside a detector's transformer, whatever the layout."""


# --- Backbones ---

_RESNET = re.compile(
    r"conv1\.weight|bn1\.\w+|layer[1-4]\.\d+\.(?:conv[123]\.weight|bn[123]\.\w+|downsample\.[01]\.\w+)"
)


def _resnet(name: str) -> str | None:
    return name if _RESNET.fullmatch(name) else None


_NORM_LEAF = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_Rules = tuple[tuple[str, str | Callable[["re.Match[str]"], str]], ...]

_HF_RESNET: _Rules = (
    (r"embedder\.embedder\.convolution\.weight", "conv1.weight"),
    (rf"embedder\.embedder\.normalization\.{_NORM_LEAF}", r"bn1.\1"),
    (
        r"encoder\.stages\.([0-3])\.layers\.(\d+)\.shortcut\.convolution\.weight",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0.weight",
    ),
    (
        rf"encoder\.stages\.([0-3])\.layers\.(\d+)\.shortcut\.normalization\.{_NORM_LEAF}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1.{m[3]}",
    ),
    (
        r"encoder\.stages\.([0-3])\.layers\.(\d+)\.layer\.([0-2])\.convolution\.weight",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}.weight",
    ),
    (
        rf"encoder\.stages\.([0-3])\.layers\.(\d+)\.layer\.([0-2])\.normalization\.{_NORM_LEAF}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}.{m[4]}",
    ),
)
_DETECTRON2_RESNET: _Rules = (
    (r"stem\.conv1\.weight", "conv1.weight"),
    (rf"stem\.conv1\.norm\.{_NORM_LEAF}", r"bn1.\1"),
    (
        r"res([2-5])\.(\d+)\.shortcut\.weight",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.0.weight",
    ),
    (
        rf"res([2-5])\.(\d+)\.shortcut\.norm\.{_NORM_LEAF}",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.1.{m[3]}",
    ),
    (
        r"res([2-5])\.(\d+)\.conv([123])\.weight",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}.weight",
    ),
    (
        rf"res([2-5])\.(\d+)\.conv([123])\.norm\.{_NORM_LEAF}",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.{m[4]}",
    ),
)
# The children of torchvision's ResNet in an nn.Sequential: 0 conv1, 1 bn1, 2 ReLU, 3 pooling, 4 to 7 stages.
_SEQUENTIAL_RESNET: _Rules = (
    (r"0\.weight", "conv1.weight"),
    (rf"1\.{_NORM_LEAF}", r"bn1.\1"),
    (
        r"([4-7])\.(\d+)\.(conv[123]\.weight|bn[123]\.\w+|downsample\.[01]\.\w+)",
        lambda m: f"layer{int(m[1]) - 3}.{m[2]}.{m[3]}",
    ),
)
_PAPER_GCVIT = re.compile(r"patch_embed\..+|levels\.[0-3]\..+|norm\d?\.(?:weight|bias)")
_TIMM_GCVIT = re.compile(
    r"stem\.(?:conv1|down)\..+|stages\.[0-3]\.(?:blocks|downsample|global_block|norm)\..+"
)


def _by_rules(rules: _Rules) -> Callable[[str], str | None]:
    compiled = [(re.compile(pattern), target) for pattern, target in rules]

    def usual_name(name: str) -> str | None:
        for pattern, target in compiled:
            match = pattern.fullmatch(name)
            if match is not None:
                return target(match) if callable(target) else match.expand(target)
        return None

    return usual_name


RESNETS = (
    Layout("torchvision's", _resnet),
    Layout("Hugging Face's", _by_rules(_HF_RESNET)),
    Layout("Detectron2's", _by_rules(_DETECTRON2_RESNET)),
    Layout("nn.Sequential's", _by_rules(_SEQUENTIAL_RESNET)),
)
"""Layouts of a ResNet; the usual names are torchvision's, which mmdet and timm share."""

GCVITS = (
    Layout("the paper's", lambda name: name if _PAPER_GCVIT.fullmatch(name) else None),
    Layout("timm's", lambda name: gcvit.timm_to_paper(name) if _TIMM_GCVIT.fullmatch(name) else None),
)
"""Layouts of a GCViT; the usual names are the paper's."""

BACKBONES = RESNETS + GCVITS

# A key that every network of the layout has below its prefix; the rest may be any module's.
_ANCHORS = ("layer1.0.conv1.weight", "levels.0.blocks.0.attn.qkv.weight")


# --- Prefixes ---


@dataclass
class Found:
    """A network among the keys of a dictionary.

    Attributes:
        layout: whose names it has.
        prefix: what precedes them, without wrappers, with its last dot; may be empty.
        names: usual name → key of the dictionary.
    """

    layout: Layout
    prefix: str
    names: dict[str, str] = field(default_factory=dict)


def find_prefixes(keys: Mapping[str, str], layouts: Iterable[Layout]) -> list[Found]:
    """Find the networks of some layouts below any prefix.

    Args:
        keys: key of the dictionary → the same without wrappers.
        layouts: the ones to try.

    Returns:
        One for each layout and prefix with any expected name, those with most names first.
    """
    found: dict[tuple[int, str], Found] = {}
    choices = list(enumerate(layouts))
    for key, bare in keys.items():
        for start in _starts(bare):
            name = bare[start:]
            for number, layout in choices:
                usual = layout.usual_name(name)
                if usual is not None:
                    place = found.setdefault((number, bare[:start]), Found(layout, bare[:start]))
                    place.names.setdefault(usual, key)
    return sorted(found.values(), key=lambda one: -len(one.names))


def _starts(key: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"\.", key))]


def find_backbones(keys: Mapping[str, str]) -> list[Found]:
    """Find every ResNet and GCViT of a known layout.

    Args:
        keys: as :func:`find_prefixes`.

    Returns:
        The largest first.
    """
    candidates = find_prefixes(keys, BACKBONES)
    return [found for found in candidates if any(anchor in found.names for anchor in _ANCHORS)]


def module_layout(own_keys: Collection[str]) -> tuple[Layout, ...]:
    """Return the layouts that files of a backbone may have.

    Args:
        own_keys: the backbone's own; files of any backbone may have these names, those of a ResNet or GCViT
            other ones too.
    """
    own = frozenset(own_keys)

    def known(layout: Layout) -> Layout:
        def usual_name(name: str) -> str | None:
            usual = layout.usual_name(name)
            return usual if usual is not None and (usual in own or _is_final_norm(usual, own)) else None

        return Layout(layout.name, usual_name)

    same = Layout("the backbone's own", lambda name: name if name in own else None)
    if gcvit.is_gcvit(own):
        return (same, *(known(layout) for layout in GCVITS))
    if "layer1.0.conv1.weight" in own and "conv1.weight" in own:
        return (same, *(known(layout) for layout in RESNETS[1:]))
    return (same,)


def usual_backbone_name(layout: Layout, name: str) -> str | None:
    """Return the usual name of any key of a backbone, also one that the model does not have.

    Args:
        layout: of :func:`module_layout`.
        name: without the prefix.
    """
    known = next((one for one in BACKBONES if one.name == layout.name), None)
    return known.usual_name(name) if known is not None else None


def _is_final_norm(name: str, own: frozenset[str]) -> bool:
    """Whether a name is that of a classifier's final norm, which may become the norm of the last stage."""
    return name in ("norm.weight", "norm.bias") and "norm3.weight" in own
