"""Hub models are pinned to commits when a run starts, and stay there when it is continued."""

import types

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from visper.config import Geometry, Student, load_run
from visper.model import revisions, start
from visper.model.build import build_student
from visper.model.encoders import load_encoder
from visper.model.revisions import commit_of, with_commits

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(monkeypatch):
    """A hub whose models are all at ``hub.commit``; ``hub.asked`` lists (model, revision)."""
    state = types.SimpleNamespace(commit=OLD, asked=[])

    class Api:
        def model_info(self, model, revision=None, timeout=None):
            state.asked.append((model, revision))
            return types.SimpleNamespace(sha=state.commit)

    monkeypatch.setattr(revisions, "HfApi", Api)
    return state


def commits(run):
    teachers = [task.target.revision for task in run.distillation.tasks.values()]
    return [run.student.llm_revision, run.student.encoder_revision, *teachers]


def test_every_hub_model_of_a_run_is_pinned(hub):
    assert commits(with_commits(load_run("llama3-8b-vit-l/pt"))) == [OLD] * 5


def test_a_continued_run_keeps_its_commits_when_the_hub_has_moved(hub):
    run = load_run("llama3-8b-vit-l/pt")
    saved = with_commits(run)
    hub.commit = NEW
    assert with_commits(run, saved) == saved
    assert commits(with_commits(run)) == [NEW] * 5


def test_a_tag_that_has_moved_gives_another_run(hub):
    run = load_run("llama3-8b-vit-l/pt", ["student.llm_revision=v1"])
    saved = with_commits(run)
    assert ("meta-llama/Meta-Llama-3-8B-Instruct", "v1") in hub.asked
    hub.commit = NEW
    assert with_commits(run, saved).student.llm_revision == NEW != saved.student.llm_revision


def test_folders_and_commits_are_never_looked_up(hub, tmp_path):
    assert commit_of(str(tmp_path)) is None and commit_of("plain name") is None
    assert commit_of("some/model", NEW) == NEW and hub.asked == []


def test_without_hub_and_cache_the_revision_stays_as_written(monkeypatch):
    class Api:
        def model_info(self, *args, **kwargs):
            raise OSError("no network")

    monkeypatch.setattr(revisions, "HfApi", Api)
    assert commits(with_commits(load_run("llama3-8b-vit-l/pt", ["student.llm_revision=v1"]))) == ["v1", *[None] * 4]


def test_loaders_ask_for_the_revision(monkeypatch, tiny_llm, tiny_encoder):
    asked = {}

    def recorded(name, loader):
        def load(*args, **kwargs):
            asked[name] = kwargs.get("revision")
            return loader(*args, **kwargs)

        return load

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", recorded(kind.__name__, kind.from_pretrained))
    student = Student(llm=str(tiny_llm), encoder=str(tiny_encoder), llm_revision=OLD, encoder_revision=NEW)
    monkeypatch.setattr("visper.model.build.load_encoder", recorded("encoder", load_encoder))
    build_student(student, Geometry.SQUASH)
    assert asked == {"AutoModelForCausalLM": OLD, "AutoTokenizer": OLD, "encoder": NEW}


def test_a_student_of_the_hub_is_pinned_and_loaded_at_its_commit(hub, monkeypatch, tmp_path):
    run = load_run("llama3-8b-vit-l/ift", ["start_from=some/student"])
    saved = with_commits(run)
    assert saved.start_from_revision == OLD
    hub.commit = NEW
    assert with_commits(run, saved) == saved and with_commits(run).start_from_revision == NEW
    asked = []
    monkeypatch.setattr(start, "load_student", lambda place, **options: asked.append((place, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start.starting_student(saved)
    ((place, options),) = asked
    assert (place, options["revision"]) == ("some/student", OLD)
