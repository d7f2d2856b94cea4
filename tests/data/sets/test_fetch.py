"""Every fault of a server ends in the right bytes or in a message with a remedy; no partial file is left."""

import hashlib
import random
import threading
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from tests.data.sets import server as at
from visper.common.errors import DataError
from visper.data.sets.background import ProgressBar
from visper.data.sets.fetch import Remote, RetryPolicy, SourceError, obtain
from visper.data.sets.lockfile import Lockfile

CONTENT = b"[" + random.Random(0).randbytes(5000) + b"]"
OTHER = b"[" + random.Random(1).randbytes(6000) + b"]"
QUICK = RetryPolicy(attempts=3, timeout=0.25, pause=0.01, longest_pause=0.05)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 112962519\n"
PAGE = b"<!DOCTYPE html><html>quota exceeded</html>"


@pytest.fixture
def shelf(monkeypatch):
    monkeypatch.setattr("visper.data.sets.fetch.PIECE", 50)  # the files are small
    with at.serving() as shelf:
        yield shelf


class Place:
    """A file on its way to a root."""

    def __init__(self, root, patience=QUICK):
        self.root, self.patience, self.stop = root, patience, threading.Event()
        self.place, self.part = root / "rows.json", root / "state" / "rows.json"
        self.lockfile = Lockfile(root / "lock.json")

    def get(self, url, remote=None, **known):
        progress = Progress(console=Console(quiet=True), disable=True)
        meter = ProgressBar(progress, self.stop, "rows.json")
        remote = remote or Remote("rows.json", url, url, **known)
        return obtain(remote, self.place, self.part, False, self.lockfile, meter, self.patience)

    def is_whole(self, content=CONTENT):
        left = list(self.part.parent.glob("*")) if self.part.parent.exists() else []
        return self.place.read_bytes() == content and not left


@pytest.fixture
def here(tmp_path):
    return Place(tmp_path)


SURVIVED = {
    "nothing wrong": [],
    "dropped once": [at.drop(1000)],
    "dropped four times, gaining": [at.drop(100), at.drop(100), at.drop(100), at.drop(100)],
    "dropped before the first byte": [at.drop(0), at.drop(0)],
    "dropped before the last byte": [at.drop(len(CONTENT) - 1)],
    "reset in the middle": [at.reset(3000)],
    "429 with Retry-After in seconds": [at.status(429, Retry_After="0")],
    "429 with Retry-After as a date": [at.status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
    "429 with nonsense in Retry-After": [at.status(429, Retry_After="soon")],
    "503 twice": [at.status(503, Retry_After="0"), at.status(503)],
    "500, 502, then well": [at.status(500), at.status(502)],
    "504 between two drops": [at.drop(2000), at.status(504), at.drop(500)],
    "408": [at.status(408)],
    "Range ignored after a drop": [at.drop(1000), at.whole()],
    "wrong piece after a drop": [at.drop(1000), at.wrong_piece()],
    "416 after a drop": [at.drop(1000), at.status(416)],
    "promised more than there is, once": [at.promise(len(CONTENT) + 10)],
    "slow bytes": [at.slow(0.02, 10)],
    "stalled, then well": [at.stall(1000, 0.6)],
    "no length": [at.unmeasured()],
    "no length and cut": [at.unmeasured(cut=700)],
    "corrupt, then well": [at.corrupt()],
    "cut short, then well": [at.promise(1000)],
    "an error page, then well": [at.instead(PAGE)],
    "a pointer, then well": [at.instead(POINTER)],
    "a piece of unknown total after a drop": [at.drop(1000), at.piece_of_unknown_total()],
    "a length that is no number": [at.drop(1000), at.odd_length()],
    "compressed unasked": [at.encoded()],
    "compressed and half, then well": [at.encoded(0.5)],
    "compressed in an unknown way, then well": [at.encoded(how="br")],
    "429 until the year 99999": [at.status(429, Retry_After="Fri, 31 Dec 99999 23:59:59 GMT")],
    "429 with a superscript": [at.status(429, Retry_After="\xb2")],
}


@pytest.mark.parametrize("name", SURVIVED)
@pytest.mark.parametrize("validator", [None, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, {"ETag": 'W/"1"'}, {}])
def test_a_passing_fault_is_survived(shelf, here, name, validator):
    if validator is not None:
        shelf.validators["/rows.json"] = validator
    url = shelf.put("/rows.json", CONTENT, *SURVIVED[name])
    entry = here.get(url, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert here.is_whole() and entry.bytes == len(CONTENT)


UNPUBLISHED = [name for name in SURVIVED if not name.startswith("corrupt")]


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_without_a_published_hash_a_fault_is_survived_too(shelf, here, name):
    here.get(shelf.put("/rows.json", CONTENT, *SURVIVED[name]))
    assert here.is_whole()


REFUSED = {
    "always compressed and half": ([at.encoded(0.5)] * 9, "the compressed body is truncated"),
    "always compressed in an unknown way": ([at.encoded(how="br")] * 9, "encoded as 'br'"),
    "no length, ends with the connection": ([at.endless()], "sends no length"),
    "sends more than it announced": ([at.drop(1000), *[at.more()] * 9], "more than the announced 5002 bytes"),
    "always an error message": ([at.instead(b'{"error": "quota exceeded"}')] * 9, "an error message"),
    "headers that never end": ([at.trickle()] * 9, "received nothing for"),
    "gone": ([at.status(404)], "HTTP 404"),
    "gone for good": ([at.status(410)], "HTTP 410"),
    "forbidden": ([at.status(403)], "not allowed"),
    "gated": ([at.status(401)], "hf auth login"),
    "never well": ([at.status(503)] * 9, "gave up after 3 failed attempts: HTTP 503"),
    "dropped at the same byte for ever": ([at.drop(10), *[at.drop(0)] * 9], "gave up after 3"),
    "stalled for ever": ([at.stall(0, 0.4)] * 5, "gave up after 3"),
    "always promises too much": ([at.promise(len(CONTENT) + 10)] * 20, "gave up after"),
    "always cut short": ([at.promise(1000)] * 9, "not JSON .truncated or damaged"),
    "always corrupt": ([at.corrupt()] * 9, "its sha256 is .*, but the published one is"),
    "always an error page": ([at.instead(PAGE)] * 9, "a web page"),
    "always a pointer": ([at.instead(POINTER)] * 9, "git-LFS pointer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lasting_fault_is_named_and_nothing_takes_its_place(shelf, here, name):
    faults, message = REFUSED[name]
    url = shelf.put("/rows.json", CONTENT, *faults)
    known = {"sha256": hashlib.sha256(CONTENT).hexdigest()} if name == "always corrupt" else {}
    with pytest.raises(SourceError, match=message):
        here.get(url, **known)
    assert not here.place.exists()


def test_half_a_compressed_file_is_never_taken_for_a_whole_one(shelf, here):
    """No bracket tells that a text is cut; what was kept of it is not in the way of the next call."""
    here.place, text = here.root / "notes.txt", CONTENT.hex().encode()
    url = shelf.put("/notes.txt", text, *[at.encoded(0.5)] * 9)
    remote = Remote("notes.txt", url, url)
    with pytest.raises(SourceError, match="the compressed body is truncated"):
        here.get(url, remote=remote)
    shelf.faults["/notes.txt"].clear()
    here.get(url, remote=remote)
    assert here.is_whole(text)


def test_a_server_that_is_not_there_is_named(here):
    with pytest.raises(SourceError, match="gave up after 3"):
        here.get("http://127.0.0.1:9/rows.json")


def test_a_size_other_than_the_published_is_refused_before_the_bytes(shelf, here):
    with pytest.raises(SourceError, match="offers 5002 bytes, but the published size is 17"):
        here.get(shelf.put("/rows.json", CONTENT), bytes=17)
    assert not here.part.exists()


def test_what_came_is_continued_not_fetched_again(shelf, here):
    here.get(shelf.put("/rows.json", CONTENT, at.drop(4000)))
    assert shelf.asked("/rows.json") == [None, "bytes=4000-"]


def test_a_later_run_continues_what_an_earlier_one_left(shelf, here):
    url = shelf.put("/rows.json", CONTENT, at.drop(4000), *[at.status(503)] * 3)
    with pytest.raises(SourceError):
        here.get(url)
    assert here.part.stat().st_size == 4000
    here.get(url)
    assert here.is_whole() and shelf.asked("/rows.json")[-1] == "bytes=4000-"


@pytest.mark.parametrize("obedience", [[], [at.careless()]], ids=["If-Range obeyed", "If-Range ignored"])
def test_a_file_changed_between_attempts_is_fetched_anew(shelf, here, obedience):
    def change(handler, content):
        handler.shelf.files["/rows.json"] = OTHER
        return at.careless()(handler, OTHER) if obedience else False

    here.get(shelf.put("/rows.json", CONTENT, at.drop(1000), change))
    assert here.is_whole(OTHER)


def test_without_validator_or_hash_a_part_is_never_continued(shelf, here):
    shelf.validators["/rows.json"] = {}
    here.get(shelf.put("/rows.json", CONTENT, at.drop(1000), at.become(OTHER)))
    assert here.is_whole(OTHER) and shelf.asked("/rows.json") == [None, None]


def test_with_a_published_hash_a_mirror_continues_the_other_servers_part(shelf, here):
    first = shelf.put("/a", CONTENT, at.drop(3000), *[at.status(404)])
    known = {"md5": hashlib.md5(CONTENT).hexdigest()}
    with pytest.raises(SourceError):
        here.get(first, **known)
    here.get(shelf.put("/b", CONTENT), **known)
    assert here.is_whole() and shelf.asked("/b") == ["bytes=3000-"]


def test_without_a_published_hash_a_mirror_starts_anew(shelf, here):
    with pytest.raises(SourceError):
        here.get(shelf.put("/a", CONTENT, at.drop(3000), at.status(404)))
    here.get(shelf.put("/b", OTHER))
    assert here.is_whole(OTHER) and shelf.asked("/b") == [None]


def test_a_weak_etag_that_changes_is_another_file(shelf, here):
    """The date is the same: If-Range alone would continue the part of the former file."""
    date = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    shelf.validators["/rows.json"] = {"ETag": 'W/"1"', **date}

    def change(handler, content):
        handler.shelf.files["/rows.json"] = b"[" + b"1" * 5000 + b"]"
        handler.shelf.validators["/rows.json"] = {"ETag": 'W/"2"', **date}
        handler.serve(handler.shelf.files["/rows.json"])
        return True

    here.get(shelf.put("/rows.json", CONTENT, at.drop(1000), change))
    assert here.is_whole(b"[" + b"1" * 5000 + b"]")


def test_a_published_hash_is_checked_though_a_file_of_that_size_was_recorded(shelf, here):
    url = shelf.put("/rows.json", CONTENT)
    here.get(url)
    with pytest.raises(DataError, match="the published one is"):
        here.get(url, sha256=hashlib.sha256(OTHER).hexdigest())


def test_query_strings_stay_out_of_messages(here):
    with pytest.raises(SourceError) as error:
        here.get("http://127.0.0.1:9/rows.json?Signature=secret&Expires=1")
    assert "secret" not in str(error.value) and "Expires" not in str(error.value)


def test_a_stop_is_seen_within_two_seconds_on_a_silent_line(shelf, tmp_path):
    here = Place(tmp_path, RetryPolicy(timeout=30))
    url = shelf.put("/rows.json", CONTENT, at.stall(10, 8))
    threading.Timer(0.3, here.stop.set).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        here.get(url)
    assert time.monotonic() - began < 2


def test_redirects_are_followed(shelf, here):
    target = shelf.put("/deep/rows.json", CONTENT)
    here.get(shelf.put("/rows.json", b"", at.moved(target)))
    assert here.is_whole()


def test_what_was_recorded_must_come_again(shelf, here):
    url = shelf.put("/rows.json", CONTENT)
    here.get(url)
    here.place.unlink()
    shelf.put("/rows.json", OTHER)
    with pytest.raises(SourceError, match=r"recorded at the first download.*remove its entry from visper-data\.lock"):
        here.get(url)
    shelf.put("/rows.json", CONTENT)
    here.get(url)
    assert here.is_whole()


def test_a_file_in_place_is_never_overwritten(shelf, here):
    here.get(shelf.put("/rows.json", CONTENT))
    here.place.write_bytes(b"[1]")
    with pytest.raises(DataError, match=r"3 bytes, recorded were 5002\. Move it away"):
        here.get(shelf.address + "/rows.json")
    assert here.place.read_bytes() == b"[1]"


def test_a_file_that_a_person_put_there_is_judged_and_used(shelf, here):
    here.place.write_bytes(OTHER)
    with pytest.raises(DataError, match="the published one is"):
        here.get("http://127.0.0.1:9/", sha256=hashlib.sha256(CONTENT).hexdigest())
    here.place.write_bytes(CONTENT)
    here.get("http://127.0.0.1:9/", sha256=hashlib.sha256(CONTENT).hexdigest())
    here.place.write_bytes(POINTER)
    with pytest.raises(DataError, match="unexpected file"):
        here.get("http://127.0.0.1:9/")


def test_a_kill_between_record_and_rename_loses_nothing(shelf, here):
    url = shelf.put("/rows.json", CONTENT)
    here.get(url)
    here.place.rename(here.part)
    here.part.with_name("rows.json.state.json").write_text(f'{{"source": "{url}", "total": 5002, "validator": "x"}}')
    before = len(shelf.requests)
    here.get(url)
    assert here.is_whole() and len(shelf.requests) == before


def test_a_full_disk_is_said_before_the_bytes(shelf, here, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"disk full.*--drop-archives"):
        here.get(shelf.put("/rows.json", CONTENT))
    assert not here.place.exists()
