"""Written files and folders are complete or absent, even if writers are killed or write at the same time."""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from visper.common.errors import ConfigError, DataError
from visper.common.files import (
    OUTSIDE,
    atomic_path,
    inside,
    is_leftover,
    naming,
    read_json_object,
    remove_leftovers,
    write_text,
)

TOKEN = 8 * "1f"


def leftover(place: Path, kind: str = "partial", host: str | None = None) -> Path:
    return place.with_name(f".{place.name}.{kind}-{host or socket.gethostname()}-{TOKEN}")


def put_folder(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.mkdir()
        (partial / "a").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_and_folders_are_replaced_without_a_trace(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_text(tmp_path / "deep" / "file", text)
        put_folder(tmp_path / "deep" / "folder", text)
    assert (tmp_path / "deep" / "file").read_text() == (tmp_path / "deep" / "folder" / "a").read_text() == "new"
    assert names(tmp_path / "deep") == {"file", "folder"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(type(error)), atomic_path(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"null", b'{"a": "\xff"}', b"[" * 100_000])
def test_a_json_file_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json' is cut short or not a JSON object: download"):
        read_json_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


def test_errors_of_writing_name_the_destination(tmp_path: Path) -> None:
    """Those of an open file name none, and the temporary name helps nobody."""
    for number in range(3):
        with (
            pytest.raises(OSError, match=r"^\[Errno \d+\] [^']*: '[^']*/out'$"),
            atomic_path(tmp_path / "out") as partial,
        ):
            if number == 0:
                Path("/dev/full").write_text("x")
            elif number == 1:
                (partial / "a").write_text("x")
            else:
                pq.write_table(pa.table({"a": [1]}), str(partial / "a"))
    with pytest.raises(OSError, match=r"No space left on device: 'answers'$"), naming(Path("answers")):
        Path("/dev/full").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"elsewhere'$"), atomic_path(tmp_path / "out"):
        Path("elsewhere").read_text()


def test_links_to_nowhere_and_files_in_a_folders_place_are_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for place in ("link", "link/a"):
        with pytest.raises(ConfigError, match=r"link' is a link to '.*nowhere', which does not exist: create"):
            write_text(tmp_path / place, "x")
    for place in ("file/a", "file/a/b"):
        with pytest.raises(ConfigError, match=r"a part of its path is a file: expected a folder"):
            write_text(tmp_path / place, "x")
    assert names(tmp_path) == {"link", "file"}


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_safetensors_errors_about_the_disk_are_errors_of_the_operating_system(tmp_path: Path, size: int) -> None:
    """The limit of a file's size stands for a full disk: safetensors reports both in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        expected = nullcontext() if size == 100 else pytest.raises(OSError, match=r"\[Errno 27\] .*large: '.*weights'")
        with expected, atomic_path(tmp_path / "weights") as partial:
            save_file({"a": torch.zeros(size)}, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ({"weights"} if size == 100 else set())


def test_a_folder_returns_when_its_successor_cannot_take_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_folder(tmp_path / "folder", "old")
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if ".partial-" in source.name:
            raise PermissionError(13, "refused")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        put_folder(tmp_path / "folder", "new")
    assert names(tmp_path) == {"folder"} and (tmp_path / "folder" / "a").read_text() == "old"


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_text("pixels")
    with pytest.raises(ConfigError, match=r"images' is a folder, and a file would be written there: name a file"):
        write_text(tmp_path / "images", "report")
    assert (tmp_path / "images" / "1.png").read_text() == "pixels" and len(list(tmp_path.iterdir())) == 1


def test_two_writers_at_once_share_nothing(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other and socket.gethostname() in one.name and is_leftover(one)
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "one"


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    put_folder(tmp_path / "folder", "new")
    partial = str(Path(flushed[0]).parent)
    assert is_leftover(Path(partial)) and flushed == [f"{partial}/a", partial, str(tmp_path)]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "ü" * 127):
        write_text(tmp_path / name, "new")
    assert len(names(tmp_path)) == 2


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    put_folder(tmp_path / "far", "far")
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "file").symlink_to(tmp_path / "far" / "a")
    put_folder(tmp_path / "link", "new")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "far" / "a").read_text() == "far" and not (tmp_path / "link").is_symlink()
    assert names(tmp_path) == {"far", "file", "link"}


def test_a_killed_writer_leaves_the_old_content_and_is_tidied_up_after(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from visper.common.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and (tmp_path / "file").read_text() == "old"
    remove_leftovers(tmp_path.iterdir())
    assert names(tmp_path) == {"file"}


def test_leftovers_of_other_hosts_and_files_of_other_names_stay(tmp_path: Path) -> None:
    (tmp_path / "place").touch()
    place = tmp_path / "place"
    others = [leftover(place, host="elsewhere"), leftover(place, host=f"{socket.gethostname()}-2"),
              leftover(place, "old", "elsewhere"), tmp_path / ".place.partial-1", tmp_path / ".place"]  # fmt: skip
    own = [leftover(place), leftover(place, "old")]
    for path in (*others, *own):
        path.mkdir()
    remove_leftovers(tmp_path.iterdir())
    assert names(tmp_path) == {"place", *(path.name for path in others)}


def test_a_folder_set_aside_returns_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    put_folder(tmp_path / "folder", "old")
    (tmp_path / "folder").rename(leftover(tmp_path / "folder", "old"))
    leftover(tmp_path / "folder").mkdir()
    remove_leftovers(tmp_path.iterdir())
    assert names(tmp_path) == {"folder"} and (tmp_path / "folder" / "a").read_text() == "old"


def test_a_name_stays_inside_its_folder_when_all_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "a" / "in.jpg").write_text("x")
    (folder / "link.jpg").symlink_to("a/in.jpg")
    (folder / "up.jpg").symlink_to("../secret")
    (folder / "far").symlink_to(tmp_path)
    (tmp_path / "entry").symlink_to(folder)
    (tmp_path / "images-2").mkdir()
    for name in ("a/in.jpg", "link.jpg", "a/../link.jpg", "lost.jpg", "lost/lost.jpg", "far/images/a/in.jpg"):
        assert inside(folder, name) == folder / name
        assert inside(tmp_path / "entry", name) == tmp_path / "entry" / name
    for name in ("up.jpg", "far/secret", "../secret", "a/../../secret", str(tmp_path / "secret"), "..", ".", "a/..",
                 "../images-2/x"):  # fmt: skip
        with pytest.raises(DataError) as error:
            inside(folder, name)
        assert error.value.reason == OUTSIDE and str(folder) in error.value.detail


def test_the_folder_may_be_relative_or_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "images").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        assert inside("images", "a.jpg") == Path("images/a.jpg")
        with pytest.raises(DataError):
            inside("images", "../a.jpg")
    assert inside("/", str(tmp_path / "a.jpg")) == tmp_path / "a.jpg"


def test_an_error_on_a_read_only_disk_names_the_file_not_its_temporary_name(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    for operation in ("unlink", "write_text"):  # removing what does not exist is refused there, too
        monkeypatch.setattr(Path, operation, refuse)
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'file'}'")):
        write_text(tmp_path / "file", "text")
