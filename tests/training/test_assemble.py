"""Teachers of a run: precision, and what is said of one that does not fit, before the data is read."""

import pytest
import torch

from tests import tiny_teachers
from visper.common.errors import ConfigError
from visper.config import load_run
from visper.distillation.teachers.tasks import build_teachers


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "depth": tiny_teachers.save(tiny_teachers.depth_model(), folder / "depth"),
        "seg": tiny_teachers.save_oneformer(folder / "seg"),
        "gen": tiny_teachers.save_unclip(folder / "gen"),
    }


def published(places, *changes):
    """The published recipe on tiny teachers: its sizes, options and predictors."""
    models = [f"distillation.tasks.{task}.target.model={place}" for task, place in places.items()]
    return load_run("llama3-8b-vit-l/pt", [*models, *changes])


def teachers_of(run):
    """As a run builds them, whose student has 8 task tokens a task."""
    ids = dict.fromkeys(("depth", "seg", "gen"), range(8))
    return build_teachers(run.distillation, run.optimization.precision, ids)


def test_teachers_take_the_precision_of_the_recipe(places):
    teachers = teachers_of(published(places, "distillation.teacher_dtype=bfloat16"))
    for teacher in teachers.values():
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert [teachers[task].spec.grid for task in places] == [(24, 24), (24, 24), None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distillation.tasks.depth.target.size=70"], "25 queries for the teacher's 25 tokens cannot be divided"),
        (["distillation.tasks.depth.head={num_queries: 100}"], "100 queries cannot give the teacher's 576 tokens"),
        (["distillation.tasks.depth.head={num_queries: 36}"], "head.num_queries' to a multiple of 8"),
        (["distillation.tasks.seg.head={queries: states}"], "'distillation.tasks.seg.head.queries' to 'mat"),
        (["distillation.tasks.gen.head={queries: matrix}"], "head.queries' to 'states'"),
        (["distillation.tasks.seg.target.size=100"], "task 'seg'.*cells of 32 pixels"),
        (["distillation.tasks.gen.target.subfolder=encoder"], "task 'gen'.*cannot load the unclip teacher"),
        (["distillation.tasks.depth.target.kind=depth_anythin"], "did you mean 'depth_anything'"),
        (["distillation.tasks.depth.target.sise=70"], "no option 'sise': did you mean 'size'"),
    ],
)
def test_what_does_not_fit_is_told_with_its_remedy(places, changes, message):
    with pytest.raises(ConfigError, match=message):
        teachers_of(published(places, *changes))
