"""Rows, prompts and scores of small files in the published schemas, the scores worked out by hand."""

import json

import pyarrow.parquet as pq
import pytest

from tests.evaluation.benchmarks import published
from visper.common.console import Console
from visper.common.errors import ConfigError, DataError
from visper.evaluation import asking
from visper.evaluation.asking import Asker
from visper.evaluation.benchmarks import BENCHMARKS, find_benchmarks
from visper.evaluation.benchmarks.published_scores import COLUMNS, PAPER
from visper.evaluation.benchmarks.run import average, constant_readings, run_benchmark, save_results, show_results

SAID = {
    "cv-bench": ["(B)", "(B)", "a", "tree", "(A)"],  # right: 1 of 2, 1 of 1; 1 of 1, 1 of 1
    "mmstar": ["A", "(B)", "The answer is (C)", "A"],  # right: 3 of 4
    "realworldqa": ["right", "three"],  # right: 1 of 2
    "ok-vqa": ["ride", "Dog"],  # (2 x 1/3 + 8 x 2/3) / 10 = 0.6, and 1
}
SCORES = {
    "cv-bench": {"Count": 0.5, "Depth": 1, "Relation": 1, "Distance": 1, "2D": 0.75, "3D": 1, "CV-Bench": 0.875},
    "mmstar": {"MMStar": 0.75},
    "realworldqa": {"RWQA": 0.5},
    "ok-vqa": {"OK-VQA": 0.8},
}
PUBLISHED = {
    "cv-bench": {"Count": 0.5, "Depth": 0, "Relation": 0, "Distance": 1, "2D": 0.25, "3D": 0.5, "CV-Bench": 0.375},
    "mmstar": {"MMStar": 0.5},
    "realworldqa": {"RWQA": 0},
    "ok-vqa": {"OK-VQA": 0.8},
}
LENGTHS = {"cv-bench": 128, "mmstar": 128, "realworldqa": 16, "ok-vqa": 32}
PROMPTS = {
    "cv-bench": "question 0? Select from the following choices.\nOnly answer the option as the output. For example, if "
    "your answer is the option A, answer (A).",
    "mmstar": "Which 0?\nOptions: A: red, B: blue, C: green, D: gray\nAnswer with the option's letter from the given "
    "choices directly, such as answer letter 'A' only. \n",
    "realworldqa": published.REALWORLD[0][0],
    "ok-vqa": "What is 0?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\nAnswer the "
    "question using a single word or phrase.",
}


@pytest.fixture
def root(tmp_path):
    return published.write_all(tmp_path / "data")


@pytest.fixture
def asker(tmp_path, monkeypatch):
    """A model that says what ``SAID`` says, by the place of the question in the benchmark; blind, always nothing."""
    said, lengths = {}, {}

    def answer(student, prompts, shown, length, generate):
        lengths.update(dict.fromkeys(prompts, length))
        return [said.get((prompt, image.tobytes()), "") for prompt, (image,) in zip(prompts, shown, strict=True)]

    def prepare(name, root, answers):
        items, images = BENCHMARKS[name].rows(root)
        pairs = zip(items, answers, strict=True)
        said.update({(item.prompt, images.open(*item.images).tobytes()): text for item, text in pairs})

    monkeypatch.setattr(asking, "answer", answer)
    monkeypatch.setattr(asking, "load_to_ask", lambda model: None)
    (tmp_path / "model").mkdir()
    asker = Asker(str(tmp_path / "model"), batch_size=2)
    asker.prepare, asker.lengths = prepare, lengths
    return asker


def values(columns):
    return {column.name: pytest.approx(column.value) for column in columns}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_from_its_files_to_its_scores(name, root, asker):
    asker.prepare(name, root, SAID[name])
    result = run_benchmark(asker, BENCHMARKS[name], root, blind=True)
    assert values(result.columns) == SCORES[name] and values(result.published) == PUBLISHED[name]
    assert set(values(result.blind)) == set(SCORES[name]) and not any(column.value for column in result.blind)
    assert PROMPTS[name] in asker.lengths and set(asker.lengths.values()) == {LENGTHS[name]}
    assert (result.asked, result.of, result.empty, result.unanswered) == (len(SAID[name]), len(SAID[name]), 0, 0)
    for column in result.columns:
        assert 0 <= column.interval[0] <= column.value <= column.interval[1] <= 1 and column.interval[0] < 0.9
    rows = [json.loads(line) for line in result.answers.read_text().splitlines()]
    assert [row["said"] for row in rows if not row["blind"]] == SAID[name]
    assert result.read_otherwise == sum(row["read"] != row["published_reading"] for row in rows if not row["blind"])


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("cv-bench", 0.875),  # one of two in Count, the only row of each other task
        ("mmstar", 0.25),
        ("realworldqa", 0.5),
        ("ok-vqa", 0.5),  # "dog", said by all annotators of one of two questions
    ],
)
def test_the_constant_answer_is_the_most_frequent_right_one_of_each_kind(name, score, root):
    benchmark = BENCHMARKS[name]
    items, _ = benchmark.rows(root)
    assert values(benchmark.score(items, constant_readings(benchmark, items)))[benchmark.overall] == score
    more = [*items, items[1], items[1]]  # now the answer to the second is the most frequent of its kind
    assert constant_readings(benchmark, more)[1] == benchmark.read(items[1], items[1].answers[0]).text


def test_all_gives_the_papers_seven_columns_and_their_mean(root, asker, tmp_path, capsys):
    for name, said in SAID.items():
        asker.prepare(name, root, said)
    results = [run_benchmark(asker, benchmark, root) for benchmark in find_benchmarks("all")]
    assert average(results).value == pytest.approx((0.5 + 1 + 1 + 1 + 0.75 + 0.5 + 0.8) / 7)
    assert average(results[:3]) is None
    show_results(Console(width=200), results)
    shown = capsys.readouterr().out
    mine = next(line for line in shown.splitlines() if "this model" in line).split()[2:]
    assert mine == ["50.0", "100.0", "100.0", "100.0", "87.5", "75.0", "50.0", "80.0", "79.3"]
    theirs = next(line for line in shown.splitlines() if "OLA-VLM, Llama-3 ViT-L" in line).split()[3:]
    assert theirs == ["51.3", "74.2", "69.4", "54.3", "61.4", "39.5", "57.9", "56.6", "57.6"]
    assert "Qwen2.5-VL-7B (2026)" in shown
    row = next(line for line in shown.splitlines() if "CV-Bench" in line)
    assert [cell.strip() for cell in row.split("│")[4:6]] == ["37.5", "87.5"]  # published parser, constant
    assert "cv-bench: 5 asked, 0 not answered (image unreadable, or too long), 0 answers empty, 2 answers that" in shown
    save_results(tmp_path / "s.json", results, "owner/name")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["ok-vqa"]["scores"]["OK-VQA"]["score"] == pytest.approx(0.8) and "average" in saved
    assert saved["ok-vqa"]["constant"] == {"OK-VQA": pytest.approx(0.5)}


def test_a_limit_takes_rows_evenly_and_says_so(root, asker, capsys):
    asker.prepare("cv-bench", root, SAID["cv-bench"])
    result = run_benchmark(asker, BENCHMARKS["cv-bench"], root, limit=3)
    assert (result.asked, result.of, result.answers.name) == (3, 5, "cv-bench-3.jsonl")
    assert [column.name for column in result.columns] == ["Count", "Depth", "3D"]  # rows 0, 1 and 3: no COCO, so no 2D
    show_results(Console(width=200), [result])
    assert "3 of 5 (the scores are not benchmark results) asked" in capsys.readouterr().out


def test_empty_answers_and_unreadable_images_are_counted_as_wrong(root, asker, capsys):
    file = root / "coco" / "val2014" / "COCO_val2014_000000000043.jpg"
    asker.prepare("ok-vqa", root, ["", "dog"])
    file.write_bytes(file.read_bytes()[:60])
    result = run_benchmark(asker, BENCHMARKS["ok-vqa"], root)
    assert (result.empty, result.unanswered) == (1, 1) and values(result.columns) == {"OK-VQA": 0.0}


def test_a_benchmark_that_is_not_prepared_names_the_command(tmp_path):
    published.write_mmstar(tmp_path)
    BENCHMARKS["mmstar"].rows(tmp_path)
    for name in ("cv-bench", "realworldqa", "ok-vqa"):
        with pytest.raises(ConfigError, match=rf"Run `visper data prepare {name} --root .*`, or set --root"):
            BENCHMARKS[name].rows(tmp_path)
    with pytest.raises(ConfigError, match="no benchmark 'mmbench': choose one of cv-bench, mmstar,"):
        find_benchmarks("mmbench")


def test_a_missing_column_is_named_with_its_file(root):
    for name, column in (("cv-bench/test_3d", "prompt"), ("mmstar/mmstar", "image")):
        file = root / "eval" / f"{name}.parquet"
        pq.write_table(pq.read_table(file).drop_columns([column]), file)
        with pytest.raises(DataError, match=rf"{file.name}' has no column '{column}'; it has"):
            BENCHMARKS[name.split("/")[0]].rows(root)
    file = root / "eval" / "ok-vqa" / "mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    del content["annotations"][0]["answers"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="an entry of 'annotations' has no 'answers'"):
        BENCHMARKS["ok-vqa"].rows(root)
    file.write_text(file.read_text()[:50])
    with pytest.raises(DataError, match="not JSON"):
        BENCHMARKS["ok-vqa"].rows(root)


def test_the_papers_averages_are_the_means_of_its_columns_but_for_one():
    """To rounding. The columns of that row give 55.8; it stays as published, 55.1."""
    rows = {name: row for name, row in PAPER.items() if row["average"]}
    off = {name: abs(sum(row[c] for c in COLUMNS) / 7 - row["average"]) for name, row in rows.items()}
    assert len(rows) == 8 and {name for name, value in off.items() if value > 0.06} == {"LLaVA, Llama-3 ViT-L"}
