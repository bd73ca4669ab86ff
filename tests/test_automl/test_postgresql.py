"""Two processes share a study in a PostgreSQL server that the test starts; skipped where there is none."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from automl_project import epochs_of, make_project, trials_of
from test_study import outputs_of, start

pytest.importorskip("optuna")
pytest.importorskip("psycopg", reason="psycopg is not installed")


def _program(name: str) -> str | None:
    found = [*Path("/usr/lib/postgresql").glob(f"*/bin/{name}")]
    return str(sorted(found)[-1]) if found else shutil.which(name)


@pytest.fixture
def server() -> Iterator[str]:
    """A server in a folder of its own, which asks for a password; gives its URL."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    # A server refuses to run as root; the folder of pytest may be closed to others.
    folder = Path(tempfile.mkdtemp(prefix="ddetr_mm_pg"))
    options: dict = {}
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no unprivileged user for PostgreSQL")
        os.chown(folder, 65534, 65534)
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    (folder / "password").write_text("pa55word")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    made = subprocess.run(
        [*drop, initdb, "-D", f"{folder}/data", "-U", "tester", "-A", "scram-sha-256"]
        + [f"--pwfile={folder}/password", "--no-sync", "-E", "UTF8", "--locale=C"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if made.returncode != 0:
        shutil.rmtree(folder)
        pytest.skip(f"initdb does not work here: {made.stderr.strip()[:200]}")
    command = [
        *drop,
        postgres,
        "-D",
        f"{folder}/data",
        "-p",
        str(port),
        "-h",
        "127.0.0.1",
        "-k",
        str(folder),
        "-F",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **options
    )
    try:
        import time

        import psycopg

        url = f"postgresql://tester:pa55word@127.0.0.1:{port}/postgres"
        for _ in range(100):
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                time.sleep(0.1)
        else:
            pytest.fail("the server does not answer")
        yield url.replace("postgresql://", "postgresql+psycopg://")
    finally:
        process.send_signal(signal.SIGINT)  # ends connections that are open
        process.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_machines_share_a_study_in_postgresql(server, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("STAND_IN_TOGETHER", str(tmp_path / "*/results/automl/trial_*/train/status.json"))
    # Two folders, as two machines without a shared disk have them.
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        make_project(folder)
    options = ("ddetr_mm.automl.max_trials=5", f"ddetr_mm.automl.storage={server}")
    both = [start(folder, *options) for folder in folders]
    outputs = outputs_of(both)
    assert [one.returncode for one in both] == [0, 0], outputs
    found = [one for one in trials_of(folders[0], server) if not one.user_attrs.get("surplus")]
    assert [one.state.name for one in found] == ["COMPLETE"] * 5
    ran = {folder: [p.name for p in (folder / "results/automl").glob("trial_*")] for folder in folders}
    names = sorted(name for some in ran.values() for name in some)
    assert names == [f"trial_{one.number:03d}" for one in found]
    for folder, names in ran.items():
        assert names
        for name in names:
            assert epochs_of(folder / "results/automl", int(name[-3:])) == [0, 1, 2, 3]
    assert "pa55word" not in "".join(outputs)
    for folder in folders:
        for path in (folder / "results").rglob("*"):
            assert not path.is_file() or b"pa55word" not in path.read_bytes(), path
