"""Who starts the ranks of a job, and which of them a process is, by its environment."""

from __future__ import annotations

import pytest

from ddetr_mm.errors import InputError
from ddetr_mm.runtime.rank_env import NodePlan, adopt_slurm, first_host, is_rank, plan_launch, world_size

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


def test_an_empty_host_list_is_told():
    with pytest.raises(InputError, match="MASTER_ADDR"):
        first_host("")
