"""The study: Optuna's storage, sampler and pruner, and the loop that starts, continues and ends trials.

Optuna keeps the trials; who runs one shows in a lock on its folder, which ends with the process. The same
command therefore continues what a killed one has left, and several machines share one storage: see
:meth:`Study.run`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ddetr_mm.automl.space import SearchSpace, shown
from ddetr_mm.automl.trials import (
    History,
    failure_of,
    kind_of,
    read_history,
    remove_checkpoints,
    start_process,
    trial_spec,
    values_line,
    write_spec,
)
from ddetr_mm.compat.versions import require
from ddetr_mm.errors import DataError, Problem, RunError, StackError, printable
from ddetr_mm.outputs import only_writer
from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.spec.describe import to_plain

STORAGE_NAME = "study.db"
FIRST_FAILURES = 3
"""The study stops when so many first trials fail for one reason."""
POLL_S = 0.3
BEAT_S = 30.0
SILENT_S = 900.0
"""A trial whose owner on another machine has not shown itself for so long counts as failed."""
UNCLAIMED_S = 60.0
MIN_EPOCHS = 1
"""Epochs of the first rung."""

_SETTINGS_THAT_MAY_CHANGE = ("max_trials", "timeout_hours", "concurrent", "keep_checkpoints", "storage")


# --- Optuna's parts ---


def require_optuna() -> Any:
    """Import Optuna, quiet but for warnings.

    Raises:
        StackError: it is not installed.
    """
    hint = "install it: `pip install ddetr_mm[automl]`, or `pip install 'optuna>=5'`"
    optuna = require("optuna", "automl", hint=hint)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def rungs(algorithm: str, max_epochs: int, factor: int) -> list[int]:
    """Numbers of epochs after which a trial is compared with others; the last is ``max_epochs``."""
    found = []
    if algorithm in ("hyperband", "bohb", "asha"):
        epochs = MIN_EPOCHS
        while epochs < max_epochs:
            found.append(epochs)
            epochs *= factor
    return [*found, max_epochs]


def make_pruner(algorithm: str, max_epochs: int, factor: int) -> Any:
    """Optuna's pruner of an algorithm."""
    from optuna import pruners

    if algorithm in ("hyperband", "bohb"):
        return pruners.HyperbandPruner(MIN_EPOCHS, max_epochs, factor)
    if algorithm == "asha":
        return pruners.SuccessiveHalvingPruner(MIN_EPOCHS, factor)
    return pruners.NopPruner()


def make_sampler(algorithm: str, space: SearchSpace, seed: int) -> Any:
    """Optuna's sampler of an algorithm."""
    from optuna import samplers

    if algorithm in ("bayesian", "bohb"):
        return samplers.TPESampler(seed=seed, n_startup_trials=min(10, 3 + len(space.parameters)))
    if algorithm == "grid":
        return samplers.GridSampler({path: one.grid() for path, one in space.parameters.items()}, seed=seed)
    return samplers.RandomSampler(seed=seed)


def default_url(folder: Path) -> str:
    """The URL of the SQLite file of a study."""
    from sqlalchemy.engine import URL

    url = URL.create("sqlite", database=str(folder / STORAGE_NAME)).render_as_string(hide_password=False)
    return url.replace("{", "{{").replace("}", "}}")  # Optuna fills in fields


def masked(url: str) -> str:
    """A storage URL without its password, for messages."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    user, colon, _ = login.partition(":")
    rest = f"{user}{':***' if colon else ''}{at}{place}"
    base, question, _ = rest.partition("?")  # options may have one, too
    return f"{scheme}{separator}{base}{'?…' if question else ''}"


def open_storage(url: str | None, folder: Path) -> Any:
    """Open Optuna's storage.

    Args:
        url: as the spec has it; None: ``study.db`` in the folder.
        folder: the study's.

    Raises:
        StackError: a package that the URL needs is missing.
        DataError: it cannot be opened.
    """
    optuna = require_optuna()
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(_ATTEMPTS):
        try:
            if url is None:
                options = {"connect_args": {"timeout": 60}}
                return optuna.storages.RDBStorage(default_url(folder), engine_kwargs=options)
            return optuna.storages.get_storage(url)
        except ImportError as error:
            what = "needs a package that is not installed"
            hint = f"install it: {without_password(str(error), url)}"
            raise StackError(Problem(what, where=_STORAGE, value=masked(url or ""), hint=hint)) from None
        except (SQLAlchemyError, ValueError, OSError, AssertionError, KeyError, RuntimeError) as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Another process makes the tables at the same moment.
            if attempt + 1 < _ATTEMPTS and re.search(_MADE_BY_ANOTHER, words):
                time.sleep(1 + attempt)
                continue
            place = masked(url) if url else str(folder / STORAGE_NAME)
            hint = without_password(words, url)
            raise DataError(Problem("cannot be opened", where=_STORAGE, value=place, hint=hint)) from None
    raise AssertionError("the last attempt returns or raises")


_ATTEMPTS = 5
_MADE_BY_ANOTHER = "already exists|duplicate|locked|UNIQUE constraint|no such table"
_STORAGE = "ddetr_mm.automl.storage"


def without_password(text: str, url: str | None) -> str:
    """Text without the password, and the options, of a URL."""
    login = (url or "").partition("://")[2].rpartition("@")[0]
    secrets = [login.partition(":")[2], (url or "").partition("?")[2]]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text.replace(url, masked(url)) if url else text


# --- The study ---


def study_settings(spec: ExperimentSpec) -> dict[str, Any]:
    """Everything of a spec that decides what a trial reaches: path → value.

    All machines of a study, and all its starts, must agree on it.
    """
    plain = to_plain(spec)
    kept = {name: plain[name] for name in ("model", "dataset", "train", "ddetr_mm")}
    for name in _SETTINGS_THAT_MAY_CHANGE:
        del kept["ddetr_mm"]["automl"][name]
    for section, names in {
        "dataset": ("workers", "pin_memory", "test_data_sources", "infer_data_sources"),
        "train": ("gpu_ids", "num_gpus", "results_dir", "num_epochs", "resume_training_checkpoint_path"),
        "ddetr_mm": ("device", "max_hours", "stop_after_epoch", "log_interval", "quick_check"),
    }.items():
        for name in names:
            del kept[section][name]
    return dict(_flat(kept, ""))


def _flat(part: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in part.items():
        nested = isinstance(value, dict) and value
        found += _flat(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return found


@dataclass
class Running:
    """A trial that this process runs.

    Attributes:
        trial: Optuna's.
        folder: its folder.
        slot: which of the concurrent trials it is, from 0.
        stack: holds the lock on the folder.
        target: number of epochs after which its process ends.
        process: None until an earlier one has let go of the folder.
        begun: when it was started or taken over here.
        history: as read last.
    """

    trial: Any
    folder: Path
    slot: int
    stack: ExitStack
    target: int
    process: subprocess.Popen[bytes] | None = None
    begun: float = field(default_factory=time.monotonic)
    history: History = field(default_factory=History)

    @property
    def number(self) -> int:
        """Its number in the study."""
        return int(self.trial.number)

    @property
    def results(self) -> Path:
        """Where its training run writes."""
        return self.folder / "train"


class Study:
    """One process of a study.

    Args:
        spec: the user's.
        space: what is searched.
        folder: ``results_dir/automl``.
        goal: ``max`` or ``min``.
        gpus: GPUs of each concurrent trial; None: the CPU, or whatever there is.
        report: called with a line for every event.
        changed: called after every trial that ends.

    Raises:
        DataError: the storage has another study of this name.
    """

    def __init__(
        self,
        spec: ExperimentSpec,
        space: SearchSpace,
        folder: Path,
        *,
        goal: str,
        gpus: list[list[int]] | None = None,
        report: Callable[[str], None] = print,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec, self.space, self.folder, self.goal = spec, space, folder, goal
        self.direction = {"max": "maximize", "min": "minimize"}[goal]
        self.better: Callable[..., float] = {"max": max, "min": min}[goal]
        self.settings = spec.ddetr_mm.automl
        self.gpus = gpus
        self.report, self.changed = report, changed
        self.running: list[Running] = []
        self.host = socket.gethostname()
        self.stopping = False
        self.begun = time.monotonic()
        self._beaten = 0.0
        self._searched_orphans = 0.0
        self.rungs = rungs(self.settings.algorithm, self.settings.max_epochs, self.settings.reduction_factor)
        self.distributions = {path: one.distribution() for path, one in space.parameters.items()}
        self._open()

    # --- opening ---

    def _open(self) -> None:
        import optuna

        storage = open_storage(self.settings.storage, self.folder)
        name = f"ddetr_mm {self.spec.results_dir}"
        options = {
            "storage": storage,
            "direction": self.direction,
            "pruner": make_pruner(
                self.settings.algorithm, self.settings.max_epochs, self.settings.reduction_factor
            ),
        }
        self.salt = 0
        settings = study_settings(self.spec)
        try:
            self.study = optuna.create_study(study_name=name, **options)
        except optuna.exceptions.DuplicatedStudyError:
            self.study = optuna.create_study(study_name=name, load_if_exists=True, **options)
            self.salt = int.from_bytes(os.urandom(3), "big")  # machines that start at once draw differently
            self._require_same(settings)
        else:
            self.study.set_user_attr("settings", settings)
            if self.settings.algorithm != "grid":
                self.study.enqueue_trial(
                    {path: one.nearest_own() for path, one in self.space.parameters.items()},
                    user_attrs={"own": True},
                )

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + 10
        known = self.study.user_attrs.get("settings")
        while known is None and time.monotonic() < deadline:  # another machine has just created it
            time.sleep(0.2)
            known = self.study.user_attrs.get("settings")
        if known is None:
            self.study.set_user_attr("settings", dict(settings))
            return
        changed = [path for path in sorted({*known, *settings}) if known.get(path) != settings.get(path)]
        if changed:
            lines = [
                f"{path}: {shown(known.get(path))} → {shown(settings.get(path))}" for path in changed[:5]
            ]
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            what = f"has a study of another spec ({'; '.join(lines)}{more})"
            hint = "choose another results_dir, or use the spec that it was started with"
            raise DataError(Problem(what, file=self.folder, hint=hint))

    # --- what there is ---

    def trials(self) -> list[Any]:
        """All trials of the study, as Optuna has them."""
        return [one for one in self.study.get_trials(deepcopy=False) if not one.user_attrs.get("surplus")]

    def started(self) -> list[Any]:
        """The trials that have begun, in order."""
        return [one for one in self.trials() if one.state.name != "WAITING"]

    def values_of(self, trial: Any) -> dict[str, Any]:
        """The values of the searched fields that a trial is trained with."""
        return self.space.own() if trial.user_attrs.get("own") else self.space.values(trial.params)

    def best(self) -> Any | None:
        """The best trial that was trained to its end; None where there is none."""
        ended = [one for one in self.trials() if one.state.name == "COMPLETE" and one.value is not None]
        sign = 1 if self.goal == "max" else -1
        return max(ended, key=lambda one: (sign * one.value, -one.number), default=None)

    # --- the loop ---

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Run trials until there are enough, or the time is over.

        A trial that a process has left is continued by whichever process finds its folder here and not
        locked. A process that ends one of its trials removes the checkpoints that have lost.

        Args:
            tick: called several times a second.

        Raises:
            RunError: the first trials failed for one reason, or all did.
            KeyboardInterrupt: it was interrupted; running trials have stopped, each with a checkpoint.
        """
        try:
            self._clean_up()
            while True:
                self._look_after_processes()
                self._beat()
                if self._time_is_over() and not self.stopping:
                    self.report("The time is over: running trials stop, the same command continues them.")
                    self._stop_processes()
                if not self.stopping:
                    self._fill_slots()
                if not self.running and (self.stopping or not self._may_start()):
                    break
                tick()
                time.sleep(POLL_S)
        except BaseException:
            self._stop_processes()
            while self.running:
                self._look_after_processes()
                time.sleep(POLL_S)
            raise
        ended = [one for one in self.trials() if one.state.is_finished()]
        if ended and all(one.state.name == "FAIL" for one in ended) and not self._others_run():
            raise RunError(_failures("all trials failed", ended))

    def _time_is_over(self) -> bool:
        hours = self.settings.timeout_hours
        return hours is not None and time.monotonic() - self.begun > 3600 * hours

    def _others_run(self) -> bool:
        return any(not one.state.is_finished() for one in self.trials())

    def _may_start(self) -> bool:
        """Whether trials are missing, or waiting to be continued here."""
        started = self.started()
        if len(started) < self.wanted():
            return True
        return any(one.state.name == "RUNNING" and self._is_here(one) for one in started)

    def wanted(self) -> int:
        """How many trials the study is to have."""
        if self.settings.algorithm == "grid":
            return min(self.settings.max_trials, self.space.grid_size())
        return self.settings.max_trials

    def _is_here(self, trial: Any) -> bool:
        owner = trial.user_attrs.get("owner")
        return owner is not None and owner["host"] == self.host and owner["folder"] == self._place(trial)

    def _place(self, trial: Any) -> str:
        return os.path.realpath(self.folder / trial_name(trial.number))

    def _fill_slots(self) -> None:
        while len(self.running) < self.settings.concurrent:
            self._require_some_success()
            taken = {one.slot for one in self.running}
            slot = next(slot for slot in range(self.settings.concurrent) if slot not in taken)
            if not self._adopt(slot) and not self._start_new(slot):
                return

    def _require_some_success(self) -> None:
        first = [one for one in self.trials() if one.state.is_finished()][:FIRST_FAILURES]
        failed = [one for one in first if one.state.name == "FAIL"]
        kinds = {kind_of(one.user_attrs.get("reason", "")) for one in failed}
        if len(failed) == FIRST_FAILURES and len(kinds) == 1:
            raise RunError(_failures(f"the first {FIRST_FAILURES} trials failed for one reason", failed))

    def _start_new(self, slot: int) -> bool:
        started = self.started()
        if len(started) >= self.wanted():
            return False
        seed = (self.spec.train.seed * 1009 + len(started) * 7919 + self.salt) % 2**32
        if self.settings.algorithm == "grid":
            seed = 0  # its order, which all processes have to share
        self.study.sampler = make_sampler(self.settings.algorithm, self.space, seed)
        trial = self.study.ask(fixed_distributions=self.distributions)
        before = [one for one in self.started() if one.number < trial.number]
        if len(before) >= self.wanted():  # another machine was quicker
            trial.set_user_attr("surplus", True)
            self._tell(trial, "FAIL")
            return False
        self._take(trial, slot)
        return True

    def _adopt(self, slot: int) -> bool:
        """Continue a trial that a process has left; looked for every few seconds."""
        if self._searched_orphans and time.monotonic() - self._searched_orphans < 5:
            return False
        self._searched_orphans = time.monotonic()
        import optuna

        mine = {one.number for one in self.running}
        for one in self.trials():
            if one.state.name != "RUNNING" or one.number in mine or not self._is_left(one):
                continue
            if self._take(optuna.Trial(self.study, one._trial_id), slot, adopted=True):
                self._searched_orphans = 0.0
                return True
        return False

    def _is_left(self, trial: Any) -> bool:
        """Whether a trial may have no running process; one whose machine is silent counts as failed."""
        owner, now = trial.user_attrs.get("owner"), time.time()
        if owner is None:  # its process ended, or is about to say that it is its
            age = now - trial.datetime_start.timestamp()
            return self.settings.storage is None or age > UNCLAIMED_S
        if self._is_here(trial):
            return True
        silent = now - float(trial.user_attrs.get("beat", owner["since"]))
        if owner["folder"] == self._place(trial) and Path(owner["folder"]).is_dir():  # a shared disk
            return silent > 4 * BEAT_S
        if silent > SILENT_S:
            self._end(trial, "FAIL", f"its machine, {owner['host']}, has not shown itself for 15 minutes")
        return False

    def _take(self, trial: Any, slot: int, adopted: bool = False) -> bool:
        """Lock a trial's folder, write its spec where it is missing and let it train; False where locked."""
        folder = self.folder / trial_name(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        stack = ExitStack()
        try:
            stack.enter_context(only_writer(folder, "ddetr-mm automl"))
        except DataError:
            return False
        owner = {"host": self.host, "folder": os.path.realpath(folder), "since": time.time()}
        trial.set_user_attr("owner", owner)
        for path, distribution in self.distributions.items():  # a killed process may not have drawn all
            trial._suggest(path, distribution)
        values = self.values_of(trial)
        trial.set_user_attr("values", values)
        heading = f"Trial {trial.number:03d} of ddetr-mm automl: {values_line(values)}"
        try:
            write_spec(
                folder, trial_spec(self.spec, values, folder, heading=printable(heading), goal=self.goal)
            )
        except ValueError as error:  # values that do not go together
            stack.close()
            self._end(trial, "FAIL", " ".join(str(error).split())[:400])
            return True
        run = Running(trial, folder, slot, stack, self._next_rung(read_history(folder / "train/status.json")))
        self.running.append(run)
        verb = "continues" if adopted else "starts"
        own = " (the spec's own values)" if trial.user_attrs.get("own") else ""
        self.report(f"trial {trial.number:03d} {verb}{own}: {values_line(values)}")
        self._start_process(run)
        return True

    def _next_rung(self, history: History) -> int:
        """The rung that a trial with this history trains to."""
        done = min(max(history.metrics, default=0), history.epochs)
        return next((rung for rung in self.rungs if rung > done), self.rungs[-1])

    # --- processes ---

    def _start_process(self, run: Running) -> None:
        """Start the training run, unless an earlier process still holds its folder."""
        if run.results.is_dir():
            try:
                with only_writer(run.results, "ddetr-mm automl"):
                    pass
            except DataError:
                return
        gpus = None if self.gpus is None else self.gpus[run.slot]
        run.process = start_process(
            run.folder, stop_after=run.target, gpu_ids=gpus, key=self.spec.encryption_key
        )

    def _look_after_processes(self) -> None:
        for run in list(self.running):
            if run.process is None:
                if self.stopping:
                    self._let_go(run)
                else:
                    self._start_process(run)
                continue
            status = run.process.poll()
            run.history = read_history(run.results / "status.json")
            if status is not None:
                self._process_ended(run, status)

    def _process_ended(self, run: Running, status: int) -> None:
        run.process = None
        curve = run.history.curve(self.settings.metric)
        self._note_curve(run, curve)
        if status != 0:
            if self.stopping and status in (130, -15, 143):
                self._let_go(run)
                return
            self._finish(run, "FAIL", failure_of(run.folder, status, run.history))
        elif not curve:
            known = sorted({name for one in run.history.metrics.values() for name in one})
            what = f"its validations have no {self.settings.metric}, only {', '.join(known) or 'nothing'}"
            self._finish(run, "FAIL", what)
        elif max(curve) < run.target or run.target >= self.rungs[-1]:  # early stopping, or the end
            self._finish(run, "COMPLETE", value=self.better(curve.values()))
        elif run.trial.should_prune():
            self._finish(run, "PRUNED", value=self.better(curve.values()))
        elif self.stopping:
            self._let_go(run)
        else:
            run.target = self._next_rung(run.history)
            self._start_process(run)

    def _note_curve(self, run: Running, curve: Mapping[int, float]) -> None:
        """Keep the validations in the storage: the best so far, which pruning compares, and each one."""
        known = self.study._storage.get_trial(run.trial._trial_id).intermediate_values
        for epoch, best in zip(curve, accumulate(curve.values(), self.better), strict=True):
            if epoch not in known:
                run.trial.report(best, epoch)
        run.trial.set_user_attr("curve", {str(epoch): value for epoch, value in curve.items()})

    def _stop_processes(self) -> None:
        """Ask all running trials to stop after their step, with a checkpoint."""
        self.stopping = True
        for run in self.running:
            if run.process is not None and run.process.poll() is None:
                run.process.terminate()

    def _let_go(self, run: Running) -> None:
        """Leave a trial to the next start."""
        run.stack.close()
        self.running.remove(run)

    # --- ends ---

    def _finish(self, run: Running, state: str, reason: str = "", value: float | None = None) -> None:
        seconds = time.monotonic() - run.begun
        run.trial.set_user_attr("seconds", seconds + run.trial.user_attrs.get("seconds", 0.0))
        self._end(run.trial, state, reason, value, epochs=run.history.epochs)
        run.stack.close()
        self.running.remove(run)
        self._clean_up()
        self.changed()

    def _end(
        self, trial: Any, state: str, reason: str = "", value: float | None = None, epochs: int = 0
    ) -> None:
        if reason:  # by the storage: a trial that was read of it keeps attributes to itself
            self.study._storage.set_trial_user_attr(trial._trial_id, "reason", printable(reason))
        self._tell(trial, state, value)
        metric = self.settings.metric
        words = {
            "COMPLETE": f"ended: best {metric} {value:.4g}" if value is not None else "ended",
            "PRUNED": f"ended early, behind others after {epochs} epochs: {metric} {value or 0:.4g}",
            "FAIL": f"failed: {printable(reason)}",
        }[state]
        best = self.best()
        leader = f"; best so far: trial {best.number:03d}, {best.value:.4g}" if best is not None else ""
        self.report(f"trial {trial.number:03d} {words}{leader}")

    def _tell(self, trial: Any, state: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        # The grid's sampler would end a loop of Optuna's that does not run here.
        self.study.sampler = make_sampler("random", self.space, 0)
        value = value if state == "COMPLETE" else None
        self.study.tell(trial.number, value, state=TrialState[state], skip_if_finished=True)

    def _clean_up(self) -> None:
        """Remove the checkpoints of trials that have ended and are not the best."""
        if self.settings.keep_checkpoints:
            return
        best = self.best()
        for one in self.trials():
            if one.state.is_finished() and (best is None or one.number != best.number):
                remove_checkpoints(self.folder / trial_name(one.number) / "train")

    def _beat(self) -> None:
        """Show other machines that the trials here are alive."""
        if time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            for run in self.running:
                run.trial.set_user_attr("beat", time.time())


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"trial_{number:03d}"


def _failures(what: str, trials: list[Any]) -> Problem:
    reason = trials[0].user_attrs.get("reason") or "no reason is known"
    numbers = ", ".join(f"{one.number:03d}" for one in trials[:5])
    return Problem(f"{what} (trials {numbers})", value=reason, hint="see log.txt in their folders")
