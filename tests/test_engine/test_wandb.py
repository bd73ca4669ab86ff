"""Weights & Biases: a real offline run where the package is there, one line where it is not."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.visualization import Visualizer

import ddetr_mm.register  # noqa: F401 - registers the backend
from ddetr_mm.engine import wandb
from ddetr_mm.engine.detections import picture_backends
from ddetr_mm.engine.wandb import WandbBackend, has_login, without_secrets

HAS_PACKAGE = importlib.util.find_spec("wandb") is not None
SETTINGS = dict(
    project="cells",
    entity="lab",
    group="nightly",
    tags=["training", "tao-toolkit"],
    run_name="first try",
    run_id="abc123",
    reinit=True,
    sync_tensorboard=False,
    save_code=False,
)


class Recorder(types.ModuleType):
    """The package's names that the backend uses, recording the arguments of each call."""

    class Error(Exception):
        """The package's base error."""

    def __init__(self, mode: str = "offline", api_key: str | None = None, refuses: bool = False) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.calls: list[tuple[str, Any]] = []
        self.refuses = refuses
        self.settings = types.SimpleNamespace(
            mode=mode, api_key=api_key, base_url="https://api.wandb.example"
        )
        self.config = types.SimpleNamespace(
            update=lambda values, allow_val_change: self.calls.append(("config", values))
        )

    def setup(self) -> Any:
        return self

    def init(self, **arguments: Any) -> Any:
        if self.refuses:
            raise self.Error("no such project")
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))

    def Image(self, picture: np.ndarray) -> tuple[int, ...]:
        return picture.shape

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def recorder(monkeypatch):
    """Replaces the package by a recorder."""

    def put(**options: Any) -> Recorder:
        module = Recorder(**options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def use(backend: WandbBackend) -> None:
    """What a run does with it."""
    backend.add_config(Config(dict(lr=0.1, encryption_key="hush")))
    backend.add_scalars(dict(loss=2.0), step=3)
    backend.add_scalar("mAP", 0.5, step=4)
    backend.add_image("picture", np.zeros((4, 6, 3), np.uint8), step=4)
    backend.close()


def test_every_setting_opens_the_run(recorder, tmp_path: Path):
    package = recorder()
    use(WandbBackend(str(tmp_path), **SETTINGS))
    assert package.calls[0] == (
        "init",
        dict(
            project="cells",
            entity="lab",
            group="nightly",
            tags=["training", "tao-toolkit"],
            name="first try",
            id="abc123",
            resume="allow",
            reinit=True,
            sync_tensorboard=False,
            save_code=False,
            dir=str(tmp_path),
        ),
    )
    assert package.calls[1:] == [
        ("define_metric", ("*", "step")),
        ("config", dict(lr=0.1, encryption_key="(hidden)")),
        ("log", dict(loss=2.0, step=3)),
        ("log", dict(mAP=0.5, step=4)),
        ("log", dict(picture=(4, 6, 3), step=4)),
        ("finish", None),
    ]


def test_a_visualizer_knows_it_by_its_type_and_leaves_the_name_to_the_run(recorder, tmp_path: Path):
    package = recorder()
    config = dict(type="mmdet.WandbBackend", project="cells", run_name="first try")
    visualizer = Visualizer(vis_backends=[config], save_dir=str(tmp_path))
    (backend,) = picture_backends(visualizer)  # gets the pictures of validation
    backend.add_image("picture", np.zeros((4, 6, 3), np.uint8), step=4)
    assert package.calls[0][1]["name"] == "first try"
    assert package.calls[-1] == ("log", dict(picture=(4, 6, 3), step=4))


def test_scalars_are_not_sent_twice_with_tensorboard(recorder, tmp_path: Path):
    package = recorder()
    use(WandbBackend(str(tmp_path), **SETTINGS | dict(sync_tensorboard=True)))
    assert [values for name, values in package.calls if name == "log"] == [dict(picture=(4, 6, 3), step=4)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (None, "the package wandb is not installed"),
        (dict(mode="online"), "no account is set up"),
        (dict(refuses=True), "no such project"),
    ],
)
def test_a_run_continues_without_it_and_one_line_says_so(
    recorder, monkeypatch, tmp_path, caplog, options, words
):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    package = None
    if options is None:
        monkeypatch.setattr(wandb, "PACKAGE", "a_package_that_does_not_exist")
    else:
        package = recorder(**options)
    lines: list[str] = []
    monkeypatch.setattr(wandb, "print_log", lambda text, *_: lines.append(text))
    use(WandbBackend(str(tmp_path), **SETTINGS))
    assert len(lines) == 1 and words in lines[0]
    assert package is None or package.calls == []


def test_nothing_is_said_where_nobody_asked_for_it(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(wandb, "PACKAGE", "a_package_that_does_not_exist")
    lines: list[str] = []
    monkeypatch.setattr(wandb, "print_log", lambda text, *_: lines.append(text))
    use(WandbBackend(str(tmp_path), **SETTINGS, announce=False))
    assert lines == []


def test_a_login_is_found_in_the_netrc_file(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_login("https://api.wandb.example")
    (tmp_path / "netrc").write_text("machine api.wandb.example login user password " + 40 * "0" + "\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_login("https://api.wandb.example")
    assert not has_login("https://elsewhere.example")


def test_secrets_are_hidden_at_any_depth():
    assert without_secrets(dict(a=[dict(encryption_key="x", b=1)], encryption_key=None)) == dict(
        a=[dict(encryption_key="(hidden)", b=1)], encryption_key=None
    )


@pytest.mark.skipif(not HAS_PACKAGE, reason="the package wandb is not installed")
def test_the_package_knows_every_argument():
    import wandb

    known = inspect.signature(wandb.init).parameters
    assert set(WandbBackend("x").init_arguments) <= set(known)


@pytest.mark.skipif(not HAS_PACKAGE, reason="the package wandb is not installed")
def test_an_offline_run_is_left_in_the_results(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    backend = WandbBackend(str(tmp_path), **SETTINGS)
    run = backend.experiment.run
    assert (run.project, run.name, run.id, run.group) == ("cells", "first try", "abc123", "nightly")
    assert set(run.tags) == {"training", "tao-toolkit"}
    backend.add_config(Config(dict(lr=0.1, encryption_key="hush")))
    assert dict(run.config) == dict(lr=0.1, encryption_key="(hidden)")
    backend.add_scalars(dict(loss=2.0), step=3)
    backend.add_image("picture", np.zeros((4, 6, 3), np.uint8), step=3)
    assert run.summary["loss"] == 2.0 and run.summary["step"] == 3
    backend.close()
    (record,) = tmp_path.rglob("run-abc123.wandb")
    assert record.stat().st_size > 0
    assert len(list(tmp_path.rglob("*.png"))) == 1
