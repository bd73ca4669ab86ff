import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ddetr_mm.convert.reader import can_fork, ordered_map

_offset = None


def prepare(offset):
    global _offset
    _offset = offset


def add_offset(number):
    return number + _offset


def slow_then_fast(number):
    if number % 7 == 0:
        time.sleep(0.02)
    return number, os.getpid()


def fail_at_thirty(number):
    if number == 30:
        raise ValueError("thirty")
    return number


def die_elsewhere(task):
    number, parent = task
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def nothing():
    """No preparation."""


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    """With another thread about, processes are spawned."""
    if request.param == "fork":
        if threading.active_count() > 1 or not hasattr(os, "fork"):
            pytest.skip("this process cannot fork safely")
        assert can_fork()
        yield "fork"
        return
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert not can_fork()
    yield "spawn"
    done.set()
    thread.join()


@pytest.mark.parametrize("num_processes", [0, 1, 3])
def test_results_come_in_order(num_processes, start_method):
    results = ordered_map(add_offset, iter(range(500)), num_processes, prepare, (1000,))
    assert list(results) == list(zip(range(500), range(1000, 1500), strict=True))


def test_no_tasks():
    assert list(ordered_map(add_offset, [], 2, prepare, (0,))) == []


def test_every_task_is_done_once_and_by_several_processes():
    results = [result for _, result in ordered_map(slow_then_fast, range(300), 2, nothing)]
    assert [number for number, _ in results] == list(range(300))
    assert len({pid for _, pid in results} - {os.getpid()}) == 2


def test_few_tasks_are_on_the_way():
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = ordered_map(add_offset, tasks(), 1, prepare, (0,))
    for done in range(1, 200):
        next(results)
        assert taken - done < 15
    results.close()


@pytest.mark.parametrize("num_processes", [0, 1])
def test_an_error_of_the_function_is_raised(num_processes, start_method):
    results = ordered_map(fail_at_thirty, range(100), num_processes, nothing)
    assert [next(results) for _ in range(30)] == [(number, number) for number in range(30)]
    with pytest.raises(ValueError, match="thirty"):
        next(results)


def test_continues_alone_when_a_process_dies(caplog, start_method):
    tasks = [(number, os.getpid()) for number in range(100)]

    def slowly():
        for task in tasks:
            time.sleep(0.02)  # leave the other process time to start and take one
            yield task

    assert list(ordered_map(die_elsewhere, slowly(), 1, nothing)) == [(task, task[0]) for task in tasks]
    assert "continuing in one process" in caplog.text


@pytest.mark.parametrize(
    "thread", ["", "import threading; threading.Thread(target=time.sleep, args=[9]).start()"]
)
def test_a_script_without_main_guard_still_works(tmp_path, thread):
    """Spawned processes run such a script again, and fail; the caller must not."""
    script = tmp_path / "script.py"
    script.write_text(
        "from ddetr_mm.convert.reader import ordered_map\n"
        "import time\n"
        f"{thread}\n"
        "def slow(): pass\n"
        "def tasks():\n"
        "    for number in range(60):\n"
        "        time.sleep(0.02)\n"
        "        yield number\n"
        "print(sum(result for _, result in ordered_map(abs, tasks(), 1, slow)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(sum(range(60)))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_end_with_their_parent(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, pathlib, threading\n"
        "from ddetr_mm.convert.reader import ordered_map\n"
        "def mark(): pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "def tasks():\n"
        "    for number in range(10_000):\n"
        "        time.sleep(0.02)\n"
        "        yield number\n"
        "if __name__ == '__main__':\n"
        f"    if {method == 'spawn'}: threading.Thread(target=time.sleep, args=[200], daemon=True).start()\n"
        "    for _ in ordered_map(abs, tasks(), 2, mark): pass\n"
    )
    folder = tmp_path / "pids"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, script, folder])
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(file.name) for file in folder.iterdir()]
    assert len(pids) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
