"""Low-rank updates of the LLM with peft: injecting, saving and merging them.

LoRA: arXiv 2106.09685. QLoRA: arXiv 2305.14314 (the frozen LLM in 4 bits; updates are merged into the unquantized LLM).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visper.common.compat import forget_adapters
from visper.common.console import Console, announce
from visper.common.errors import ConfigError
from visper.common.files import atomic_path
from visper.common.manifest import WEIGHTS_ONLY, write_manifest
from visper.config import Lora, Run, VlmStudent
from visper.model import Student, load_student
from visper.model.parts import LLM, PLACES, PROJECTOR, modules_of, part_of
from visper.training.stages import part_name

ADAPTER = "adapter"
"""Folder beside ``model/`` with the updates and the projector's weights in peft's format."""
_NAMED = 3
"""Maximum number of parameters named in a message."""


def add_updates(lora: Lora | None, student: Student) -> None:
    """Injects low-rank updates into the student's LLM, in place; does nothing without ``lora``.

    Raises:
        ConfigError: peft is not installed, or a target is not a linear layer of the LLM.
    """
    if lora is None:
        return
    _need("peft", "lora")
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora, student), student.model)


def peft_config(lora: Lora, student: Student) -> Any:
    """The ``LoraConfig`` for the student's LLM."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"({'|'.join(modules_of(student.model, LLM))})\..*\.({'|'.join(_targets(lora, student))})",
    )


def _targets(lora: Lora, student: Student) -> list[str]:
    llm = student.model.get_decoder()
    linear = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    known = sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linear})
    if lora.targets == "all-linear":
        return known
    unknown = [name for name in lora.targets if name not in known]
    if unknown or not lora.targets:
        raise ConfigError(f"lora.targets names {unknown or 'nothing'}: the LLM's linear layers are {', '.join(known)}")
    return list(lora.targets)


def four_bits(start_from: str | None) -> dict[str, Any]:
    """Options to load a student with its LLM in 4 bits (NF4, double quantization); other parts are not quantized.

    Raises:
        ConfigError: no GPU, bitsandbytes is not installed, or the run does not start from a folder.
    """
    if start_from is None:
        raise ConfigError("lora.quantize needs 'start_from': set it to the previous stage's output or a model folder")
    _need("bitsandbytes", "qlora")
    if not torch.cuda.is_available():
        raise ConfigError("lora.quantize=4bit needs a CUDA GPU, and this machine has none: remove 'quantize'")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[start.strip(".").split(".")[-1] for start, part in PLACES if part != "llm."],
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def save_adapter(run: Run, student: Student, model: nn.Module, folder: Path, console: Console) -> None:
    """Writes the updates in peft's format, for ``PeftModel.from_pretrained(model_the_stage_started_from, folder)``.

    The projector is trained too, so its modules are included (peft's ``modules_to_save``). If the run has changed
    anything else, the result would not be the finished model: then nothing is written, and the log says why.

    Args:
        model: the training model; its trainable parameters are those that the run has changed.
    """
    from peft import get_peft_model_state_dict

    assert run.lora is not None
    saved = _saved_modules(student.model)
    obstacle = _obstacle(run, student, model, saved)
    if obstacle is not None:
        announce(console, "adapter", f"not written, because {obstacle}; model/ is complete")
        return
    config = copy.copy(peft_config(run.lora, student))
    config.modules_to_save = saved or None
    config.base_model_name_or_path, config.revision = _start_of(run)
    config.inference_mode = True
    weights: dict[str, Tensor] = get_peft_model_state_dict(student.model, state_dict=student.model.state_dict())
    modules = tuple(f"{name}." for name in saved)
    weights |= {name: value for name, value in student.model.state_dict().items() if name.startswith(modules)}
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    with atomic_path(folder) as partial:
        partial.mkdir()
        config.save_pretrained(partial)
        save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        write_manifest(partial, WEIGHTS_ONLY)


def _saved_modules(model: nn.Module) -> list[str]:
    """The projector's modules with trained parameters. peft cannot save a list of modules, so a list's members stand
    for it (Qwen3-VL's ``deepstack_merger_list``)."""
    found: list[str] = []
    for name in modules_of(model, PROJECTOR):
        module = model.get_submodule(name)
        several = isinstance(module, nn.ModuleList)
        found += [f"{name}.{at}" for at in range(len(module))] if several else [name]  # type: ignore[arg-type]
    return [name for name in found if any(p.requires_grad for p in model.get_submodule(name).parameters())]


def _obstacle(run: Run, student: Student, model: nn.Module, saved: Sequence[str]) -> str | None:
    """Why the model that the run started from, with the adapter, would not be the finished one; None if it would."""
    start, _ = _start_of(run)
    if start is None:
        return "the run started from an LLM and an encoder, and not from a model that it could be added to"
    if run.start_from is None and student.task_token_ids:
        return f"the run has added task tokens to the vocabulary of '{start}'"
    held = ("objective.", *(f"student.{name}." for name in saved))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    others = [part_name(name) for name in trained if not name.startswith(held)]
    if not others:
        return None
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return f"it cannot hold all that the run has trained: {', '.join(others[:_NAMED])}{more}"


def _start_of(run: Run) -> tuple[str | None, str | None]:
    """Folder or hub id of the model that the run started from, and its revision; None if it assembled the student."""
    if run.start_from is not None:
        model = Path(run.start_from) / "model"  # of a stage's folder
        return str(model) if model.is_dir() else run.start_from, run.start_from_revision
    return (run.student.vlm, run.student.vlm_revision) if isinstance(run.student, VlmStudent) else (None, None)


def merge_updates(run: Run, student: Student) -> Student:
    """The student with its updates merged into the LLM's weights, and peft's layers replaced by plain ones.

    If the LLM is quantized, the unquantized one is loaded and the updates are merged into that. Task tokens must be
    written into the vocabulary of the result, not before.
    """
    if run.lora is not None and run.lora.quantize is not None:
        student = _onto_unquantized(run, student)
    from peft.tuners.lora import LoraLayer

    modules: list[tuple[str, Any]] = list(student.model.named_modules())
    for name, module in modules:
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(student.model.get_submodule(parent), last, module.base_layer)
    forget_adapters(student.model)
    return student


def _onto_unquantized(run: Run, quantized: Student) -> Student:
    assert run.start_from is not None
    whole = load_student(run.start_from, revision=run.start_from_revision)
    add_updates(run.lora, whole)
    # Trained parts are taken completely, because they may have buffers that training changes; they are not quantized.
    trained = {part_of(name) for name, p in quantized.model.named_parameters() if p.requires_grad} - {LLM}
    state = quantized.model.state_dict().items()
    updates = {name: tensor.cpu() for name, tensor in state if "lora_" in name or part_of(name) in trained}
    whole.model.load_state_dict(updates, strict=False)
    whole.processor = quantized.processor
    return whole


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"'lora' needs {package}, which is not installed: pip install 'visper-lm[{extra}]'")
