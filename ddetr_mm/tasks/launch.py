"""Starting the ranks of a distributed subtask with torchrun's elastic launcher, and telling how they ended.

Every rank runs the command itself, with its place in the job in the environment. A rank that fails leaves
its reason in the file torchrun's launcher names; the launching process tells it once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.engine.distributed import (
    LAUNCHED_VARIABLE,
    NodePlan,
    adopt_slurm,
    is_launched_by_us,
    is_rank,
    plan_launch,
)
from ddetr_mm.engine.status import FAILURE, StatusLog, failure_message
from ddetr_mm.errors import InputError, RankFailure
from ddetr_mm.files import usable_cores
from ddetr_mm.spec import LoadedSpec, task_results_dir
from ddetr_mm.tasks.session import choose_device, require_gpus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

_MOMENT = "seconds_since_epoch"

SAVING_TIME_S = 300
"""How long ranks may take to save when the command is interrupted, where torch lets us say so (its default
is 30 seconds)."""


def launched(arguments: Namespace, loaded: LoadedSpec, subtask: str) -> bool:
    """Run a subtask on several ranks, if the spec or the environment says so; also chooses the device.

    Args:
        arguments: of the command, which every rank is called with again.
        loaded: the spec.
        subtask: ``train``, ``evaluate`` or ``inference``.

    Returns:
        True when the ranks have done the work; False where this process has to do it, as the only one or
        as a rank of its job.

    Raises:
        InputError: the machine has too few GPUs, or the environment does not tell where the others are.
        RankFailure: a rank failed.
        KeyboardInterrupt: the run was interrupted; the ranks have ended.
    """
    task = getattr(loaded.spec, subtask)
    plan = plan_launch(task.num_gpus, task.num_nodes)
    adopt_slurm()
    choose_device(loaded.spec, task.gpu_ids)
    if plan is None:
        return False
    status = StatusLog.at(task_results_dir(loaded.spec, subtask) / "status.json")
    try:
        require_gpus(loaded.spec, plan.ranks_per_node, where=f"{subtask}.num_gpus")
        run_ranks(plan, rank_command(arguments))
    except InputError as error:
        status.write(failure_message(error, subtask), FAILURE, verbosity="ERROR")
        raise
    except RankFailure as failure:
        # The first rank has told its own failures; of others it knows the consequence at most.
        if plan.node_rank == 0 and (failure.rank != 0 or failure.killed):
            status.write(str(failure), FAILURE, verbosity="ERROR")
        raise
    return True


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Belong to the job's other ranks inside the block; does nothing, and loads nothing, outside a job."""
    if not is_rank():
        yield
        return
    from ddetr_mm.engine.distributed import process_group

    with process_group():
        yield


def rank_command(arguments: Namespace) -> list[str]:
    """The command as a list of words for Python."""
    words = ["-m", "ddetr_mm", arguments.command, "-e", arguments.experiment_spec, *arguments.overrides]
    return [*words, "--debug"] if arguments.debug else words


def run_ranks(plan: NodePlan, command: list[str]) -> None:
    """Start this machine's ranks and wait for them.

    Args:
        plan: how many, and their place in the job.
        command: words for the Python interpreter.

    Raises:
        RankFailure: one failed; the others have been stopped.
        KeyboardInterrupt: this process got SIGINT or SIGTERM; the ranks got it too and have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import launch_agent

    # Its own report is a page long and names no reason.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = str(max(1, usable_cores() // plan.ranks_per_node))
    inherited = _environment(
        {LAUNCHED_VARIABLE: str(os.getpid())}, {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    )
    with inherited, _signal_handlers_kept():
        try:
            launch_agent(launch_config(plan), sys.executable, command)
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            rank, failure = root_failure(error.failures)
            if failure.exitcode == 130:
                raise KeyboardInterrupt from None
            raise told_failure(rank, plan.world_size, failure) from None


def launch_config(plan: NodePlan) -> Any:
    """torchrun's launch configuration for a plan: no restarts, and one static place for several machines."""
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, Any] = dict(
        min_nodes=plan.num_nodes,
        max_nodes=plan.num_nodes,
        nproc_per_node=plan.ranks_per_node,
        run_id=f"ddetr_mm-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
    )
    if plan.master_addr is None:
        settings |= dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost")
    else:
        settings |= dict(
            run_id="ddetr_mm",
            rdzv_backend="static",
            rdzv_endpoint=f"{plan.master_addr}:{plan.master_port}",
            rdzv_configs={"rank": plan.node_rank},
        )
    if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:
        settings["shutdown_timeout"] = SAVING_TIME_S
    return LaunchConfig(**settings)


def root_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Which of several failed ranks to tell.

    One that was killed, else the one that failed first; those that the launcher stopped with SIGTERM come
    last.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        stopped = failure.exitcode == -signal.SIGTERM
        moment: float = failure.timestamp
        if isinstance(failure.message, dict):
            moment = failure.message["extraInfo"].get(_MOMENT, moment)
        return stopped, failure.exitcode >= 0, moment, rank

    return min(failures.items(), key=order)


def told_failure(rank: int, world_size: int, failure: ProcessFailure) -> RankFailure:
    """A rank's failure as one message, with the exit status that the command ends with."""
    who = f"rank {rank} of {world_size} (process {failure.pid})"
    if failure.exitcode < 0:
        reason = f"{who} was killed by {failure.signal_name()}; the other ranks were stopped"
        if failure.signal_name() == "SIGKILL":
            reason += ". The system kills so when memory is used up: `dmesg` tells"
        return RankFailure(reason, rank=rank, killed=True)
    message = failure.message
    if isinstance(message, dict):
        wrong_input = failure.exitcode == InputError.exit_status
        text = message["message"] if wrong_input else f"{who} failed: {message['message']}"
        details = message["extraInfo"].get("py_callstack")
        return RankFailure(text, rank=rank, exit_status=failure.exitcode, details=details)
    return RankFailure(f"{who} ended with status {failure.exitcode}", rank=rank, exit_status=failure.exitcode)


def recorded_for_launcher(error: BaseException, debug: bool = False) -> bool:
    """Leave the reason of a failure for the process that started this rank.

    Args:
        error: what ends the rank.
        debug: whether wrong input is told with its traceback, too.

    Returns:
        False where this process is not a rank of ours and must tell its failure itself.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None or not is_launched_by_us():
        return False
    now = time.time()
    # torch reads whole seconds; ranks that lose the failed one follow within one.
    information: dict[str, Any] = {"timestamp": str(int(now)), _MOMENT: now}
    if debug or not isinstance(error, InputError):
        information["py_callstack"] = "".join(traceback.format_exception(error))
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    content = {"message": {"message": text, "extraInfo": information}}
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return True


@contextmanager
def _environment(forced: Mapping[str, str], defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables that the ranks inherit; they are as before after the block."""
    changed = {**{name: value for name, value in defaults.items() if name not in os.environ}, **forced}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that torchrun's launcher replaces."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
