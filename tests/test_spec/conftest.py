"""A loader of spec text for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import ddetr_mm.spec.load
from ddetr_mm.errors import SpecError
from ddetr_mm.spec import LoadedSpec, load_spec

Load = Callable[..., LoadedSpec]


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """Where the text of a test's spec goes."""
    return tmp_path / "spec.yaml"


@pytest.fixture(autouse=True)
def taos_results_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in TAO's container, which has a folder for the results: whether there is one decides a default."""
    monkeypatch.setattr(ddetr_mm.spec.load, "TAO_RESULTS", tmp_path_factory.getbasetemp())


@pytest.fixture
def load(spec_file: Path) -> Load:
    """``load(text, overrides=(), subtask=None, **more)`` loads a spec from text."""

    def from_text(
        text: str, overrides: Sequence[str] = (), subtask: str | None = None, **more: bool
    ) -> LoadedSpec:
        spec_file.write_text(text, encoding="utf-8")
        return load_spec(spec_file, overrides, subtask, **more)

    return from_text


@pytest.fixture
def problems(load: Load) -> Callable[..., list[str]]:
    """``problems(text, …)`` is the list of messages a faulty spec is refused with; [] if it is not."""

    def of(text: str, overrides: Sequence[str] = (), subtask: str | None = None, **more: bool) -> list[str]:
        try:
            load(text, overrides, subtask, **more)
        except SpecError as error:
            return [str(problem) for problem in error.problems]
        return []

    return of
