"""What cannot be had names its id and the remedy; sizes of published bases need no network."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tests import tiny
from visper.common.errors import ConfigError
from visper.config import Geometry, load_run, recipe_names
from visper.config import Student as StudentConfig
from visper.model import build_skeleton, build_student, load_encoder, load_student
from visper.model.hub import known_sizes, loading, sizes_of, stored_file, vocabulary_of
from visper.model.student import load_processor, save_student


class Response:
    """As much of an HTTP response as the hub's errors read."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError, "student.llm: cannot load 'a/b': it is gated.*huggingface.co/a/b, then run `hf auth login`"),
        (RepositoryNotFoundError, "cannot load 'a/b': the hub has no such model, or it is private"),
        (ConnectionError, "cannot load 'a/b': who knows. Use an existing folder.*`hf download a/b`"),
    ],
)
def test_what_cannot_be_had_says_what_to_do(cause, message):
    reason = cause("x") if cause is ConnectionError else cause("x", response=Response())
    with pytest.raises(ConfigError, match=message), loading("student.llm", "a/b"):
        raise OSError("who knows") from reason


def test_a_folder_that_is_misspelled_is_named_before_the_hub(monkeypatch, tmp_path):
    (tmp_path / "runs" / "pt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    missing = r"there is no 'ptt' in the folder 'runs'; as the id of a hub model: "
    with pytest.raises(ConfigError, match=missing + "the hub has no such"), loading("student.llm", "runs/ptt"):
        raise OSError from RepositoryNotFoundError("x", response=Response())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=missing):
        load_student("runs/ptt")
    with pytest.raises(ConfigError) as error, loading("student.llm", "runs/pt"):
        raise OSError("damaged")
    assert str(error.value) == "student.llm: cannot load 'runs/pt': damaged."
    (tmp_path / "weights.pt").touch()
    with (
        pytest.raises(ConfigError, match=r"weights\.pt': no labels\.$"),
        loading("edges", str(tmp_path / "weights.pt")),
    ):
        raise OSError("no labels")


@pytest.mark.parametrize("name", ["runs/ift/model", "../llm", "/data/llm"])
def test_a_path_to_no_folder_is_not_taken_for_a_hub_id(name):
    with pytest.raises(ConfigError, match=r"there is no folder '/.*/(llm|model)'. Use an existing") as error:
        sizes_of(name, "student.llm")
    assert "hf download" not in str(error.value)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Caches files of the hub model a/b, with the hub out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, folder = "0" * 40, tmp_path / "hub" / "models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)

    def store(*names, absent=()):
        for kind, files in (("snapshots", names), (".no_exist", absent)):
            (folder / kind / commit).mkdir(parents=True, exist_ok=True)
            for name in files:
                (folder / kind / commit / name).write_text("{}")

    return store


def test_an_unreachable_hub_is_not_a_model_without_the_file(cached):
    cached("config.json")
    with pytest.raises(ConfigError, match=r"unknown whether 'a/b' has the file x.json.*`hf download a/b`"):
        stored_file("a/b", "x.json")
    cached("x.json")
    assert stored_file("a/b", "x.json").name == "x.json"


@pytest.mark.parametrize("known", [{"names": [".gitattributes"]}, {"names": [], "absent": ["x.json"]}])
def test_what_the_cache_knows_needs_no_hub(cached, known):
    cached(*known.pop("names"), **known)
    assert stored_file("a/b", "x.json") is None


def test_a_folder_has_what_is_in_it(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    assert stored_file(str(tmp_path), "x.json") == tmp_path / "x.json" and stored_file(str(tmp_path), "y") is None


def test_a_missing_package_and_unasked_code_say_what_to_do():
    with (
        pytest.raises(ConfigError, match=r"cannot load 'timm/x': needs timm\. Remedy: pip install 'visper-lm\[timm\]'"),
        loading("student.encoder", "timm/x"),
    ):
        raise ImportError("needs timm")
    with pytest.raises(ConfigError, match=r"'trust_remote_code: true' beside"), loading("student.llm", "a/b"):
        raise ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run.")


DAMAGE = [
    ("config.json", {}, "model_type"),
    ("config.json", [], "model_type|list indices"),
    ("config.json", {"model_type": "of-tomorrow"}, "does not recognize"),
    ("config.json", {"model_type": "llama", "hidden_size": "x"}, "hidden_size"),
    ("config.json", {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, "mismatched"),
    ("config.json", {"model_type": "llama", "num_attention_heads": 0}, "ZeroDivision"),
    ("generation_config.json", [], "mapping|list indices"),
    ("tokenizer.json", {}, "added_tokens"),
    ("tokenizer.json", None, "Expecting"),
    ("tokenizer_config.json", 3, "int"),
    ("model.safetensors.index.json", {}, "weight_map"),
    ("model.safetensors", None, "header"),
]


@pytest.mark.parametrize(("file", "content", "says"), DAMAGE)
def test_a_damaged_base_model_is_one_message(file, content, says, tmp_path, tiny_llm, tiny_encoder):
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text("" if content is None else json.dumps(content))
    with pytest.raises(ConfigError, match=rf"student.llm: cannot load '{folder}': .*({says})"):
        build_student(StudentConfig(llm=str(folder), encoder=str(tiny_encoder)), Geometry.PAD)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{"])
def test_a_damaged_preprocessor_configuration_is_named(content, tmp_path, tiny_encoder):
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cannot read its preprocessor_config\.json"):
        load_encoder(str(folder))


@pytest.mark.parametrize(("file", "says"), [("config.json", "int"), ("tokenizer.json", "int")])
def test_a_damaged_student_is_one_message(file, says, tmp_path, tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.PAD)
    save_student(student, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    (tmp_path / "model" / file).write_text("3")
    for load in (load_student, load_processor):
        with pytest.raises(ConfigError, match=rf"student: cannot load '{tmp_path / 'model'}': .*{says}"):
            load(tmp_path / "model")


def test_an_adapter_is_no_model(tmp_path, tiny_llm, tiny_encoder, cached):
    """transformers would add its layers to the LLM, and the student's folder would lack the weights below them."""
    adapter = shutil.copytree(tiny_llm, tmp_path / "stage" / "adapter")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/llm"}')
    for load in (
        load_student,
        lambda folder: build_skeleton(StudentConfig(llm=str(folder), encoder=str(tiny_encoder))),
    ):
        with pytest.raises(ConfigError, match=r"is an adapter \(LoRA\), not a whole model: merge it into.*'owner/llm'"):
            load(adapter)
    shutil.copytree(tiny_llm, tmp_path / "stage" / "model")
    with pytest.raises(ConfigError, match=rf"the whole model, with the adapter, is '{tmp_path / 'stage'}'"):
        load_student(adapter)
    with pytest.raises(ConfigError, match="'a/b' is an adapter"), loading("student.llm", "a/b"):
        cached("adapter_config.json")


def test_too_little_memory_is_not_damage():
    with pytest.raises(torch.OutOfMemoryError), loading("student.llm", "a/b"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_code_of_a_folder_is_run_only_where_the_recipe_says_so(tmp_path, tiny_encoder):
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigError, match=f"student.llm: '{folder}' contains its own code"):
        build_skeleton(StudentConfig(llm=str(folder), encoder=str(tiny_encoder)))


def test_an_unreachable_id_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"student.llm: cannot load 'nobody/nothing': .*`hf download nobody/nothing`"):
        sizes_of("nobody/nothing", "student.llm")


def test_a_folder_comes_before_the_table_of_known_sizes(tiny_llm):
    config = sizes_of(str(tiny_llm), "student.llm")
    assert config.hidden_size == 32
    assert vocabulary_of(str(tiny_llm), "student.llm").size == len(tiny.byte_tokenizer())


def test_every_published_recipe_is_known_without_network():
    for name in recipe_names():
        student = load_run(name).student
        if not isinstance(student, StudentConfig) or name.startswith(("quickstart", "photographs", "study")):
            continue
        assert "vocabulary" in known_sizes()[student.llm]
        assert student.encoder in known_sizes() or student.encoder.startswith("timm/")
