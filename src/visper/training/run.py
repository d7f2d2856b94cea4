"""The story of a stage: data, student, objective, engine, weights. Each line announces itself.

Layout of a stage's output::

    run.yaml        the resolved run (whose folder this is)
    adapter/        with 'lora': the low-rank updates in peft's format; model/ holds them merged
    model/          a plain LLaVA folder: weights, tokenizer, processor, generation config, run.yaml; written last
    distillation/   PT only: predictors, logit scales and query matrices, for looking and probing
    checkpoints/    what is needed to continue, complete or absent
    log.jsonl       every logged value
    dropped.jsonl   rows left out, with the reason
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from visper.common.console import announce
from visper.common.errors import ConfigError, StoppedError
from visper.common.files import atomic_path, write_text
from visper.config import Engine, Run, load_run, run_text, save_run
from visper.data.images import background_of
from visper.data.rows.records import DropList
from visper.data.sets.catalog import row_files
from visper.distillation.teachers.tasks import build_teachers
from visper.model import Student, save_student
from visper.model.encoders import BATCH_NORMS
from visper.model.revisions import with_commits
from visper.model.start import starting_student
from visper.target_store.open import open_targets
from visper.training.arguments import check_split, training_arguments
from visper.training.assemble import apply_run, build_data, build_training_model
from visper.training.attention import choose_attention
from visper.training.callbacks import ConsoleCallback, JsonlCallback, tensorboard
from visper.training.lora import ADAPTER, add_updates, merge_updates, quantized_student, save_adapter
from visper.training.module import TrainingModel
from visper.training.parallel.deepspeed import (
    prepare_for_zero,
    require_same_writer,
    uses_zero,
    zero_settings,
    zero_state,
)
from visper.training.parallel.fsdp import is_sharded, shard, unshard
from visper.training.rates import learning_rate_of
from visper.training.resume import require_same_order
from visper.training.stages import count_parts
from visper.training.trainer import DROPPED, STAGING, StageTrainer, checkpoints, is_last

MAY_DIFFER: dict[str, Any] = {
    "output": True,
    "logging": True,
    "launch": True,
    "data": {"workers"},
    "optimization": {"micro_batch", "gradient_checkpointing", "packing", "attention"},
}
"""What may change when a run is continued: how it is split, watched and stored, not what it computes."""


def run_stage(run: Run, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Trains one stage and returns the folder of the finished student.

    Args:
        resume: continue from the newest complete checkpoint in the run's output.
        callbacks: more of the engine's callbacks.

    Raises:
        ConfigError: the run cannot be, or its output folder holds another one.
        DataError: too many bad rows.
    """
    row_files(run.data)  # what is missing is said before anything is loaded
    output = Path(run.output)
    timeout = timedelta(minutes=run.launch.timeout_minutes)
    zero = uses_zero(run.launch)
    state = zero_state(timeout) if zero else PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"one process sees {count} GPUs: start one process a GPU (`torchrun --nproc-per-node {count} -m visper "
            "train ...`), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    console = Console(quiet=not state.is_main_process)
    run = broadcast_object_list([with_commits(run, _saved(output)) if state.is_main_process else None])[0]
    if state.is_main_process:
        claim_output(run, output, resume)
    state.wait_for_everyone()
    torch.manual_seed(run.seed)
    check_split(run, state.num_processes)
    student = quantized_student(run) if run.lora and run.lora.quantize else starting_student(run)
    announce(console, "student", f"{type(student.model).__name__}, {student.num_layers} layers x {student.hidden_size}")
    choose_attention(run, student.model.model.language_model)
    background = background_of(student.processor.image_processor)
    targets = open_targets(run.distillation, run.data.geometry.value, background, output / "run.yaml")
    if targets is None:
        teachers = build_teachers(run.distillation, run.optimization.precision, student.task_token_ids)
    else:
        teachers = targets.teachers()
    for task, teacher in teachers.items():
        announce(console, "teacher", f"{task}: {type(teacher).__name__}, {teacher.spec}")
    data = build_data(run, student, teachers, console, targets)
    add_updates(run, student)
    model = build_training_model(run, student, teachers)
    set_trainable(run, model, student, console)
    if run.optimization.gradient_checkpointing:
        model.recompute_activations(run.optimization.gradient_checkpointing)

    if run.launch.engine is Engine.FSDP and state.num_processes > 1:
        share = shard(model, state.num_processes, run.optimization.precision == "bfloat16")
        announce(console, "sharded", f"{share:.1%} of the weights on each of {state.num_processes} processes")
    elif zero:
        prepare_for_zero(run.launch, model)

    watchers: list[TrainerCallback] = [JsonlCallback(output / "log.jsonl"), ConsoleCallback(), *callbacks]
    if "tensorboard" in run.logging.report_to and state.is_main_process:
        watchers.append(tensorboard(output / "tensorboard"))
    # Not earlier: once the arguments name ZeRO-3, transformers shares out whatever is loaded.
    arguments = training_arguments(run, output, state.num_processes, zero_settings(run) if zero else None)
    trainer = StageTrainer(model, arguments, data, run, teachers, watchers)
    trainer.remove_callback(PrinterCallback)
    found = checkpoints(output / "checkpoints")
    newest = str(found[-1]) if resume and found else None
    if newest is not None:
        require_same_order(Path(newest), data)
        before = DropList.read(output / DROPPED)  # also rows that were found bad while training
        data.drops.extend(drop for drop in before if drop.sample_id not in data.drops.agreed)
    if state.is_main_process:
        data.drops.write(output / DROPPED)
    announce(console, "training", f"stage {run.stage} from {'step 0' if newest is None else newest}")
    if newest is not None and is_last(Path(newest)):
        trainer.restore(newest)  # killed before the folder was finished: the engine would take one step more
    else:
        if newest is not None:
            require_same_writer(Path(newest), run.launch, state.num_processes)
        with stopping_on_sigterm(trainer):
            trainer.train(resume_from_checkpoint=newest)
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedError(
                f"told to stop (SIGTERM): saved at step {trainer.state.global_step} of {trainer.state.max_steps} in "
                f"{output / 'checkpoints'}; add --resume to go on"
            )
    if is_sharded(model):
        unshard(model, keep=state.is_main_process)
    if state.is_main_process:
        finish(run, output, student, model)
        announce(console, "saved", str(output / "model"))
    state.wait_for_everyone()
    return output / "model"


@contextmanager
def stopping_on_sigterm(trainer: StageTrainer) -> Iterator[None]:
    """SIGTERM, which spot machines and schedulers send before they take a machine away, ends training at the next step.

    In a thread that is not the main one nothing can be caught, and nothing is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        trainer.stop_asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_pipeline(runs: Sequence[Run]) -> None:
    """Trains stages in order; finished ones are skipped, interrupted ones continued from their checkpoint."""
    console = Console()
    for run in runs:
        if is_finished(run):
            announce(console, "finished", f"{run.name}: {run.output}")
            continue
        run_stage(run, resume=True)


def is_finished(run: Run) -> bool:
    """Whether the output holds this very run, whole. Raises ConfigError if it holds another one."""
    output = Path(run.output)
    _refuse_other(run, output)
    return (output / "model" / "run.yaml").is_file()


def claim_output(run: Run, output: Path, resume: bool) -> None:
    """Makes the output folder this run's own. What another run left there is never touched.

    Raises:
        ConfigError: it holds another run, a finished one, or an unfinished one and ``resume`` was not asked for.
    """
    _refuse_other(run, output)
    if (output / "model").exists():
        raise ConfigError(
            f"output '{output}' holds this run, finished: remove it to train again, or choose another output"
        )
    if checkpoints(output / "checkpoints") and not resume:
        raise ConfigError(f"output '{output}' holds checkpoints of this run: add --resume, or choose another output")
    output.mkdir(parents=True, exist_ok=True)
    # What a run that was killed leaves behind; killed at once, nothing else.
    leftovers = {*output.glob(".*.partial-*"), *output.glob(".*.old-*")}
    if not (output / "run.yaml").exists() and any(
        path not in leftovers or not path.name.startswith(".run.yaml.") for path in output.iterdir()
    ):
        raise ConfigError(f"output '{output}' is not empty and holds no run of ours: choose another output")
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    shutil.rmtree(output / "checkpoints" / STAGING, ignore_errors=True)
    write_text(output / "run.yaml", run_text(run))


def _saved(output: Path) -> Run | None:
    """The run that the output folder holds."""
    return load_run(output / "run.yaml") if (output / "run.yaml").is_file() else None


def _refuse_other(run: Run, output: Path) -> None:
    saved = _saved(output)
    if saved is None:
        return
    theirs = saved.model_dump(exclude=MAY_DIFFER)
    ours = with_commits(run, saved).model_dump(exclude=MAY_DIFFER)
    different = sorted(key for key in ours if ours[key] != theirs[key])
    if different:
        raise ConfigError(
            f"output '{output}' holds another run (its {', '.join(different)} differ): "
            "choose another output, or give back the settings in its run.yaml"
        )


def set_trainable(run: Run, model: TrainingModel, student: Student, console: Console) -> None:
    """Applies the stage's table, reports it, and puts what is frozen into the run's precision."""
    unused = apply_run(run, model, student)
    if unused:
        announce(console, "frozen", f"{len(unused)} encoder parameters behind the layer the projector reads")
    for count in count_parts(model):
        if count.total:
            rate = f" at {learning_rate_of(run, count.part):g}" if count.trainable else ""
            announce(console, "learns", f"{count.part}: {count.trainable:,} of {count.total:,} parameters{rate}")
    if run.optimization.precision == "bfloat16":
        # Learning weights stay in float32 under autocast; parts that are frozen whole need only be read.
        inner = student.model.model
        for part in (inner.vision_tower, inner.multi_modal_projector, inner.language_model, student.model.lm_head):
            if run.lora is not None and part is inner.language_model:
                for parameter in part.parameters():
                    if not parameter.requires_grad and parameter.is_floating_point():
                        parameter.data = parameter.data.to(torch.bfloat16)
            elif not any(parameter.requires_grad for parameter in part.parameters()):
                to_bfloat16(part)


def to_bfloat16(module: nn.Module) -> None:
    """Casts the weights, but not batch normalization's: its statistics are sums that half precision rounds away."""
    kept = {id(p) for m in module.modules() if isinstance(m, BATCH_NORMS) for p in m.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)


def finish(run: Run, output: Path, student: Student, model: TrainingModel) -> None:
    """Writes what the stage made. ``model`` is renamed into place last: where it is, everything is."""
    if model.task_tokens is not None:
        model.task_tokens.write_back(student.model.get_input_embeddings())
    if model.objective is not None and model.task_tokens is not None:
        with atomic_path(output / "distillation") as partial:
            partial.mkdir()
            kept = {f"objective.{n}": t for n, t in model.objective.state_dict().items()}
            kept |= {f"task_tokens.{n}": t for n, t in model.task_tokens.state_dict().items()}
            save_file({n: t.detach().cpu().contiguous() for n, t in kept.items()}, partial / "weights.safetensors")
            save_run(run, partial / "run.yaml")
    if run.lora is not None:
        with atomic_path(output / ADAPTER) as partial:
            save_adapter(run, student, partial)
        student = merge_updates(run, student)
    if run.optimization.precision == "bfloat16":
        to_bfloat16(student.model)
    with atomic_path(output / "model") as partial:
        save_student(student, partial)
        save_run(run, partial / "run.yaml")
