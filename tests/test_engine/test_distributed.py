"""Ranks are started with their place in the job, and the launching process tells once how they ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_mm.engine.distributed import (
    LAUNCHED_VARIABLE,
    NodePlan,
    adopt_slurm,
    first_host,
    is_rank,
    plan_launch,
    recorded_for_launcher,
    root_failure,
    run_ranks,
    world_size,
)
from ddetr_mm.errors import InputError, RankFailure

# --- Who starts the ranks of a job, and which of them a process is, by its environment ---

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


def srun(task: int, tasks: int, nodes: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % max(tasks // nodes, 1)),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks // nodes}(x{nodes})",
        "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_JOB_ID": "123456",
        **more,
    }


def test_one_gpu_starts_nothing():
    assert plan_launch(1, 1, {}) is None
    assert world_size({}) == 1 and not is_rank({})


def test_several_gpus_are_started_on_a_free_port():
    assert plan_launch(2, 1, {}) == NodePlan(1, 0, 2)
    # torchrun's MASTER_ADDR alone does not make a process a rank.
    assert plan_launch(2, 1, {"MASTER_ADDR": "host"}) == NodePlan(1, 0, 2)


def test_what_torchrun_has_started_is_not_started_again():
    assert plan_launch(8, 4, TORCHRUN) is None
    assert is_rank(TORCHRUN) and world_size(TORCHRUN) == 4


def test_several_machines_need_to_find_each_other():
    with pytest.raises(InputError, match="MASTER_ADDR and NODE_RANK"):
        plan_launch(8, 2, {})
    environ = {"MASTER_ADDR": "first", "MASTER_PORT": "1234", "NODE_RANK": "1"}
    plan = plan_launch(8, 2, environ)
    assert plan == NodePlan(2, 1, 8, "first", 1234) and plan.world_size == 16


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("NODE_RANK", "first", "a whole number from 0"),
        ("NODE_RANK", "-1", "a whole number from 0"),
        ("NODE_RANK", "2", "0 to 1"),
        ("MASTER_PORT", "any", "a whole number from 1"),
    ],
)
def test_a_place_that_is_none_is_refused(name: str, value: str, allowed: str):
    environ = {"MASTER_ADDR": "first", "NODE_RANK": "1", name: value}
    with pytest.raises(InputError) as caught:
        plan_launch(8, 2, environ)
    (problem,) = caught.value.problems
    assert problem.where == f"${name}" and str(problem.value) == value and problem.allowed == allowed


TAO = {"WORLD_SIZE": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("spec", "environ", "plan"),
    [
        ((1, 1), TAO, NodePlan(2, 1, 1, "first", 1234)),
        ((4, 1), TAO, NodePlan(2, 1, 4, "first", 1234)),
        ((4, 2), TAO, NodePlan(2, 1, 4, "first", 1234)),
        ((1, 1), {**TAO, "NUM_GPU_PER_NODE": "8"}, NodePlan(2, 1, 8, "first", 1234)),
        ((8, 2), {**TAO, "NUM_GPU_PER_NODE": "8"}, NodePlan(2, 1, 8, "first", 1234)),
        # As a PyTorchJob sets them; LOCAL_RANK is missing there.
        ((4, 1), {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "first"}, NodePlan(2, 0, 4, "first", 29500)),
        ((4, 1), {**TAO, "RANK": "1"}, NodePlan(2, 1, 4, "first", 1234)),
        ((1, 1), {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "2"}, NodePlan(1, 0, 2)),
        ((2, 1), {"WORLD_SIZE": "1", "NODE_RANK": "0"}, NodePlan(1, 0, 2)),
        ((1, 1), {"WORLD_SIZE": "1"}, None),
        # An empty variable is not set.
        ((2, 1), {"WORLD_SIZE": "", "NUM_GPU_PER_NODE": "4"}, NodePlan(1, 0, 2)),
        # torchrun's own variables are not TAO's.
        ((1, 1), {**TORCHRUN, "NUM_GPU_PER_NODE": "8"}, None),
    ],
)
def test_variables_of_taos_launcher(spec: tuple[int, int], environ: dict[str, str], plan: NodePlan | None):
    assert plan_launch(*spec, environ) == plan


@pytest.mark.parametrize(
    ("spec", "changes", "text"),
    [
        ((1, 4), {}, "num_nodes: contradicts WORLD_SIZE=2 in the environment (got 4)"),
        ((1, 2), {"WORLD_SIZE": "1"}, "num_nodes: contradicts WORLD_SIZE=1"),
        ((4, 1), {"NUM_GPU_PER_NODE": "8"}, "num_gpus: contradicts NUM_GPU_PER_NODE=8 in the environment"),
        ((1, 1), {"RANK": "0"}, "$NODE_RANK: contradicts RANK=0"),
        ((1, 1), {"NODE_RANK": "2"}, "$NODE_RANK: is no machine of the job"),
        ((1, 1), {"NODE_RANK": "", "RANK": "2"}, "$RANK: is no machine of the job"),
        ((1, 1), {"WORLD_SIZE": "two"}, "$WORLD_SIZE: is out of range"),
        ((1, 1), {"WORLD_SIZE": "0"}, "$WORLD_SIZE: is out of range"),
        ((1, 1), {"NUM_GPU_PER_NODE": "0"}, "$NUM_GPU_PER_NODE: is out of range"),
        ((1, 1), {"NODE_RANK": "x"}, "$NODE_RANK: is out of range"),
        ((1, 1), {"MASTER_ADDR": ""}, "needs MASTER_ADDR in the environment"),
        ((1, 1), {"NODE_RANK": ""}, "needs NODE_RANK in the environment"),
    ],
)
def test_variables_of_taos_launcher_that_contradict_are_refused(
    spec: tuple[int, int], changes: dict[str, str], text: str
):
    with pytest.raises(InputError) as caught:
        plan_launch(*spec, {**TAO, **changes})
    assert text in str(caught.value)


def test_tasks_of_srun_become_ranks():
    environ = srun(task=5, tasks=8, nodes=2)
    assert plan_launch(4, 2, environ) is None
    adopt_slurm(environ)
    assert is_rank(environ) and world_size(environ) == 8
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"]) == ("5", "1", "4")
    assert environ["MASTER_ADDR"] == "gpu07" and environ["MASTER_PORT"] == str(29500 + 3456)


def test_one_task_of_srun_a_machine_starts_the_ranks_of_its_machine():
    environ = srun(task=1, tasks=4, nodes=4)
    assert plan_launch(8, 4, environ) == NodePlan(4, 1, 8, "gpu07", 29500 + 3456)
    # With one GPU a machine the tasks themselves are the ranks.
    assert plan_launch(1, 4, environ) is None


def test_a_batch_script_outside_of_srun_is_alone():
    environ = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "9"}
    assert plan_launch(2, 1, environ) == NodePlan(1, 0, 2)
    adopt_slurm(environ)
    assert not is_rank(environ)


def test_the_environment_of_torchrun_wins_over_slurms():
    environ = srun(task=0, tasks=2, nodes=2) | TORCHRUN
    assert plan_launch(2, 2, environ) is None
    adopt_slurm(environ)
    assert environ["RANK"] == "3"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu[07-09,12],login1", "gpu07"),
        ("node1", "node1"),
        ("a-b3,c", "a-b3"),
        ("rack[2,4]-n", "rack2-n"),
        ("ip-10-0-[1-3].local", "ip-10-0-1.local"),
    ],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str):
    assert first_host(hosts) == first


def test_an_empty_host_list_is_reported():
    with pytest.raises(InputError, match="MASTER_ADDR"):
        first_host("")


# --- Ranks are started with their place in the job, and the launching process tells once how they ended ---

TWO = NodePlan(num_nodes=1, node_rank=0, ranks_per_node=2)

TELL_PLACE = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DDETR_MM_LAUNCHER_PID")
place = {name: os.environ[name] for name in names}
open(os.path.join(sys.argv[1], os.environ["RANK"] + ".json"), "w").write(json.dumps(place))
"""
FAIL_ON_RANK_1 = """
import os, sys, time
import ddetr_mm
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.engine.distributed import recorded_for_launcher
if os.environ["RANK"] == "0":
    time.sleep(60)
try:
    raise {error}
except Exception as error:
    assert recorded_for_launcher(error)
    sys.exit({status})
"""
WAIT_FOR_SIGNAL = """
import os, signal, sys, time
path = os.path.join(sys.argv[1], os.environ["RANK"])
def save(number, frame):
    open(path + ".saved", "w").write(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open(path + ".ready", "w")
time.sleep(60)
"""
LAUNCH = """
import sys
from ddetr_mm.engine.distributed import NodePlan
from ddetr_mm.engine.distributed import run_ranks
try:
    run_ranks(NodePlan({plan}), ["-c", sys.argv[1], sys.argv[2]])
except KeyboardInterrupt:
    sys.exit(130)
"""


def launch(plan: str, script: str, folder: Path) -> subprocess.Popen[str]:
    """Another process that starts ranks."""
    words = [sys.executable, "-c", LAUNCH.format(plan=plan), script, str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def places(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_ranks_know_their_place_and_leave_nothing_behind(tmp_path: Path):
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    run_ranks(TWO, ["-c", TELL_PLACE, str(tmp_path)])
    found = places(tmp_path)
    assert [(place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) for place in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert {place[LAUNCHED_VARIABLE] for place in found} == {str(os.getpid())}
    assert os.environ.get(LAUNCHED_VARIABLE) == environment.get(LAUNCHED_VARIABLE)
    assert os.environ.get("OMP_NUM_THREADS") == environment.get("OMP_NUM_THREADS")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_machines_with_node_ranks_make_one_job(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    machines = [launch(f"2, {node}, 1, '127.0.0.1', {port}", TELL_PLACE, tmp_path) for node in range(2)]
    outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    found = places(tmp_path)
    assert [(place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) for place in found] == [
        ("0", "0", "2"),
        ("1", "0", "2"),
    ]
    assert {place["MASTER_ADDR"] for place in found} == {"127.0.0.1"}


def test_wrong_input_on_one_rank_is_reported_in_its_words():
    script = FAIL_ON_RANK_1.format(error='DataError(Problem("is broken", file="a.jpg"))', status=2)
    with pytest.raises(RankFailure) as caught:
        run_ranks(TWO, ["-c", script])
    failure = caught.value
    assert str(failure) == "a.jpg: is broken" and failure.details is None
    assert (failure.rank, failure.exit_status, failure.killed) == (1, 2, False)


def test_a_defect_on_one_rank_is_reported_with_its_traceback():
    script = FAIL_ON_RANK_1.format(error='ZeroDivisionError("one over nothing")', status=1)
    with pytest.raises(
        RankFailure, match="rank 1 of 2 .* failed: ZeroDivisionError: one over nothing"
    ) as caught:
        run_ranks(TWO, ["-c", script])
    assert caught.value.exit_status == 1 and "Traceback" in (caught.value.details or "")


def test_an_exit_without_a_word_keeps_its_status():
    script = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(7); time.sleep(60)"
    with pytest.raises(RankFailure, match="rank 1 of 2 .* ended with status 7") as caught:
        run_ranks(TWO, ["-c", script])
    assert caught.value.exit_status == 7


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_ranks_which_may_save(tmp_path: Path, name: str):
    launcher = launch("1, 0, 2", WAIT_FOR_SIGNAL, tmp_path)
    assert launcher.stdout is not None
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert launcher.poll() is None, launcher.stdout.read()
    launcher.send_signal(getattr(signal, name))
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert [path.read_text() for path in sorted(tmp_path.glob("*.saved"))] == [name, name]


def test_the_cause_is_reported_and_not_its_consequences(tmp_path: Path):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def failure(rank: int, exitcode: int, moment: float | None = None) -> ProcessFailure:
        path = tmp_path / f"{rank}.json"
        if moment is not None:
            extra = {"timestamp": str(int(moment)), "seconds_since_epoch": moment}
            path.write_text(json.dumps({"message": {"message": "…", "extraInfo": extra}}))
        return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))

    first, later = failure(1, 2, moment=100.2), failure(0, 1, moment=100.7)
    assert root_failure({0: later, 1: first})[0] == 1
    assert root_failure({0: first, 1: failure(2, -signal.SIGTERM)})[0] == 0
    assert root_failure({0: first, 1: failure(3, -signal.SIGKILL)})[0] == 1


def test_only_a_rank_of_ours_leaves_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert not recorded_for_launcher(ValueError("of an outer torchrun"))
    assert not (tmp_path / "error.json").exists()
