"""Images are identified by content: equal bytes are the same image, a changed file is another one."""

import os

import pytest

from tests import tiny
from visper.config import Source
from visper.data.checks import digests
from visper.data.checks.digests import LOCKFILE, contents_of, digest, digests_of
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPER_CACHE", str(tmp_path / "cache"))
    rows = tiny.write_rows(tmp_path / "rows", images=4, text_rows=2)
    return open_records([(rows / "rows.json", rows / "images")], DropList())


def test_a_digest_is_of_the_bytes_and_rows_without_a_image_have_none(records):
    found = digests_of(records)
    assert found == {(i, 0): digest(*contents_of(records, i)) for i in range(4)} and contents_of(records, 4) == []
    assert len(set(found.values())) == 4 and all(len(own) == 16 for own in found.values())


def test_files_are_hashed_once_until_they_change(records, tmp_path, monkeypatch):
    before = digests_of(records)
    with (tmp_path / "cache" / LOCKFILE).open("a") as lockfile:
        lockfile.write('["half a li')
    hashed = []
    monkeypatch.setattr(digests, "digest", lambda content: hashed.append(content) or b"new".ljust(16))
    assert digests_of(records) == before and not hashed
    file = tmp_path / "rows" / "images" / "1.png"
    dates = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert digests_of(records)[1, 0] == b"new".ljust(16) and len(hashed) == 1
    (tmp_path / "rows" / "images" / "2.png").unlink()
    assert digests_of(records)[2, 0] is None


def test_images_in_parquet_files_have_the_digests_of_their_files(records, tmp_path):
    write_parquet(records, tmp_path / "parquet", DropList(), seed=3)
    embedded = open_records([Source(parquet=f"{tmp_path}/parquet/*.parquet")], DropList())
    assert sorted(digests_of(embedded).values()) == sorted(digests_of(records).values())
