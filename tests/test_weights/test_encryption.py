"""Encrypted checkpoints: round trips, wrong keys, damaged files."""

import io

import pytest
import torch

import ddetr_mm.weights.encryption as encryption
from ddetr_mm.errors import WeightsError
from ddetr_mm.weights.encryption import (
    decrypt_file,
    encrypt_file,
    encryption_key,
    is_encrypted,
    is_whole_encrypted,
    plain_file,
    use_encryption_key,
)
from ddetr_mm.weights.safe_read import read_raw


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(encryption, "SEGMENT_BYTES", 100)


@pytest.fixture(autouse=True)
def no_key_left():
    yield
    use_encryption_key(None)


def encrypted(path, content: bytes, key="correct horse"):
    encrypt_file(io.BytesIO(content), path, key)
    return path


def decrypted(path, key="correct horse") -> bytes:
    target = io.BytesIO()
    decrypt_file(path, target, key)
    return target.getvalue()


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 300])
def test_content_comes_back_and_is_not_readable_before(tmp_path, small_segments, length):
    content = b"weights " * 40
    path = encrypted(tmp_path / "a.pth", content[:length])
    assert is_encrypted(path) and is_whole_encrypted(path)
    assert decrypted(path) == content[:length]
    assert b"weights" not in path.read_bytes()


OLD = (
    "44444d4d454e4331654beee853815f51d222a54711947ae8af1fa56c24699c0000000000000007a441fc0077334c3b"
    "5cbd0b8eb77045319634f061761bb0992ebe0b7f21222fc2b8c84eeb0ade8c"
)
"""What version 0.1 wrote of ``weights``, with an eighth of today's cost of deriving the key."""


def test_files_of_the_first_version_open(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(bytes.fromhex(OLD))
    assert is_encrypted(path) and is_whole_encrypted(path) and decrypted(path) == b"weights"
    with pytest.raises(WeightsError, match="cannot be decrypted with this key"):
        decrypted(path, "wrong horse")
    # The cost cannot be lowered in a new file: the header is authenticated.
    new = encrypted(tmp_path / "new.pth", b"weights").read_bytes()
    path.write_bytes(b"DDMMENC1" + new[8:])
    with pytest.raises(WeightsError):
        decrypted(path)


def test_any_text_is_a_key(tmp_path):
    for key in ("ключ", "a\udcffb", " "):
        assert decrypted(encrypted(tmp_path / "a.pth", b"x", key), key) == b"x"


def test_a_wrong_key_and_none_are_reported(tmp_path):
    path = encrypted(tmp_path / "a.pth", b"x")
    with pytest.raises(WeightsError, match=r"a\.pth: encryption_key: cannot be decrypted with this key"):
        decrypted(path, "wrong horse")
    for key in (None, ""):
        with pytest.raises(WeightsError, match="is encrypted; give its key: encryption_key="):
            decrypted(path, key)


def test_every_changed_byte_is_noticed(tmp_path, small_segments):
    path = encrypted(tmp_path / "a.pth", b"y" * 150)
    whole = path.read_bytes()
    for position in (9, 25, 32, 41, 60, 160, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(WeightsError):
            decrypted(path)


def test_segments_cannot_be_exchanged_or_cut_off(tmp_path, small_segments):
    path = encrypted(tmp_path / "a.pth", b"1" * 100 + b"2" * 100)
    whole = path.read_bytes()
    head, first, second = whole[:55], whole[55:171], whole[171:]
    path.write_bytes(head + second + first)
    with pytest.raises(WeightsError, match="truncated or changed"):
        decrypted(path)
    path.write_bytes(head + first)
    assert not is_whole_encrypted(path)
    with pytest.raises(WeightsError, match="truncated or changed"):
        decrypted(path)


def test_two_files_of_one_content_and_key_differ(tmp_path):
    assert encrypted(tmp_path / "a", b"z").read_bytes() != encrypted(tmp_path / "b", b"z").read_bytes()


def test_an_encrypted_checkpoint_is_read_with_the_process_s_key(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(5)}}, tmp_path / "plain.pth")
    path = encrypted(tmp_path / "a.pth", (tmp_path / "plain.pth").read_bytes(), "k")
    with pytest.raises(WeightsError, match=r"a\.pth: is encrypted"):
        read_raw(path)
    use_encryption_key("k")
    assert encryption_key() == "k"
    raw = read_raw(path)
    assert raw.path == path and raw.payload["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
    use_encryption_key("")
    assert encryption_key() is None


def test_plain_files_need_no_key(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with plain_file(path) as same:
        assert same == path
    assert not is_encrypted(path) and not is_encrypted(tmp_path / "missing")


def test_without_files_in_memory_a_private_file_serves(tmp_path, monkeypatch):
    monkeypatch.delattr("os.memfd_create")
    path = encrypted(tmp_path / "a.pth", b"content", "k")
    with plain_file(path, "k") as plain:
        assert plain.read_bytes() == b"content"
        assert plain.stat().st_mode & 0o077 == 0
    assert not plain.exists()
