"""Names of classes in free configurations."""

from __future__ import annotations

import pytest

from ddetr_mm.spec.type_names import unfit_type_names


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"type": "ResNet", "depth": 18, "norm_cfg": {"type": "BN"}},
        {"type": "mmpretrain.ConvNeXt", "_scope_": "mmpretrain"},
        {"type": "ResNet", "plugins": [{"cfg": {"type": "ContextBlock"}}]},
    ],
)
def test_names_of_registered_classes_pass(config):
    assert list(unfit_type_names(config)) == []


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"type": "os.system"}, ".type"),
        ({"type": "builtins.eval"}, ".type"),
        ({"type": "mmdet.registry.MODELS.build"}, ".type"),
        ({"type": ["ResNet"]}, ".type"),
        ({"type": ""}, ".type"),
        ({"type": "ResNet", "norm_cfg": {"type": "os.system"}}, ".norm_cfg.type"),
        ({"type": "ResNet", "plugins": [{"cfg": {"type": "a.b"}}]}, ".plugins[0].cfg.type"),
        ({"type": "ResNet", "_scope_": "os"}, "._scope_"),
    ],
)
def test_paths_to_any_object_are_found(config, place):
    assert [found for found, _ in unfit_type_names(config)] == [place]
