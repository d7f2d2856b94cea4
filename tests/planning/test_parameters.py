"""Parameters of recipes at published sizes, on the meta device: how many there are and how many learn in each stage."""

import functools

import pytest
from torch._subclasses.fake_tensor import FakeTensor

from tests import tiny
from visper.common.errors import ConfigError
from visper.config import Geometry, Stage, load_run
from visper.config import Student as StudentConfig
from visper.model import build_skeleton, build_student, hub
from visper.planning import parameters as sizes
from visper.planning.parameters import first_stage, part_sizes

CLIP = "openai/clip-vit-large-patch14-336"

QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
QWEN3 |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SMOL2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
SMOL2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOL3 = {"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008}
SMOL3 |= {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "pad_token_id": 0}
GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912}
GEMMA3 |= {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
OTHERS = {
    # As the hub counts their weights, a tied table once; then a parameter that only this family has.
    "qwen3-0.6b": (QWEN3, 151669, 596_049_920, ("layers.27.self_attn.q_norm.weight", (128,))),
    "smollm2-135m": (SMOL2, 49152, 134_515_008, ("layers.29.mlp.up_proj.weight", (1536, 576))),
    "smollm3-3b": (SMOL3, 128256, 3_075_098_624, ("layers.35.self_attn.k_proj.weight", (512, 2048))),
    "gemma3-1b": (GEMMA3, 262145, 999_885_952, ("layers.25.pre_feedforward_layernorm.weight", (1152,))),
}


@functools.lru_cache
def counts(name, *overrides):
    """Per part all parameters; per stage and part those that learn."""
    found = {size.part: size for size in part_sizes(load_run(name, overrides))}
    return {part: size.total for part, size in found.items()}, {
        stage: {part: size.trainable[stage] for part, size in found.items() if size.trainable[stage]} for stage in Stage
    }


@pytest.mark.parametrize(
    ("recipe", "llm", "new_rows", "width"),
    [
        ("llama3-8b-vit-l/pt", 8_030_261_248, 26, 4096),  # image, 24 task tokens, padding
        ("phi3-mini-vit-l/pt", 3_821_079_552, 0, 3072),  # its table has 53 rows to spare
    ],
)
def test_published_bases_count_as_published_and_learn_by_the_table(recipe, llm, new_rows, width):
    total, learning = counts(recipe)
    llm += 2 * new_rows * width  # input table and output head
    projector = 1024 * width + width + width * width + width
    queries = (576 + 576 + 8) * width
    assert (total["vision"], total["llm"], total["projector"]) == (303_507_456, llm, projector)
    assert (total["task_tokens"], total["logit_scales"]) == (queries, 3)
    behind = 12_596_224 + 2 * 1024  # the layer behind the one the projector reads, and the last norm
    assert learning[Stage.PT] == {
        "projector": projector,
        "task_tokens": queries,
        "predictors": total["predictors"],
        "logit_scales": 3,
    }
    assert learning[Stage.VPT] == {"vision": 303_507_456 - behind, "projector": projector, "llm": llm}
    assert learning[Stage.IFT] == {"projector": projector, "llm": llm}


def test_predictors_at_published_size_by_hand():
    def resampler(width, target):
        attention = 4 * width + (128 + 256 + 128) * width
        return width * 4096 + width + attention + 2 * width + 2 * width**2 + width * target + target + 2 * target

    depth = resampler(4096, 1024) + 2 * (1024**2 + 1024)
    total, _ = counts("llama3-8b-vit-l/pt")
    assert total["predictors"] == 2 * (depth + resampler(1536, 1536) + resampler(1024, 1024))


@pytest.mark.slow
def test_convnext_in_full_learns_but_for_timms_last_norm():
    total, learning = counts("llama3-8b-convnext-xxl/vpt")
    assert total["vision"] == 843_398_016 and total["projector"] == 3072 * 4096 + 4096 + 4096**2 + 4096
    assert learning[Stage.VPT]["vision"] == total["vision"] - 2 * 3072


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name != "qwen3-0.6b" else ()) for name in OTHERS]
)
def test_other_bases_count_as_published_and_take_task_tokens(family, monkeypatch):
    config, entries, published, (name, shape) = OTHERS[family]
    known = hub.known_sizes() | {
        family: {"config": {**config, "tie_word_embeddings": True}, "vocabulary": {"size": entries, "has_pad": True}}
    }
    monkeypatch.setattr(hub, "known_sizes", lambda: known)
    total, learning = counts("llama3-8b-vit-l/pt", f"student.llm={family}")
    rows, width = config["vocab_size"], config["hidden_size"]
    grown = max(0, entries + 25 - rows) * width
    assert total["llm"] == published + grown == learning[Stage.IFT]["llm"]
    assert total["task_tokens"] == (576 + 576 + 8) * width == learning[Stage.PT]["task_tokens"]
    assert "llm" not in learning[Stage.PT]
    student = build_skeleton(StudentConfig(llm=family, encoder=CLIP))
    parameters = dict(student.model.model.language_model.named_parameters())
    assert tuple(parameters[name].shape) == shape
    assert student.model.lm_head.weight is student.model.get_input_embeddings().weight
    ids = [student.image_token_id, *(token for task in student.task_token_ids.values() for token in task)]
    assert ids == list(range(entries, entries + 25)) and ids[-1] < len(parameters["embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_skeleton_has_the_names_shapes_and_ids_of_the_student(tied, tmp_path, tiny_encoder):
    llm = tiny.save_llm(tmp_path / "llm", tied=tied)
    config = StudentConfig(llm=str(llm), encoder=str(tiny_encoder))
    built, skeleton = build_student(config, Geometry.SQUASH), build_skeleton(config)
    assert {n: p.shape for n, p in built.model.named_parameters()} == {
        n: p.shape for n, p in skeleton.model.named_parameters()
    }
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert (skeleton.image_token_id, skeleton.task_token_ids) == (built.image_token_id, built.task_token_ids)
    assert skeleton.model.config.pad_token_id == built.model.config.pad_token_id


def test_nothing_is_given_memory(monkeypatch):
    made = []
    build = sizes.build_training_model
    monkeypatch.setattr(sizes, "build_training_model", lambda *given: made.append(build(*given)) or made[-1])
    part_sizes(load_run("phi3-mini-vit-l/pt"))
    assert len(made) == 3 and all(isinstance(p, FakeTensor) for model in made for p in model.parameters())


def test_a_later_stage_is_followed_back_to_the_students_recipe():
    assert first_stage(load_run("phi3-mini-vit-l/ift-after-vpt")).name == "phi3-mini-vit-l-pt"
    with pytest.raises(ConfigError, match=r"starts from 'elsewhere', which does not exist.*recipe of its first stage"):
        first_stage(load_run("phi3-mini-vit-l/ift", ["start_from=elsewhere"]))


def test_embedding_losses_count_in_the_stage_that_has_them():
    sizes = {size.part: size for size in part_sizes(load_run("visual/viral"))}
    mlp = (4096 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 768
    assert sizes["predictors"].total == mlp
    assert {str(stage): count for stage, count in sizes["predictors"].trainable.items()} == {
        "pt": 0,
        "vpt": 0,
        "ift": mlp,
    }


def test_a_frozen_part_counts_in_the_runs_own_stage_only():
    _, learning = counts("phi3-mini-vit-l/vpt", "optimization.freeze=[vision]")
    assert "vision" not in learning[Stage.VPT] and "projector" in learning[Stage.IFT]


def test_a_base_that_cannot_be_had_is_named():
    with pytest.raises(ConfigError, match=r"student.llm: cannot load '/nowhere/llm'"):
        part_sizes(load_run("llama3-8b-vit-l/pt", ["student.llm=/nowhere/llm"]))
    with pytest.raises(ConfigError, match=r"task 'depth': depth_anything teacher '/nowhere/t': .*cannot load"):
        part_sizes(load_run("llama3-8b-vit-l/pt", ["distillation.tasks.depth.target.model=/nowhere/t"]))
