"""A run is continued with the rows, images and weights that it began with, or not at all, unless told so."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.common.test_files import leftover
from visper.common.errors import ConfigError
from visper.common.files import write_text
from visper.common.manifest import WEIGHTS_ONLY, write_manifest
from visper.config import Run
from visper.data.rows import table
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.sets.catalog import row_files
from visper.target_store.build import build_targets
from visper.target_store.open import open_targets
from visper.training import is_finished, run_pipeline, run_stage
from visper.training import output as output_module
from visper.training.content import CONTENT, content_of, require_same_content
from visper.training.output import check_output, claim_output
from visper.training.trainer import StageTrainer


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """PT of four steps; everything that it is trained on lies under ``tmp_path``."""
    monkeypatch.setenv("VISPER_CACHE", str(tmp_path / "cache"))
    llm, encoder = tiny.save_llm(tmp_path / "llm"), tiny.save_encoder(tmp_path / "encoder")
    settings = json.loads(tiny.write_recipe(tmp_path, "pt", llm, encoder, max_steps=4).read_text())
    settings["distillation"] = tiny.distillation()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "weights.bin").write_bytes(b"0")
    (tmp_path / "own_loss.py").write_text("def mine(p, target, mask):\n    return (p - target).abs().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_loss", raising=False)  # another test's
    settings["distillation"]["tasks"]["gen"]["loss"] = {"own_loss:mine": 1.0}
    settings["distillation"]["tasks"]["seg"]["target"]["model"] = str(tmp_path / "teacher")
    settings["logging"]["save_every"] = 2
    return Run.model_validate(settings)


def content(run: Run) -> dict[str, str]:
    targets = open_targets(run.distillation, run.data.geometry.value, (0, 0, 0))
    return content_of(run, open_records(row_files(run.data), DropList()), targets)


def change_answer(folder: Path) -> None:
    file = folder / "rows" / "rows.json"
    file.write_text(file.read_text().replace("thing xx", "thing yy"))


def change_images(folder: Path) -> None:
    for file in (folder / "rows" / "images").iterdir():
        file.write_bytes(file.read_bytes() + b"\0")


def change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an answer under the same id": (change_answer, "the rows of 'rows'"),
    "all images": (change_images, "images"),
    "the LLM": (lambda folder: change_weights(folder / "llm"), "student.llm '.*/llm'"),
    "the encoder": (lambda folder: change_weights(folder / "encoder"), "student.encoder '.*/encoder'"),
    "a teacher": (lambda folder: (folder / "teacher" / "weights.bin").write_bytes(b"1"), "the teacher of 'seg' '.*'"),
    "the code of a loss": (lambda folder: (folder / "own_loss.py").write_text(""), "the code of 'own_loss:mine'"),
    "a new file of a teacher": (lambda folder: (folder / "teacher" / "a").touch(), "the teacher of 'seg' '.*'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_refused_by_name_alone(run: Run, tmp_path: Path, what: str) -> None:
    change, name = CHANGES[what]
    (tmp_path / CONTENT).write_text(json.dumps(content(run)))
    change(tmp_path)
    with pytest.raises(ConfigError, match=rf"began: {name}\. Restore it, or .*--resume --accept-changes"):
        require_same_content(tmp_path, content(run))


def test_what_stays_the_same_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / CONTENT).write_text(json.dumps(content(run)))
    rows = tmp_path / "rows" / "rows.json"
    rows.write_text(json.dumps(json.loads(rows.read_text()), indent=7))
    (tmp_path / "llm" / "README.md").write_text("notes")
    require_same_content(tmp_path, content(run))


def test_the_stage_before_is_content(run: Run, tmp_path: Path) -> None:
    run_stage(run)
    changes = {"student": None, "distillation": None, "stage": "ift", "start_from": run.output}
    later = run.model_copy(update=changes)
    (tmp_path / CONTENT).write_text(json.dumps(content(later)))
    change_weights(Path(run.output) / "model")
    with pytest.raises(ConfigError, match=r"began: start_from '.*/pt/model'\."):
        require_same_content(tmp_path, content(later))


@pytest.mark.parametrize(
    ("again", "name"),
    [
        ({"dtype": "int8"}, r"distillation\.targets '.*/targets/store\.json'"),
        ({"teacher": "bfloat16"}, "the precision of the targets of 'depth', .* of 'gen', .* of 'seg'"),
    ],
)
def test_stored_targets_built_again_otherwise_are_refused(
    run: Run, tmp_path: Path, again: dict[str, str], name: str
) -> None:
    def stored(dtype: str = "float16", teacher: str = "float32") -> dict[str, str]:
        assert run.distillation is not None
        changes = {"targets": str(tmp_path / "targets"), "teacher_dtype": teacher}
        changed = run.model_copy(update={"distillation": run.distillation.model_copy(update=changes)})
        build_targets(changed, tmp_path / "targets", dtype, quiet=True)
        return content(changed)

    (tmp_path / CONTENT).write_text(json.dumps(stored()))
    require_same_content(tmp_path, stored())
    shutil.rmtree(tmp_path / "targets")
    with pytest.raises(ConfigError, match=rf"began: {name}\. Restore it"):
        require_same_content(tmp_path, stored(**again))


def test_a_stage_finished_from_something_else_is_not_skipped(run: Run, tmp_path: Path) -> None:
    run_stage(run)
    changes = {"student": None, "distillation": None, "stage": "ift", "start_from": run.output}
    later = run.model_copy(update={**changes, "output": str(tmp_path / "ift")})
    run_pipeline([run, later])
    run_pipeline([run, later])
    change_weights(Path(run.output) / "model")
    write_manifest(Path(run.output) / "model", WEIGHTS_ONLY)  # as if it had been trained again
    with pytest.raises(
        ConfigError, match=r"ift' holds this run, finished, but .*: start_from '.*/pt/model'\. Remove '"
    ):
        run_pipeline([run, later])


def test_another_version_of_the_code_that_parses_rows_changes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(run)
    monkeypatch.setattr(table, "code_key", lambda *modules: "newer")
    monkeypatch.setattr(table, "BATCH_ROWS", 2)
    monkeypatch.setattr(table, "SCHEMA", table.SCHEMA.append(pa.field("newer", pa.string())))
    assert is_finished(run)
    require_same_content(Path(run.output), content(run))


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_run_is_compared_with_all_that_it_was_trained_on(run: Run, tmp_path: Path, what: str) -> None:
    change, name = CHANGES[what]
    finished(run)
    change(tmp_path)
    with pytest.raises(ConfigError, match=rf"but changed since it began: {name}\. Remove"):
        is_finished(run)


@pytest.mark.parametrize("removed", ["rows/rows.json", "rows/images", "llm", "teacher"])
def test_a_finished_run_does_not_need_what_it_was_trained_on(run: Run, tmp_path: Path, removed: str) -> None:
    finished(run)
    (tmp_path / removed).rename(tmp_path / "elsewhere")
    assert is_finished(run)
    (Path(run.output) / CONTENT).unlink()
    with pytest.raises(ConfigError, match=r"unknown whether .* was trained on the current content"):
        is_finished(run)


def finished(run: Run) -> None:
    """Makes a folder as if the run had been trained."""
    (Path(run.output) / "model").mkdir(parents=True)
    claim_output(run, Path(run.output), content(run))
    (Path(run.output) / "model" / "run.yaml").touch()


@pytest.mark.parametrize("written", [0, 1])
def test_a_run_killed_while_it_claims_its_folder_may_begin_again(run: Run, monkeypatch, written: int) -> None:
    output = Path(run.output)
    output.mkdir()
    left = iter(range(written))

    def write(path: Path, text: str) -> None:
        next(left)
        write_text(path, text)

    monkeypatch.setattr(output_module, "write_text", write)
    with pytest.raises(StopIteration):
        claim_output(run, output, content(run))
    check_output(run, output, resume=False)


def test_the_leftovers_of_a_killed_run_go_when_it_is_claimed_again(run: Run) -> None:
    places = [Path(run.output) / "log.jsonl", Path(run.output) / "drawings" / "step_000002" / "1.png"]
    places[1].parent.mkdir(parents=True)
    for place in places:
        leftover(place).touch()
    claim_output(run, Path(run.output), content(run))
    assert not any(leftover(place).exists() for place in places)


@pytest.mark.parametrize("damaged", [None, "{", "[]"])
def test_without_a_record_nothing_is_taken_for_the_same(run: Run, tmp_path: Path, damaged: str | None) -> None:
    if damaged is not None:
        (tmp_path / CONTENT).write_text(damaged)
    with pytest.raises(ConfigError, match=r"content\.json' cannot be read"):
        require_same_content(tmp_path, content(run))


@pytest.mark.slow
def test_a_run_is_resumed_with_other_answers_only_if_told_so(run: Run, tmp_path: Path, monkeypatch) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    steps = StageTrainer.training_step

    def step(self: StageTrainer, *args: object) -> torch.Tensor:
        if self.state.global_step == 3:
            raise Killed
        return steps(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTrainer, "training_step", step)
        run_stage(run)
    before = (Path(run.output) / CONTENT).read_text()
    change_answer(tmp_path)
    with pytest.raises(ConfigError, match=r"the rows of 'rows'"):
        run_stage(run, resume=True)
    assert (Path(run.output) / CONTENT).read_text() == before
    run_stage(run, resume=True, accept_changes=True)
    assert json.loads((Path(run.output) / CONTENT).read_text()) == content(run)
