"""No test of this folder writes into the user's cache folder."""

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DDETR_MM_CACHE", str(folder))
    return folder / "annotations"
