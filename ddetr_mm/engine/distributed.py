"""Ranks: who they are, how they start and how they end."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import broadcast_object_list
from torch import distributed

from ddetr_mm.errors import InputError, Problem

# --- Which process of a job this is, by what torchrun, Slurm or our own launcher put into the environment ---
# Nothing here imports torch: a command asks before it loads anything heavy. Functions take the environment
# as a mapping, so that they can be tried without changing it.

LAUNCHED_VARIABLE = "DDETR_MM_LAUNCHER_PID"
"""Set for the ranks that the command itself started: the process that started them."""

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
    """Whether this process is one rank of a job that something has started."""
    return all(name in environ for name in _TORCHRUN)


def is_launched_by_us(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the command itself started this rank, and waits to tell what becomes of it."""
    return LAUNCHED_VARIABLE in environ and is_rank(environ)


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks of the job this process belongs to; 1 outside a job."""
    return int(environ["WORLD_SIZE"]) if is_rank(environ) else 1


def plan_launch(num_gpus: int, num_nodes: int, environ: Mapping[str, str] = os.environ) -> NodePlan | None:
    """What this machine has to start; None where this process is itself the one to work.

    The environment wins over the spec: what torchrun or ``srun`` has started is not started again.
    ``srun`` with one task a machine is a way to run this command on every machine of the job; each of
    them then starts ``num_gpus`` ranks.

    Args:
        num_gpus: ranks on each machine, by the spec.
        num_nodes: machines, by the spec.
        environ: the environment.

    Raises:
        InputError: several machines, and nothing tells which of them this is or where the first one is.
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
    if num_nodes == 1:
        return NodePlan(1, 0, num_gpus) if num_gpus > 1 else None
    missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if not environ.get(name)]
    if missing:
        raise InputError(
            Problem(
                f"a run on several machines needs {' and '.join(missing)} in the environment",
                where="num_nodes",
                value=num_nodes,
                hint="start the same command on every machine with MASTER_ADDR set to the first one's name "
                "and NODE_RANK counting from 0, or use torchrun or srun",
            )
        )
    return NodePlan(num_nodes, int(environ["NODE_RANK"]), num_gpus, environ["MASTER_ADDR"], _port(environ))


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Where ``srun`` has started this process as one of several ranks, name its place as torchrun does.

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
    """``MASTER_PORT``; under Slurm else one that follows from the job's number, so that jobs differ."""
    if environ.get("MASTER_PORT"):
        return int(environ["MASTER_PORT"])
    return _DEFAULT_PORT + int(environ.get("SLURM_JOB_ID", "0")) % 10_000


# --- The group of ranks that a process belongs to: joining it, leaving it, agreeing within it ---

TIMEOUT = timedelta(minutes=60)
"""How long a rank waits for the others. Long, for they wait while the first one scores a large data set or
writes a large checkpoint; a rank that *dies* is noticed by the launcher at once."""

_LAUNCHER_GONE_STATUS = 1


@contextmanager
def process_group() -> Iterator[None]:
    """Belong to the job's group of ranks inside the block.

    Outside a job, and where the group is there already, nothing happens.

    Ranks talk over NCCL where there is a GPU, else over gloo. mmengine's own initialisation is not used:
    it asks for a GPU wherever torch was built for one.
    """
    if not is_rank() or distributed.is_initialized():
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

    Without this, ranks of a killed command would go on training, beside those of the command's next start.
    """
    if not is_launched_by_us():
        return
    launcher = int(os.environ[LAUNCHED_VARIABLE])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(_LAUNCHER_GONE_STATUS)

    threading.Thread(target=watch, daemon=True, name="end-with-launcher").start()


def decided_by_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank: for what could differ by the moment it is looked up.

    Args:
        value: anything that can be pickled; that of other ranks is dropped.
    """
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
