"""Whatever a server does: the right bytes, or an error that names the file; and the next call is not worse off."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests.data.sets import server as at
from tests.data.sets.test_fetch import CONTENT, OTHER, PAGE, POINTER, Place
from visper.common.errors import DataError
from visper.data.sets.fetch import RetryPolicy, SourceError

FAULTS = {
    "drop": lambda chance: at.drop(chance.randrange(len(CONTENT))),
    "reset": lambda chance: at.reset(chance.randrange(len(CONTENT))),
    "status": lambda chance: at.status(chance.choice((408, 416, 429, 500, 503)), Retry_After="0"),
    "page": lambda _: at.instead(PAGE),
    "pointer": lambda _: at.instead(POINTER),
    "whole": lambda _: at.whole(),
    "piece": lambda _: at.wrong_piece(),
    "unknown total": lambda _: at.piece_of_unknown_total(),
    "odd length": lambda _: at.odd_length(),
    "more": lambda _: at.more(),
    "promise": lambda chance: at.promise(chance.randrange(2 * len(CONTENT))),
    "chunked": lambda chance: at.unmeasured(chance.choice((None, 700))),
    "endless": lambda _: at.endless(),
    "compressed": lambda chance: at.encoded(chance.choice((0.3, 0.9, 1.0)), chance.random() < 0.5),
    "careless": lambda _: at.careless(),
    "slow": lambda _: at.slow(0.005, 5),
}
ATTACKS = int(os.environ.get("VISPER_ATTACKS", "60"))


@pytest.fixture
def shelf(monkeypatch):
    monkeypatch.setattr("visper.data.sets.fetch.PIECE", 50)  # the files are small
    with at.serving() as shelf:
        yield shelf


def survive(shelf, folder, seed):
    """A server with some faults in a row, asked until it is well again. Returns whether a call was refused."""
    chance = random.Random(seed)
    content, here = chance.choice((CONTENT, OTHER)), Place(folder, RetryPolicy(3, timeout=0.5, pause=0.001))
    faults = [FAULTS[chance.choice(list(FAULTS))](chance) for _ in range(chance.randrange(1, 7))]
    shelf.validators["/rows.json"] = chance.choice(({}, {"ETag": '"1"'}, {"ETag": 'W/"1"'}))
    url, refused = shelf.put("/rows.json", content, *faults), 0
    for _ in range(20):
        try:
            here.get(url)
        except (SourceError, DataError) as error:
            refused += 1
            assert not here.place.exists(), (seed, error)
        else:
            break
    here.get(url)
    assert here.is_whole(content), (seed, here.place.read_bytes()[:50])
    return bool(refused)


def test_after_any_faults_in_a_row_the_file_is_the_right_one(shelf, tmp_path):
    refused = sum(survive(shelf, tmp_path / str(seed), seed) for seed in range(ATTACKS))
    assert 0 < refused < ATTACKS


def silent():
    """An address where somebody takes the call and says nothing."""
    listening = socket.create_server(("127.0.0.1", 0))
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("source", ["file", "hub"])
def test_the_first_interrupt_ends_a_preparation_though_the_server_is_silent(tmp_path, source):
    listening, address = silent()
    origin = {"url": f"{address}/rows.json"} if source == "file" else {"hub": "some/one", "path": "rows.json"}
    described = {"downloads": [{"file": "rows.json", "sources": [origin]}], "name": "mine", "title": "t", "use": "u"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**described, "license": "l"}))
    command = [sys.executable, "-m", "visper", "data", "prepare", "mine.yaml", "--root", "data"]
    with (
        listening,
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background job, which may have started this, ignores the signal and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        ) as process,
    ):
        try:
            listening.settimeout(60)
            asked, _ = listening.accept()
            with asked:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                began = time.monotonic()
                said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert time.monotonic() - began < 10, said  # 2 on a machine that does nothing else; the server never answers
    assert process.returncode == 130 and "Traceback" not in said, said
