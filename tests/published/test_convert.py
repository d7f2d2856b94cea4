"""Converted weights are the published ones, bit for bit; the forms a checkpoint may have; faults are one message."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration, TimmWrapperConfig, TimmWrapperModel

from tests import tiny
from tests.published.checkpoints import random_state, save_clip, save_published, small_config
from visper.common.errors import ConfigError, DataError
from visper.common.manifest import require_undamaged
from visper.config import load_run
from visper.evaluation import answer
from visper.model import TaskTokens, load_student
from visper.published import convert_published, load_probes, to_visper
from visper.published.config import read_published
from visper.published.names import INPUT_TABLE, NEVER_USED, OUTPUT_TABLE
from visper.published.skeleton import converted_skeleton
from visper.published.weights import Weights
from visper.training import run_stage

CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP |= {"image_size": 16, "patch_size": 4}
UNUSED = (".linear_2.", ".linear_3.", "da_v2_head", "inv_freq")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"), CLIP)


@pytest.fixture(scope="module")
def pt(clip, tmp_path_factory):
    """A PT checkpoint in two shards: its folder, its configuration, its weights, and our folder of it."""
    folder = tmp_path_factory.mktemp("pt")
    config = small_config(clip)
    state = random_state(folder, config)
    source = save_published(folder / "published", config, state, shards=2)
    convert_published(str(source), folder / "ours")
    return source, config, state, folder / "ours"


def weights_in(folder):
    weights = Weights.of(folder)
    return weights.read(weights.shapes)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def convert_and_compare(source, state, folder, encoder=None):
    """Every published parameter that is used is in the converted folder, bit for bit. Returns that folder.

    The vocabulary tables are compared in the rows of the tokenizer: new tokens may take rows that it left over.
    """
    convert_published(str(source), folder / "out", encoder)
    files = {place: folder / "out" / place for place in ("model", "distillation", "probes")}
    found = {place: weights_in(files["model"]) if place == "model" else {} for place in files}
    for place in ("distillation", "probes"):
        if files[place].exists():
            found[place] = load_file(files[place] / "weights.safetensors")
    published = read_published(source, state)
    slots = converted_skeleton(published, folder / "out", encoder, encoder_inside=True).slots()
    kept = {name: value for name, value in state.items() if not any(part in name for part in UNUSED)}
    assert kept.keys() == slots.keys()
    assert sum(map(len, found.values())) == sum(slot.folder is not None for slot in slots.values())
    rows = len(AutoTokenizer.from_pretrained(source, config=AutoConfig.for_model("llama")))
    for name, value in kept.items():
        if slots[name].folder is None:
            continue
        own = found[slots[name].folder][slots[name].name]
        if slots[name].name in (INPUT_TABLE, OUTPUT_TABLE):
            own, value = own[:rows], value[:rows]
        assert own.dtype == value.dtype and torch.equal(own.reshape(value.shape), value), name
    return folder / "out"


@pytest.mark.parametrize("tokens", [300, 280])
def test_pt_weights_are_the_published_ones(pt, tmp_path, tokens):
    """Also where task tokens take rows that the published table has to spare, as Phi-3's has."""
    _, config, state, _ = pt
    convert_and_compare(save_published(tmp_path / "source", config, state, tokens), state, tmp_path)


@pytest.mark.parametrize("tokens", [300, 280])
def test_ift_weights_are_the_published_ones(clip, tmp_path, tokens):
    config = small_config(clip, model_type="llava_llama", image_aspect_ratio="pad")
    state = random_state(tmp_path, config)
    folder = convert_and_compare(save_published(tmp_path / "source", config, state, tokens), state, tmp_path)
    assert [file.name for file in folder.iterdir()] == ["model"]
    student = load_student(folder)
    rows = student.model.get_input_embeddings().weight[student.task_token_ids["depth"]]
    means = state["model.special_depth_tokens"].float().unflatten(0, (8, 2)).mean(1)
    assert torch.equal(rows, means.bfloat16().float())
    assert student.processor.image_processor.do_pad


def test_probe_weights_are_the_published_ones(clip, tmp_path):
    config = small_config(clip, model_type="probe_dsg_llava_llama", probe_mode="seg")
    state = random_state(tmp_path, config)
    probes = load_probes(convert_and_compare(save_published(tmp_path / "source", config, state), state, tmp_path))
    assert list(probes) == [f"seg_{layer}" for layer in (1, 2, 3, 4)]
    assert probes["seg_2"](torch.randn(2, 5, 32)).shape == (2, 16, 6)


def test_damage_of_a_converted_folder_is_found_when_it_is_loaded(pt, clip, tmp_path):
    shutil.copytree(pt[-1], tmp_path / "pt")
    config = small_config(clip, model_type="probe_dsg_llava_llama", probe_mode="seg")
    convert_published(
        str(save_published(tmp_path / "source", config, random_state(tmp_path, config))), tmp_path / "probe"
    )
    loaders = {
        "pt/model": load_student,
        "pt/distillation": lambda folder: require_undamaged(folder / "distillation"),
        "probe/probes": load_probes,
    }
    for place, load in loaders.items():
        file = sorted((tmp_path / place).glob("*.safetensors"))[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"the content of '{file.name}' has changed"):
            load((tmp_path / place).parent)
        content[-1] ^= 1
        file.write_bytes(content)


def test_pickled_weights_convert_to_the_same(pt, tmp_path):
    _, config, state, ours = pt
    convert_published(
        str(save_published(tmp_path / "pickled", config, state, shards=2, pickled=True)), tmp_path / "out"
    )
    assert_same(weights_in(tmp_path / "out" / "model"), weights_in(ours / "model"))


def test_new_rows_and_left_out_parameters_are_told(pt, tmp_path):
    source, _, state, _ = pt
    report = convert_published(str(source), tmp_path / "out")
    assert sum(report.left_out.values()) == sum(any(part in name for part in UNUSED) for name in state)
    assert list(report.left_out) and set(report.left_out) <= set(NEVER_USED)
    assert sum(report.written.values()) == len(state) - sum(report.left_out.values())
    table = weights_in(tmp_path / "out" / "model")["language_model.model.embed_tokens.weight"]
    assert len(table) == 300 + 1 + 24  # image, task tokens
    torch.testing.assert_close(table[300].float(), table[:300].float().mean(0), rtol=0, atol=1e-2)


def test_encoder_from_its_own_folder_where_the_checkpoint_has_none(pt, clip, tmp_path):
    _, config, state, _ = pt
    without = {name: value for name, value in state.items() if "vision_tower" not in name}
    source = save_published(tmp_path / "without", {**config, "mm_vision_tower": "/no/where"}, without)
    with pytest.raises(ConfigError, match="--encoder"):
        convert_published(str(source), tmp_path / "out")
    report = convert_published(str(source), tmp_path / "out", encoder=str(clip))
    assert str(clip) in report.notes[0]
    found = weights_in(tmp_path / "out" / "model")
    for name, value in load_file(clip / "model.safetensors").items():
        assert torch.equal(found[f"vision_tower.vision_model.{name}"], value.bfloat16())
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "model")


def test_convnext_tower_weights_are_the_published_ones(tmp_path):
    """The published tower is timm's trunk; its id is no model of transformers, so --encoder names one that is."""
    backbone = TimmWrapperConfig(architecture="test_convnext", num_classes=0)
    TimmWrapperModel(backbone).save_pretrained(tmp_path / "convnext")
    config = small_config(tmp_path / "convnext")
    state = random_state(tmp_path, config)
    assert any(name.startswith("model.vision_tower.vision_tower.stem.") for name in state)
    source = save_published(tmp_path / "source", {**config, "mm_vision_tower": "laion/CLIP-convnext-res160"}, state)
    student = load_student(convert_and_compare(source, state, tmp_path, encoder=str(tmp_path / "convnext")))
    assert student.processor.patch_size == 32
    stem = student.model.model.vision_tower.backbone.timm_model.stem[0].weight
    assert torch.equal(stem, state["model.vision_tower.vision_tower.stem.0.weight"].to(stem.dtype))


def test_the_converted_student_answers_and_fine_tunes(pt, tmp_path):
    ours = pt[3]
    picture = tiny.write_rows(tmp_path / "rows") / "images" / "0.png"
    student = load_student(ours)
    answer(student, ["what?"], [[Image.open(picture)]], 2)
    recipe = {
        "name": "tiny",
        "stage": "ift",
        "output": str(tmp_path / "ift"),
        "start_from": str(ours),
        "data": {"sources": [{"json": str(tmp_path / "rows/rows.json"), "images": str(tmp_path / "rows/images")}]},
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, "precision": "float32"},
    }
    recipe["data"] |= {"geometry": "pad", "workers": 0}
    (tmp_path / "ift.yaml").write_text(json.dumps(recipe))
    run_stage(load_run(tmp_path / "ift.yaml"))


def test_queries_give_the_rows_in_the_vocabulary(pt):
    student = load_student(pt[3])
    saved = load_file(pt[3] / "distillation" / "weights.safetensors")
    queries = {task: saved[f"task_tokens.queries.{task}"] for task in student.task_token_ids}
    rows = TaskTokens(student.task_token_ids, queries).input_rows()
    table = student.model.get_input_embeddings().weight
    ids = [token for tokens in student.task_token_ids.values() for token in tokens]
    assert torch.equal(table[ids], rows.bfloat16().float())
    assert list(student.task_token_ids) == ["gen", "depth", "seg"]


def broken(pt, folder, drop=None, extra=None, reshape=None, **changes):
    _, config, state, _ = pt
    state = {name: value for name, value in state.items() if name != drop}
    if extra:
        state[extra] = torch.zeros(1)
    if reshape:
        state[reshape] = torch.zeros(3)
    return save_published(folder / "broken", {**config, **changes}, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "model.norm.weight"}, "1 missing:\n  model.norm.weight"),
        ({"extra": "model.image_newline"}, "1 unknown:\n  model.image_newline"),
        ({"reshape": "seg_logit_scale"}, r"seg_logit_scale is \[3\], expected \[\]"),
        ({"model_type": "llava"}, "needs no conversion"),
        ({"model_type": "qwen2"}, "ola_llama"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"model_type": "llava_llama", "task_token_format": "emb"}, "expand_emb"),
        ({"aux_mode": "depth-color"}, "aux_mode"),
        ({"mm_vision_tower": "/no/where"}, "--encoder"),
    ],
)
def test_faults_are_named_and_nothing_is_written(pt, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        convert_published(str(broken(pt, tmp_path, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_never_touched(pt, tmp_path):
    with pytest.raises(ConfigError, match="exists"):
        convert_published(str(pt[0]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", HfHubHTTPError.__bases__)
def test_an_id_that_cannot_be_reached(kind, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise kind("Name or service not known")

    with pytest.raises(ConfigError, match="cannot be reached"):
        convert_published("no/such/folder", tmp_path / "out")
    monkeypatch.setattr("visper.published.weights.snapshot_download", no_network)
    with pytest.raises(ConfigError, match="hf download no-such/model"):
        convert_published("no-such/model", tmp_path / "out")


def test_a_missing_shard_and_a_file_with_code_are_refused(pt, tmp_path):
    _, config, state, _ = pt
    source = save_published(tmp_path / "cut", config, state, shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks 1 of the 2 files"):
        convert_published(str(source), tmp_path / "out")
    source = save_published(tmp_path / "code", config, state, pickled=True)
    torch.save({"model.norm.weight": tiny.PooledColors}, source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="contain code, which is never run") as error:
        convert_published(str(source), tmp_path / "out")
    assert "weights_only" not in str(error.value), "torch's advice to load it unsafely"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_half_downloaded_settings_are_named(pt, tmp_path, file, content):
    shutil.copytree(pt[0], tmp_path / "source")
    (tmp_path / "source" / file).write_text(content)
    expected = "is cut short or not a JSON object: download" if content != "{}" else "'weight_map'|model_type"
    with pytest.raises(ConfigError, match=rf"{file}.*({expected})"):
        convert_published(str(tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_task_tokens": None}),
        ("config.json", {"num_hidden_layers": 2}),
        ("config.json", {"image_depth": {}}),
        ("config.json", {"mm_vision_select_layer": []}),
        ("tokenizer.json", []),
        ("tokenizer_config.json", 3),
        ("generation_config.json", []),
        ("special_tokens_map.json", "x"),
        ("chat_template.jinja", "{% for m in %}"),
        ("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ],
)
def test_damaged_settings_are_one_message(pt, tmp_path, file, content):
    source = shutil.copytree(pt[0], tmp_path / "source")
    content = {**pt[1], **content} if file == "config.json" else content
    (source / file).write_text(content if file.endswith("jinja") else json.dumps(content))
    with pytest.raises(ConfigError, match=r"cannot load|section 'image_depth'|chat template"):
        convert_published(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_sampling_that_are_never_read_are_left_out(pt, tmp_path):
    """As Vicuna has them, without do_sample; transformers refuses to save them beside changed settings."""
    source = shutil.copytree(pt[0], tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    convert_published(str(source), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert not saved.keys() & {"temperature", "top_p"} and 2 in saved["eos_token_id"]


def test_complete_or_absent(pt, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(to_visper, "save_processor", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert_published(str(pt[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())
