"""No code from a file runs; every broken file gets its own message."""

import builtins
import functools
import io
import json
import operator
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from mmdet.registry import MODELS
from safetensors.torch import save_file
from weights_builders import small_canonical, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import convert_checkpoint, load_backbone, read_checkpoint
from ddetr_mm.weights.formats import OFFICIAL, from_canonical
from ddetr_mm.weights.safe_read import read_raw

OMEGACONF = Path(__file__).parents[1] / "assets" / "omegaconf_2.4.ckpt"


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(sentinel: Path) -> dict[str, object]:
    """Objects that would leave a file behind if their pickle were run."""
    touch = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {sentinel}"),
        "builtins.eval": Call(eval, touch),
        "builtins.exec": Call(exec, touch),
        "builtins.open": Call(open, str(sentinel), "w"),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "operator.attrgetter": Call(operator.attrgetter, "system"),
        "functools.partial": Call(functools.partial, os.system, f"touch {sentinel}"),
        "torch.load": Call(torch.load, str(sentinel.with_suffix(".pth"))),
        "torch.hub.load": Call(torch.hub.load, str(sentinel), "model"),
        "shutil.copy": Call(shutil.copy, __file__, str(sentinel)),
        "builtins.map": Call(builtins.map, os.system, [f"touch {sentinel}"]),
    }


@pytest.fixture
def sentinel(tmp_path):
    """A file that must not come into being."""
    path = tmp_path / "executed"
    (tmp_path / "executed.pth").write_bytes(b"")
    yield path
    assert not path.exists(), "code from the file was run"


NAMES = list(attacks(Path("executed")))


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", NAMES)
def test_code_in_a_torch_file_is_refused_by_name(name, old_format, sentinel, tmp_path):
    path = tmp_path / "model.pth"
    content = {"state_dict": {"weight": torch.zeros(2)}, "hyper_parameters": attacks(sentinel)[name]}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(WeightsError, match="never runs code") as caught:
        read_checkpoint(path)
    assert name in str(caught.value) or name.split(".")[-1] in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickles_are_refused(protocol, sentinel, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(attacks(sentinel)["os.system"], protocol=protocol))
    with pytest.raises(WeightsError, match="system"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"weight": [1, 2]}, protocol=protocol))
    with pytest.raises(WeightsError):
        read_checkpoint(path)


def test_newer_pickle_protocol_inside_a_zip_is_refused(sentinel, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(attacks(sentinel)["os.system"], path, pickle_protocol=4)
    with pytest.raises(WeightsError, match=r"posix\.system|os\.system"):
        read_checkpoint(path)


def test_oldest_tar_format_is_refused(sentinel, tmp_path):
    path = tmp_path / "model.pth"
    payload = pickle.dumps(attacks(sentinel)["os.system"], protocol=2)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    with pytest.raises(WeightsError, match="tar archive"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval"])
def test_code_in_a_hugging_face_folder_is_refused(name, sentinel, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deformable_detr"}')
    torch.save({"model.level_embed": attacks(sentinel)[name]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="never runs code"):
        read_checkpoint(tmp_path)


def test_code_in_a_backbone_file_or_a_conversion_is_refused(sentinel, tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(1), "x": attacks(sentinel)["os.system"]}, path)
    with pytest.raises(WeightsError, match="never runs code"):
        load_backbone(torch.nn.Linear(1, 1), path)
    with pytest.raises(WeightsError, match="never runs code"):
        convert_checkpoint(path, tmp_path / "out.pth", "mmdet")
    assert not (tmp_path / "out.pth").exists()


def test_function_of_a_known_library_is_not_harmless(tmp_path):
    raw = b"\x80\x02cnumpy.testing._private.utils\nrunstring\nX\x01\x00\x00\x00a}\x86R."
    path = zip_with_pickle(tmp_path / "model.pth", raw)
    with pytest.raises(WeightsError, match="runstring"):
        read_raw(path)


def test_name_that_pretends_to_be_a_class_stays_inert(tmp_path):
    # A class of Lightning's that does not exist: nothing is imported, nothing is called.
    raw = b"\x80\x02}X\x01\x00\x00\x00acpytorch_lightning.evil.module\nRunMe\nX\x02\x00\x00\x00ls\x85Rs."
    payload = read_raw(zip_with_pickle(tmp_path / "model.pth", raw)).payload
    assert payload["a"].arguments == ("ls",)


def test_whole_pickled_model_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules.*state_dict"):
        read_checkpoint(path)


def zip_with_pickle(path: Path, pickled: bytes, data: bytes = b"") -> Path:
    """A PyTorch archive around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        if data:
            archive.writestr("archive/data/0", data)
    return path


# --- Bookkeeping objects that must load ---


def test_an_omegaconf_config_in_a_checkpoint_stays_inert():
    """The file was saved with OmegaConf 2.4, as Lightning saves hyper parameters."""
    payload = read_raw(OMEGACONF).payload
    assert torch.equal(payload["state_dict"]["weight"], torch.arange(3.0))
    assert type(payload["hyper_parameters"]).__module__.startswith("ddetr_mm.")
    assert "omegaconf" not in sys.modules


def test_harmless_bookkeeping_loads_and_stays_inert(tmp_path):
    import argparse
    import datetime
    import enum
    import pathlib

    import numpy as np
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    path = tmp_path / "model.pth"
    bookkeeping = {
        "namespace": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
        "folder": pathlib.PosixPath("/tmp/x"),
        "when": datetime.datetime(2020, 1, 1),
        "defaults": defaultdict(list, a=[1]),
        "queue": deque([1, 2], maxlen=3),
        "history": HistoryBuffer([1.0, 2.0], [1, 1]),
        "number": np.float64(2.5),
        "array": np.arange(3),
        "cfg": ConfigDict(a=dict(b=1)),
        "ordered": OrderedDict(a=1),
        "tuple": (1, None, True, b"x", {1, 2}, 2 + 1j),
    }
    torch.save({"meta": bookkeeping, "state_dict": small_canonical()}, path)
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.state_dict["level_embed"], small_canonical()["level_embed"])
    payload = read_raw(path).payload["meta"]
    assert payload["defaults"] == {"a": [1]} and payload["queue"] == [1, 2]
    assert not isinstance(payload["folder"], pathlib.Path) and not isinstance(
        payload["history"], HistoryBuffer
    )
    assert isinstance(enum.Enum, type)


def test_class_lists_loaded_for_one_file_do_not_stay_allowed(tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))
    test_harmless_bookkeeping_loads_and_stays_inert(tmp_path)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.usefixtures("kept_safe_globals")
def test_real_classes_allowed_elsewhere_are_not_built(tmp_path):
    from mmengine.logging import HistoryBuffer

    path = tmp_path / "model.pth"
    torch.save({"state_dict": small_canonical(), "meta": {"h": HistoryBuffer([1.0], [1])}}, path)
    with torch.serialization.safe_globals([HistoryBuffer, getattr]):
        history = read_raw(path).payload["meta"]["h"]
        assert HistoryBuffer in torch.serialization.get_safe_globals()
    assert not isinstance(history, HistoryBuffer)


def test_old_torch_format_loads(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": small_canonical()}, path, _use_new_zipfile_serialization=False)
    assert len(read_checkpoint(path).state_dict) == len(small_canonical())


# --- Broken files ---


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """name → (path, words the message must hold)."""
    good = write_mmdet(folder / "good.pth", small_canonical()).read_bytes()
    old = folder / "old.pth"
    torch.save({"state_dict": small_canonical()}, old, _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(3)}, folder / "good.safetensors")
    tensors = (folder / "good.safetensors").read_bytes()
    cases = {
        "empty.pth": (b"", "empty"),
        "cut.pth": (good[: len(good) // 2], "truncated"),
        "cut_old.pth": (old.read_bytes()[:-100], "truncated"),
        "cut_short_old.pth": (old.read_bytes()[:40], "no whole PyTorch file|truncated"),
        "image.pth": (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG image"),
        "photo.pth": (b"\xff\xd8\xff\xe0" + bytes(64), "JPEG image"),
        "notes.pth": ("Gewichte für das Modell\n".encode() * 40, "text file"),
        "data.pth": (b'{"state_dict": {}}', "JSON"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        "page.pth": (b"<!DOCTYPE html><html>404</html>", "web page"),
        "packed.pth": (b"\x1f\x8b\x08\x00" + bytes(64), "gzip"),
        "random.pth": (bytes(range(1, 256)) * 9, "neither a PyTorch nor a safetensors"),
        "model.tlt": (bytes(range(7, 250)) * 9, "encrypted.*closed"),
        "model.etlt": (bytes(range(7, 250)) * 9, "encrypted.*closed"),
        "huge.safetensors": (
            struct.pack("<Q", 2**60) + b"{}" + bytes(50),
            "header claims 1152921504606846976",
        ),
        "cut.safetensors": (tensors[:-4], "no whole safetensors"),
        "short.safetensors": (tensors[:20], "header claims"),
        "tiny.safetensors": (b"\x01", "safetensors"),
        "lying.safetensors": (
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "no whole safetensors",
        ),
        "garbled.safetensors": (struct.pack("<Q", 8) + b"{]garble" + bytes(8), "no whole safetensors"),
        "other.zip": (zipped({"a.txt": b"hello"}), "not a PyTorch file"),
        "script.pth": (zipped({"m/data.pkl": b"\x80\x02}.", "m/code/x.py": b"1"}), "TorchScript"),
        "garbage_index.pth": (zipped({"m/data.pkl": b"\x80\x02}q\xff\xff"}), "damaged"),
        "no_end.pth": (zipped({"m/data.pkl": b"\x80\x02}"}), "damaged"),
    }
    written = {}
    for name, (content, words) in cases.items():
        (folder / name).write_bytes(content)
        written[name] = (folder / name, words)
    return written


def safetensors_bytes(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_every_broken_file_has_a_clear_message(tmp_path):
    for name, (path, words) in broken_files(tmp_path).items():
        with pytest.raises(WeightsError, match=words) as caught:
            read_checkpoint(path)
        problem = caught.value.problems[0]
        assert str(problem.file) == str(path), name
        assert problem.hint, f"{name}: no hint in {problem}"


def test_missing_file_and_folders_of_other_kinds(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match=r"without config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"without model\.safetensors"):
        read_checkpoint(tmp_path)
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="type None"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(WeightsError, match="not JSON"):
        read_checkpoint(tmp_path)


def test_shards_cannot_lead_out_of_their_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deformable_detr"}')
    index = {"weight_map": {"model.level_embed": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside its folder"):
        read_checkpoint(tmp_path)
    index["weight_map"]["model.level_embed"] = "model-00001.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is missing"):
        read_checkpoint(tmp_path)


def test_zip_bomb_is_refused_unopened(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", bytes(200 * 2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(WeightsError, match="compressed"):
        read_raw(path)


def test_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path):
    path = tmp_path / "expanded.pth"
    torch.save({"state_dict": {"encoder.layers.0.ffn.layers.1.weight": torch.zeros(1).expand(10**10)}}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightsError, match="claims 10000000000 values"):
        read_checkpoint(path)


def test_storage_that_claims_more_than_the_file_is_refused(tmp_path):
    path = tmp_path / "good.pth"
    torch.save({"weight": torch.zeros(77)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    # Storage size and tensor size alike: 77 becomes 2**30.
    entries[name] = entries[name].replace(b"K\x4d", b"J" + struct.pack("<i", 2**30))
    path.write_bytes(zipped(entries))
    with pytest.raises(WeightsError):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "single tensor"),
        ([1, 2], "a list"),
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"state_dict": {"a": "text", "b": torch.zeros(1)}}, "no Deformable DETR .*its keys: b"),
        ({"state_dict": {"a": {"b": torch.zeros(1)}}}, "no Deformable DETR .*its keys: b"),
        ({"epoch": 3, "lr": 0.1}, r"holds no weights \(its entries: epoch, lr\)"),
        ({"state_dict_encrypted": True, "state_dict": {"a": torch.zeros(1)}}, "encrypted"),
        ({"state_dict": b"\x00\x01encrypted"}, "encrypted"),
        ({"state_dict": io.BytesIO(b"\x00\x01")}, "encrypted"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "not supported"),
        ({"fc.weight": torch.zeros(2)}, "no Deformable DETR"),
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "a ResNet or GCViT of another kind"),
    ],
)
def test_files_without_a_plain_state_dict(content, words, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(path)


@pytest.mark.parametrize("old_format", [False, True])
def test_flipped_bytes_never_escape_as_other_errors(old_format, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": small_canonical()}, path, _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    for position in torch.randint(0, len(content), (60,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 0x5A
        path.write_bytes(damaged)
        try:
            checkpoint = read_checkpoint(path)
        except WeightsError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(value, torch.Tensor) for value in checkpoint.state_dict.values())


def test_getattr_of_anything_but_a_history_is_refused(tmp_path):
    from mmengine.logging import HistoryBuffer

    path = tmp_path / "model.pth"
    for owner, name in (
        (HistoryBuffer, "__subclasses__"),
        (int, "mean"),
        (HistoryBuffer, "register_statistics"),
    ):
        content = {"history": HistoryBuffer([1.0], [1]), "x": Call(getattr, owner, name)}
        torch.save({"state_dict": small_canonical(), "meta": content}, path)
        with pytest.raises(WeightsError, match="never runs code"):
            read_checkpoint(path)


# --- NumPy's arrays ---


def arrays_of(tensors, dtype=None):
    return {key: value.numpy().astype(dtype) if dtype else value.numpy() for key, value in tensors.items()}


def official_weights():
    canonical = small_canonical(counters=False)
    return from_canonical(canonical, OFFICIAL, with_box_refine=True, two_stage=False)[0]


def assert_is_small(checkpoint):
    expected = small_canonical(counters=False)
    assert set(checkpoint.state_dict) == set(expected)
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_npz_archive_is_read(save, prefix, tmp_path):
    save(tmp_path / "x.npz", **{prefix + key: value for key, value in arrays_of(official_weights()).items()})
    checkpoint = read_checkpoint(tmp_path / "x.npz")
    assert_is_small(checkpoint)
    assert checkpoint.format == ("tao" if prefix else "official")
    report = convert_checkpoint(tmp_path / "x.npz", tmp_path / "x.pth", "mmdet")
    assert report.complete
    assert_is_small(read_checkpoint(tmp_path / "x.pth"))


def test_arrays_in_a_torch_file_are_read(tmp_path):
    torch.save({"model": arrays_of(official_weights()), "epoch": 3}, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert_is_small(checkpoint)
    assert checkpoint.format == "official" and checkpoint.meta.epoch == 3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2s_pickle_of_arrays_is_read(protocol, tmp_path):
    content = {"model": arrays_of(official_weights()), "__author__": "x", "matching_heuristics": True}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert_is_small(read_checkpoint(tmp_path / "x.pkl"))


@pytest.mark.parametrize("dtype", [">f4", "<f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_byte_order_and_layout(dtype, order, tmp_path):
    arrays = {
        key: np.asarray(value, dtype, order=order) for key, value in arrays_of(official_weights()).items()
    }
    for name, write in (
        ("x.pkl", lambda path: path.write_bytes(pickle.dumps(arrays))),
        ("x.npz", lambda path: np.savez(path, **arrays)),
        ("x.pth", lambda path: torch.save(arrays, path)),
    ):
        write(tmp_path / name)
        found = read_checkpoint(tmp_path / name).state_dict
        for key, value in small_canonical(counters=False).items():
            assert torch.allclose(found[key].float(), value, atol=1e-2 if "2" in dtype else 1e-6), (name, key)
        assert found["level_embed"].dtype == torch.from_numpy(np.zeros(1, dtype[1:])).dtype


def detectron2_name(key):
    """Detectron2's name of one of torchvision's keys."""
    if key.startswith(("conv1", "bn1")):
        return key.replace("conv1", "stem.conv1").replace("bn1", "stem.conv1.norm")
    stage, rest = int(key[5]), key[7:]
    block, part = rest.split(".", 1)
    part = part.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for number in "123":
        part = part.replace(f"bn{number}", f"conv{number}.norm")
    return f"res{stage + 1}.{block}.{part}"


def test_detectron2s_resnet_is_a_backbone(tmp_path):
    model = torchvision.models.resnet18()
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("fc")}
    named = {
        detectron2_name(key): value.numpy() for key, value in weights.items() if "num_batches" not in key
    }
    content = {
        "model": {**named, "stem.fc.weight": np.zeros((2, 2), np.float32)},
        "__author__": "torchvision",
    }
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
    backbone = MODELS.build(dict(type="ResNet", depth=18))
    report = load_backbone(backbone, tmp_path / "R-18.pkl")
    assert report.missing == [] and report.source_format == "a backbone with Detectron2's names"
    for key, value in backbone.state_dict().items():
        assert "num_batches" in key or torch.equal(value, weights[key]), key


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.array([{}], dtype=object)}, "holds Python objects, not arrays"),
        ({"a": np.array(["x"])}, "holds arrays of no numbers"),
    ],
)
def test_archives_of_anything_but_numbers_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(tmp_path / "x.npz")


# --- Kinds of files that are not read, each by its own name ---


def other_kinds(folder: Path) -> dict[str, tuple[Path, str]]:
    """A file or folder of every kind → the words by which it is refused."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    torch.jit.trace(model, torch.zeros(1, 2)).save(str(folder / "traced.pt"))
    torch.jit.script(model).save(str(folder / "scripted.pth"))
    torch.save(model, folder / "whole.pth")
    torch.save({"model": model, "epoch": 1}, folder / "inside.pth")
    torch.save(model, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), folder / "program.pt2")
    opaque = bytes(range(7, 250)) * 9
    torch.save({"state_dict_encrypted": True, "state_dict": opaque}, folder / "encrypted.pth")
    for name in ("keras.hdf5", "tlt_resnet.h5", "old_network.tlt", "renamed.pth"):
        (folder / name).write_bytes(b"\x89HDF\r\n\x1a\n" + opaque)
    for name in (
        "x.tlt",
        "x.etlt",
        "x.onnx",
        "x.engine",
        "x.plan",
        "x.trt",
        "x.pdparams",
        "x.pb",
        "x.tflite",
    ):
        (folder / name).write_bytes(opaque)
    (folder / "x.msgpack").write_bytes(opaque)
    (folder / "__0_0.distcp").write_bytes(opaque)
    np.save(folder / "one.npy", np.zeros(3))
    (folder / "keras.keras").write_bytes(zipped({"model.weights.h5": b"1", "config.json": b"{}"}))
    for name, inside in (("dcp", ".metadata"), ("zero", "zero_to_fp32.py"), ("tf", "saved_model.pb")):
        (folder / name).mkdir()
        (folder / name / inside).write_bytes(b"1")
    words = {
        "traced.pt": "is a TorchScript program, not a file of weights; save the state_dict",
        "scripted.pth": "is a TorchScript program, not a file of weights",
        "whole.pth": "is a whole pickled model, not its weights: it asks to build torch.nn.modules.container",
        "inside.pth": "is a whole pickled model, not its weights",
        "old.pth": "is a whole pickled model, not its weights",
        "program.pt2": "is a program of torch.export, not a file of weights",
        "encrypted.pth": "is encrypted by TAO's own, closed scheme and cannot be read here",
        "keras.hdf5": "is an HDF5 file (Keras, or a network of TAO's TensorFlow branch)",
        "tlt_resnet.h5": "is an HDF5 file",
        "old_network.tlt": "is an HDF5 file",
        "renamed.pth": "is an HDF5 file",
        "x.tlt": "is a .tlt file: it is encrypted by TAO's own, closed scheme",
        "x.etlt": "is an .etlt file, an export for TensorRT that is encrypted",
        "x.onnx": "is an ONNX model, not a file of weights; evaluate.checkpoint",
        "x.engine": "is a TensorRT engine, not a file of weights; evaluate.trt_engine",
        "x.plan": "is a TensorRT engine",
        "x.trt": "is a TensorRT engine",
        "x.pdparams": "is PaddlePaddle's",
        "x.pb": "is a TensorFlow graph",
        "x.tflite": "is a TensorFlow Lite model",
        "x.msgpack": "is a Flax checkpoint",
        "__0_0.distcp": "is a part of a distributed checkpoint",
        "one.npy": "is a NumPy array, not a file of weights",
        "keras.keras": "is a Keras archive",
        "dcp": "is a distributed checkpoint of torch",
        "zero": "is a checkpoint of DeepSpeed",
        "tf": "is a model saved by TensorFlow",
    }
    return {name: (folder / name, text) for name, text in words.items()}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The files of :func:`other_kinds`; nobody may change them."""
    return other_kinds(tmp_path_factory.mktemp("kinds"))


KINDS = [
    *("traced.pt", "scripted.pth", "whole.pth", "inside.pth", "old.pth", "program.pt2", "encrypted.pth"),
    *("keras.hdf5", "tlt_resnet.h5", "old_network.tlt", "renamed.pth", "x.tlt", "x.etlt", "x.onnx"),
    *("x.engine", "x.plan", "x.trt", "x.pdparams", "x.pb", "x.tflite", "x.msgpack", "__0_0.distcp"),
    *("one.npy", "keras.keras", "dcp", "zero", "tf"),
]


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_files_are_named(name, kinds, tmp_path):
    path, words = kinds[name]
    for read in (read_checkpoint, lambda one: load_backbone(torch.nn.Linear(1, 1), one)):
        with pytest.raises(WeightsError) as caught:
            read(path)
        (problem,) = caught.value.problems
        assert words in str(problem) and str(problem.file) == str(path) and problem.hint
    with pytest.raises(WeightsError):
        convert_checkpoint(path, tmp_path / "y.pth", "tao")
    assert not list(tmp_path.iterdir())


def test_the_list_of_kinds_is_whole(kinds):
    assert sorted(kinds) == sorted(KINDS)
