"""The run of one stage: student, data, distillation, optimization, logging, output.

All sections reject unknown keys, so a misspelled key is an error, never a silent default.
Defaults of the method come from arXiv 2412.09585; the recipes hold the published values for each base model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from visper.config.data import Data, Source
from visper.config.distillation import Distillation
from visper.config.paths import PathText
from visper.config.section import Choice, Section
from visper.config.student import AnyStudent


class Stage(Choice):
    """The stages of the method, in order."""

    PT = "pt"
    VPT = "vpt"
    IFT = "ift"


def _number_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) else "number"


ShareOrAuto = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]
"""The tags are not keys: ``explain`` leaves them out of the places of faults."""


class Optimization(Section):
    """Batch, learning rate and length. Results depend on the global batch; micro-batch and processes only split it."""

    global_batch: PositiveInt
    micro_batch: PositiveInt = 8
    lr: PositiveFloat
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    max_grad_norm: NonNegativeFloat = 1.0
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = Field(None, description="stop after this many steps, whatever 'epochs' says")
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: ShareOrAuto = Field(
        "auto",
        description="share of layers whose activations are recomputed in the backward pass; true: 1, false: 0; auto: "
        "the smallest share that fits the GPU, 0 on a CPU",
    )
    train: tuple[str, ...] = Field((), description="parts to train besides those of the stage, e.g. [llm]")
    freeze: tuple[str, ...] = Field((), description="parts of the stage not to train, e.g. [vision]")
    packing: bool = Field(False, description="several samples per row instead of padding: the same losses")
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="the LLM's attention in training; default: the model's own"
    )
    compile: Literal["inductor", "aot_eager"] | None = Field(
        None,
        description="compile each LLM layer and each predictor; aot_eager only traces them, for debugging",
    )
    lr_overrides: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="trained part -> its own learning rate, e.g. {projector: 1e-3}"
    )

    @property
    def recomputation(self) -> float:
        """The share of recomputed layers; 1 as long as ``auto`` has not been resolved."""
        return 1.0 if self.gradient_checkpointing == "auto" else self.gradient_checkpointing


class Lora(Section):
    """Fine-tuning of the LLM with LoRA (peft); the adapters are merged into the weights at the end of the stage."""

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers of the LLM by the last part of their name, e.g. [q_proj, v_proj]"
    )
    quantize: Literal["4bit"] | None = Field(
        None, description="4bit: store the frozen LLM in 4 bits (QLoRA; needs a GPU)"
    )


class Monitor(Section):
    """Reactions to faults in training. Messages name the rows of the step, and all processes react alike."""

    non_finite: Literal["stop", "skip"] = Field("stop", description="for a NaN or infinite loss; skip: skip the step")
    spike: Literal["stop", "warn", "ignore"] = Field("warn", description="for a spike of the loss")
    spike_size: PositiveFloat = Field(8.0, description="deviations above the median of the last 50 steps")
    dead_term: Literal["stop", "warn", "ignore"] = Field("warn", description="for a loss term that stays constant")
    dead_after: PositiveInt = Field(10, description="log entries without a change")
    no_labels: Literal["stop", "warn", "ignore"] = Field("warn", description="for a micro-batch without labels")


class Logging(Section):
    """Logs and checkpoints. The console and the JSONL log are always on."""

    every: PositiveInt = Field(10, description="steps")
    save_every: PositiveInt = Field(500, description="steps")
    keep_checkpoints: PositiveInt = 2
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = Field("visper", description="the project of W&B and trackio")
    monitor: Monitor = Field(default_factory=lambda: Monitor.model_validate({}))


class Evaluation(Section):
    """Evaluation during training: losses on held-out rows, answers to questions or to a benchmark."""

    every: PositiveInt = Field(500, description="steps; also after the last one")
    loss_on: tuple[Source, ...] = Field((), description="held-out rows, given as in data.sources, for all loss terms")
    questions: PathText | None = Field(None, description="questions, as for `visper evaluate --questions`")
    images: PathText | None = Field(None, description="folder of the questions' images; omit if they are embedded")
    benchmark: str | None = Field(None, description="cv-bench, mmstar, realworldqa or ok-vqa, under data.root")
    limit: PositiveInt = Field(200, description="largest number of rows and of questions, evenly spaced over all")
    max_new_tokens: PositiveInt = Field(32, description="per answer; benchmarks have their own limits")
    blind: bool = Field(False, description="also ask with other questions' images, as a control; doubles the cost")
    best: str | None = Field(
        None, description="value that selects the best checkpoint; default: accuracy if there are questions, else loss"
    )
    draw: NonNegativeInt = Field(
        0, description="number of images of loss_on whose predictions are drawn next to the teachers' output"
    )
    use_best: bool = Field(False, description="finish with the weights of the best checkpoint, not with the last ones")

    @property
    def asks(self) -> bool:
        """Whether questions or a benchmark are evaluated."""
        return self.questions is not None or self.benchmark is not None

    @property
    def measure(self) -> str:
        """The logged value that selects the best checkpoint."""
        return f"{EVALUATED}{self.best or ('accuracy' if self.asks else 'loss')}"

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better: true for accuracies, false for losses."""
        return self.measure.startswith(f"{EVALUATED}accuracy")

    @model_validator(mode="after")
    def _something_to_do(self) -> Evaluation:
        if not self.loss_on and not self.asks:
            raise ValueError("nothing to evaluate: give 'loss_on', 'questions' or 'benchmark'")
        if self.questions is not None and self.benchmark is not None:
            raise ValueError("give 'questions' or 'benchmark', not both")
        if self.images is not None and self.questions is None:
            raise ValueError("'images' belongs to 'questions': remove it")
        if self.blind and not self.asks:
            raise ValueError("'blind' is a control for 'questions' or 'benchmark': give one of them, or remove it")
        if self.draw and not self.loss_on:
            raise ValueError("'draw' shows images of 'loss_on': give 'loss_on', too")
        if any(source.weight != 1 for source in self.loss_on):
            raise ValueError("every row of 'loss_on' is measured once, whatever its 'weight': remove it")
        needs = "loss_on" if not self.higher_is_better else "questions or a benchmark"
        if not (self.asks if self.higher_is_better else self.loss_on):
            raise ValueError(f"best '{self.measure.removeprefix(EVALUATED)}' is not measured without {needs}: give it")
        return self


EVALUATED = "eval/"
"""Prefix of the logged names of held-out values."""


class Engine(Choice):
    """How a stage is distributed over processes."""

    DDP = "ddp"
    FSDP = "fsdp"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Launch(Section):
    """The number of processes and how the model is sharded. This affects speed and memory, not results."""

    processes: PositiveInt = Field(default=1, description="on this machine; leave at 1 if a launcher starts them")
    engine: Engine = Field(default=Engine.DDP, description="ddp, fsdp, zero2 or zero3: what each process holds")
    timeout_minutes: PositiveFloat = Field(default=30, description="how long processes wait for a late one")
    reduce_once: bool = Field(
        default=False,
        description="fsdp: reduce gradients once per step, not per micro-batch; needs memory for unsharded gradients",
    )
    replicas: PositiveInt = Field(
        default=1,
        description="fsdp: copies of the model, each sharded over its own group of processes, such as a node",
    )

    @model_validator(mode="after")
    def _sharding_is_fsdp(self) -> Launch:
        if self.engine is Engine.FSDP:
            return self
        if self.reduce_once:
            raise ValueError(
                f"reduce_once belongs to engine fsdp, this is '{self.engine}' (ddp reduces once per step anyway): "
                "remove it"
            )
        if self.replicas > 1:
            raise ValueError(f"replicas belongs to engine fsdp, this is '{self.engine}': remove it")
        return self


JOINING_ATTENTION = ("sdpa", "flex_attention")
"""Attention implementations that accept a mask of which tokens each token of a row sees."""

COMPILED_PACKING = ("flex_attention", "eager")
"""Attention implementations that compile without a graph break when they separate the samples of a packed row."""


class Run(Section):
    """One stage of one model; saved next to the weights that it produces."""

    name: str
    stage: Stage
    output: PathText = Field(description="folder of this run; refused if it contains another run")
    start_from: PathText | None = Field(
        None, description="folder of the previous stage, or any model folder saved by visper"
    )
    start_from_revision: str | None = Field(None, description="commit, tag or branch, if start_from is a hub id")
    student: AnyStudent | None = None
    data: Data
    distillation: Distillation | None = None
    optimization: Optimization
    lora: Lora | None = Field(None, description="stage ift: train LoRA adapters instead of the full LLM")
    evaluation: Evaluation | None = Field(None, description="evaluation during training")
    logging: Logging = Field(default_factory=lambda: Logging.model_validate({}))
    launch: Launch = Launch()
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def packed(self) -> bool:
        """Whether the samples of a micro-batch are packed into one row; joined conversations always are."""
        return self.optimization.packing or self.data.join_conversations

    @model_validator(mode="after")
    def _parts_fit(self) -> Run:
        if (self.student is None) == (self.start_from is None):
            given = "neither" if self.student is None else "both"
            raise ValueError(
                f"found {given} of 'student' (a first stage) and 'start_from' (the previous stage): give one of them"
            )
        if self.data.join_conversations and self.distillation is not None:
            raise ValueError("joining is not supported with distillation: set data.join_conversations=false")
        if self.data.join_conversations and self.optimization.attention not in (None, *JOINING_ATTENTION):
            raise ValueError(
                f"data.join_conversations is not supported with optimization.attention={self.optimization.attention}, "
                f"which cannot separate conversations that share an image: use one of {', '.join(JOINING_ATTENTION)}"
            )
        if self.optimization.compile is not None:
            self._require_compilable()
        engine, zero = self.launch.engine, self.launch.engine in (Engine.ZERO2, Engine.ZERO3)
        if zero and self.logging.monitor.non_finite == "skip":
            raise ValueError(
                f"logging.monitor.non_finite=skip is not supported with launch.engine={engine}: DeepSpeed's optimizer "
                "steps before the loss is checked. Set it to stop, or use launch.engine=fsdp"
            )
        if zero and self.evaluation is not None and self.evaluation.use_best:
            raise ValueError(
                f"evaluation.use_best is not supported with launch.engine={engine}: use launch.engine=fsdp"
            )
        if self.evaluation is not None and self.evaluation.draw:
            self._require_drawable()
        if engine is Engine.ZERO3 and self.evaluation is not None and (self.evaluation.asks or self.evaluation.draw):
            raise ValueError(
                f"evaluation with questions or drawings is not supported with launch.engine={engine}: use "
                "launch.engine=fsdp, or 'loss_on' alone"
            )
        if self.lora is not None and self.lora.quantize is not None and engine is not Engine.DDP:
            raise ValueError(
                f"lora.quantize is not supported with launch.engine={engine}: 4-bit weights cannot be sharded; use "
                "launch.engine=ddp"
            )
        if self.lora is not None and self.stage is not Stage.IFT:
            why = "its LLM is frozen anyway" if self.stage is Stage.PT else "it trains the whole model"
            raise ValueError(f"'lora' belongs to stage 'ift', this is '{self.stage}' ({why}): remove it")
        if self.distillation is not None and self.student is not None:
            tokens = self.student.task_tokens
            missing = [task for task in self.distillation.at_task_tokens if tokens is None or task not in tokens.order]
            if missing:
                raise ValueError(
                    f"tasks {missing} have no task tokens: add them to 'student.task_tokens.order', or set their 'at' "
                    "to image_tokens"
                )
        return self

    def _require_compilable(self) -> None:
        opt, engine = self.optimization, self.launch.engine
        refused = {
            f"launch.engine={engine}": engine in (Engine.ZERO2, Engine.ZERO3),
            "lora.quantize": self.lora is not None and self.lora.quantize is not None,
            "data.join_conversations": self.data.join_conversations,
            f"packing under optimization.attention={opt.attention} (only under {' or '.join(COMPILED_PACKING)})": (
                opt.packing and opt.attention not in COMPILED_PACKING
            ),
        }
        for what in (what for what, found in refused.items() if found):
            raise ValueError(f"optimization.compile is not supported with {what}: change one of them")

    def _require_drawable(self) -> None:
        if self.distillation is None or not self.distillation.taught:
            raise ValueError("evaluation.draw shows what teachers see, but this stage has no teachers: remove it")
        if self.distillation.targets is not None:
            raise ValueError(
                "evaluation.draw needs the teachers, but 'distillation.targets' replaces them: remove one of the two "
                "(`visper look` draws a finished run)"
            )
