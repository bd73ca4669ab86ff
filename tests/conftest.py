"""Settings for the whole suite, and the tests that an environment cannot run."""

import gc
import os
import signal

# Before anything imports matplotlib or transformers: no display, no look at a model hub.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

from ddetr_mm.compat.mmcv_ops import has_compiled_ops

# Two busy cores: a slow example says nothing about the code. The same examples in every run.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# A long search for faults: `pytest --hypothesis-profile=many tests/test_faults -k fuzz` and the like.
settings.register_profile(
    "many",
    deadline=None,
    max_examples=1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.load_profile("suite")


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which a shell has background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with a reason, what needs mmcv's compiled ops where there are none."""
    if has_compiled_ops():
        return
    skip = pytest.mark.skip(reason="mmcv has no compiled ops here; `make test-ops` runs this")
    for item in items:
        if item.get_closest_marker("full_ops"):
            item.add_marker(skip)


@pytest.fixture
def kept_safe_globals():
    """What ``torch.load`` may build in this process, put back afterwards.

    ``torch.serialization.safe_globals`` takes away what it was given when it ends, also what had been
    allowed before it began.
    """
    import torch

    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture
def living_figures():
    """Counts matplotlib's figures in memory, with Python's own search for cycles off."""
    from matplotlib.figure import Figure

    gc.collect()
    gc.disable()
    yield lambda: sum(isinstance(thing, Figure) for thing in gc.get_objects())
    gc.enable()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium for HTML pages; skips where there is none."""
    from browser import open_browser

    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened
