"""The cached table gives the same records as the file, and is never used for another file."""

import errno
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.common.test_files import leftover
from tests.conftest import outside
from tests.data.rows.test_records import read_records, row, survey
from tests.data.test_chat import CHATML, make_processor
from visper.common.cache import cache_folder, hub_cache_remedy
from visper.common.errors import DataError
from visper.config import Source
from visper.data.chat import ConversationEncoder
from visper.data.rows import lengths, table
from visper.data.rows.json_rows import read_rows
from visper.data.rows.lengths import encoder_key, measure
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import RecordTable, open_table

ANY_TEXT = st.text(st.characters(codec=None) | st.sampled_from("<image>\ud83d\u2028\0"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "user", "dog"]), "value": ANY_TEXT | st.just("<image>\nQ")}
)
GOOD_TURNS = st.lists(ANY_TEXT, min_size=2, max_size=6).map(lambda texts: row(*texts)["conversations"])
ROW = st.fixed_dictionaries(
    {"conversations": GOOD_TURNS | st.lists(TURN, max_size=4) | JSON},
    optional={"id": ANY_TEXT | st.integers() | JSON, "image": ANY_TEXT | st.just("a.jpg") | JSON, "model": st.just("")},
)
ROWS = st.lists(ROW | ROW | JSON, max_size=6)


def write(file: Path, rows: Any, **options: Any) -> Path:
    file.write_text(json.dumps(rows, **options), encoding="utf-8")
    return file


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_any_rows_come_back_as_they_were_read(tmp_path: Path, rows: list[Any]) -> None:
    sources = [(write(tmp_path / "mix.json", rows), tmp_path / "images")]
    plain, kept = DropList(), DropList()
    expected = read_records(sources, plain)
    records = open_records(sources, kept)
    assert list(records) == expected
    assert list(kept) == list(plain) and len(records) + len(kept) == len(rows)
    kept.write(tmp_path / "dropped.jsonl")
    assert DropList.read(tmp_path / "dropped.jsonl") == list(plain)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(JSON, max_size=5), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_rows_read_one_by_one_are_those_of_json(
    tmp_path: Path, rows: list[Any], indent: int | None, ascii: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert repr(list(read_rows(tmp_path / "x.json"))) == repr(json.loads(text))


@pytest.mark.parametrize(
    "text",
    ["", "[", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", '["a', '["\\x"]', "<html>", "nul", "[tru]", "[1}", "[" * 99],
)
def test_a_broken_file_is_refused_wherever_it_breaks(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        list(read_rows(tmp_path / "x.json"))


@pytest.mark.parametrize("how", ["longer", "same size", "same size and date"])
def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.delenv("VISPER_CACHE")
    file = write(tmp_path / "mix.json", [row("Q", "old")])
    before = file.stat()
    assert open_table(file).record(0, "mix", None).turns[1].text == "old"
    (kept,) = (tmp_path / ".visper").iterdir()
    write(file, [row("Q", "longer" if how == "longer" else "new")])
    if how == "same size and date":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_table(file).record(0, "mix", None).turns[1].text in ("new", "longer")
    assert not kept.exists() and len(list((tmp_path / ".visper").iterdir())) == 1


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "mix.json", [row("Q", "A")])
    open_table(file)
    monkeypatch.setattr(table, "read_rows", lambda file: pytest.fail("read again"))
    assert len(open_table(file)) == 1


def test_what_writers_killed_long_ago_have_left_goes_with_the_next_write(tmp_path: Path) -> None:
    """No lock guards a cache, so a young file may be another process's."""
    file = write(tmp_path / "rows.json", [row("Q", "A")])
    cache = cache_folder(tmp_path)
    old, young = (leftover(cache / f"rows.json-{name}.arrow") for name in ("old", "young"))
    for place, age in ((old, 100_000), (young, 0)):
        place.touch()
        os.utime(place, (time.time() - age,) * 2)
    open_table(file)
    assert not old.exists() and young.exists()


def test_a_file_read_under_two_columns_keeps_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISPER_CACHE")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.jpg", "short": "A cat.", "long": "A cat on a mat."}]))
    tables = [open_table(tmp_path / "rows.json", columns={"text": text}) for text in ("short", "long")]
    again = [pickle.loads(pickle.dumps(table)) for table in tables]
    assert [table.value("texts", 0)[1] for table in again] == ["A cat.", "A cat on a mat."]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.jpg", "short": "A dog."}]))
    open_table(tmp_path / "rows.json", columns={"text": "short"})
    assert [table.path.is_file() for table in tables] == [False, False]


def test_a_mapped_field_is_not_read_under_its_own_name(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "text": "alt", "caption": "A cat."}, {"image": "b.jpg", "text": "alt"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table = open_table(tmp_path / "rows.json", columns={"text": "caption"})
    assert table.value("texts", 0)[1] == "A cat." and table.good_rows().tolist() == [0]
    with pytest.raises(DataError, match=r"'columns' names \['captoin'\], but no row of .*rows.json' has them"):
        open_table(tmp_path / "rows.json", columns={"text": "captoin"})


def test_a_broken_file_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISPER_CACHE")
    (tmp_path / "x.json").write_text("[" + json.dumps(row("Q", "A")) + ",")
    with pytest.raises(DataError, match="not JSON"):
        open_table(tmp_path / "x.json")
    assert list((tmp_path / ".visper").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.json", [row("Q", "A")])

    def changing(path: Path) -> Any:
        yield from read_rows(path)
        write(path, [row("Q", "B")] * 2)

    monkeypatch.setattr(table, "read_rows", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        open_table(file)


def test_read_only_data_is_cached_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISPER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda place, _: place != tmp_path / "data")
    assert cache_folder(tmp_path / "data") == tmp_path / "visper"


@pytest.mark.parametrize("given", [True, False])
def test_where_nothing_can_be_written_the_cache_is_moved_by_a_variable(tmp_path, monkeypatch, given) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("VISPER_CACHE")
    monkeypatch.setenv("VISPER_CACHE" if given else "XDG_CACHE_HOME", str(tmp_path / "file" / "x"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataError, match=r"file/x.*set the variable VISPER_CACHE to a writable folder"):
        cache_folder(tmp_path)
    assert not (tmp_path / ".visper").exists()


def test_a_hub_cache_that_cannot_be_written_is_moved_by_a_variable(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/home/me/.cache/huggingface")
    for place in ("/home/me/.cache", "/home/me/.cache/huggingface/hub/models--x"):
        error = OSError(errno.EROFS, "Read-only file system", place)
        assert "HF_HOME" in hub_cache_remedy(error)
    assert not hub_cache_remedy(OSError(errno.EROFS, "Read-only file system", "/data/x"))
    assert not hub_cache_remedy(OSError(errno.ENOENT, "No such file", "/home/me/.cache"))


def test_another_process_maps_the_table_again(tmp_path: Path) -> None:
    opened = open_table(write(tmp_path / "mix.json", [row("Q", "A")] * 3))
    sent = pickle.dumps(opened)
    assert len(sent) < 500
    assert pickle.loads(sent).record(2, "mix", None) == opened.record(2, "mix", None)


@pytest.fixture
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_processor(CHATML), 120)


def mixed(folder: Path, rows: int = 60) -> list[tuple[Path, Path]]:
    content: list[Any] = [row("Q" * (i % 9), "A" * (i % 50 + 1)) for i in range(rows)]
    content[7], content[11] = "no row", row("Q", " ")
    return [(write(folder / "mix.json", content), folder)]


def test_lengths_are_those_of_the_encoder_and_counted_once(
    tmp_path: Path, encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = DropList()
    records = open_records(mixed(tmp_path), drops)
    good, found = survey(records, encoder, drops)
    assert drops.counts() == {"not a row": 1, "no supervised token": 1}
    assert found.lengths.tolist() == [len(encoder.encode(record).input_ids) for record in good]
    monkeypatch.setattr(lengths, "in_order", lambda *_: pytest.fail("counted again"))
    assert survey(records, encoder, DropList())[1].lengths.tolist() == found.lengths.tolist()


def test_lengths_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = open_records(mixed(tmp_path), DropList())
    alone = measure(records, encoder, quiet=True)
    records.parts[0].table.path.with_name(f"{records.parts[0].table.path.stem}.{encoder_key(encoder)}.lengths").unlink()
    monkeypatch.setattr("visper.common.parallel.FEW", 1)
    monkeypatch.setattr("visper.common.parallel.num_cores", lambda: 3)
    together = measure(records, encoder, quiet=True)
    assert together.lengths.tolist() == alone.lengths.tolist() and together.problems == alone.problems


def test_another_tokenizer_template_or_length_is_counted_anew(encoder: ConversationEncoder) -> None:
    keys = {encoder_key(encoder), encoder_key(ConversationEncoder(make_processor(CHATML), 121))}
    keys.add(encoder_key(ConversationEncoder(make_processor(CHATML, system="Be brief."), 120)))
    grown = make_processor(CHATML)
    grown.tokenizer.add_tokens(["Q"])
    keys.add(encoder_key(ConversationEncoder(grown, 120)))
    assert len(keys) == 4
    encoder.tokenizer(["a", "bb"], padding=True, truncation=True, max_length=7)
    assert encoder_key(encoder) in keys, "what the last call asked for is no other tokenizer"


def test_an_agreed_drop_list_leaves_rows_out_uncounted(tmp_path: Path) -> None:
    sources = mixed(tmp_path)
    listed = [Drop("mix/3/1", "not an image", "x.jpg"), Drop("mix/7/", "not a row")]
    drops = DropList(agreed=listed)
    records = open_records(sources, drops)
    assert len(records) == 58 and not any(record.id == "mix/3/1" for record in records)
    assert len(drops) == 0
    drops.check(58, 0.0)
    drops.write(tmp_path / "dropped.jsonl")
    assert DropList.read(tmp_path / "dropped.jsonl") == listed


@pytest.mark.parametrize("sample_id", ["mix/3/other id", "mix/999/1", "mixed/3/1", "nonsense", "mix/x/1"])
def test_a_drop_list_of_other_data_is_refused(tmp_path: Path, sample_id: str) -> None:
    with pytest.raises(DataError, match="1 of its 1 rows are not in the run's sources"):
        open_records(mixed(tmp_path), DropList(agreed=[Drop(sample_id, "gone")]))


@pytest.mark.parametrize("dropped", [2, 5])
def test_a_drop_list_of_rows_without_ids_that_have_moved_is_refused(tmp_path: Path, dropped: int) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
    rows: list[Any] = [{"image": f"{number}.png", "conversations": turns} for number in range(8)]
    rows[5] = {"image": "5.png", "conversations": "not a conversation"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sources = [(tmp_path / "rows.json", tmp_path)]
    listed = [Drop(open_table(tmp_path / "rows.json").sample_id(dropped, "rows"), "bad")]
    assert len(open_records(sources, DropList(agreed=listed))) == (7 if dropped == 5 else 6)
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="1 of its 1 rows are not in the run's sources"):
        open_records(sources, DropList(agreed=listed))


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 1}'])
def test_a_file_that_is_no_drop_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match="not a drop list"):
        DropList.read(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["pretrain.json", "instruct.json"])
def test_real_photographs_come_back(name: str) -> None:
    folder = outside("photos")
    records = open_records([(folder / name, folder)], DropList())
    assert list(records) == read_records([(folder / name, folder)], DropList())
    assert isinstance(records.parts[0].table, RecordTable)
    assert records.has_image.tolist() == [bool(record.images) for record in records]
    assert records.characters.tolist() == [sum(len(t.text) for t in r.turns) for r in records]
    files = [str(folder / name) for _, _, folder, name in records.image_files()]
    assert files == [image.path for record in records for image in record.images]


def test_a_missing_source_says_what_its_path_is_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readers: list[Callable[[str], Any]] = [
        lambda name: open_records([(name, ".")], DropList()),
        lambda name: open_records([Source(parquet=name)], DropList()),
        lambda name: DropList.read(Path(name)),
        lambda name: list(read_rows(Path(name))),
    ]
    for read in readers:
        with pytest.raises(DataError, match=rf"'my/rows' \(relative to the current folder, '{tmp_path}'\): expected"):
            read("my/rows")
        with pytest.raises(DataError, match=rf"'{tmp_path}/rows': expected"):
            read(f"{tmp_path}/rows")
