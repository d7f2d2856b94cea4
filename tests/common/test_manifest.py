"""Damage to a folder is detected and named before anything is loaded."""

import json
from pathlib import Path

import pytest
import xxhash

from visper.common import manifest
from visper.common.errors import DataError
from visper.common.manifest import MANIFEST, digest_of, find_damage, require_undamaged, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "deep" / "b").write_bytes(b"")
    for _ in range(2):  # it does not name itself
        write_manifest(tmp_path)
    return tmp_path


def test_every_file_is_named_with_size_and_digest(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST).read_text())
    assert entries["a"] == {"bytes": 10, "xxh3": xxhash.xxh3_128(b"0123456789").hexdigest()}
    assert entries.keys() == {"a", "deep/b"} and find_damage(folder) is None


def test_a_file_of_several_blocks_has_the_digest_of_its_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * (1 << 15) + b"rest"
    (tmp_path / "a").write_bytes(content)
    assert digest_of(tmp_path / "a") == xxhash.xxh3_128(content).hexdigest()


def test_every_flipped_bit_is_found(folder: Path) -> None:
    content = (folder / "a").read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / "a").write_bytes(damaged)
        assert find_damage(folder) == "the content of 'a' has changed since it was written"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"a": 1}', b'{"a": {}}', b"\xff"])
def test_a_damaged_manifest_is_damage(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder) is not None


def test_lost_and_shortened_files_are_named(folder: Path) -> None:
    (folder / "a").write_bytes(b"01234")
    assert find_damage(folder) == "'a' has 5 bytes, expected 10"
    with pytest.raises(DataError, match=r"'a' has 5 bytes, expected 10: copy the folder again.*manifest\.json"):
        require_undamaged(folder)
    (folder / "a").unlink()
    assert find_damage(folder) == "'a' is missing"
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == "it has no manifest.json, which is written last"
    require_undamaged(folder)


def test_what_is_not_named_may_change(folder: Path) -> None:
    (folder / "c").touch()
    write_manifest(folder, "b")
    (folder / "a").unlink()
    assert find_damage(folder) is None


def test_weights_that_were_not_written_with_it_are_named(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "tuned").mkdir()  # a folder of the user's beside the weights
    (folder / "tuned" / "model.safetensors").touch()
    assert find_damage(folder) is None
    (folder / "deep" / "shard-00003.safetensors").touch()
    assert find_damage(folder) == "'deep/shard-00003.safetensors' was not written with its other files"


def test_a_file_of_another_user_is_not_damaged(folder: Path, monkeypatch) -> None:
    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(manifest, "digest_of", refuse)  # tests may run as root, who may read everything
    with pytest.raises(PermissionError):
        find_damage(folder)
