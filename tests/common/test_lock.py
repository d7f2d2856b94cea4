"""One process at a time holds a folder's lock; a dead process holds none."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest

from visper.common.console import Console
from visper.common.errors import ConfigError
from visper.common.lock import HOLDER, LOCK, InUseError, locked, new_folder

QUIET = Console(quiet=True)
HOLDS = """
import os, sys, time
from pathlib import Path
from visper.common.console import Console
from visper.common.lock import locked
with locked(Path(sys.argv[1]), Console(quiet=True)):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_refused_with_who_holds_it_and_since_when(tmp_path: Path) -> None:
    with locked(tmp_path / "run", QUIET):
        holder = rf"process {os.getpid()} on host '{re.escape(socket.gethostname())}' since 20\d\d-.* UTC"
        with (
            pytest.raises(ConfigError, match=rf"/run' is in use by {holder}: wait for it"),
            locked(tmp_path / "run", QUIET),
        ):
            pass
        assert (tmp_path / "run" / LOCK).exists(), "the refused one leaves the lock alone"
        (tmp_path / "run" / HOLDER).write_text("{")
        with pytest.raises(ConfigError, match="in use by another process"), locked(tmp_path / "run", QUIET):
            pass


def test_a_killed_holder_holds_nothing_though_its_forked_child_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"), locked(tmp_path, QUIET):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path, QUIET):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_left_of_a_lock_but_what_was_written_under_it(tmp_path: Path) -> None:
    with locked(tmp_path / "made" / "deep", QUIET):
        pass
    assert not (tmp_path / "made").exists()
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there", QUIET), locked(tmp_path / "kept", QUIET):
        (tmp_path / "kept" / "a").touch()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"there", "kept", "kept/a"}


def test_the_next_holder_removes_what_one_killed_as_it_began_has_left(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from visper.common import files, lock\n"
        "from visper.common.console import Console\n"
        "files._take_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "lock.locked(Path(sys.argv[1]), Console()).__enter__()"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL and any(".json.partial-" in file.name for file in tmp_path.iterdir())
    with locked(tmp_path, QUIET):
        pass
    assert not list(tmp_path.iterdir())


def test_the_next_writer_of_a_new_folder_removes_what_killed_ones_left_of_it_alone(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from visper.common.lock import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("out", "out", "out.1"):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
        assert killed.returncode == -signal.SIGKILL
    with new_folder(tmp_path / "out") as partial:
        partial.mkdir()
        with pytest.raises(InUseError), new_folder(tmp_path / "out"):
            pass
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.1.")]
    assert left == ["out"] and len(list(tmp_path.iterdir())) == 3, "out.1's lock and half are not out's to remove"


def test_an_error_under_the_lock_releases_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, QUIET):
        raise KeyboardInterrupt
    with locked(tmp_path, QUIET):
        pass


def test_whoever_waits_goes_on_when_the_holder_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    said = StringIO()

    def end_holder() -> None:
        until = time.monotonic() + 30
        while "waiting for it to end" not in said.getvalue() and time.monotonic() < until:
            time.sleep(0.05)
        holder.kill()

    ending = threading.Thread(target=end_holder)
    ending.start()
    with locked(tmp_path, Console(file=said, width=500), wait=True):
        assert "waiting for it to end" in said.getvalue()
        assert holder.wait(30) == -signal.SIGKILL
    ending.join()
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_and_used(tmp_path: Path, monkeypatch, number: int) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = StringIO()
    with locked(tmp_path / "run", Console(file=said, width=500)):
        (tmp_path / "run" / "a").touch()
    assert re.search(
        r"warning +the file system of '.*run' has no locks \(.*\): do not start a second process", said.getvalue()
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]
