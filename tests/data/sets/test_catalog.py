"""The catalog is valid, recipes name its entries, and an error about a missing set gives the command for it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.data.sets.test_prepare import own_set
from visper.cli import app
from visper.common.errors import ConfigError
from visper.config import Source, load_run, recipe_names
from visper.data.sets.catalog import missing, read_set, row_files, set_names, with_needs


@pytest.mark.parametrize("name", set_names())
def test_every_entry_is_valid_and_named_as_its_file(name):
    data_set, _ = read_set(name)
    assert data_set.name == name and data_set.license
    assert all(need in set_names() for need in (*data_set.needs, *data_set.needed_by))


def test_no_two_downloads_share_a_place():
    files = [download.file for name in set_names() for download in read_set(name)[0].downloads]
    assert len(set(files)) == len(files)


def test_the_catalog_is_read_without_torch():
    code = (
        "import sys, pathlib; from visper.data.sets.catalog import listing; listing(['llava-665k'], pathlib.Path('x'))"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    "recipe", [name for name in recipe_names() if not name.startswith(("quickstart", "photographs", "study"))]
)
def test_published_recipes_name_sets_and_say_which_command_brings_them(recipe, tmp_path):
    run = load_run(recipe, [f"data.root={tmp_path}"])
    (source,) = run.data.sources
    with pytest.raises(ConfigError, match=f"visper data prepare {source.data_set} --root {tmp_path}"):
        row_files(run.data)


def test_a_set_that_is_there_gives_its_rows_and_their_folder(tmp_path):
    (tmp_path / "LLaVA-Pretrain" / "images").mkdir(parents=True)
    rows = tmp_path / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    rows.write_text("[]")
    data = load_run("llama3-8b-vit-l/pt", [f"data.root={tmp_path}"]).data
    with pytest.raises(ConfigError, match="missing LLaVA-Pretrain/images"):
        row_files(data)
    (tmp_path / "LLaVA-Pretrain" / "images" / "00000").mkdir()
    assert row_files(data) == [Source(json_file=str(rows), images=str(tmp_path / "LLaVA-Pretrain" / "images"))]


def test_an_interrupted_preparation_is_not_taken_for_a_whole_one(tmp_path):
    (tmp_path / "eval" / "mmstar").mkdir(parents=True)
    (tmp_path / "eval" / "mmstar" / "mmstar.parquet").write_text("x")
    assert missing(read_set("mmstar")[0], tmp_path) == []
    (tmp_path / "visper-data.lock.json").write_text(json.dumps({"unfinished": ["mmstar"]}))
    assert missing(read_set("mmstar")[0], tmp_path) == ["the end of an interrupted preparation"]


def test_a_set_without_rows_cannot_be_trained_on(tmp_path):
    (tmp_path / "eval" / "mmstar").mkdir(parents=True)
    (tmp_path / "eval" / "mmstar" / "mmstar.parquet").write_text("x")
    data = load_run("llama3-8b-vit-l/pt", [f"data.root={tmp_path}", "data.sources=[{set: mmstar}]"]).data
    with pytest.raises(ConfigError, match="no rows to train on: it is for evaluation"):
        row_files(data)


def test_parts_of_a_set_bring_its_rows():
    assert [data_set.name for data_set, _ in with_needs("allava-caption")] == [
        "allava-caption",
        "allava-laion",
        "allava-vflan",
    ]


@pytest.mark.parametrize("source", ["{}", "{json: a}", "{set: a, json: b, images: c}", "{images: a}"])
def test_a_source_is_a_set_or_a_file_with_its_folder(source):
    with pytest.raises(ConfigError, match="give one of 'set'"):
        load_run("llama3-8b-vit-l/pt", [f"data.sources=[{source}]"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "x"}, "unknown key 'licens': did you mean 'license'"),
        ({"downloads": [{"file": "a", "sources": []}]}, r"downloads\.0\.sources"),
        ({"downloads": [{"file": "a", "sources": [{"hub": "a/b"}]}]}, "give 'url', or 'hub' and 'path', or a local"),
        ({"downloads": [{"file": "../a", "sources": [{"path": "b"}]}]}, "expected a path inside the root"),
        ({"downloads": [{"file": "a", "sources": [{"url": "ftp://a"}]}]}, r"sources\.0\.url"),
        ({"downloads": [{"file": "a", "sources": [{"path": "b"}], "size": "much"}]}, "a size such as '18 GB'"),
        ({"downloads": [{"file": "a", "sources": [{"path": "b"}], "size": 18}]}, "a size such as '18 GB'"),
        ({"downloads": [{"file": "a", "sources": [{"path": "b"}], "size": "18"}]}, "a size such as '18 GB'"),
        ({"downloads": [{"file": "a", "sources": [{"path": "b"}], "unpack": [{"too": "x"}]}]}, "did you mean 'to'"),
        ({"downloads": [{"file": "a", "sources": [{"path": "b"}], "md5": "00"}]}, r"downloads\.0\.md5"),
    ],
)
def test_faults_of_a_description_name_file_key_and_remedy(tmp_path, change, message):
    file = own_set(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as error:
        read_set(str(file))
    assert str(file) in str(error.value)


def test_list_shows_sizes_what_is_there_and_licenses(tmp_path):
    (tmp_path / "root" / "mine").mkdir(parents=True)
    file = own_set(tmp_path, {"downloads": [{"file": "mine/a.txt", "sources": [{"path": "a"}], "size": "2 GB"}]})
    shown = CliRunner().invoke(app, ["data", "list", str(file), "llava-665k", "--root", str(tmp_path / "root")]).output
    assert "2.0 GB" in shown and "60.0 GB +" in shown and "119.0 GB +" in shown and "License: l" in shown
    (tmp_path / "root" / "mine" / "a.txt").write_text("x")
    assert "ready" in CliRunner().invoke(app, ["data", "list", str(file), "--root", str(tmp_path / "root")]).output


def test_prepare_brings_a_set_of_ones_own(tmp_path):
    (tmp_path / "a").write_text("x")
    file = own_set(tmp_path, {"downloads": [{"file": "mine/a.txt", "sources": [{"path": "a"}]}]})
    command = ["data", "prepare", str(file), "--root", str(tmp_path / "root")]
    assert "1 files fetched" in CliRunner().invoke(app, command).output
    assert "nothing to do" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize("verb", ["list", "prepare"])
def test_help_shows_an_example(verb):
    assert "Example" in CliRunner().invoke(app, ["data", verb, "--help"]).output
