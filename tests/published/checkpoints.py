"""Published checkpoints in small, as folders: golden weights under a published config.json, or random ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from tests import tiny
from visper.published.config import read_published
from visper.published.names import INPUT_TABLE, OUTPUT_TABLE
from visper.published.skeleton import converted_skeleton

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<unk>"]


def save_tokenizer(folder: Path, size: int) -> None:
    """A byte tokenizer of exactly ``size`` entries, the last ones fillers that no text spells."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"\u4e00{i}" for i in range(size - len(symbols) - len(SPECIAL))]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:-1]})
    fast.chat_template = tiny.CHAT_TEMPLATE
    fast.save_pretrained(folder)
    assert len(fast) == size


def save_clip(folder: Path, sizes: dict[str, Any], weights: bool = True) -> Path:
    """The encoder's own folder; without ``weights`` its configuration alone."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(**sizes)
    if weights:
        CLIPVisionModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    side = sizes["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def save_published(
    folder: Path,
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    tokens: int | None = None,
    shards: int = 1,
    pickled: bool = False,
) -> Path:
    """A published checkpoint: ``tokens`` entries in its tokenizer (default: as many as its table has rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(folder, tokens or config["vocab_size"])
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"{stem}.{end}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}"
        tensors = {name: state[name].contiguous() for name in part}
        torch.save(tensors, folder / file) if pickled else save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def small_config(encoder: Path, **changes: Any) -> dict[str, Any]:
    """A config.json as published, of a PT model of four layers."""
    head = {"depth": 1, "dim_head": 4, "num_heads": 2, "ff_mult": 1}
    config = {
        "model_type": "ola_llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 262,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.1",
        "aux_mode": "gen-depth-seg",
        "num_task_tokens": 8,
        "task_token_format": "expand_emb",
        "contrastive_loss_weight": 0.3,
        "pass_text_to_aux": True,
        "image_depth": {**head, "num_tokens": 16, "output_dim": 8, "depth_layer_indices": "1-3"},
        "image_seg": {**head, "num_tokens": 16, "output_dim": 6, "seg_layer_indices": "2-4"},
        "image_gen": {**head, "num_tokens": 1, "output_dim": 10, "img_layer_indices": "3", "img_loss_weight": 0.25},
        "depth_estimator": "depth_anything_v2_vitl.pth",
        "image_aspect_ratio": "square",
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(encoder),
        "use_mm_proj": True,
    }
    return {**config, **changes}


def random_state(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights for ``config``, under published names: also those that no conversion keeps."""
    save_published(folder / "empty", config, {})
    rows = config["num_task_tokens"] if config["model_type"] != "probe_dsg_llava_llama" else 0
    special = [f"model.special_{task}_tokens" for task in config["aux_mode"].split("-") if rows]
    skeleton = converted_skeleton(read_published(folder / "empty", special), folder / "out", None, encoder_inside=True)
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, slot in skeleton.slots().items():
        shape = (config["vocab_size"], slot.shape[1]) if slot.name in (INPUT_TABLE, OUTPUT_TABLE) else slot.shape
        state[name] = (torch.randn(shape, generator=generator) * 0.2).bfloat16()
        if ".linear_1." in name:
            for number in "23":
                state[name.replace(".linear_1.", f".linear_{number}.")] = torch.randn(shape).bfloat16()
    state["da_v2_head.depth_head.projects.0.weight"] = torch.randn(2, 2)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
    return state
