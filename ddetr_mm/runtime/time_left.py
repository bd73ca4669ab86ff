"""How long work will still take, from how long its steps have taken."""

from __future__ import annotations

import statistics

RECENT_S = 30.0
RECENT_STEPS = 40
"""The rate is that of the last :data:`RECENT_S` seconds, or of so many steps where those took longer: long
enough to be steady though images differ in size, short enough to follow a machine that gets busy."""

_SLOW_START = 3.0
_CLOSE_S = 0.2


class TimeLeft:
    """Keeps a clock over steps, and another over pauses between them (validations within a training).

    All times are in seconds on any clock that does not go back. Time in pauses counts for no step.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._paused_at: float | None = None
        self._paused_s = 0.0
        self._pauses: list[float] = []
        self._start_dropped = False

    def add(self, now: float, done: int) -> None:
        """Note that ``done`` steps are done; at most one point in 0.2 s is kept."""
        active = now - self._paused_s
        if len(self._points) > 2 and active - self._points[-2][0] < _CLOSE_S:
            self._points[-1] = (active, done)
        else:
            self._points.append((active, done))
        self._drop_slow_start()
        while len(self._points) > 2:
            time, steps = self._points[1]
            if active - time <= RECENT_S or done - steps < RECENT_STEPS:
                break
            self._points.pop(0)

    def pause(self, now: float) -> None:
        """Something else begins."""
        self._paused_at = now

    def resume(self, now: float) -> None:
        """It is over."""
        if self._paused_at is not None:
            self._pauses.append(now - self._paused_at)
            self._paused_s += now - self._paused_at
            self._paused_at = None

    def per_second(self) -> float:
        """Steps a second of work; 0 as long as it is not known."""
        if len(self._points) < 2:
            return 0.0
        (start, before), (now, done) = self._points[0], self._points[-1]
        return (done - before) / (now - start) if now > start else 0.0

    def seconds(self, steps_left: int, pauses_left: int = 0, pause_steps: float = 0.0) -> float | None:
        """The time left; None as long as it is not known.

        Args:
            steps_left: steps still to do.
            pauses_left: pauses still to come.
            pause_steps: how many steps a pause is expected to be worth, until one has been measured.
        """
        rate = self.per_second()
        if not rate:
            return None
        pause = statistics.median(self._pauses) if self._pauses else pause_steps / rate
        return steps_left / rate + pauses_left * pause

    def _drop_slow_start(self) -> None:
        """Forget the first step when it took far longer than the next ones: it warmed something up."""
        if self._start_dropped or len(self._points) < 5:
            return
        self._start_dropped = True
        pairs = zip(self._points, self._points[1:], strict=False)
        costs = [(late - early) / max(after - before, 1) for (early, before), (late, after) in pairs]
        if costs[0] > _SLOW_START * statistics.median(costs[1:]):
            self._points.pop(0)
