"""Every parameter of the published full-size checkpoints has its place in ours, and none of ours is left over.

Names and shapes are the published ones (golden g7); our models are built at full size on the meta device.
"""

import pytest

from tests.published.checkpoints import save_clip, save_published
from visper.published.config import read_published
from visper.published.names import account
from visper.published.skeleton import converted_skeleton

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ATTENTION_HEADS = {4096: 32, 3072: 32}
HEAD = {"depth": 1, "dim_head": 32, "num_heads": 4, "ff_mult": 1}
LEFT_OUT = {"pt": 16 + 64, "ift": 0, "probe_depth": 64, "probe_seg": 0, "probe_gen": 0}
"""MLPs 2 and 3 of two depth heads (4 tensors each); the depth teacher's DPT head."""


def config_of(name, shapes):
    """The config.json of a published checkpoint; sizes as its shapes have them."""
    rows, width = shapes["model.embed_tokens.weight"]
    phi3 = "model.layers.0.self_attn.qkv_proj.weight" in shapes
    kind = name.split("_")[0]
    key = next((n for n in shapes if n.endswith("self_attn.k_proj.weight") and n.startswith("model.layers.")), None)
    heads = ATTENTION_HEADS[width]
    config = {
        "model_type": {"pt": "ola_", "ift": "llava_", "probe": "probe_dsg_llava_"}[kind]
        + ("phi3" if phi3 else "llama"),
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.down_proj.weight"][1],
        "num_hidden_layers": sum(n.endswith(".input_layernorm.weight") for n in shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if phi3 or key is None else shapes[key][0] * heads // width,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "image_depth": {**HEAD, "num_tokens": 576, "output_dim": 1024, "depth_layer_indices": "18-20"},
        "image_seg": {**HEAD, "num_tokens": 576, "output_dim": 1536, "seg_layer_indices": "10-18"},
        "image_gen": {**HEAD, "num_tokens": 1, "output_dim": 1024, "img_layer_indices": "12-20"},
    }
    if kind == "probe":
        return config | {"probe_mode": name.split("_")[1]}
    return config | {"aux_mode": "gen-depth-seg", "num_task_tokens": 8}


CHECKPOINTS = (
    "pt_llama3_8b",
    "pt_phi3_mini",
    "ift_llama3_8b",
    "probe_depth_llama3_8b",
    "probe_seg_llama3_8b",
    "probe_gen_llama3_8b",
    "probe_depth_vicuna7b",
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_published_name_is_a_parameter_of_ours_and_none_is_left_over(golden, tmp_path, name):
    shapes = golden.full_size(name)
    found = {n: tuple(shape) for n, shape in shapes.items()}
    config = config_of(name, shapes) | {"mm_vision_tower": str(save_clip(tmp_path / "clip", CLIP_L, weights=False))}
    # Fewer entries in the tokenizer than rows in its table, as in Phi-3: no table grows, all shapes must be equal.
    published = read_published(save_published(tmp_path / "published", config, {}, tokens=300), found)
    skeleton = converted_skeleton(published, tmp_path / "out", None, encoder_inside=True)
    slots = skeleton.slots()
    unused = account(found, slots, published.folder)
    assert {n: slot.shape for n, slot in slots.items()} == {n: s for n, s in found.items() if n in slots}
    assert len(found) == len(slots) + sum(map(len, unused.values()))
    kind = next(kind for kind in LEFT_OUT if name.startswith(kind))
    assert sum(map(len, unused.values())) == LEFT_OUT[kind]
    assert all(tensor.is_meta for n, tensor in skeleton.state.items() if n.startswith("language_model."))


def test_teachers_inside_the_student_are_left_out(golden, tmp_path):
    backbone, oneformer = golden.full_size("teacher dav2"), golden.full_size("teacher oneformer")
    found = {f"dav2_backbone.{n}": tuple(s) for n, s in backbone.items()}
    found |= {f"oneformer.{n}": tuple(s) for n, s in oneformer.items()}
    (names,) = account(found, {}, tmp_path).values()
    assert len(names) == len(backbone) + len(oneformer) > 1000
