"""Hub data sets, folders on disk and Parquet files give the same rows as JSON."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.test_chat import CHATML, make_processor
from visper.common.errors import DataError
from visper.config import Source
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import contents_of, digest, digests_of
from visper.data.collator import Sample
from visper.data.dataset import ConversationDataset
from visper.data.image_order import image_groups
from visper.data.rows import hugging_face
from visper.data.rows.formats import CAPTION_QUESTION
from visper.data.rows.records import DropList, ShownImage
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records

MESSAGES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TEXT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


PNGS = [png(i) for i in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write(folder: Path, kind: str, rows: dict[str, list[Any]], features: Any = None) -> Source:
    content = datasets.Dataset.from_dict(rows, features=features)
    if kind == "saved":
        content.save_to_disk(str(folder / "set"))
        return Source(hf=str(folder / "set"))
    if kind == "saved splits":
        datasets.DatasetDict(train=content, test=content.select([0])).save_to_disk(str(folder / "set"))
        return Source(hf=str(folder / "set"))
    (folder / "set").mkdir()
    half = len(content) // 2
    content.select(range(half)).to_parquet(str(folder / "set" / "train-0.parquet"))
    content.select(range(half, len(content))).to_parquet(str(folder / "set" / "train-1.parquet"))
    if kind == "folder":
        return Source(hf=str(folder / "set"))
    return Source(parquet=str(folder / "set" / "train-*.parquet"))


def opened(source: Source) -> tuple[Records, DropList]:
    drops = DropList()
    return open_records([source], drops), drops


EMBEDDED = [{"bytes": content, "path": None} for content in PNGS]


@pytest.mark.parametrize("kind", ["saved", "saved splits", "folder", "parquet"])
@pytest.mark.parametrize(
    ("column", "images", "feature"),
    [
        ("image", EMBEDDED, datasets.Image()),
        ("images", [[image] for image in EMBEDDED], datasets.List(datasets.Image())),
        ("image", PNGS, datasets.Value("binary")),
    ],
)
def test_embedded_images_become_samples(
    tmp_path: Path, kind: str, column: str, images: list[Any], feature: Any
) -> None:
    rows = {"messages": [MESSAGES] * 3 + [TEXT], column: [*images, [] if column == "images" else None]}
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}], column: feature}
    )
    records, drops = opened(write(tmp_path, kind, rows, features))
    assert len(records) == 4 and not len(drops)
    assert records.has_image.tolist() == [True] * 3 + [False]
    assert digests_of(records) == {(i, 0): digest(content) for i, content in enumerate(PNGS)}
    dataset = ConversationDataset(pickle.loads(pickle.dumps(records)), ConversationEncoder(make_processor(CHATML), 500))
    shown, text = dataset[1], dataset[3]
    assert isinstance(shown, Sample) and isinstance(text, Sample)
    (seen,) = shown.seen
    assert (seen.permute(1, 2, 0).numpy() == np.asarray(Image.open(io.BytesIO(PNGS[1])))).all()
    assert text.pixel_values is None


def test_llava_captions_and_messages_give_the_same_records(tmp_path: Path) -> None:
    for i, content in enumerate(PNGS):
        (tmp_path / f"{i}.png").write_bytes(content)
    names = [f"{i}.png" for i in range(3)]
    found = []
    for own, rows in {
        "llava": {"conversations": [TURNS] * 3, "image": names},
        "messages": {"messages": [MESSAGES] * 3, "images": [[name] for name in names]},
        "renamed": {"dialog": [MESSAGES] * 3, "file": names, "image": [None] * 3},
    }.items():
        (tmp_path / own).mkdir()
        source = write(tmp_path / own, "parquet", rows)
        columns = {"messages": "dialog", "image": "file"} if own == "renamed" else {}
        records, drops = opened(Source(parquet=source.place, images=str(tmp_path), columns=columns))
        assert not len(drops)
        found.append([(record.turns, record.images) for record in records])
        assert isinstance(ConversationDataset(records, ConversationEncoder(make_processor(CHATML), 500))[0], Sample)
    assert found[0] == found[1] == found[2]
    assert found[0][0][1] == (ShownImage(str(tmp_path / "0.png"), 0),)


def test_pairs_of_question_and_answer_with_several_images(tmp_path: Path) -> None:
    pair = {"user": "Same?", "assistant": "No."}
    rows = {"images": [EMBEDDED[:2], EMBEDDED[2:], []], "texts": [[pair, pair], [pair], [pair]], "source": ["a"] * 3}
    texts = [{key: datasets.Value("string") for key in pair}]
    features = {"images": datasets.List(datasets.Image()), "texts": texts, "source": datasets.Value("string")}
    records, drops = opened(write(tmp_path, "folder", rows, datasets.Features(features)))
    assert [len(record.images) for record in records] == [2, 1, 0] and not len(drops)
    assert [turn.text for turn in records[0].turns] == ["\n\nSame?", "No.", "Same?", "No."]
    assert contents_of(records, 0) == PNGS[:2] and contents_of(records, 1) == PNGS[2:]


def test_captions_are_answers_to_one_question(tmp_path: Path) -> None:
    rows = {"image": [EMBEDDED[0], None], "caption": ["A cat.", "Nothing."]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    source = write(tmp_path, "saved", rows, features)
    records, drops = opened(Source(hf=source.place, columns={"text": "caption"}))
    assert [turn.text for turn in records[0].turns] == [CAPTION_QUESTION, "A cat."]
    assert drops.counts() == {"no image": 1}


def test_several_images_and_images_that_are_not_there_are_counted(tmp_path: Path) -> None:
    lost = {"bytes": None, "path": "far/away.png"}
    rows = {"messages": [MESSAGES] * 3, "images": [[EMBEDDED[0], EMBEDDED[1]], [lost], [EMBEDDED[2]]]}
    records, drops = opened(write(tmp_path, "parquet", rows))
    assert drops.counts() == {"images and tags differ": 1, "image not embedded": 1}
    assert contents_of(records, 0) == [PNGS[2]]


def of_names(folder: Path, names: list[list[str | None]], contents: list[bytes] | None = None) -> Records:
    """Rows of two images with these paths, which `datasets` reads a thousand at a time."""
    shown = [{"from": "human", "value": "<image><image>"}, TURNS[1]]
    images = [
        [{"bytes": contents[i] if contents else b"%d" % i, "path": path} for path in paths]
        for i, paths in enumerate(names)
    ]
    features = datasets.Features(
        {
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    folder.mkdir()
    file = folder / "rows.parquet"
    table = pa.Table.from_pydict({"conversations": [shown] * len(names), "images": images}, features.arrow_schema)
    pq.write_table(table, file)
    return opened(Source(parquet=str(file)))[0]


def test_rows_of_different_embedded_images_are_different_groups(tmp_path: Path) -> None:
    """Without paths, with names that repeat in every folder, and with names whose folders were cut off."""
    rows = range(3000)
    digits = [b"%d" % i for i in rows]
    for what, names, contents in (
        ("none", [[None, None] for _ in rows], None),
        ("folders", [[f"{i // 100}/a{i % 100}.png", f"{i // 100}/b{i % 100}.png"] for i in rows], digits),
        ("cut off", [["a.png", "b.png"] for _ in rows], [b"x" * (1 + i) for i in rows]),
    ):
        records = of_names(tmp_path / what, names, contents)
        assert len(records) == len(set(image_groups(records).tolist())) == 3000, what


def test_rows_of_the_same_embedded_images_are_one_group(tmp_path: Path) -> None:
    pairs = [["a/0.png", "b/0.png"], ["0.png", "0.png"], ["a/0.png", "b/0.png"], ["b/0.png", "a/0.png"]]
    groups = image_groups(of_names(tmp_path / "pairs", pairs, [b"x"] * 4)).tolist()
    assert groups == [0, 1, 0, 2]


def test_embedded_images_keep_their_path_whatever_it_is_and_are_numbered_without_one(tmp_path: Path) -> None:
    names = [["/far/0.png", "../0.png"], [None, ""], ["https://a.b/0.png", "0.png"], ["0.png", "1.png"]]
    records = of_names(tmp_path / "any", names, [b"x", b"x", b"x", b"yy"])
    assert [[image.path for image in records[row].images] for row in range(4)] == [
        ["/far/0.png", "../0.png"],
        ["embedded-1-0", "embedded-1-1"],
        ["https://a.b/0.png", "0.png"],
        ["0 (2 bytes).png", "1.png"],
    ]


def test_columns_of_no_format_are_named(tmp_path: Path) -> None:
    source = write(tmp_path, "saved", {"prompt": ["a"], "answer": ["b"]})
    with pytest.raises(DataError, match=r"has \['prompt', 'answer'\]; expected 'conversations'.*columns: \{messages: "):
        opened(source)
    with pytest.raises(DataError, match=r"'columns' names \['dialog'\], but it has \['prompt', 'answer'\]"):
        opened(Source(hf=source.place, columns={"messages": "dialog"}))


def test_paths_without_a_folder_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "saved", {"messages": [MESSAGES], "image": ["a.png"]})
    with pytest.raises(DataError, match="its column 'image' contains texts: give 'images'"):
        opened(source)


def test_a_folder_of_parquet_is_named_by_a_pattern_and_a_file_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "v[1]").mkdir()
    write(tmp_path / "v[1]", "parquet", {"messages": [TEXT] * 2})
    folder = tmp_path / "v[1]" / "set"
    assert len(opened(Source(parquet=str(folder / "train-0.parquet")))[0]) == 1
    with pytest.raises(DataError, match=r"expected Parquet files, such as '.*/set/\*\.parquet'"):
        opened(Source(parquet=str(folder)))


def test_an_image_folder_is_read_with_its_folder_as_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "Red."}')
    _, drops = opened(Source(hf="photos"))
    assert [drop.detail for drop in drops] == [
        f"'{folder}/a.png' is given without its bytes: give 'images', its folder"
    ]
    records, drops = opened(Source(hf="photos", images="photos"))
    assert not list(drops) and contents_of(records, 0) == [(folder / "a.png").read_bytes()]


def test_what_cannot_be_loaded_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'me/mine' on the Hub")

    with pytest.raises(DataError, match="expected Parquet files"):
        opened(Source(parquet=str(tmp_path / "*.parquet")))
    (tmp_path / "x.parquet").write_bytes(b"not Parquet")
    with pytest.raises(DataError, match="are all of them Parquet files"):
        opened(Source(parquet=str(tmp_path / "x.parquet")))
    for number, column in enumerate(("text", "caption")):
        pq.write_table(pa.table({"image": ["a.png"], column: ["A cat."]}), tmp_path / f"mixed-{number}.parquet")
    with pytest.raises(
        DataError, match=r"because column names don't match; are all of them Parquet files of one schema"
    ):
        opened(Source(parquet=str(tmp_path / "mixed-*.parquet")))
    source = write(tmp_path, "folder", {"messages": [MESSAGES] * 2})
    with pytest.raises(DataError, match="split 'validation'"):
        opened(Source(hf=source.place, split="validation"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="hf download --repo-type dataset me/mine --local-dir"):
        opened(Source(hf="me/mine"))


def test_rows_are_read_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, "parquet", {"messages": [TEXT] * 4})
    assert len(opened(source)[0]) == 4
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "_rows", lambda *_: pytest.fail("read again"))
        assert len(opened(source)[0]) == 4
        patch.setattr(hugging_face, "_rows", lambda *_: iter([{"messages": TEXT}] * 3))
        patch.setattr(hugging_face, "code_key", lambda module: f"other code of {module.__name__}")
        assert len(opened(source)[0]) == 3
    datasets.Dataset.from_dict({"messages": [[TEXT[0], {"role": "assistant", "content": "3"}]] * 2}).to_parquet(
        str(tmp_path / "set" / "train-0.parquet")
    )
    assert [record.turns[1].text for record in opened(source)[0]] == ["3", "3", "2", "2"]


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_file_that_changed_and_kept_its_date_is_read_again(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "set" / "rows.parquet"
    file.parent.mkdir()
    source = Source(parquet=str(file)) if kind == "parquet" else Source(hf=str(file.parent))
    for answer in ("one", "two"):
        turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": answer}]
        pq.write_table(pa.table({"messages": [turns]}), file)
        os.utime(file, (1_700_000_000, 1_700_000_000))  # as unpacked from an archive of fixed dates
        assert open_records([source], DropList())[0].turns[1].text == answer


def test_plain_json_does_not_import_datasets() -> None:
    code = "import sys; import visper.data.rows.sources; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
