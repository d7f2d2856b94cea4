"""Runs a stage: builds data, student, objective and trainer, trains, and writes the stage's folder (see ``output``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from visper.common.console import Console, announce
from visper.common.errors import StoppedError, counted
from visper.common.files import atomic_path
from visper.common.gpus import explaining_full_memory
from visper.common.lock import locked_by_first
from visper.common.manifest import WEIGHTS_ONLY, write_manifest
from visper.common.ranks import first_decides, wait_for_all
from visper.config import Run, Stage, save_run
from visper.data.dataset import require_images
from visper.data.images import background_of
from visper.data.sets.catalog import row_files
from visper.distillation import Teacher
from visper.distillation.teachers.tasks import build_teachers, specs_of
from visper.model import Student, save_student
from visper.model.card import write_card
from visper.model.revisions import with_commits
from visper.model.start import require_positions, starting_processor, starting_student
from visper.target_store.open import TargetStore, open_targets
from visper.training.arguments import check_split, training_arguments
from visper.training.assemble import build_training_model, continue_objective, set_trainable, to_bfloat16
from visper.training.attention import choose_attention
from visper.training.best import MEASURED_ON, best_checkpoint
from visper.training.callbacks import JsonlCallback, console_callback
from visper.training.checkpoint import is_last, require_finite
from visper.training.compilation import compile_parts, require_compiler
from visper.training.content import content_of, require_same_content
from visper.training.held_out import (
    EvaluationCallback,
    Evaluator,
    HeldOut,
    held_out_rows,
    require_evaluator,
)
from visper.training.lora import ADAPTER, add_updates, four_bits, merge_updates, save_adapter
from visper.training.module import TrainingModel
from visper.training.output import (
    DROPPED,
    check_output,
    claim_output,
    is_finished,
    naming_saved_weights,
    newest_own,
    require_separate_outputs,
    saved_run,
)
from visper.training.parallel.deepspeed import (
    prepare_for_zero,
    require_same_writer,
    uses_zero,
    zero_settings,
)
from visper.training.parallel.fsdp import is_sharded, shard, shares_weights, unshard
from visper.training.parallel.join import join_processes
from visper.training.recomputation import EstimateMemory, decide_recomputation
from visper.training.resume import continue_rows
from visper.training.stage_data import StageData, build_data
from visper.training.trackers import log_images, require_trackers, tensorboard
from visper.training.trainer import StageTrainer


def run_stage(
    run: Run,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    accept_changes: bool = False,
    evaluator: Evaluator | None = None,
    recomputation: EstimateMemory | None = None,
    followed: bool = False,
) -> Path:
    """Trains one stage and returns the folder of the finished student.

    Args:
        resume: continue from the newest undamaged checkpoint in the run's output.
        callbacks: additional callbacks for the Trainer.
        accept_changes: continue even if rows, images or initial weights have changed since the run began.
        evaluator: asks questions and draws predictions as ``run.evaluation`` says (``evaluation.while_training``).
        recomputation: decides ``gradient_checkpointing: auto`` on a GPU (``planning.recomputation``); without it,
            all layers are recomputed there.
        followed: the caller goes on afterwards: raise StoppedError also if a signal came too late to stop the stage.

    Raises:
        ConfigError: the run cannot be trained, or its output folder holds another run or is in use.
        DataError: too many bad rows.
        StoppedError: a signal stopped the run early; it has saved a checkpoint. Or see ``followed``.
    """
    require_parts(run, evaluator)
    processes = join_processes(run.launch)
    console = Console(quiet=not processes.is_main_process)
    output = Path(run.output)
    with locked_by_first(output, console), explaining_full_memory():
        run = open_output(run, resume)
        run = decide_recomputation(run, processes, recomputation, console)
        checkpoint = first_decides(lambda: newest_own(run, output, console)) if resume else None
        check_split(run.optimization, processes.num_processes)
        torch.manual_seed(run.seed)

        student = build_student(run, processes, console)
        teachers, targets = build_targets(run, student, console)
        model = build_model(run, student, teachers, processes, console)  # its errors come before the rows are read
        data = build_data(run, student, teachers, targets, console)
        if run.stage is Stage.PT:
            require_images(data.dataset.records)
        content = first_decides(lambda: content_of(run, data.dataset.records, targets))
        if checkpoint is not None:
            continue_rows(checkpoint, data)
            if not accept_changes:
                first_decides(lambda: require_same_content(output, content))
        if processes.is_main_process:
            claim_output(run, output, content)
        evaluation = evaluation_callback(run, student, teachers, targets, data, evaluator, console)
        trainer = build_trainer(run, model, data, teachers, processes, callbacks, evaluation)
        train(trainer, checkpoint, console, evaluation)
        if processes.is_main_process:
            with naming_saved_weights(output):
                finish(run, student, model, console)
            announce(console, "saved", f"{output}/model")
        wait_for_all()
    if followed:
        trainer.stop.end_after(output)
    return output / "model"


def run_pipeline(
    runs: Sequence[Run],
    evaluator_of: Callable[[Run], Evaluator | None] = lambda run: None,
    recomputation: EstimateMemory | None = None,
) -> None:
    """Trains stages in order; skips finished ones, whose weights the first process verifies; resumes interrupted ones.

    Raises:
        ConfigError: there are no stages, two have the same output, or see ``run_stage``.
    """
    require_separate_outputs(runs)
    join_processes(runs[0].launch)
    finished = first_decides(partial(_check_stages, runs))
    for number, run in enumerate(runs):
        processes = join_processes(run.launch)
        # A stage is compared again if an earlier one has trained since: that may be where it starts from.
        if finished[number] and (all(finished[:number]) or first_decides(partial(is_finished, run))):
            announce(Console(quiet=not processes.is_main_process), "finished", f"{run.name}: {run.output}")
            continue
        followed = number + 1 < len(runs)
        run_stage(run, resume=True, evaluator=evaluator_of(run), recomputation=recomputation, followed=followed)


def _check_stages(runs: Sequence[Run]) -> list[bool]:
    """Whether each stage is finished; the others' outputs, data and starts are checked before the first one trains.

    Raises:
        ConfigError: a stage cannot be trained or skipped, or starts from what neither exists nor is made before it.
        DataError: a stage's rows do not exist, or a finished model is damaged.
    """
    finished: list[bool] = []
    made: set[Path] = set()
    for run in runs:
        finished.append(is_finished(run))
        if not finished[-1]:
            check_output(run, Path(run.output), resume=True)
            row_files(run.data)
            start = Path(run.start_from or "").resolve()
            if made.isdisjoint((start, start.parent)):
                starting_processor(run)
        made.add(Path(run.output).resolve())
    return finished


def require_parts(run: Run, evaluator: Evaluator | None) -> None:
    """Reports missing data, trackers, compilers or evaluators before anything is loaded."""
    row_files(run.data)
    require_trackers(run.logging.report_to, run.logging.project)
    require_compiler(run)
    require_evaluator(run.evaluation, evaluator)


def open_output(run: Run, resume: bool) -> Run:
    """Checks the run's output folder; returns the run with its hub models pinned to commits.

    Raises:
        ConfigError: the run may not write into the folder, see ``check_output``.
    """
    output = Path(run.output)

    def pinned() -> Run:
        own = with_commits(run, saved_run(output))
        check_output(own, output, resume)
        return own

    return first_decides(pinned)


def build_student(run: Run, processes: PartialState, console: Console) -> Student:
    """The student that the stage starts with, set to the run's attention.

    With FSDP, only the first process reads the weights; the others receive theirs when the model is sharded.
    """
    if run.lora and run.lora.quantize:
        student = starting_student(run, **four_bits(run.start_from))
    elif shares_weights(run.launch, processes.num_processes):
        loaded: list[Student] = []
        first_decides(lambda: loaded.append(starting_student(run)))
        student = loaded[0] if loaded else starting_student(run, skeleton=True)
    else:
        student = starting_student(run)
    announce(console, "student", f"{type(student.model).__name__}, {student.num_layers} layers x {student.hidden_size}")
    choose_attention(run, student)
    require_positions(student, run.data.max_tokens)
    return student


def build_targets(run: Run, student: Student, console: Console) -> tuple[dict[str, Teacher], TargetStore | None]:
    """The teachers by task, and the target store that replaces them, if the run names one."""
    background = background_of(student.processor.image_processor)
    store = open_targets(run.distillation, run.data.geometry.value, background)
    if store is None:
        precision, device = run.optimization.precision, PartialState().device
        teachers = build_teachers(run.distillation, precision, student.task_token_ids, device)
    else:
        teachers = dict(store.teachers())
    for task, teacher in teachers.items():
        announce(console, "teacher", f"{task}: {type(teacher).__name__}, {teacher.spec}")
    return teachers, store


def build_model(
    run: Run, student: Student, teachers: Mapping[str, Teacher], processes: PartialState, console: Console
) -> TrainingModel:
    """Student and objective as one module, with its trainable parameters set, sharded or compiled as the run says."""
    shares = shares_weights(run.launch, processes.num_processes)
    skeleton = shares and not processes.is_main_process
    with torch.device("meta") if skeleton else nullcontext():
        add_updates(run.lora, student)
        model = build_training_model(student, run.stage, run.distillation, specs_of(teachers), run.seed)
    if not skeleton:
        continue_training(run, model, student, console)
        set_trainable(model, run.stage, run.optimization, run.lora is not None, console)
    if run.optimization.recomputation:
        model.recompute_activations(run.optimization.recomputation)
    if shares:
        copies = run.launch.replicas
        share = shard(model, processes.num_processes, copies, run.optimization.precision == "bfloat16")
        text = f"{share:.1%} of the weights on each of {processes.num_processes} processes"
        announce(console, "sharded", text if copies == 1 else f"{text}, {copies} copies")
    elif uses_zero(run.launch):
        prepare_for_zero(run.launch, model)
    if run.optimization.compile is not None:
        compile_parts(model, run.optimization.compile)
        announce(console, "compiled", f"the LLM's layers and the predictors, by {run.optimization.compile}")
    return model


def continue_training(run: Run, model: TrainingModel, student: Student, console: Console) -> None:
    """Loads the heads and queries of the previous stage where they still fit, and says what is new."""
    if run.start_from is None:
        return
    continued: list[str] = []
    if run.distillation is not None:
        continued = continue_objective(model, run.distillation, run.start_from)
        new = len(run.distillation.tasks) - len(continued)
        announce(console, "heads", f"of {counted(len(continued), 'task')} from {run.start_from}, {new} new")
    drawn = [task for task in student.task_token_ids if task not in continued]
    if run.stage is Stage.PT and drawn:
        announce(console, "task tokens", f"new for {', '.join(drawn)}: this stage does not keep those of the start")


def build_trainer(
    run: Run,
    model: TrainingModel,
    data: StageData,
    teachers: Mapping[str, Teacher],
    processes: PartialState,
    callbacks: Sequence[TrainerCallback],
    evaluation: EvaluationCallback | None,
) -> StageTrainer:
    """The trainer with its callbacks.

    Call it after building the model: once the Trainer's arguments name ZeRO-3, transformers shards all models it loads.
    """
    output = Path(run.output)
    log = JsonlCallback(output / "log.jsonl", {MEASURED_ON: evaluation.on} if evaluation else {})
    watchers: list[TrainerCallback] = [log, console_callback(), *callbacks]
    if evaluation is not None:
        watchers.append(evaluation)
    board = None
    if "tensorboard" in run.logging.report_to and processes.is_main_process:
        board = tensorboard(output / "tensorboard")
        watchers.append(board)
    zero = zero_settings(run) if uses_zero(run.launch) else None
    arguments = training_arguments(run, output, processes.num_processes, zero)
    trainer = StageTrainer(model, arguments, data, teachers, run, watchers)
    trainer.remove_callback(PrinterCallback)
    if evaluation is not None:
        evaluation.trainer = trainer
        evaluation.log_images = partial(log_images, run.logging.report_to, board=getattr(board, "tb_writer", None))
    return trainer


def evaluation_callback(
    run: Run,
    student: Student,
    teachers: Mapping[str, Teacher],
    targets: TargetStore | None,
    data: StageData,
    evaluator: Evaluator | None,
    console: Console,
) -> EvaluationCallback | None:
    """The callback that evaluates while the run trains; None without ``run.evaluation``."""
    if run.evaluation is None:
        return None
    rows = held_out_rows(run, student, teachers, targets, data, console)
    held_out = HeldOut(run.evaluation, run.optimization, student, rows, evaluator)
    on = first_decides(lambda: held_out.measured_on(PartialState().num_processes))
    return EvaluationCallback(held_out, Path(run.output), on)


def train(
    trainer: StageTrainer, checkpoint: Path | None, console: Console, evaluation: EvaluationCallback | None = None
) -> None:
    """Trains to the end, from ``checkpoint`` if given; with ``use_best``, then loads the best checkpoint's weights.

    Raises:
        StoppedError: a signal stopped the run early; a checkpoint is saved.
        TrainingError: the final weights are not finite.
    """
    if trainer.is_world_process_zero():
        trainer.data.drops.write(trainer.output / DROPPED)
    announce(console, "training", "from step 0" if checkpoint is None else f"from {checkpoint}")
    if checkpoint is not None and is_last(checkpoint):
        trainer.restore(checkpoint)  # killed before `finish`; the Trainer would train one more step
    else:
        if checkpoint is not None:
            require_same_writer(checkpoint, trainer.launch, trainer.accelerator.num_processes)
        try:
            with trainer.stop.on_signals():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                trainer.writer.wait()
        finally:
            trainer.writer.close()
        step, last = trainer.state.global_step, trainer.state.max_steps
        if trainer.stop.agreed and step < last:
            raise StoppedError(
                f"told to stop: saved at step {step} of {last} in {trainer.output / 'checkpoints'}; "
                "to continue, repeat the command (visper train: with --resume)"
            )
    if evaluation is not None and evaluation.held_out.settings.use_best:
        measure = evaluation.held_out.settings.measure
        best = first_decides(lambda: best_checkpoint(trainer.output, measure, evaluation.on))
        trainer.restore(best)
        announce(console, "best", f"the finished model has the weights of {best.name}")
    model = trainer.accelerator.unwrap_model(trainer.model)
    require_finite(model, trainer.accelerator)
    if is_sharded(model):
        unshard(model, keep=trainer.is_world_process_zero())


def finish(run: Run, student: Student, model: TrainingModel, console: Console) -> None:
    """Writes the stage's results. ``model`` is moved to its place last, so if it exists, the results are complete."""
    output = Path(run.output)
    if run.lora is not None:
        save_adapter(run, student, model, output / ADAPTER, console)
        student = merge_updates(run, student)
    if model.task_tokens is not None:
        model.task_tokens.write_back(student.model.get_input_embeddings())
    if model.words is not None:
        model.words.write_back(student.model.get_input_embeddings(), student.model.get_output_embeddings())
    if model.objective is not None:
        with atomic_path(output / "distillation") as partial:
            partial.mkdir()
            kept = {f"objective.{n}": t for n, t in model.objective.state_dict().items()}
            if model.task_tokens is not None:
                kept |= {f"task_tokens.{n}": t for n, t in model.task_tokens.state_dict().items()}
            save_file({n: t.detach().cpu().contiguous() for n, t in kept.items()}, partial / "weights.safetensors")
            write_manifest(partial, WEIGHTS_ONLY)
            save_run(run, partial / "run.yaml")
    if run.optimization.precision == "bfloat16":
        to_bfloat16(student.model)
    with atomic_path(output / "model") as partial:
        save_student(student, partial)
        save_run(run, partial / "run.yaml")
        write_card(partial)
