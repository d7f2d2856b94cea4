"""Every verb: its help has an example, it does its one thing, and people's mistakes end in one message."""

import json
import os
from importlib.metadata import version

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import tiny
from tests.evaluation.benchmarks.published import write_mmstar
from visper.cli import app, main
from visper.common.errors import ConfigError, DataError
from visper.config import load_run, recipe_names
from visper.data.rows.records import DropList
from visper.training import run_stage

VERBS = (
    ["quickstart"],
    ["train"],
    ["pipeline"],
    ["plan"],
    ["recipes"],
    ["chat"],
    ["evaluate"],
    ["look"],
    ["convert"],
    ["data", "list"],
    ["data", "prepare"],
    ["data", "check"],
    ["data", "shard"],
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llm, tiny_encoder):
    """A finished fine-tuning of a tiny student, with the recipe that made it."""
    folder = tmp_path_factory.mktemp("cli")
    rows = tiny.write_rows(folder / "rows")
    recipe = {
        "name": "tiny",
        "stage": "ift",
        "output": str(folder / "out"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, "precision": "float32"},
    }
    (folder / "tiny.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run_stage(load_run(folder / "tiny.yaml"))
    return folder


def call(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_an_example(verb):
    result = call(*verb, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_recipes_are_listed_and_shown_resolved():
    listed = call("recipes").output.splitlines()
    assert {line.split()[0] for line in listed[1:]} == set(recipe_names()), "a name that is cut off cannot be copied"
    assert "global_batch: 256" in call("recipes", "phi3-mini-vit-l/pt").output


def test_parameters_of_a_recipe_are_counted_by_part_and_stage():
    shown = call("recipes", "phi3-mini-vit-l/ift", "--parameters").output
    assert "3,821,079,552" in shown and "all and trainable" in shown and "in vpt" in shown and "predictors" in shown


def test_train_takes_overrides(trained):
    result = call("train", str(trained / "tiny.yaml"), f"output={trained / 'other'}", "seed=5")
    assert result.exit_code == 0
    assert load_run(trained / "other" / "run.yaml").seed == 5


def test_pipeline_skips_finished_stages(trained):
    assert "finished" in call("pipeline", str(trained / "tiny.yaml")).output


def test_chat_answers(trained):
    Image.new("RGB", (9, 7), "blue").save(trained / "blue.png")
    asked = ("chat", str(trained / "out"), "--image", str(trained / "blue.png"), "--prompt", "what?")
    assert call(*asked, "--max-new-tokens", "3").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "out", "--prompt", "what?", "--max-new-tokens", "0"),
        ("quickstart", "--seed", "-1"),
        ("data", "check", "rows.json", "--workers", "0"),
        ("data", "shard", "rows.json", "--out", "shards", "--seed", "-1"),
    ],
)
def test_a_number_that_nothing_can_use_is_refused_at_once(arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and arguments[-2] in result.output


def test_chat_refuses_a_prompt_longer_than_the_positions(trained):
    with pytest.raises(DataError, match="leave no room for an answer: shorten --prompt"):
        call("chat", str(trained / "out"), "--prompt", "what is it? " * 500)


def test_chat_without_an_image_says_that_none_is_shown(trained, capsys):
    result = call("chat", str(trained / "out"), "--prompt", "In HTML, <image> is what?", "--max-new-tokens", "3")
    assert result.exit_code == 0 and "the model answers from the text alone" in result.stderr
    assert "alone" not in result.stdout


def test_answers_that_cannot_be_written_are_refused_before_the_model_is_loaded(trained, tmp_path):
    (tmp_path / "questions.json").write_text('[{"question": "what?", "answer": "red"}]')
    (tmp_path / "file").write_text("")
    asked = ("evaluate", "/nowhere", "--questions", str(tmp_path / "questions.json"))
    with pytest.raises(
        ConfigError, match=r"file/a\.jsonl', since '.*file' is not a writable folder: .* --answers FILE"
    ):
        call(*asked, "--answers", str(tmp_path / "file" / "a.jsonl"))


def test_a_read_only_model_folder_asks_for_another_place_of_the_answers(tmp_path, monkeypatch):
    (tmp_path / "questions.json").write_text('[{"question": "what?", "answer": "red"}]')
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda place, _: str(place) != str(tmp_path / "model"))  # root may write anywhere
    asked = ("evaluate", str(tmp_path / "model"), "--questions", str(tmp_path / "questions.json"))
    with pytest.raises(ConfigError, match=r"'.*model' is not a writable folder: give another file with --answers"):
        call(*asked)
    assert list((tmp_path / "model").iterdir()) == []


def test_scores_are_saved_although_nobody_reads_the_output(trained, tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    write_mmstar(tmp_path)
    monkeypatch.setattr("visper.evaluation.benchmarks.run.show_results", closed)
    asked = ("--benchmark", "mmstar", "--root", str(tmp_path), "--answers", str(tmp_path / "mine"))
    assert call("evaluate", str(trained / "out"), *asked).exit_code == 1
    assert (tmp_path / "mine" / "mmstar.scores.json").is_file()


def test_a_benchmark_of_a_read_only_model_goes_where_answers_says(trained, tmp_path, monkeypatch):
    write_mmstar(tmp_path)
    out, access, asked = trained / "out", os.access, ("--benchmark", "mmstar", "--root", str(tmp_path))
    before = set(out.rglob("*"))
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith(str(out)) and access(place, mode))
    with pytest.raises(ConfigError, match=r"is not a writable folder: give another folder with --answers"):
        call("evaluate", str(out), *asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"'.*file' is not a writable folder: give another folder with --answers"):
        call("evaluate", "/nowhere", *asked, "--answers", str(tmp_path / "file"))
    assert call("evaluate", str(out), *asked, "--answers", str(tmp_path / "mine")).exit_code == 0
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {"mmstar.jsonl", "mmstar.scores.json"}
    assert set(out.rglob("*")) == before


def test_convert_says_that_a_llava_folder_needs_no_conversion(trained):
    with pytest.raises(ConfigError, match="needs no conversion"):
        call("convert", str(trained / "out" / "model"), str(trained / "converted"))
    assert not (trained / "converted").exists()


def test_evaluate_keeps_raw_answers_and_shows_intervals(trained):
    questions = [{"image": "1.png", "question": "what?", "answer": "thing"}, {"question": "say 1", "answer": "word"}]
    (trained / "questions.json").write_text(json.dumps(questions))
    place = ("--questions", str(trained / "questions.json"), "--images", str(trained / "rows" / "images"))
    result = call("evaluate", str(trained / "out"), *place, "--max-new-tokens", "2")
    assert "95 % interval" in result.output and "no blind control: fewer than two images differ" in result.output
    kept = [json.loads(line) for line in (trained / "out" / "answers" / "questions.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in kept] == [["thing"], ["word"]] and all("said" in row for row in kept)


def test_evaluate_scores_a_benchmark_on_a_real_model(trained, tmp_path):
    write_mmstar(tmp_path)
    result = call("evaluate", str(trained / "out"), "--benchmark", "mmstar", "--root", str(tmp_path))
    assert "MMStar" in result.output and "OLA-VLM, Phi-3 ViT-L" in result.output
    saved = json.loads((trained / "out" / "answers" / "mmstar.scores.json").read_text())
    assert saved["mmstar"]["asked"] == 4 and saved["mmstar"]["unanswered"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["train", "llama3-8b-vit-l/pt", "optimization.lrr=1"], "did you mean 'lr'?"),
        (["train", "llama3-8b-vit-l/pt", "distillation.tasks=[1]"], "distillation.tasks"),
        (["train", "llama3-8b-vit-l/pt", "name=[a"], "not valid YAML"),
        (["train", "llama3-8b-vit-l/pt", "--accept-changes"], "add --resume"),
        (["data", "check", "HERE/some.json", "--images", "HERE", "--set", "seed=1"], "changes the recipe of --run"),
        (["demo", "HERE", "--set", "seed=1"], "name it with --look"),
        (["probe", "HERE", "--task", "a", "-o", "HERE/p", "--images", "HERE", "--score-limit", "9"], "is for --score"),
        (["push", "HERE", "me/mine", "--base", "a/b"], "--base is for adapters"),
        (["evaluate", "/nowhere", "--questions", "HERE/in/own.parquet", "--images", "HERE"], "contains its images"),
        (["recipes", "photographs/pt", "--parameters"], "models/"),
        (["recipes", "--parameters"], "name it"),
        (["chat", "/nowhere/at/all", "--prompt", "x"], "/nowhere/at/all"),
        (["chat", "/nowhere/at/all", "--prompt", " "], "--prompt is empty"),
        (["chat", "/nowhere/at/all", "--prompt", "<image>"], "give one --image FILE for each '<image>'"),
        (
            ["chat", "/nowhere", "--prompt", "<image> or <image>?", "--image", "HERE/a.png"],
            "give one --image FILE for each",
        ),
        (["push", "/nowhere", "mine"], "'mine' has no owner: write owner/name, such as YOUR_ACCOUNT/mine"),
        (["push", "/nowhere", "a/b/c"], "'a/b/c' cannot name a repository: expected owner/name"),
        (["push", "/nowhere", "me/my model"], "'me/my model' cannot name a repository: expected owner/name"),
        (["push", "/nowhere", "/x"], "'/x' cannot name a repository: expected owner/name"),
        (["evaluate", "/nowhere", "--questions", "HERE"], "such as 'HERE/some.json'"),
        (["evaluate", "/nowhere", "--questions", "HERE/some.json", "--images", "none"], "'none' is not a folder"),
        (["evaluate", "/nowhere"], "give --questions FILE or --benchmark NAME"),
        (
            ["evaluate", "/nowhere", "--benchmark", "mmstar", "--root", "/none"],
            "visper data prepare mmstar --root /none",
        ),
        (["evaluate", "/nowhere", "--benchmark", "mmstar", "--max-new-tokens", "9"], "tokens: only for --questions"),
        (["evaluate", "/nowhere", "--questions", "HERE/some.json", "--answers", "HERE"], "a folder: name a file for"),
        (["evaluate", "/nowhere", "--benchmark", "mmstar", "--protocol", "own"], "no protocol 'own': choose paper"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_two(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "some.json").write_text('[{"question": "what?", "answer": "red"}]')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    embedded = {"question": ["what?"], "answer": ["red"], "image": [(tmp_path / "a.png").read_bytes()]}
    pq.write_table(pa.table(embedded), tmp_path / "in" / "own.parquet")
    arguments = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    message = message.replace("HERE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["visper", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and message in shown and "Traceback" not in shown


def fails_inside(monkeypatch, error, *options):
    def fail(*_):
        raise error

    monkeypatch.setattr("visper.config.load.read_recipe", fail)
    monkeypatch.setattr("sys.argv", ["visper", *options, "train", "any"])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "left"),
    [(["--version"], True), (["recipes", "no/such"], False)],  # the others may wait for a process that failed alone
)
def test_a_process_leaves_its_group_at_a_good_end(arguments, left, monkeypatch, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    monkeypatch.setattr("sys.argv", ["visper", *arguments])
    try:
        with pytest.raises(SystemExit):
            main()
        assert torch.distributed.is_initialized() is not left
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("error", [ValueError("unforeseen"), KeyError("unforeseen"), RuntimeError("unforeseen")])
def test_a_bug_shows_its_traceback_and_asks_for_a_report(error, monkeypatch, capsys):
    assert fails_inside(monkeypatch, error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "unforeseen" in shown and "please report it" in shown


@pytest.mark.parametrize("error", [ConfigError("no such key"), DataError("no such row"), OSError(28, "disk full")])
def test_debug_shows_the_traceback_of_expected_errors_too(error, monkeypatch, capsys):
    monkeypatch.delenv("VISPER_DEBUG", raising=False)
    assert fails_inside(monkeypatch, error) == 2 and "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("VISPER_DEBUG", "")  # restored after the test, whatever --debug sets
    assert fails_inside(monkeypatch, error, "--debug") == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "report" not in shown


@pytest.mark.parametrize(
    ("number", "advice"), [(28, "free some space"), (30, "a place that can be written"), (13, "check its permissions")]
)
def test_a_place_that_cannot_be_written_is_named_with_advice(number, advice, monkeypatch, capsys):
    assert fails_inside(monkeypatch, OSError(number, "refused", "runs/a")) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"[Errno {number}] refused: 'runs/a'; " in shown and advice in shown


def test_version_is_the_packages():
    assert call("--version").output == f"visper {version('visper-lm')}\n"


def test_data_is_checked_with_a_runs_tokenizer_then_written_to_parquet_and_trained_from(trained, tmp_path):
    rows = trained / "rows"
    recipe, drops, parquet = trained / "tiny.yaml", tmp_path / "dropped.jsonl", tmp_path / "parquet"
    file = ["data", "check", str(rows / "rows.json"), "--images", str(rows / "images")]
    assert call(*file, "--run", str(recipe)).exit_code == 0
    small = call(*file, "--run", str(recipe), "--set", "data.max_pixels=100", "--drop", str(drops))
    assert small.exit_code == 1 and {drop.reason for drop in DropList.read(drops)} == {"huge image"}
    tight = call(*file, "--run", str(recipe), "--set", "data.max_tokens=50", "--drop", str(drops))
    assert tight.exit_code == 1 and "12 of 16 rows are unusable" in tight.output
    made = call("data", "shard", *file[2:], "--drop-list", str(drops), "--out", str(parquet))
    assert made.exit_code == 0 and "4 rows in 1 file:" in made.output
    source = f"data.sources=[{{parquet: {parquet}/*.parquet}}]"
    assert call("train", str(recipe), source, f"output={tmp_path / 'out'}").exit_code == 0


@pytest.mark.parametrize(("set_before", "threads"), [(None, "1"), ("4", "4")])
def test_the_quickstart_takes_one_thread_unless_told(monkeypatch, tmp_path, set_before, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_before:
        monkeypatch.setenv("OMP_NUM_THREADS", set_before)

    def stands_in(*_, **__):
        raise ValueError(f"threads: {os.environ['OMP_NUM_THREADS']}")

    monkeypatch.setattr("visper.quickstart.run.quickstart", stands_in)
    result = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path)])
    assert str(result.exception) == f"threads: {threads}"
