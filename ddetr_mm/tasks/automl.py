"""``ddetr-mm automl``: a search for better values of the spec's fields, as a study of training runs.

This process only starts training runs and never imports torch. It may be killed at any time: the same command
continues, and several machines that run it share one study.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.automl.space import SECTION, SearchSpace, search_space
from ddetr_mm.engine.status import StatusLog
from ddetr_mm.errors import DataError, InputError, Problem, RunError, SpecError, printable
from ddetr_mm.files import write_text_whole, written_whole
from ddetr_mm.outputs import protected_inputs, require_free, results_root
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, load_spec, spec_to_yaml, task_results_dir
from ddetr_mm.spec.fields import nearest
from ddetr_mm.spec.rules import LOSSES, METRICS
from ddetr_mm.tasks.check import early_check, quick_check
from ddetr_mm.tasks.session import input_files, print_notes, require_gpus

if TYPE_CHECKING:
    from ddetr_mm.automl.study import Study

BEST_SPEC, BEST_CHECKPOINT, PAGE = "best_spec.yaml", "best.pth", "automl.html"


def run(arguments: Namespace) -> None:
    """Search; leaves the best spec, its checkpoint and a page about all trials.

    Raises:
        SpecError: the spec is wrong, or asks for a search that cannot be made.
        DataError: the data are wrong, or the storage cannot be opened.
        RunError: the first trials failed for one reason, or all did.
    """
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "automl")
    spec = loaded.spec
    assert isinstance(spec, ExperimentSpec)  # noqa: S101 - automl has no other kind of spec
    space = search_space(loaded)
    check_settings(loaded, space)
    folder = task_results_dir(spec, "automl")
    with ExitStack() as stack:
        stack.enter_context(protected_inputs(input_files(loaded, "train")))
        stack.enter_context(results_root(folder))
        folder.mkdir(parents=True, exist_ok=True)
        require_free(folder / name for name in (BEST_SPEC, BEST_CHECKPOINT, PAGE))
        print_notes(loaded)
        for note in space.notes:
            print(f"note: {printable(note)}", file=sys.stderr)
        status = StatusLog.at(folder / "status.json")
        with status.task("automl"):
            check_data(loaded)
            write_text_whole(folder / "experiment.yaml", spec_to_yaml(spec))
            _search(loaded, space, folder, status)


def check_data(loaded: LoadedSpec) -> None:
    """Check files and data, which would fail every trial, in a process of its own: the checks load torch.

    Raises:
        DataError: with everything that is wrong.
    """
    context = multiprocessing.get_context("fork")
    results, sending = context.Pipe(duplex=False)

    def check() -> None:
        try:
            early_check(loaded, resumes=False)
            quick_check(loaded)
        except InputError as error:
            sending.send((error.exit_status, [str(problem) for problem in error.problems]))
        else:
            sending.send(None)

    child = context.Process(target=check)
    child.start()
    sending.close()
    try:
        found = results.recv()
    except EOFError:
        raise RunError(Problem("the check of the data ended by an error", hint="see above")) from None
    finally:
        child.join()
    if found is not None:
        status, problems = found
        raise (RunError if status == 1 else DataError)(*problems)


def check_settings(loaded: LoadedSpec, space: SearchSpace) -> None:
    """Check what ``ddetr_mm.automl`` asks for besides its parameters.

    Raises:
        SpecError: with everything that is wrong.
    """
    spec = loaded.spec
    assert isinstance(spec, ExperimentSpec)  # noqa: S101
    settings = spec.ddetr_mm.automl
    problems = []

    def add(name: str, what: str, **more: Any) -> None:
        origin = loaded.origin.get(name)
        place = f"{name}, {origin}" if origin else name
        problems.append(Problem(what, file=loaded.path, where=place, **more))

    known = (*METRICS, *(LOSSES if spec.ddetr_mm.validation_loss else ()), "train_loss")
    if settings.metric not in known:
        close = nearest(settings.metric.replace("test_", "val_"), known)
        hint = f"did you mean {close}?" if close else None
        if settings.metric in LOSSES:
            hint = "set ddetr_mm.validation_loss=true"
        allowed = ", ".join(known)
        add(
            f"{SECTION}.metric",
            "is no metric of a trial's status.json",
            value=settings.metric,
            allowed=allowed,
            hint=hint,
        )
    gpus = len(spec.train.gpu_ids)
    if gpus > 1 and gpus % settings.concurrent:
        what = f"does not divide the {gpus} GPUs of train.gpu_ids"
        add(f"{SECTION}.concurrent", what, value=settings.concurrent)
    if spec.train.num_nodes > 1:
        hint = f"start the command on every machine, with {SECTION}.storage on all of them"
        add("train.num_nodes", "is more than 1: a trial runs on one machine", hint=hint)
    if settings.algorithm == "grid" and space.grid_size() > settings.max_trials:
        what = f"makes a grid of {space.grid_size()} points, more than max_trials={settings.max_trials}"
        hint = f"list few fields in {SECTION}.parameters and set {SECTION}.default_parameters=false"
        add(f"{SECTION}.algorithm", what, value="grid", hint=hint)
    SpecError.collect(problems)


def _goal(spec: ExperimentSpec) -> str:
    settings = spec.ddetr_mm.automl
    if settings.direction is not None:
        return settings.direction[:3]
    return "min" if "loss" in settings.metric else "max"


def _gpus(spec: ExperimentSpec) -> list[list[int]] | None:
    """The GPUs of each concurrent trial; None where the trials use none of several."""
    if spec.ddetr_mm.device == "cpu":
        return None
    ids, concurrent = list(spec.train.gpu_ids), spec.ddetr_mm.automl.concurrent
    if len(ids) == 1:
        return [ids] * concurrent
    each = len(ids) // concurrent
    return [ids[slot * each : (slot + 1) * each] for slot in range(concurrent)]


def _search(loaded: LoadedSpec, space: SearchSpace, folder: Path, status: StatusLog) -> None:
    from ddetr_mm.automl.report import write_report
    from ddetr_mm.automl.study import Study, masked, require_optuna

    require_optuna()
    spec = loaded.spec
    assert isinstance(spec, ExperimentSpec)  # noqa: S101
    settings = spec.ddetr_mm.automl
    if spec.ddetr_mm.device == "cuda":
        require_gpus(spec)
    display = _Display(settings.max_trials)

    def report(line: str) -> None:
        display.line(line)
        status.write(line)

    study = Study(
        spec, space, folder, goal=_goal(spec), gpus=_gpus(spec), report=report, changed=lambda: _write()
    )
    display.study = study

    def _write() -> None:
        write_report(study, folder / PAGE)

    place = masked(settings.storage) if settings.storage else str(folder / "study.db")
    display.line(
        f"{settings.algorithm} search of {len(space.parameters)} fields, {study.wanted()} trials of "
        f"{settings.max_epochs} epochs by {settings.metric}; study: {place}"
    )
    try:
        with display:
            study.run(display.tick)
    finally:
        _write()
    _leave_the_best(study, folder, status)


def _leave_the_best(study: Study, folder: Path, status: StatusLog) -> None:
    """Write ``best_spec.yaml`` and copy the best checkpoint."""
    from ddetr_mm.automl.study import trial_name
    from ddetr_mm.automl.trials import best_spec, values_line

    best = study.best()
    if best is None:
        print("no trial was trained to its end: there is no best spec yet")
        return
    values, metric = study.values_of(best), study.settings.metric
    heading = f"Best of {len(study.trials())} trials, {best.number:03d}: {metric} {best.value:.4g}"
    checkpoint = folder / BEST_CHECKPOINT
    write_text_whole(
        folder / BEST_SPEC, best_spec(study.spec, values, checkpoint, heading=printable(heading))
    )
    source = folder / trial_name(best.number) / "train" / "dd_model_best.pth"
    if source.is_file():
        with written_whole(checkpoint) as temporary:
            shutil.copyfile(os.path.realpath(source), temporary)
    else:
        owner = best.user_attrs.get("owner", {}).get("host", "another machine")
        print(f"the best checkpoint is on {owner}: {BEST_CHECKPOINT} is written there")
    own = next((one for one in study.trials() if one.user_attrs.get("own") and one.value is not None), None)
    gain = f"; the spec's own values: {own.value:.4g}" if own is not None else ""
    text = f"Best: trial {best.number:03d}, {metric} {best.value:.4g}{gain} ({values_line(values)})"
    status.write(text, kpi={f"best_{metric}": best.value})
    print(f"{printable(text)}\n{folder / BEST_SPEC}\n{checkpoint}\n{folder / PAGE}")


class _Display:
    """Progress on standard error: lines of events, and on a terminal one line that is kept up to date."""

    def __init__(self, wanted: int) -> None:
        from rich.console import Console
        from rich.live import Live

        from ddetr_mm.engine.progress import is_live_terminal

        self.wanted = wanted
        self.study: Study | None = None
        self.console = Console(
            force_jupyter=False, file=sys.stderr, width=None if is_live_terminal(sys.stderr) else 1000
        )
        self.live = (
            Live(console=self.console, refresh_per_second=2, transient=True)
            if is_live_terminal(sys.stderr)
            else None
        )
        self._printed = time.monotonic()

    def __enter__(self) -> _Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def line(self, text: str) -> None:
        """Print an event."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def tick(self) -> None:
        """Show trials, the best so far and the time left; without a terminal once a minute."""
        if self.study is None:
            return
        if self.live is not None:
            from rich.text import Text

            self.live.update(Text(progress_line(self.study)))
        elif time.monotonic() - self._printed > 60:
            self._printed = time.monotonic()
            self.line(progress_line(self.study))


def progress_line(study: Study) -> str:
    """Trials so far, the running ones with their epochs, the best, and the time left."""
    trials, wanted = study.trials(), study.wanted()
    ended = [one for one in trials if one.state.is_finished()]
    parts = [f"{len(ended)} of {wanted} trials"]
    for run in study.running:
        curve = run.history.curve(study.settings.metric)
        newest = f", {study.settings.metric} {list(curve.values())[-1]:.4g}" if curve else ""
        parts.append(f"trial {run.number:03d}: epoch {run.history.epochs}/{study.rungs[-1]}{newest}")
    best = study.best()
    parts += [f"best {best.value:.4g} (trial {best.number:03d})"] if best is not None else []
    seconds = [one.user_attrs["seconds"] for one in ended if "seconds" in one.user_attrs]
    if seconds:
        left_s = sum(seconds) / len(seconds) * (wanted - len(ended)) / study.settings.concurrent
        parts.append(f"about {timedelta(seconds=round(left_s))} left")
    return " · ".join(parts)
