"""A wrong value is explained in the words of a recipe: what was expected, what was found, how it is written."""

import re

import pytest
from pydantic import BaseModel

from visper.common.errors import ConfigError
from visper.config import Run, load_run
from visper.config.faults import EXPECTED

RECIPE = "llama3-8b-vit-l/pt"
PYTHON = re.compile(r"\b(tuple|dict|dictionary|mapping|instance of|Input should|NoneType|validation|string|integer)\b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.drop_list=drop.jsonl", "expected a list of paths, found 'drop.jsonl': write [drop.jsonl]"),
        ("data.drop_list={a: 1}", "expected a list of paths, found keys with values"),
        ("data.sources=x.json", "a list of entries with the keys set, json, hf, parquet, "),
        ("data.sources={json: a, images: b}", "found keys with values: put it in brackets, [{...}]"),
        ("data.sources=[x.json]", "key 'data.sources.0': expected keys with values (set, json, "),
        ("data.sources=[]", "expected at least one entry, found []"),
        ("data.sources=", "found nothing"),
        ("data.sources=[{json: a, images: b, columns: {img: image}}]", "unknown key 'data.sources.0.columns.img'"),
        ("distillation.tasks.depth.layers=3", "expected a list of numbers, found 3: write [3]"),
        ("distillation.tasks.depth.layers=8-20", "expected a list of numbers, found '8-20': write it as in [1, 2]"),
        ("distillation.tasks.depth.loss=cosine", "expected keys with values, as in {key: value}, found 'cosine'"),
        ("distillation.tasks.depth.head=mlp", "expected keys with values (kind, shared, frozen), found 'mlp'"),
        ("optimization.betas=0.9", "expected a list of 2 numbers, found 0.9"),
        ("optimization.betas=[0.9]", "expected 2 or more entries, found [0.9]"),
        ("optimization.micro_batch=1.5", "expected a whole number, found 1.5"),
        ("optimization.packing=maybe", "expected true or false, found 'maybe'"),
        ("logging.report_to=wandb", "expected a list of texts, found 'wandb': write [wandb]"),
        (
            "lora={targets: q_proj}",
            "'lora.targets': expected 'all-linear' or a list of texts, found 'q_proj': write [q",
        ),
        ("lora={targets: [1]}", "key 'lora.targets.0': expected a text, found 1: put it in quotes"),
        ("student=x", "key 'student': expected keys with values (llm, "),
        ("name=3", "expected a text, found 3: put it in quotes"),
        ("launch=8", "expected keys with values (processes, engine, "),
        ("data.join_conversations=true", ": joining is not supported with distillation"),
        ("start_from=x", ": found both of 'student'"),
        ("student=", ": found neither of 'student'"),
    ],
)
def test_a_fault_speaks_of_lists_texts_and_keys(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(RECIPE, [override])
    assert message in str(error.value) and "key ''" not in str(error.value)
    assert not PYTHON.search(str(error.value)) and "\n" not in str(error.value)


def test_every_field_of_a_run_is_explained_without_python() -> None:
    def keys(section: type[BaseModel], place: str) -> list[str]:
        return [f"{place}{field.alias or name}" for name, field in section.model_fields.items()]

    places = keys(Run, "")
    data, optimization = Run.model_fields["data"].annotation, Run.model_fields["optimization"].annotation
    assert data is not None and optimization is not None
    places += keys(data, "data.") + keys(optimization, "optimization.")
    explained = 0
    for place in places:
        for value in ("[[x]]", "{a: {b: c}}", "word", "-1"):
            try:
                load_run(RECIPE, [f"{place}={value}"])
            except ConfigError as error:
                explained += 1
                assert not PYTHON.search(str(error)), (place, value, str(error))
    assert explained > 3 * len(places) // 2


def test_a_refused_name_is_explained_once() -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*unknown key 'distillation.tasks.2x': '2x' cannot name[^\n]*$"):
        load_run(RECIPE, ["distillation.tasks.2x.layers=[3]"])
    with pytest.raises(ConfigError, match=r"student\.task_tokens\.order\.0': '2x' cannot name a task(?!.*found)"):
        load_run(RECIPE, ["student.task_tokens.order=[2x]"])


def test_a_misspelled_task_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'edge' is new, so it needs this key; known: depth, seg, gen$"):
        load_run(RECIPE, ["distillation.tasks.edge.layers=[3]"])
    with pytest.raises(ConfigError, match=r"known: depth, seg, gen\. Did you mean 'depth'\?"):
        load_run(RECIPE, ["distillation.tasks.dept.layers=[3]"])
    with pytest.raises(ConfigError, match=r"known: depth, gen\. Did you mean 'gen'\?"):  # a removed task is not known
        load_run(RECIPE, ["distillation.tasks.seg=", "distillation.tasks.gem.layers=[3]"])


def test_every_expectation_is_a_phrase() -> None:
    assert all(phrase and not PYTHON.search(phrase.split("{")[0]) for phrase in EXPECTED.values())


@pytest.mark.parametrize(("extends", "found"), [("3", "3"), ("{a: b}", "{'a': 'b'}"), ("[1]", r"\[1\]")])
def test_extends_names_recipes(tmp_path, extends: str, found: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: {extends}\nname: mine\n")
    with pytest.raises(ConfigError, match=f"'extends': expected a recipe or a list of recipes, found {found}"):
        load_run(tmp_path / "mine.yaml")
