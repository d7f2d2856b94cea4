"""Every parameter of the published full-size checkpoints (golden g7) has its place in ours, of the same shape.

Not ours: the depth teacher's head (`da_v2_head`), which the published student carries, and the two of the three depth
MLPs that no loss reads. The vocabularies differ: our task tokens and image token are entries of it.
"""

import re

import pytest

from tests.published.names import published_name
from visper.config import Stage, load_run
from visper.distillation.teachers.tasks import planned_specs
from visper.model import build_skeleton
from visper.training.assemble import build_training_model

PLACES = (
    (r"^model\.special_(\w+)_tokens$", r"task_tokens.queries.\1"),
    (r"^(\w+)_logit_scale$", r"objective.logit_scales.\1"),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "student.model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "student.model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "student.model.multi_modal_projector.linear_2."),
    (r"^lm_head\.", "student.lm_head."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"student.model.language_model.\1."),
)
HEAD = re.compile(r"^image_(\w+)_heads\.(\d+)\.(.*)$")
VOCABULARY = ("student.lm_head.weight", "student.model.language_model.embed_tokens.weight")


def place_of(name, layers):
    head = HEAD.match(name)
    if head is not None:
        task, at, rest = head.groups()
        ours = published_name(rest)
        return None if ours is None else f"objective.predictors.{task}_{layers[task][int(at)]}.{ours}"
    for pattern, replacement in PLACES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    assert name.startswith("da_v2_head."), f"'{name}' has no place"
    return None


@pytest.mark.parametrize(
    ("recipe", "stage", "checkpoint"),
    [
        ("llama3-8b-vit-l/pt", Stage.PT, "pt_llama3_8b"),
        ("phi3-mini-vit-l/pt", Stage.PT, "pt_phi3_mini"),
        ("llama3-8b-vit-l/pt", Stage.IFT, "ift_llama3_8b"),
    ],
)
def test_published_checkpoints_fit_name_by_name(recipe, stage, checkpoint, golden):
    published = golden.full_size(checkpoint)
    run = load_run(recipe)
    student = build_skeleton(run.student)
    model = build_training_model(
        student, stage, run.distillation if stage is Stage.PT else None, planned_specs(run.distillation)
    )
    ours = {
        name.replace("vision_tower.vision_model.", "vision_tower."): tuple(p.shape)
        for name, p in model.named_parameters()
    }
    layers = {task: settings.layers for task, settings in run.distillation.tasks.items()}
    # A published scalar, the logit scale, is one element here.
    placed = {place_of(name, layers): tuple(shape) or (1,) for name, shape in published.items()}
    placed.pop(None, None)
    assert placed.keys() == ours.keys()
    # Query matrices are whole in PT only; after it we keep the rows that stand in the vocabulary.
    skipped = (*VOCABULARY, *(name for name in ours if stage is not Stage.PT and name.startswith("task_tokens.")))
    assert {n: s for n, s in placed.items() if n not in skipped} == {n: s for n, s in ours.items() if n not in skipped}
    assert all(ours[name][0] >= placed[name][0] and ours[name][1] == placed[name][1] for name in VOCABULARY)
