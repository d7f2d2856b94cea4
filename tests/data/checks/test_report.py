"""Every fault put into a data set is counted under its name, and nothing else is counted."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

from tests.conftest import outside
from tests.data.rows.test_records import row, survey
from tests.data.test_chat import CHATML, make_processor
from tests.records import check_file
from visper.cli import app
from visper.common.console import Console, printable
from visper.common.errors import DataError
from visper.data.chat import ConversationEncoder
from visper.data.checks import image_files as verdicts
from visper.data.checks.image_files import look
from visper.data.checks.report import FINDINGS, NO_CONVERSATION, TEXT_ONLY, TOTAL, Report, repair, source_of
from visper.data.images import open_image
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records


def picture(kind: str, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[Path, Path]:
    """A row for each fault; ``coco`` is sound but for its oddities."""
    images = tmp_path / "images"
    files = {
        "coco/a.jpg": picture("JPEG"),
        "coco/b.jpg": picture("JPEG", 1),
        "ocr/gif.jpg": picture("GIF"),
        "ocr/empty.jpg": b"",
        "ocr/cut.jpg": picture("JPEG")[:1500],
        "ocr/page.jpg": b"<html>404</html>",
    }
    for name, content in files.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)
    rows: list[Any] = [row(f"<image>\nWhat is {name}?", "A thing.", image=name) for name in [*files, "ocr/lost.jpg"]]
    rows += [
        row("<image>\nWhat is coco/a.jpg?", "A thing.", image="coco/a.jpg", id="again"),
        row("No tag", "Yes.", image="coco/b.jpg"),
        row("What is <image>?", "A tag."),
        row("Well?", "", "Really?", "Yes"),
        row("Nothing?", " "),
        row("Question?"),
    ]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    return tmp_path / "mix.json", images


ENCODER = ConversationEncoder(make_processor(CHATML), 500)


def test_every_fault_is_counted_under_its_name(faulty: tuple[Path, Path]) -> None:
    report = check_file(*faulty, ENCODER)
    total = dict(report.counts[TOTAL])
    assert total == {
        "rows": 13,
        "images": 7,
        "images present": 6,
        "mislabeled image": 1,
        "empty image file": 1,
        "broken image": 1,
        "not an image": 1,
        "missing image": 1,
        "duplicate": 1,
        "image without tag": 1,
        "tag without image": 1,
        "empty answer": 2,
        "no supervised token": 1,
        "no answer": 1,
        "unusable": 6,
    }
    assert report.counts["coco"] == {
        "rows": 4,
        "images": 2,
        "images present": 2,
        "duplicate": 1,
        "image without tag": 1,
    }
    assert report.counts["ocr"]["unusable"] == 4 and report.counts[TEXT_ONLY]["unusable"] == 1
    assert len(report.drops) == 6
    assert all(sum(counts[what] for name, counts in report.counts.items() if name != TOTAL) == n
               for what, n in total.items())  # fmt: skip


def test_without_a_tokenizer_the_same_rows_are_unusable(faulty: tuple[Path, Path]) -> None:
    report = check_file(*faulty)
    assert dict(report.counts[TOTAL]) == dict(check_file(*faulty, ENCODER).counts[TOTAL])
    assert not report.encoded


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize(
    "names", [("coco", "gqa", "ocr_vqa", "textvqa", "vg"), ("a" * 70, "写真の集まり" * 9, "b\x1b[2J")]
)
def test_a_table_shows_every_count_within_the_console(width: int, names: tuple[str, ...]) -> None:
    report = Report(Path("mix.json"))
    for number, name in enumerate([*names, TEXT_ONLY, NO_CONVERSATION]):
        for place, what in enumerate(FINDINGS):
            report.note(name, what, count=665_298 + 1000 * number + place)
    stream = io.StringIO()
    console = Console(width=width, file=stream)
    for table in report.tables(console.width):
        console.print(table)
    shown = stream.getvalue()
    assert max(map(cell_len, shown.splitlines())) <= width and "…" not in shown
    assert all(what in shown for what in FINDINGS)
    assert all(f"{count:,}" in shown for counts in report.counts.values() for count in counts.values())
    assert all(printable(name)[:8] in shown for name in (*names, TEXT_ONLY, NO_CONVERSATION))


ANSWERS = [("",), (" \n\t",), ("\u3000", "\u00a0"), ("", "A"), ("\u200b",), (".",), ("", " ", "B")]


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_check_leaves_out_the_rows_without_an_answer_that_training_leaves_out(
    tmp_path: Path, with_encoder: bool
) -> None:
    rows = [row(*(text for answer in answers for text in ("Q?", answer))) for answers in ANSWERS]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    drops = DropList()
    survey(open_records([(tmp_path / "mix.json", tmp_path)], drops), ENCODER, drops)
    report = check_file(tmp_path / "mix.json", tmp_path, ENCODER if with_encoder else None)
    assert list(report.drops) == list(drops) and len(drops) == 3


def test_repair_mends_names_and_asks_for_what_is_lost(faulty: tuple[Path, Path]) -> None:
    asked: list[str] = []

    def fetch(paths: list[Path]) -> None:
        asked.extend(path.name for path in paths)
        (faulty[1] / "ocr/lost.jpg").write_bytes(picture("JPEG", 5))

    mended, lost = repair([check_file(*faulty)], fetch)
    assert mended == 2 and sorted(asked) == ["cut.jpg", "empty.jpg", "lost.jpg", "page.jpg"]
    assert len(lost) == 3
    again = check_file(*faulty)
    assert again.counts[TOTAL]["mislabeled image"] == again.counts[TOTAL]["missing image"] == 0
    with Image.open(faulty[1] / "ocr/gif.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (90, 60))


def test_a_check_goes_on_where_it_was_stopped(faulty: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def watched(path: str, max_pixels: int) -> verdicts.Verdict:
        if len(looked) == 3:
            raise KeyboardInterrupt
        looked.append(path)
        return look(path, max_pixels)

    monkeypatch.setattr(verdicts, "look", watched)
    with pytest.raises(KeyboardInterrupt):
        check_file(*faulty)
    first = list(looked)
    looked[:] = ["", "", "", ""]  # no longer three: goes on
    report = check_file(*faulty)
    assert len(looked) - 4 == 7 - len(first)
    looked[:] = ["", "", "", ""]
    assert check_file(*faulty).counts == report.counts
    assert looked[4:] == [str(faulty[1] / "ocr/lost.jpg")], "on a missing file nothing is kept"
    (faulty[1] / "coco/a.jpg").write_bytes(b"")
    assert check_file(*faulty).counts["coco"]["empty image file"] == 2


@pytest.mark.parametrize("progressive", [False, True])
def test_a_quick_look_finds_what_full_decoding_finds(tmp_path: Path, progressive: bool) -> None:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", progressive=progressive)
    whole = stream.getvalue()
    for length in range(0, len(whole) + 1, 97):
        (tmp_path / "a.jpg").write_bytes(whole[:length])
        verdict = look(str(tmp_path / "a.jpg"))
        try:
            open_image(tmp_path / "a.jpg")
            assert verdict.reason is None, length
        except DataError as error:
            assert verdict.reason == error.reason, length


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (1, 500), (8, 8)])
def test_the_smallest_images_are_looked_at(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.jpg")
    assert look(str(tmp_path / "a.jpg")) == verdicts.Verdict("JPEG")


@pytest.mark.parametrize(
    ("image", "source"),
    [("coco/train2017/1.jpg", "coco"), ("00453/1.jpg", "(images)"), ("1.jpg", "(images)"), (None, TEXT_ONLY)],
)
def test_a_row_belongs_to_its_images_first_folder(image: str | None, source: str) -> None:
    assert source_of(image) == source


def test_the_command_reports_writes_a_drop_list_and_fails(faulty: tuple[Path, Path], tmp_path: Path) -> None:
    file, images = faulty
    report, drops = tmp_path / "report.json", tmp_path / "dropped.jsonl"
    command = ["data", "check", str(file), "--images", str(images), "--report", str(report), "--drop", str(drops)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "6 of 13 rows are unusable" in done.output
    written = json.loads(report.read_text())
    assert (written["rows"], written["unusable"]) == (13, 6)
    assert written["files"][0]["sources"]["ocr"]["missing image"] == 1
    assert len(DropList.read(drops)) == 6
    mended = CliRunner().invoke(app, [*command, "--repair"])
    assert mended.exit_code == 1 and "repaired 1 image; 4 cannot be" in mended.output


@pytest.mark.parametrize(("name", "rows"), [("pretrain.json", 850), ("instruct.json", None)])
def test_real_photographs_are_sound(name: str, rows: int | None) -> None:
    folder = outside("photos")
    encoder = ConversationEncoder(make_processor(CHATML), 4096)
    report = check_file(folder / name, folder, encoder, workers=0)
    assert isinstance(report, Report)
    assert report.counts[TOTAL]["unusable"] == 0 and len(report.drops) == 0
    assert rows is None or report.counts[TOTAL]["rows"] == report.counts[TOTAL]["images"] == rows
