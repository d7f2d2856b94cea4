"""Micro-batches on a GPU that is not there: torch's fake tensors have a device, but no values.

An operation on tensors of two devices is an error, and so is reading a value, for which a real GPU would make the host
wait. Autograd starts a thread for a GPU, so the backward pass runs on the fake device "meta", which has no autocast.
"""

import dataclasses

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import tiny, tiny_teachers
from visper.common.console import Console
from visper.config import Run
from visper.distillation import build_teacher
from visper.training.global_batch import teacher_targets
from visper.training.module import FORWARD_KEYS
from visper.training.parallel.join import join_processes
from visper.training.run import build_data, build_model, build_student, build_targets

pytestmark = pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.9 aborts, 2.10 was not tried")
GPU, WITH_BACKWARD = torch.device("cuda:0"), torch.device("meta")
COLORS = {"kind": "tests.tiny:PooledColors", "model": "colors"}
TOKENS = {"target": COLORS, "layers": [2], "head": {"kind": "mlp"}, "loss": {"cosine": 1.0, "info_nce": 0.3}}


@pytest.fixture
def gpu(monkeypatch):
    """The mode that makes the fake tensors. Autocast works on its GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return FakeTensorMode()


@pytest.fixture
def gpu_with_backward(monkeypatch):
    """The mode that makes fake tensors on ``WITH_BACKWARD``, of which autocast knows nothing."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: autocast("cpu", **settings))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: enabled("cpu"))
    return FakeTensorMode(allow_non_fake_inputs=True)  # the image processor makes its constants on the meta device


def faked(value, mode):
    """A batch with fake tensors in place of its own, still on the CPU."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: faked(getattr(value, field.name), mode) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return {key: faked(inner, mode) for key, inner in value.items()} if isinstance(value, dict) else value


def move(module, mode, device):
    """``module.to(device)``, for a module whose tensors are not fake yet. Tied weights stay tied."""
    made = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in [(name, tensor) for name, tensor in table.items() if tensor is not None]:
                if id(tensor) not in made:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        there = fake.to(device)
                    trainable = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(there, trainable) if isinstance(tensor, nn.Parameter) else there
                table[name] = made[id(tensor)]


def run_of(folder, stage, llm, encoder, task=None, **changes):
    tiny.write_several(folder / "rows", 8, (1, 0, 2, 3))
    source = {"json": str(folder / "rows" / "rows.json"), "images": str(folder / "rows" / "images")}
    optimization = {"global_batch": 8, "micro_batch": 4, "lr": 1e-3, **changes.pop("optimization", {})}
    tasks = {"tasks": {"depth": task}} if task else tiny.distillation() if stage == "pt" else None
    return Run.model_validate(
        {
            "name": stage,
            "stage": stage,
            "output": str(folder / stage),
            "student": {"llm": str(llm), "encoder": str(encoder)},
            "data": {"sources": [source], "workers": 0, **changes.pop("data", {})},
            "optimization": optimization,
            "distillation": tasks,
            **changes,
        }
    )


STAGES = pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pt", {}),
        ("pt", {"optimization": {"packing": True, "gradient_checkpointing": 1.0}}),
        ("vpt", {"optimization": {"precision": "float32"}}),
        ("ift", {"optimization": {"packing": True}, "lora": {"rank": 2}}),
        ("ift", {"optimization": {"packing": True, "attention": "eager"}}),
        ("ift", {"optimization": {"packing": True}, "data": {"join_conversations": True}}),
        ("ift", {"task": {**TOKENS, "at": "image_tokens"}}),
        ("ift", {"task": {**TOKENS, "at": "projector", "layers": []}}),
        ("ift", {"task": {**TOKENS, "target": {"kind": "encoder"}, "at": "image_tokens", "loss": {"gram": 1.0}}}),
    ],
)


def micro_batches(run, mode, device):
    """The model, and what it is given for each of two micro-batches, on the fake device; inside ``mode`` only."""
    processes, console = join_processes(run.launch), Console(quiet=True)
    student = build_student(run, processes, console)
    teachers, store = build_targets(run, student, console)
    data = build_data(run, student, teachers, store, console)
    model = build_model(run, student, teachers, processes, console).train()
    collate = model.with_positions(data.collator)
    batches = [collate([data.dataset[row] for row in rows]) for rows in (range(4), range(4, 8))]
    for module in (model, *teachers.values()):
        move(module, mode, device)
    images = sum(len(batch["image_rows"]) for batch in batches)
    with mode:
        moved = [send_to_device(faked(dict(batch), mode), device) for batch in batches]
        given = []
        for batch, targets in zip(moved, teacher_targets(moved, teachers, device, [images]), strict=True):
            divisors = {name: torch.ones((), dtype=torch.long, device=device) for name in ("num_tokens", "num_images")}
            kept = {key: value for key, value in batch.items() if key in FORWARD_KEYS}
            given.append({**kept, **divisors, "targets": targets})
    return model, given


@STAGES
def test_a_micro_batch_stays_on_its_gpu_and_reads_nothing_from_it(
    stage, changes, gpu, tmp_path, tiny_llm, tiny_encoder
):
    run = run_of(tmp_path, stage, tiny_llm, tiny_encoder, **changes)
    model, batches = micro_batches(run, gpu, GPU)
    with gpu, torch.autocast("cuda", torch.bfloat16, enabled=run.optimization.precision == "bfloat16"):
        for batch in batches:
            terms = model(**batch, token_losses=True)
            assert {term.device for term in terms.values()} == {GPU}


@pytest.mark.slow
@STAGES
def test_a_step_leaves_gradients_and_weights_on_its_gpu_and_reads_nothing_from_it(
    stage, changes, gpu_with_backward, tmp_path, tiny_llm, tiny_encoder
):
    run = run_of(tmp_path, stage, tiny_llm, tiny_encoder, **changes)
    model, batches = micro_batches(run, gpu_with_backward, WITH_BACKWARD)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with gpu_with_backward:
        for batch in batches:
            model(**batch)["loss"].backward()
        assert {parameter.grad.device for parameter in trained} == {WITH_BACKWARD}
        assert nn.utils.clip_grad_norm_(trained, 1.0).device == WITH_BACKWARD
        torch.optim.AdamW(trained, lr=1e-3).step()
        assert {parameter.device for parameter in trained} == {WITH_BACKWARD}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teachers_stay_on_their_gpu_in_either_precision(dtype, gpu, tmp_path):
    places = {
        "depth_anything": (tiny_teachers.save(tiny_teachers.depth_model(), tmp_path / "depth"), {"size": 56}),
        "oneformer": (tiny_teachers.save_oneformer(tmp_path / "seg"), {"size": 64}),
        "features": (tiny_teachers.save_vision(tmp_path / "features", "dinov2"), {}),
    }
    for kind, (place, options) in places.items():
        teacher = build_teacher(kind, str(place), **options).to(dtype)
        image = teacher.preprocess(torch.zeros(3, 40, 50, dtype=torch.uint8))
        move(teacher, gpu, GPU)
        images = gpu.from_tensor(image[None])
        with gpu:
            target = teacher(images.to(GPU))
        assert (target.device, target.dtype) == (GPU, dtype), kind
