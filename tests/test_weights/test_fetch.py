"""Weights at a URL are files first: downloaded once, and never executed."""

import functools
import http.server
import threading

import pytest
import torch

from ddetr_mm.errors import WeightsError
from ddetr_mm.models import GCViT
from ddetr_mm.tasks.mmdet_tools import mmdet_checkpoint
from ddetr_mm.weights.fetch import local_file
from ddetr_mm.weights.safe_read import read_raw


class Harmful:
    def __reduce__(self):
        return print, ("code from a file ran",)


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A folder served over HTTP, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(url):
    address, served = url
    torch.save({"a": torch.ones(2)}, served / "a b.pth")
    path = local_file(f"{address}/a%20b.pth?download=1")
    assert path.name.endswith("-a b.pth")
    assert torch.equal(read_raw(path).payload["a"], torch.ones(2))
    (served / "a b.pth").unlink()
    assert local_file(f"{address}/a%20b.pth?download=1") == path
    with pytest.raises(WeightsError, match="cannot be downloaded: .*404"):
        local_file(f"{address}/other.pth")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_paths_stay_and_other_schemes_are_refused(tmp_path):
    assert local_file(tmp_path / "x.pth") == tmp_path / "x.pth"
    with pytest.raises(WeightsError, match=r"s3://.*an http\(s\) URL"):
        local_file("s3://bucket/x.pth")


def test_code_behind_a_url_does_not_run(url, capsys, tmp_path):
    address, served = url
    torch.save({"state_dict": {}, "extra": Harmful()}, served / "x.pth")
    backbone = GCViT(init_cfg={"type": "Pretrained", "checkpoint": f"{address}/x.pth"})
    with pytest.raises(WeightsError, match="print"):
        backbone.init_weights()
    with pytest.raises(WeightsError, match="print"):
        mmdet_checkpoint(f"{address}/x.pth", tmp_path)
    assert "code from a file ran" not in capsys.readouterr().out
