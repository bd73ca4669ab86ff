"""The estimate of the time left, on simulated step times: within 20 % of the truth after a minute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ddetr_mm.runtime.progress_hook import validations_left
from ddetr_mm.runtime.time_left import TimeLeft

Steps = Callable[[np.random.Generator, int], np.ndarray]


def steady(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(0.5, 0.05, count).clip(0.1)


def fast(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.exponential(0.01, count) + 0.002


def scales(rng: np.random.Generator, count: int) -> np.ndarray:
    """Multi-scale training: short sides of 480 to 800 pixels, time by area."""
    return 1.5 * (rng.integers(480, 801, count) / 640) ** 2


def long_steps(rng: np.random.Generator, count: int) -> np.ndarray:
    """A large model on a CPU: five seconds a step."""
    return 5 * rng.normal(1, 0.15, count).clip(0.3)


def slow_start(rng: np.random.Generator, count: int) -> np.ndarray:
    """A first step that compiles for half a minute."""
    times = rng.normal(0.8, 0.08, count)
    times[0] = 30
    return times


def slow_workers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Every eighth step waits for the data."""
    times = rng.normal(0.3, 0.03, count)
    times[::8] += 1.5
    return times


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("steps", [steady, fast, scales, long_steps, slow_start, slow_workers])
@pytest.mark.parametrize("pause_s", [0.0, 45.0])
def test_within_a_fifth_after_a_minute(steps, seed, pause_s):
    """Pauses: a validation every tenth of the work, worth 80 steps until one has been measured."""
    rng = np.random.default_rng(seed)
    count = 2_000
    times = steps(rng, count * 10 if steps is fast else count)
    every = len(times) // 10
    pauses = list(range(every, len(times) + 1, every)) if pause_s else []
    ends = np.cumsum(times)
    total_s = ends[-1] + pause_s * len(pauses)
    clock, left, checked = 0.0, TimeLeft(), 0
    left.add(clock, 0)
    next_check = 60.0
    for done, time in enumerate(times, start=1):
        clock += time
        left.add(clock, done)
        if done in pauses:
            left.pause(clock)
            clock += pause_s
            left.resume(clock)
        if clock >= next_check and done < 0.9 * len(times):
            guess = left.seconds(
                len(times) - done, sum(at > done for at in pauses), pause_s / times.mean() * 0.6
            )
            assert guess == pytest.approx(total_s - clock, rel=0.2), f"after {clock:.0f} s"
            checked += 1
            next_check = clock + 30
    assert checked >= 3


def test_a_machine_that_gets_busy_is_followed():
    left = TimeLeft()
    clock = 0.0
    for done in range(2000):
        clock += 0.1 if done < 1000 else 0.4
        left.add(clock, done)
    assert left.seconds(1000) == pytest.approx(400, rel=0.05)


def test_nothing_is_known_at_first():
    left = TimeLeft()
    assert left.seconds(10) is None and left.per_second() == 0
    left.add(5.0, 0)
    assert left.seconds(10) is None


def test_steady_work():
    left = TimeLeft()
    for step in range(2000):
        left.add(step * 0.05, step)
    assert left.per_second() == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize(
    "epochs, interval, begin, expected",
    [(10, 1, 1, 10), (10, 3, 1, 4), (10, 5, 1, 2), (10, 2, 6, 3), (2, 5, 1, 1)],
)
def test_validations_left_are_those_that_run(make_runner, epochs, interval, begin, expected):
    from mmengine.hooks import Hook

    class Counter(Hook):
        seen, before = 0, None

        def before_train(self, runner):
            self.before = validations_left(runner)

        def after_val_epoch(self, runner, metrics=None):
            self.seen += 1

    counter = Counter()
    cfg = {"by_epoch": True, "max_epochs": epochs, "val_interval": interval, "val_begin": begin}
    make_runner([counter], batches=1, validate=True, train_cfg=cfg).train()
    assert counter.before == counter.seen == expected
