"""Depth-Anything-V2's original ``.pth`` files as transformers models.

The files (Small, Base, Large) hold DINOv2 under ``pretrained`` and the DPT head under ``depth_head``; here are the
rules that turn their names into those of ``DepthAnythingForDepthEstimation``. A metric variant, and version 1, use the
same names for other arithmetic (another last activation, other levels): take those in transformers' format.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

LEVELS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24)}
"""Blocks of the backbone -> those that the head reads, counted from 1 (version 2; Small and Base have 12, Large 24)."""

HEAD_WIDTH = 64
"""Width of one attention head in every DINOv2."""

NAMES: tuple[tuple[str, str], ...] = (
    (r"^pretrained\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^pretrained\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^pretrained\.patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^pretrained\.norm\.", "backbone.layernorm."),
    (r"^pretrained\.blocks\.(\d+)\.", r"backbone.encoder.layer.\1."),
    (r"\.attn\.(q|k|v)\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"^depth_head\.projects\.(\d)\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"^depth_head\.resize_layers\.(\d)\.", r"neck.reassemble_stage.layers.\1.resize."),
    (r"^depth_head\.scratch\.output_conv1\.", "head.conv1."),
    (r"^depth_head\.scratch\.output_conv2\.0\.", "head.conv2."),
    (r"^depth_head\.scratch\.output_conv2\.2\.", "head.conv3."),
    # Counted from 1 in the file; the fusion runs from the deepest level, which is its last.
    *((rf"^depth_head\.scratch\.layer{n}_rn\.", f"neck.convs.{n - 1}.") for n in range(1, 5)),
    *((rf"^depth_head\.scratch\.refinenet{n}\.", f"neck.fusion_stage.layers.{4 - n}.") for n in range(1, 5)),
    (r"(fusion_stage\..*)\.out_conv\.", r"\1.projection."),
    (r"(fusion_stage\..*)\.resConfUnit(\d)\.conv(\d)\.", r"\1.residual_layer\2.convolution\3."),
)
"""Pattern in an original name -> the one in transformers. All that match apply, in this order."""

OLDER_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"} | {
    "o_proj": "output.dense"
}
"""How transformers before 5.2x names the parts of an attention."""


def read_original(path: str | Path) -> DepthAnythingForDepthEstimation:
    """The model in an original ``.pth`` file. Only tensors are read, never code.

    Raises:
        ValueError: the file is missing, holds more than tensors, or its names or shapes are others; they are listed.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file '{path}': set the teacher's 'model' to a Depth-Anything-V2 .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be read as a file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"'{path}' is no table of tensors by name: expected a Depth-Anything-V2 state dict")
    try:
        return from_original(state)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error


def from_original(state: Mapping[str, Tensor]) -> DepthAnythingForDepthEstimation:
    """The transformers model of original tensors, which it then holds itself; sizes come from their shapes.

    Raises:
        ValueError: names or shapes are not those of Depth-Anything-V2 S, B or L; they are listed.
    """
    with torch.device("meta"):
        model = DepthAnythingForDepthEstimation(original_config(state))
    known = set(model.state_dict())
    renamed, source = {}, {}
    for original, tensor in _apart(state).items():
        name = _name(original, known)
        renamed[name], source[name] = tensor, original
    unknown = [source[name] for name in renamed if name not in known]
    missing = sorted(known - set(renamed))
    if unknown or missing:
        raise ValueError(
            f"not a Depth-Anything-V2 S, B or L: unknown {_listed(unknown)}; missing (as transformers names them) "
            f"{_listed(missing)}"
        )
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ValueError(f"shapes that fit no Depth-Anything-V2: {error}") from error
    return model


def original_config(state: Mapping[str, Tensor]) -> DepthAnythingConfig:
    """The configuration that the shapes of original tensors tell. Raises ValueError where they tell none."""
    telling = {
        "positions": "pretrained.pos_embed",
        "patches": "pretrained.patch_embed.proj.weight",
        "mlp": "pretrained.blocks.0.mlp.fc1.weight",
        **{f"level {n}": f"depth_head.projects.{n}.weight" for n in range(4)},
        "fusion": "depth_head.scratch.layer1_rn.weight",
        "head": "depth_head.scratch.output_conv2.0.weight",
    }
    missing = [name for name in telling.values() if name not in state]
    if missing:
        other = [name for name in state if not name.startswith(("pretrained.", "depth_head."))]
        raise ValueError(f"not a Depth-Anything-V2 S, B or L: missing {_listed(missing)}; unknown {_listed(other)}")
    shapes = {part: tuple(state[name].shape) for part, name in telling.items()}
    blocks = len({name.split(".")[2] for name in state if name.startswith("pretrained.blocks.")})
    width, patch = shapes["positions"][-1], shapes["patches"][-1]
    if blocks not in LEVELS or width % HEAD_WIDTH:
        raise ValueError(
            f"a backbone of {blocks} blocks x {width}: expected Depth-Anything-V2's Small (12 x 384), Base (12 x 768) "
            "or Large (24 x 1024)"
        )
    backbone = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=shapes["mlp"][0] // width,
        image_size=patch * round((shapes["positions"][1] - 1) ** 0.5),
        patch_size=patch,
        out_indices=list(LEVELS[blocks]),
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=patch,
        reassemble_hidden_size=width,
        neck_hidden_sizes=[shapes[f"level {n}"][0] for n in range(4)],
        fusion_hidden_size=shapes["fusion"][0],
        head_hidden_size=shapes["head"][0],
    )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value, one matrix in the file, as three."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                apart[name.replace(".qkv.", f".{part}.")] = value.clone()
        else:
            apart[name] = tensor
    return apart


def _name(original: str, known: set[str]) -> str:
    name = original
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    if name not in known:
        for newer, older in OLDER_NAMES.items():
            name = name.replace(f".attention.{newer}.", f".attention.{older}.")
    return name


def _listed(names: list[Any], most: int = 12) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
