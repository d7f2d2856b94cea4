"""A set is checked, repaired, sharded and trained from by its name, as people meet it: command by command."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from tests import tiny
from tests.data.sets import published, server
from tests.data.sets.published import image
from tests.data.sets.test_prepare import QUICK
from visper.cli import app, main
from visper.common.errors import ConfigError, DataError
from visper.config import Run, load_run
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.training import run_stage


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    with server.serving() as shelf:
        published.use_server(shelf, tmp_path / "catalogue", monkeypatch)
        published.put_llava_665k(shelf)
        yield shelf


def test_the_report_and_the_drop_list_are_written_although_nobody_reads_the_output(tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("visper.cli.data_check._show", closed)
    (tmp_path / "rows.json").write_text('[{"id": "1", "image": "none.png", "conversations": []}]')
    written = [tmp_path / "report.json", tmp_path / "dropped.jsonl"]
    asked = ("data", "check", tmp_path / "rows.json", "--images", tmp_path)
    assert call(*asked, "--report", written[0], "--drop", written[1])[0] == 1
    assert all(file.is_file() for file in written)


def test_a_recipe_is_checked_as_its_runs_read_it(tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=4)
    rows = tmp_path / "rows"
    held = {name: (rows / "images" / f"{name}.png").read_bytes() for name in "012"}
    (rows / "captions.json").write_text(json.dumps([{"pic": f"{n}.png", "cap": "a" * n} for n in (0, 1, 99)]))
    images = [{"bytes": held["0"]}, {"bytes": held["1"][:99]}, {"bytes": b""}, {"path": "2.png"}, None]
    asked = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "thing"}]
    table = [{"image": image and {"bytes": None, "path": None} | image, "messages": asked} for image in images]
    pq.write_table(pa.Table.from_pylist(table), rows / "held.parquet")
    sources = [
        {
            "json": str(rows / "captions.json"),
            "images": str(rows / "images"),
            "columns": {"image": "pic", "text": "cap"},
        },
        {"parquet": str(rows / "held.parquet")},
    ]
    changes = [f"data.sources={json.dumps(sources)}", "data.drop_limit=1"]
    found = tmp_path / "found.jsonl"
    code, _ = call(
        "data", "check", "--run", recipe, "--drop", found, *(each for one in changes for each in ("--set", one))
    )
    run_stage(load_run(recipe, changes))
    dropped = {drop.sample_id: drop.reason for drop in DropList.read(tmp_path / "ift" / "dropped.jsonl")}
    assert code == 1 and {drop.sample_id: drop.reason for drop in DropList.read(found)} == dropped
    assert sorted(dropped.values()) == [
        "broken image",
        "empty image file",
        "image not embedded",
        "missing image",
        "no supervised token",
    ]
    alone = ("data", "check", rows / "captions.json", "--images", rows / "images", "--run", recipe)
    assert "2 of 3 rows are unusable" in call(*alone, *(each for one in changes for each in ("--set", one)))[1]
    with pytest.raises(ConfigError, match="give conversations or a data set, or only --run"):
        call("data", "check")


def totals(report: Path, source: str) -> dict[str, int]:
    (file,) = json.loads(report.read_text())["files"]
    return file["sources"][source]


def test_llava_665k_is_prepared_damaged_checked_and_repaired(shelf, tmp_path):
    root, report, drops = tmp_path / "data", tmp_path / "report.json", tmp_path / "dropped.jsonl"
    assert call("data", "prepare", "llava-665k", "--root", root, "--drop-archives")[0] == 0
    check = ("data", "check", "llava-665k", "--root", root, "--report", report, "--drop", drops)
    code, said = call(*check)
    assert code == 1 and "llava_v1_5_mix665k.json: 3 of 14 rows are unusable" in said, (
        "one is lost, one corrupt for good, one shows an image that it does not name"
    )
    ocr = {"rows": 6, "images": 6, "images present": 5, "not an image": 1, "missing image": 1, "unusable": 2}
    assert totals(report, "ocr_vqa") == ocr
    assert totals(report, "coco") == {"rows": 3, "images": 2, "images present": 2, "duplicate": 1}
    assert totals(report, "(no conversation)") == {"rows": 1, "media without a file": 1, "unusable": 1}
    assert len(drops.read_text().splitlines()) == 3

    (root / "gqa/images/1.jpg").write_bytes(b"")
    (root / "vg/VG_100K/1.jpg").write_bytes(image(41)[:100])
    (root / "textvqa/train_images/0a.jpg").unlink()
    (root / "coco/train2017/000000000001.jpg").write_bytes(image(1, "GIF", "P"))
    code, said = call(*check)
    assert code == 1 and "6 of 14 rows are unusable" in said
    assert totals(report, "gqa")["empty image file"] == totals(report, "vg")["broken image"] == 1
    assert totals(report, "coco")["mislabeled image"] == totals(report, "textvqa")["missing image"] == 1

    shelf.requests.clear()
    code, said = call(*check, "--repair")
    assert code == 1 and "repaired 4 images; 2 cannot be" in said and "3 of 14 rows are unusable" in said
    assert (root / "gqa/images/1.jpg").read_bytes() == image(21)
    assert (root / "vg/VG_100K/1.jpg").read_bytes() == image(41)
    assert not any("train2017" in path for path, *_ in shelf.requests), "re-encoded, not fetched"
    assert "mislabeled image" not in totals(report, "coco")


def test_what_cannot_be_fetched_leaves_what_is_there(shelf, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    call("data", "prepare", "llava-665k", "--root", root, "--drop-archives")
    broken = root / "gqa/images/1.jpg"
    broken.write_bytes(image(21)[:100])
    shelf.files.clear()
    monkeypatch.setattr("visper.data.sets.prepare.RetryPolicy", lambda: QUICK)
    monkeypatch.setattr("sys.argv", ["visper", "data", "check", "llava-665k", "--root", str(root), "--repair"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "gqa/images.zip: no source gave it" in capsys.readouterr().err
    assert broken.read_bytes() == image(21)[:100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llava-665k",), "Run `visper data prepare llava-665k --root"),
        (("llava-656k",), "did you mean 'llava-665k'"),
        (("gqa",), "rows of 'llava-665k' name its images"),
        (("mmstar",), "has no rows to train on: it is for evaluation"),
        (("rows.json",), "give the folder of its images with --images"),
        (("llava-665k", "--images", "x"), "omit --images"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "shard"])
def test_what_cannot_be_looked_at_says_why(verb, arguments, message, tmp_path, monkeypatch, capsys):
    more = ["--root", str(tmp_path), *(["--out", str(tmp_path / "s")] if verb == "shard" else [])]
    monkeypatch.setattr("sys.argv", ["visper", "data", verb, *arguments, *more])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_photographs_go_all_the_way(beside_project, tmp_path, tiny_llm, tiny_encoder):
    """A user's own set in YAML: prepare, check, records, shards, and a step of training from either."""
    photos, root = beside_project("photos", variable="VISPER_PHOTOS"), tmp_path / "data"
    downloads = [
        {"file": f"photos/{name}.json", "sources": [{"path": str(photos / f"{name}.json")}]}
        for name in ("instruct", "pretrain")
    ] + [
        {"file": name, "sources": [{"path": str(photos / name)}], "unpack": [{"to": f"photos/{name}"}]}
        for name in ("coco", "flickr")
    ]
    rows = [{"json": f"photos/{name}.json", "images": "photos"} for name in ("instruct", "pretrain")]
    described = {"name": "photographs", "title": "t", "use": "stage ift", "license": "l", "rows": rows}
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**described, "downloads": downloads}))
    code, said = call("data", "prepare", mine, "--root", root)
    assert code == 0 and "929 of 929 files named by rows are present" in said
    assert "ready" in call("data", "list", mine, "--root", root)[1]

    report = tmp_path / "report.json"
    code, said = call("data", "check", mine, "--root", root, "--report", report)
    found = json.loads(report.read_text())
    assert code == 0 and found["unusable"] == 0 and len(found["files"]) == 2
    lost = root / "photos" / json.loads((photos / "pretrain.json").read_text())[0]["image"]
    whole = lost.read_bytes()
    lost.write_bytes(whole[:500])
    code, said = call("data", "check", mine, "--root", root)
    assert code == 1 and "1 of 850 rows are unusable" in said
    code, said = call("data", "check", mine, "--root", root, "--repair")
    assert code == 0 and "repaired 1 image " in said and lost.read_bytes() == whole

    parquet = tmp_path / "parquet"
    code, said = call("data", "shard", mine, "--root", root, "--out", parquet, "--file-mb", 4)
    assert code == 0 and f"{found['rows']:,} rows in" in said
    settings = {
        "stage": "ift",
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, "precision": "float32"},
    }
    for name, source in (("files", {"set": str(mine)}), ("parquet", {"parquet": f"{parquet}/*.parquet"})):
        data = {"root": str(root), "sources": [source], "group_by_length": True, "workers": 0, "max_tokens": 2048}
        out = tmp_path / f"from-{name}"
        run_stage(Run.model_validate({**settings, "name": name, "output": str(out), "data": data}))
        assert json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"] > 0


def test_names_from_rows_are_text_on_the_terminal(tmp_path, monkeypatch, capsys):
    name = "[red]\x1b[2Jfolder/x.jpg"
    rows = [{"id": "\x1b]0;owned\x07", "image": name, "conversations": [{"from": "human", "value": "<image>"}]}]
    (tmp_path / "[b]x.json").write_text(json.dumps(rows))
    monkeypatch.setattr("sys.argv", ["visper", "data", "check", str(tmp_path / "[b]x.json"), "--images", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "[b]x.json" in out and not {"\x1b", "\x07"} & set(out + err)


@pytest.mark.parametrize("option", ["--report", "--drop"])
def test_a_folder_is_not_replaced_by_a_file(shelf, tmp_path, option):
    kept = tmp_path / "images"
    kept.mkdir()
    (kept / "1.png").write_bytes(b"1")
    code, said = call("data", "check", "llava-665k", "--root", tmp_path, option, kept)
    assert code == 2 and "name a file" in said and (kept / "1.png").exists()


@pytest.mark.parametrize("options", [[], ["--images", "photos"]])
def test_a_folder_is_no_data_set_and_its_rows_are_named(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "rows.json").write_text("[]")
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path), *options])
    assert isinstance(done.exception, ConfigError)
    assert "is a folder" in str(done.exception) and f"such as '{tmp_path / 'rows.json'}'" in str(done.exception)


def test_a_source_that_is_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder: name a conversation file"):
        open_records([(tmp_path, tmp_path)], DropList())
