"""Kills preparations with SIGKILL at chosen points, repeats each, and compares the trees: run by test_killed.py.

The points are all moments a preparation touches a file under its root (Python's audit events) and all pieces it reads
or writes; each run is a fork of this process, which has one thread.

    python -m tests.data.sets.killed SET.yaml FOLDER POINTS
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from rich.console import Console

import visper.data.images  # noqa: F401 - loaded once, not in each fork
from visper.data.sets import archives
from visper.data.sets import fetch as download
from visper.data.sets.background import ProgressBar
from visper.data.sets.fetch import RetryPolicy
from visper.data.sets.prepare import prepare

download.PIECE = 300
download.CHUNK = archives.CHUNK = 300


def in_fork(work) -> int:
    """The wait status of a fork that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - a fork must not go on as its parent
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def run(name: str, root: Path, die_at: int = 0, count_to: Path | None = None) -> None:
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple) -> None:
        if (event == "open" or event.startswith("os.")) and str(root) in str(arguments[:2]):
            step()

    advance = ProgressBar.advance
    ProgressBar.advance = lambda self, count: (step(), advance(self, count))[1]
    sys.addaudithook(on_event)
    prepare(name, root, workers=2, console=Console(quiet=True), patience=RetryPolicy(attempts=3, timeout=5, pause=0.01))
    if count_to is not None:
        count_to.write_text(str(passed))


def digest(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    name, folder, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    reference, counted = folder / "reference", folder / "count"
    assert in_fork(lambda: run(name, reference, count_to=counted)) == 0
    steps, expected = int(counted.read_text()), digest(reference)
    points = sorted({1 + round(i * (steps - 1) / max(1, wanted - 1)) for i in range(wanted)})
    differing = []
    killed = 0
    for point in points:
        root = folder / "killed"
        killed += in_fork(lambda point=point, root=root: run(name, root, point)) == signal.SIGKILL
        repeated = in_fork(lambda root=root: run(name, root))
        if repeated != 0 or digest(root) != expected:
            found = digest(root)
            odd = {file for file in {*found, *expected} if found.get(file) != expected.get(file)}
            differing.append((point, repeated, sorted(odd)))
        shutil.rmtree(root)
    root = folder / "often"  # killed again and again, never cleaned
    for point in points[:: max(1, len(points) // 20)]:
        in_fork(lambda point=point: run(name, root, max(2, point // 4)))
    if in_fork(lambda: run(name, root)) != 0 or digest(root) != expected:
        differing.append(("often", 0, sorted(digest(root))))
    print(
        json.dumps(
            {"steps": steps, "killed": killed, "points": len(points), "files": len(expected), "differing": differing}
        )
    )


if __name__ == "__main__":
    main()
