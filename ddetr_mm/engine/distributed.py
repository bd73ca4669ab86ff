"""Ranks of a distributed run: which one this process is, and how ranks start, meet and end.

A rank is one process of a job, usually with one GPU. torchrun, ``srun`` or the command itself starts them.
The command uses torchrun's elastic launcher: every rank runs the command again with its place in the
environment, and a rank that fails writes its reason to a file that the launching process reads and reports
once.

Nothing here imports torch at module level: a command asks for its rank before it loads anything heavy.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.errors import InputError, Problem, RankFailure, StackError
from ddetr_mm.files import python_module, usable_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# --- Which rank this is ---

LAUNCHED_VARIABLE = "DDETR_MM_LAUNCHER_PID"
"""Process id of the command that started this rank; set only for ranks that a command started."""

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class NodePlan:
    """Ranks that one machine of a job starts.

    Attributes:
        num_nodes: machines of the job.
        node_rank: which of them this is, from 0.
        ranks_per_node: processes to start here.
        master_addr: name or address of machine 0; None for a job of one machine.
        master_port: where its ranks find each other; 0: any free port, for a job of one machine.
    """

    num_nodes: int
    node_rank: int
    ranks_per_node: int
    master_addr: str | None = None
    master_port: int = 0

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.num_nodes * self.ranks_per_node


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one rank of a distributed job."""
    return all(name in environ for name in _TORCHRUN)


def is_launched_by_us(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a command of ours started this rank, and waits for it."""
    return LAUNCHED_VARIABLE in environ and is_rank(environ)


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks of the job this process belongs to; 1 outside a job."""
    return int(environ["WORLD_SIZE"]) if is_rank(environ) else 1


def is_first_rank() -> bool:
    """Whether this process is the first of its job, or the only one: it writes files and reports.

    Asks PyTorch's process group where there is one, else what torchrun or Slurm put into the environment.
    """
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and torch_distributed.is_initialized():
        return bool(torch_distributed.get_rank() == 0)
    if "RANK" in os.environ:
        return _number_in_environment("RANK") == 0
    if _number_in_environment("SLURM_NTASKS", 1) > 1:
        return _number_in_environment("SLURM_PROCID", 0) == 0
    return True


def _number_in_environment(name: str, default: int = 0) -> int:
    text = os.environ.get(name)
    try:
        return default if text is None else int(text)
    except ValueError as error:
        allowed = "a whole number, as torchrun and Slurm set it"
        raise StackError(Problem("is no number", where=f"${name}", value=text, allowed=allowed)) from error


# --- Which ranks to start ---


def plan_launch(
    num_gpus: int, num_nodes: int, environ: Mapping[str, str] = os.environ, *, section: str = "train"
) -> NodePlan | None:
    """Plan the ranks that this machine has to start; None where this process does the work itself.

    The environment wins over the spec: ranks that torchrun or ``srun`` started are not started again. With
    one ``srun`` task a machine, each task starts ``num_gpus`` ranks. ``WORLD_SIZE`` without ``LOCAL_RANK`` is
    the number of machines, as for TAO's launcher: see :func:`nodes_of_tao`.

    Args:
        num_gpus: ranks on each machine, by the spec.
        num_nodes: machines, by the spec.
        environ: the environment.
        section: of the spec that has both numbers, for messages.

    Raises:
        InputError: several machines, and the environment lacks MASTER_ADDR or NODE_RANK, or has what is no
            number or out of range there; or the environment contradicts itself or the spec.
    """
    if is_rank(environ) or (slurm_tasks(environ) > 1 and not _slurm_starts_nodes(num_gpus, environ)):
        return None
    if _slurm_starts_nodes(num_gpus, environ):
        return NodePlan(
            num_nodes=slurm_tasks(environ),
            node_rank=int(environ["SLURM_PROCID"]),
            ranks_per_node=num_gpus,
            master_addr=environ.get("MASTER_ADDR") or first_host(_slurm_hosts(environ)),
            master_port=_port(environ),
        )
    if environ.get("WORLD_SIZE"):
        num_gpus, num_nodes, environ = nodes_of_tao(num_gpus, num_nodes, environ, section=section)
    if num_nodes == 1:
        return NodePlan(1, 0, num_gpus) if num_gpus > 1 else None
    missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if not environ.get(name)]
    if missing:
        raise InputError(
            Problem(
                f"a run on several machines needs {' and '.join(missing)} in the environment",
                where=f"{section}.num_nodes",
                value=num_nodes,
                hint="start the same command on every machine with MASTER_ADDR set to the first one's name "
                "and NODE_RANK counting from 0, or use torchrun or srun",
            )
        )
    rank = _whole_number("NODE_RANK", environ, at_least=0) or 0
    if rank >= num_nodes:
        raise InputError(
            Problem(
                "is no machine of the job", where="$NODE_RANK", value=rank, allowed=f"0 to {num_nodes - 1}"
            )
        )
    return NodePlan(num_nodes, rank, num_gpus, environ["MASTER_ADDR"], _port(environ))


def nodes_of_tao(
    num_gpus: int, num_nodes: int, environ: Mapping[str, str], *, section: str = "train"
) -> tuple[int, int, Mapping[str, str]]:
    """Read the variables of TAO's launcher, which each machine of a job has.

    ``WORLD_SIZE`` is the number of machines, ``NODE_RANK`` or ``RANK`` which of them this is, from 0, and
    ``NUM_GPU_PER_NODE`` the GPUs of each. They replace the spec's 1; another number there has to agree.

    Args:
        num_gpus: ranks on each machine, by the spec.
        num_nodes: machines, by the spec.
        environ: the environment.
        section: of the spec that has both numbers, for messages.

    Returns:
        Ranks on each machine, machines, and the environment with ``NODE_RANK``.

    Raises:
        InputError: a variable is no number or out of range, or contradicts another or the spec.
    """
    nodes = _whole_number("WORLD_SIZE", environ, at_least=1) or num_nodes
    gpus = _whole_number("NUM_GPU_PER_NODE", environ, at_least=1) or num_gpus
    for name, key, here, by_spec in (
        ("WORLD_SIZE", "num_nodes", nodes, num_nodes),
        ("NUM_GPU_PER_NODE", "num_gpus", gpus, num_gpus),
    ):
        if by_spec not in (1, here):
            raise InputError(
                Problem(
                    f"contradicts {name}={here} in the environment",
                    where=f"{section}.{key}",
                    value=by_spec,
                    hint=f"set {section}.{key}={here}, or unset {name}",
                )
            )
    ranks = {name: _whole_number(name, environ, at_least=0) for name in ("NODE_RANK", "RANK")}
    given = {name: rank for name, rank in ranks.items() if rank is not None}
    if len(set(given.values())) > 1:
        hint = "NODE_RANK is the number of this machine; unset RANK"
        raise InputError(
            Problem(
                f"contradicts RANK={given['RANK']}", where="$NODE_RANK", value=given["NODE_RANK"], hint=hint
            )
        )
    for name, rank in given.items():
        if rank >= nodes:
            allowed = f"0 to {nodes - 1}: WORLD_SIZE is the number of machines"
            raise InputError(
                Problem("is no machine of the job", where=f"${name}", value=rank, allowed=allowed)
            )
    rank = next(iter(given.values()), None)
    return gpus, nodes, environ if rank is None else {**environ, "NODE_RANK": str(rank)}


def _whole_number(name: str, environ: Mapping[str, str], at_least: int) -> int | None:
    """A variable's number; None where it is not set or empty.

    Raises:
        InputError: it is no whole number, or smaller.
    """
    text = environ.get(name)
    if not text:
        return None
    if not re.fullmatch(r"\s*\d+\s*", text) or int(text) < at_least:
        raise InputError(
            Problem(
                "is out of range", where=f"${name}", value=text, allowed=f"a whole number from {at_least}"
            )
        )
    return int(text)


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Translate the place that ``srun`` gave this process into torchrun's variables.

    Afterwards :func:`is_rank` is true and torch's ``env://`` finds the others.
    """
    if is_rank(environ) or slurm_tasks(environ) <= 1:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ["WORLD_SIZE"] = str(slurm_tasks(environ))
    environ["LOCAL_WORLD_SIZE"] = re.match(r"\d*", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[0] or "1"  # type: ignore[index]
    environ.setdefault("MASTER_ADDR", first_host(_slurm_hosts(environ)))
    environ.setdefault("MASTER_PORT", str(_port(environ)))


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """Processes that ``srun`` started beside this one, itself included; 1 outside of ``srun``.

    A batch script has ``SLURM_NTASKS`` too, but is alone; only what ``srun`` starts has the variables of
    a step.
    """
    if "SLURM_PROCID" not in environ:
        return 1
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1"))


def first_host(hosts: str) -> str:
    """The first name of a Slurm list of hosts.

    Args:
        hosts: such as ``gpu[07-09,12],login1``; the first number of the first bracket counts.

    Raises:
        InputError: an empty list.
    """
    match = re.match(r"\s*(?P<head>[^,\[\s]+)(?:\[(?P<first>\d+)[^\]]*\](?P<tail>[^,\s]*))?", hosts)
    if match is None:
        raise InputError(
            Problem("names no host", where="SLURM_STEP_NODELIST", value=hosts, hint="set MASTER_ADDR")
        )
    return match["head"] + (match["first"] or "") + (match["tail"] or "")


def _slurm_starts_nodes(num_gpus: int, environ: Mapping[str, str]) -> bool:
    """Whether ``srun`` started one task a machine and the spec wants several ranks on each."""
    tasks = slurm_tasks(environ)
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    return not is_rank(environ) and tasks > 1 and tasks == nodes and num_gpus > 1


def _slurm_hosts(environ: Mapping[str, str]) -> str:
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""


def _port(environ: Mapping[str, str]) -> int:
    """``MASTER_PORT``; under Slurm else one that follows from the job's number, so that jobs differ.

    Raises:
        InputError: it is no whole number.
    """
    port = _whole_number("MASTER_PORT", environ, at_least=1)
    if port is not None:
        return port
    return _DEFAULT_PORT + int(environ.get("SLURM_JOB_ID", "0")) % 10_000


# --- The process group ---

TIMEOUT = timedelta(minutes=60)
"""How long a rank waits for the others. Long, for they wait while the first one scores a large data set or
writes a large checkpoint; a rank that *dies* is noticed by the launcher at once."""

_LAUNCHER_GONE_STATUS = 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the job's group of ranks inside the block.

    Outside a job, and where the group exists already, nothing happens and nothing is imported.

    Ranks talk over NCCL where there is a GPU, else over gloo. mmengine's own initialisation is not used:
    it asks for a GPU wherever torch was built for one.
    """
    if not is_rank():
        yield
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    end_with_launcher()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # mmengine's choice too, which it makes with a warning
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        # Slurm may show each task its own GPU only.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield
    # Only after success: a rank that has failed must not wait for the others.
    distributed.barrier()
    distributed.destroy_process_group()


def end_with_launcher() -> None:
    """End this rank when the process that started it is gone without having been able to stop it.

    Without this, ranks of a killed command would keep training beside those of the next start.
    """
    if not is_launched_by_us():
        return
    launcher = int(os.environ[LAUNCHED_VARIABLE])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(_LAUNCHER_GONE_STATUS)

    threading.Thread(target=watch, daemon=True, name="end-with-launcher").start()


STUDY_VARIABLE = "DDETR_MM_STUDY_PID"
"""Process id of the study that started this training run as a trial."""

_GRACE_S = 300.0


def end_with_study() -> None:
    """Stop this run, with a checkpoint, when the study that started it is gone; others are left alone.

    Without this, trials of a killed study would train on, unseen by the next start.
    """
    study = os.environ.get(STUDY_VARIABLE)
    if not study or LAUNCHED_VARIABLE in os.environ:
        return

    def watch() -> None:
        while os.getppid() == int(study):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)  # for a step and a checkpoint
        os._exit(_LAUNCHER_GONE_STATUS)

    threading.Thread(target=watch, daemon=True, name="end-with-study").start()


def decided_by_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank: for what could differ by the moment it is looked up.

    Args:
        value: anything that can be pickled; that of other ranks is dropped.
    """
    from mmengine.dist import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


# --- Starting ranks ---

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

_MOMENT = "seconds_since_epoch"

SAVING_TIME_S = 300
"""How long ranks may take to save when the command is interrupted, where torch lets us say so (its default
is 30 seconds)."""


def rank_command(arguments: Namespace) -> list[str]:
    """The command as a list of words for Python."""
    words = python_module("ddetr_mm", arguments.command, "-e", arguments.experiment_spec)[1:]
    words += arguments.overrides
    words += ["--force"] if getattr(arguments, "force", False) else []
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

    # torchrun's own report is a page long and names no reason.
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
            raise rank_failure(rank, plan.world_size, failure) from None


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
    """The failed rank to report: one that was killed, else the first that failed.

    Ranks that the launcher stopped with SIGTERM come last.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        stopped = failure.exitcode == -signal.SIGTERM
        moment: float = failure.timestamp
        if isinstance(failure.message, dict):
            moment = failure.message["extraInfo"].get(_MOMENT, moment)
        return stopped, failure.exitcode >= 0, moment, rank

    return min(failures.items(), key=order)


def rank_failure(rank: int, world_size: int, failure: ProcessFailure) -> RankFailure:
    """A rank's failure as one message, with the exit status that the command ends with."""
    name = f"rank {rank} of {world_size} (process {failure.pid})"
    if failure.exitcode < 0:
        reason = f"{name} was killed by {failure.signal_name()}; the other ranks were stopped"
        if failure.signal_name() == "SIGKILL":
            reason += ". The system kills so when memory is used up: see `dmesg`"
        return RankFailure(reason, rank=rank, killed=True)
    message = failure.message
    if isinstance(message, dict):
        wrong_input = failure.exitcode == InputError.exit_status
        text = message["message"] if wrong_input else f"{name} failed: {message['message']}"
        details = message["extraInfo"].get("py_callstack")
        return RankFailure(text, rank=rank, exit_status=failure.exitcode, details=details)
    return RankFailure(
        f"{name} ended with status {failure.exitcode}", rank=rank, exit_status=failure.exitcode
    )


def recorded_for_launcher(error: BaseException, debug: bool = False) -> bool:
    """Write the reason of a failure to the file that the launching process reads.

    Args:
        error: what ends the rank.
        debug: include the traceback for wrong input too.

    Returns:
        False where this process is not a rank that a command started, and must report its failure itself.
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
    """Environment variables that the ranks inherit, restored after the block."""
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
    """Restore the signal handlers that torchrun's launcher replaces."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
