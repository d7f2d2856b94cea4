"""Recipes of other methods on the quickstart's student."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from visper.common.errors import ConfigError
from visper.config import Stage, load_run, recipe_names
from visper.data.images import student_pixels
from visper.distillation import gather_targets
from visper.distillation.teachers.tasks import build_teachers, specs_of
from visper.evaluation.predictions import PreTrained, predict_images
from visper.evaluation.visualize import look
from visper.model.start import starting_student
from visper.quickstart.controls import HeldOut, findings
from visper.quickstart.objective import drawing_teachers, scaled_objective, sources_of
from visper.quickstart.run import FAST, copy_bases, quickstart, stage_runs, supervised_stage
from visper.training.assemble import build_training_model, choose_trainable

VISUAL = [name for name in recipe_names() if name.startswith("visual/")]
RECIPES = Path(__file__).parents[2] / "src" / "visper" / "recipes"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    copy_bases(out / "bases")
    return out / "bases"


def test_recipes_of_other_methods_are_short_and_say_what_they_leave_out():
    assert {"viral", "jarvis-target", "own-features", "spatial-forcing", "covt-edges", "gram"} <= {
        name.removeprefix("visual/") for name in VISUAL
    }
    for name in VISUAL:
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 25 and "# Takes:" in text and "# Leaves out:" in text and "arXiv" in text
        assert load_run(name).distillation is not None


def test_layers_and_widths_are_scaled_to_the_small_llm(bases):
    stage, section, tokens = scaled_objective("visual/viral", bases)
    task = section["tasks"]["dino"]
    assert (stage, task["layers"], tokens) == (Stage.IFT, [2], None)
    assert task["at"] == "image_tokens" and task["loss"] == {"cosine": 1.0} and task["weight"] == 0.5
    assert task["head"]["depth"] == 3 and task["head"]["width"] < 2048
    assert scaled_objective("visual/covt-edges", bases)[2] == {"order": ["edges"], "per_task": 4}


@pytest.mark.parametrize("name", VISUAL)
def test_every_objective_trains_the_quickstarts_student_and_is_compared_with_its_targets(bases, name):
    runs = stage_runs(bases.parent, bases.parent / "world", 0, FAST, objective=name)
    stage = supervised_stage(runs)
    assert stage == str(load_run(name).stage)
    run, student = runs[stage], starting_student(runs["pt"])
    teachers = build_teachers(run.distillation, "float32", student.task_token_ids)
    model = build_training_model(student, run.stage, run.distillation, specs_of(teachers))
    choose_trainable(model, run.stage, run.optimization)
    images = [Image.effect_noise((96, 96), 80 + 40 * i).convert("RGB") for i in range(2)]
    pixels = torch.stack([student_pixels(student.processor.image_processor, image) for image in images])
    block = [student.image_token_id] * model.config.image_seq_length
    block += [token for ids in student.task_token_ids.values() for token in ids]
    ids = torch.tensor([[1, *block, 5, 6, 7]] * 2)
    targets = {task: gather_targets(teacher(teacher.see(images))) for task, teacher in teachers.items()}
    found = model(ids, torch.ones_like(ids), ids.clone(), 8, 2, pixels, image_rows=torch.arange(2), targets=targets)
    found["loss"].backward()
    terms = {term: value for term, value in found.items() if term.count("/") == 2}
    assert terms and all(value > 0 for value in terms.values())
    drawing = drawing_teachers(run)
    maps = torch.ones(2, 96, 96)
    scenes = HeldOut(images, maps, maps.long(), maps.bool())
    predicted = predict_images(model.eval(), images, "What?")
    found = findings(predicted, sources_of(run, student, drawing), drawing, scenes, scenes)
    assert {finding.name for finding in found} == set(predicted)
    assert look(PreTrained(run, model, drawing), images[0]).height >= len(run.distillation.tasks) * 384


def test_a_recipe_without_an_objective_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="expected a recipe of stage pt or ift with 'distillation'"):
        quickstart(tmp_path / "out", budget=FAST, objective="llama3-8b-vit-l/ift")
    assert not (tmp_path / "out").exists()
