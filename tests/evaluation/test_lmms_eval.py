"""The model for lmms-eval, behind a stub of the interface that version 0.7.3 has."""

import dataclasses
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from visper.common.errors import ConfigError, DataError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.evaluation import answer
from visper.model import build_student, save_student

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r'\[project\.entry-points\."lmms_eval\.models"\]\nvisper = "(.+):(.+)"\n')


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """lmms_eval.api.model.lmms"""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict, self.kept = 0, 1, {}, []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *row: self.kept.append(row))

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@pytest.fixture
def module(monkeypatch):
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    monkeypatch.delitem(sys.modules, "visper.evaluation.lmms_eval", raising=False)
    yield importlib.import_module("visper.evaluation.lmms_eval")
    sys.modules.pop("visper.evaluation.lmms_eval", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llm, tiny_encoder):
    torch.manual_seed(0)
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5)
    save_student(student, tmp_path_factory.mktemp("student") / "model")
    return next(tmp_path_factory.getbasetemp().glob("student*/model"))


DOCUMENTS = [
    {"text": "what is it? " * (1 + i % 3), "images": [Image.new("RGB", (9, 9), (25 * i, 0, 99))] * (i % 3)}
    for i in range(9)
]


def to_messages(document):
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["text"]}]}]


def requests(documents, messages=to_messages, **options):
    options = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"], **options}
    arguments = [(d["text"], messages, options, i, "task", "test") for i, d in enumerate(documents)]
    return [types.SimpleNamespace(args=one) for one in arguments]


def asked(module, folder, batch_size, documents=DOCUMENTS, **more):
    model = module.VisperModel(pretrained=str(folder), batch_size=batch_size, device="cuda:0")
    model.task_dict = {"task": {"test": documents}}
    return model, model.generate_until(requests(documents, **more))


def test_the_entry_point_gives_a_manifest_of_a_chat_model(module):
    name, function = ENTRY.search((ROOT / "pyproject.toml").read_text()).groups()
    found = getattr(importlib.import_module(name), function)()
    place, _, attribute = found.chat_class_path.rpartition(".")
    model = getattr(importlib.import_module(place), attribute)
    assert (found.model_id, found.simple_class_path) == ("visper", None)
    assert model is module.VisperModel and issubclass(model, Lmms) and model.is_simple is False


@pytest.mark.slow
def test_without_lmms_eval_nothing_imports_it():
    program = "import sys; sys.modules['lmms_eval'] = None; import visper.evaluation, visper.cli"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT / "src")


def test_batched_answers_are_those_of_visper_evaluate_in_the_order_asked(module, folder):
    model, together = asked(module, folder, "4")
    _, apart = asked(module, folder, 1)
    tags = {0: "", 1: "", 2: "<image>\n<image>\n"}
    own = [answer(model.student, [tags[len(d["images"])] + d["text"]], [d["images"]], 6)[0] for d in DOCUMENTS]
    assert together == apart == [text.split("\n\n")[0].strip() for text in own] and len(set(own)) > 4
    assert sorted(row[2] for row in model.kept) == sorted(together)


def test_a_question_longer_than_the_positions_is_answered_empty(module, folder, caplog):
    documents = [{"text": "what is it? " * length, "images": []} for length in (1, 500)]
    _, said = asked(module, folder, 2, documents)
    assert said[0] and said[1] == "" and "is not answered: the LLM has 4096 positions" in caplog.text


def test_answers_end_before_a_tasks_stop_text(module, folder):
    _, whole = asked(module, folder, 4, until=[])
    stop = next(text[2] for text in whole if len(text) > 3)
    _, cut = asked(module, folder, 4, until=stop)
    assert cut == [text.split(stop)[0].strip() for text in whole] and cut != whole


def test_a_text_that_has_its_images_tags_keeps_their_places(module):
    image = Image.new("RGB", (9, 9))
    parts = [{"type": "image", "url": image}, {"type": "text", "text": "Is <image> red?"}]
    assert module.as_question(parts, "t")[0] == "Is <image> red?"
    two = [parts[0], parts[0], {"type": "text", "text": "Is <image> <image>?"}]
    assert module.as_question(two, "t")[0] == "Is <image> <image>?"
    assert module.as_question([parts[0], {"type": "text", "text": "or"}, parts[0]], "t")[0] == "<image>\nor\n<image>"


@pytest.mark.parametrize(
    ("options", "messages", "message"),
    [
        ({"temperature": 0.2}, to_messages, "answers greedily; add --gen_kwargs"),
        ({"do_sample": True}, to_messages, "answers greedily"),
        ({"num_beams": 3}, to_messages, "answers greedily"),
        ({}, lambda d: [{"role": "system", "content": []}, *to_messages(d)], "sends the turns system, user"),
        ({}, lambda d: [{"role": "user", "content": [{"type": "video", "url": "x"}]}], "task 'task' sends video"),
    ],
)
def test_what_it_cannot_do_is_said_not_scored(options, messages, message, module, folder):
    with pytest.raises(ConfigError, match=message):
        asked(module, folder, 4, messages=messages, **options)
    with pytest.raises(ConfigError, match="found dtype"):
        module.VisperModel(pretrained=str(folder), dtype="float16")


def test_a_question_with_a_tag_too_many_is_no_empty_answer(module, folder):
    wrong = [{"text": "Is <image> or <image> red?", "images": DOCUMENTS[1]["images"]}]
    with pytest.raises(DataError, match="image"):
        asked(module, folder, 1, wrong)
