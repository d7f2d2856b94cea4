"""The run of one stage: student, data, distillation, optimization, logging, output.

Every model here forbids unknown keys: a misspelt key is an error, never a silent default.
Numbers of the method come from arXiv 2412.09585; the recipes hold the published values of each base.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from visper.config.distillation import Distillation
from visper.config.paths import PathText
from visper.config.section import Choice, Section
from visper.config.student import AnyStudent

MAX_PIXELS, MOST_PIXELS = 89_478_485, 178_956_970
"""Of one image by default, and at most: decoded it takes 268 or 537 MB. Pillow warns of decompression bombs past the
first number and refuses them past the second, whatever a run says."""


class Stage(Choice):
    """The stages of the method, in their order."""

    PT = "pt"
    VPT = "vpt"
    IFT = "ift"


class Geometry(Choice):
    """How an image becomes the square that the student and the teachers see."""

    SQUASH = "squash"
    PAD = "pad"
    CROP = "crop"


class Source(Section):
    """Rows, in one of four ways: a set of the catalogue, a JSON file, a hub data set, or Parquet files."""

    data_set: PathText | None = Field(
        None, alias="set", description="name in the catalogue, or a YAML file like its entries"
    )
    json_file: PathText | None = Field(None, alias="json", description=".json or .jsonl, optionally .gz; with 'images'")
    hf: PathText | None = Field(None, description="data set of the hub, or a folder that holds one")
    parquet: PathText | None = Field(None, description="Parquet file, or a pattern of several")
    images: PathText | None = Field(None, description="folder under which the image paths lie")
    columns: dict[Literal["id", "image", "images", "conversations", "messages", "system", "text"], str] = Field(
        default_factory=dict, description="what the rows' own names for these fields are"
    )
    split: str | None = Field(None, description="of 'hf'; default: train")
    subset: str | None = Field(None, description="of 'hf', where the data set has several")
    revision: str | None = Field(None, description="of 'hf': commit, tag or branch")
    weight: PositiveFloat = Field(1.0, allow_inf_nan=False, description="how often each row is expected in an epoch")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _one_way(self) -> Source:
        ways = {"set": self.data_set, "json": self.json_file, "hf": self.hf, "parquet": self.parquet}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1 or (given == ["json"] and self.images is None):
            raise ValueError("give one of 'set', 'json' (with 'images'), 'hf' and 'parquet'")
        for name in ("images", "columns", "split", "subset", "revision"):
            kinds = ("json", "hf", "parquet") if name in ("images", "columns") else ("hf",)
            if getattr(self, name) and given[0] not in kinds:
                raise ValueError(f"'{name}' belongs to {', '.join(kinds)}, this is '{given[0]}': remove it")
        return self

    @property
    def kind(self) -> Literal["json", "hf", "parquet"]:
        """How the rows are given; a set consists of JSON files."""
        kinds: tuple[Literal["hf", "parquet"], ...] = ("hf", "parquet")
        return next((name for name in kinds if getattr(self, name) is not None), "json")

    @property
    def place(self) -> str:
        """The file, folder, address or name; of a set its name."""
        return str(self.data_set or self.json_file or self.hf or self.parquet)


class Data(Section):
    """What a stage reads and how rows become batches."""

    sources: tuple[Source, ...] = Field(min_length=1)
    root: PathText = Field("data", description="folder of the data sets that 'set' names")
    geometry: Geometry = Field(Geometry.SQUASH, description="shared by the student and the teachers")
    max_tokens: PositiveInt = 4096
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MOST_PIXELS, description="of an image; rows with a larger one are left out"
    )
    drop_limit: float = Field(0.01, ge=0, le=1, description="share of bad rows past which the run is refused")
    unknown_limit: float = Field(
        0.2, ge=0, le=1, description="share of supervised text the tokenizer does not know past which a run is refused"
    )
    drop_list: tuple[PathText, ...] = Field(
        (), description="rows to leave out: files that `visper data check --drop` wrote"
    )
    group_by_length: bool = Field(False, description="batches of similar length and one modality")
    join_conversations: bool = Field(
        False, description="conversations about one image share it in a micro-batch: the same losses from fewer tokens"
    )
    workers: int = Field(2, ge=0, description="loader processes")


def _number_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) else "number"


ShareOrAuto = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]
UNION_TAGS = ("number", "word")
"""Tags that pydantic puts into the location of a fault in a ``ShareOrAuto``."""


class Optimization(Section):
    """Batch, learning rate and length. The global batch is what counts; micro-batch and processes only split it."""

    global_batch: PositiveInt
    micro_batch: PositiveInt = 8
    lr: PositiveFloat
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: NonNegativeFloat = 1.0
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = Field(None, description="stop after so many steps, whatever the epochs")
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: ShareOrAuto = Field(
        "auto",
        description="share of layers whose activations are recomputed in the backward pass; true is 1, false 0; auto: "
        "the least that fits the GPU, none on a CPU",
    )
    train: tuple[str, ...] = Field((), description="parts trained beside the stage's table, e.g. [llm]")
    freeze: tuple[str, ...] = Field((), description="parts of the stage's table left out, e.g. [vision]")
    packing: bool = Field(False, description="several samples in one row instead of padding: the same losses")
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="the LLM's attention while training; default: the model's own choice"
    )
    compile: Literal["inductor", "aot_eager"] | None = Field(
        None,
        description="compile the LLM's layers and the predictors, each alone; aot_eager only traces them: to debug",
    )
    lr_overrides: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="part of the stage's table -> its own learning rate, e.g. {projector: 1e-3}"
    )

    @property
    def recomputation(self) -> float:
        """Share of layers that are recomputed; all of them where ``auto`` has not been decided yet."""
        return 1.0 if self.gradient_checkpointing == "auto" else self.gradient_checkpointing


class Lora(Section):
    """Fine-tuning of the LLM by low-rank updates (peft), merged into a plain folder at the end of the stage."""

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers of the LLM by their last name, e.g. [q_proj, v_proj]"
    )
    quantize: Literal["4bit"] | None = Field(
        None, description="4bit: the frozen LLM is stored in 4 bits (QLoRA; needs a GPU)"
    )


class Monitor(Section):
    """What happens when a run goes wrong. The rows at hand are named, and all processes act together."""

    non_finite: Literal["stop", "skip"] = Field("stop", description="NaN or infinite loss; skip: leave the step out")
    spike: Literal["stop", "warn", "ignore"] = "warn"
    spike_size: PositiveFloat = Field(8.0, description="deviations above the median of the last 50 steps")
    dead_term: Literal["stop", "warn", "ignore"] = Field("warn", description="a loss term that stays zero or constant")
    dead_after: PositiveInt = Field(10, description="logs without any change")
    no_labels: Literal["stop", "warn", "ignore"] = Field("warn", description="a micro-batch without supervised tokens")


class Logging(Section):
    """What is written while training. Console and JSONL are always on."""

    every: PositiveInt = 10
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = Field("visper", description="the project of W&B and trackio")
    monitor: Monitor = Field(default_factory=lambda: Monitor.model_validate({}))


class Evaluation(Section):
    """What is measured while a stage trains: losses on held-out rows, answers to questions or to a benchmark."""

    every: PositiveInt = Field(500, description="steps; also after the last one")
    loss_on: tuple[Source, ...] = Field((), description="held-out rows, as in data.sources: every loss term on them")
    questions: PathText | None = Field(None, description="what `visper evaluate --questions` takes")
    images: PathText | None = Field(None, description="folder of the questions' images; none for embedded ones")
    benchmark: str | None = Field(None, description="cv-bench, mmstar, realworldqa or ok-vqa, under data.root")
    limit: PositiveInt = Field(200, description="rows and questions at most, evenly spaced over all")
    max_new_tokens: PositiveInt = Field(32, description="of an answer; benchmarks have their own")
    blind: bool = Field(False, description="ask once more with other questions' images: the control, at twice the cost")
    best: str | None = Field(
        None, description="value by which the best checkpoint is kept; default: accuracy where asked, else loss"
    )

    draw: NonNegativeInt = Field(
        0, description="images of loss_on whose predictions are drawn beside what the teachers see"
    )
    use_best: bool = Field(False, description="the finished model has the best checkpoint's weights, not the last ones")

    @property
    def asks(self) -> bool:
        """Whether questions are answered."""
        return self.questions is not None or self.benchmark is not None

    @property
    def measure(self) -> str:
        """The logged value by which the best checkpoint is kept."""
        return f"{EVALUATED}{self.best or ('accuracy' if self.asks else 'loss')}"

    @property
    def higher_is_better(self) -> bool:
        """Whether the best is the highest: accuracies are, losses are not."""
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
            raise ValueError("'blind' is a control of 'questions' or a 'benchmark': give one, or remove it")
        if self.draw and not self.loss_on:
            raise ValueError("'draw' shows images of 'loss_on': give that, too")
        needs = "loss_on" if not self.higher_is_better else "questions or a benchmark"
        if not (self.asks if self.higher_is_better else self.loss_on):
            raise ValueError(f"best '{self.measure.removeprefix(EVALUATED)}' is not measured without {needs}: give it")
        return self


EVALUATED = "eval/"
"""Start of the names under which held-out values are logged."""


class Engine(Choice):
    """How a stage is spread over processes."""

    DDP = "ddp"
    FSDP = "fsdp"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Launch(Section):
    """How many processes train, and what each holds. This decides speed and memory, not results."""

    processes: PositiveInt = Field(default=1, description="on this machine, unless a launcher has started them already")
    engine: Engine = Field(default=Engine.DDP, description="ddp, fsdp, zero2 or zero3: what each process holds")
    timeout_minutes: PositiveFloat = Field(default=30, description="how long processes wait for one that is late")
    reduce_once: bool = Field(
        default=False,
        description="fsdp: reduce gradients once a step, not after each micro-batch; needs memory for all of them",
    )
    replicas: PositiveInt = Field(
        default=1,
        description="fsdp: copies of the model, each shared out over its part of the processes, such as a node",
    )

    @model_validator(mode="after")
    def _sharding_is_fsdp(self) -> Launch:
        if self.engine is Engine.FSDP:
            return self
        if self.reduce_once:
            raise ValueError(
                f"reduce_once belongs to engine fsdp, this is '{self.engine}' (ddp reduces once a step anyway): remove "
                "it"
            )
        if self.replicas > 1:
            raise ValueError(f"replicas belongs to engine fsdp, this is '{self.engine}': remove it")
        return self


JOINING_ATTENTION = ("sdpa", "flex_attention")
"""Attention that can be told which tokens of a row another one sees."""

COMPILED_PACKING = ("flex_attention", "eager")
"""Attention that is compiled without a graph break where it separates the samples of a packed row."""


class Run(Section):
    """One stage of one model; saved beside the weights it makes."""

    name: str
    stage: Stage
    output: PathText = Field(description="folder of this run; refused if it holds another run")
    start_from: PathText | None = Field(
        None, description="folder of the stage before, or any folder this library saved"
    )
    start_from_revision: str | None = Field(None, description="commit, tag or branch, where start_from is a hub id")
    student: AnyStudent | None = None
    data: Data
    distillation: Distillation | None = None
    optimization: Optimization
    lora: Lora | None = Field(None, description="stage ift: train low-rank updates of the LLM instead of the LLM")
    evaluation: Evaluation | None = Field(None, description="measured while training")
    logging: Logging = Field(default_factory=lambda: Logging.model_validate({}))
    launch: Launch = Launch()
    seed: int = 0

    @property
    def packed(self) -> bool:
        """Whether the samples of a micro-batch lie in one row; joined ones always do."""
        return self.optimization.packing or self.data.join_conversations

    @model_validator(mode="after")
    def _parts_fit(self) -> Run:
        if (self.student is None) == (self.start_from is None):
            raise ValueError("give either 'student' (a first stage) or 'start_from' (the stage before), not both")
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
                "steps before the loss is judged. Set it to stop, or use launch.engine=fsdp"
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
            raise ValueError("evaluation.draw shows what teachers see, and this stage has none: remove it")
        if self.distillation.targets is not None:
            raise ValueError(
                "evaluation.draw needs teachers that draw, and 'distillation.targets' stands in their place: remove "
                "one of them (`visper look` draws a finished run)"
            )
