"""Visual embedding distillation: losses between predictions from the LLM's hidden states and visual targets."""

from visper.config import Head, Position
from visper.config.kinds import TEACHERS
from visper.distillation.attach import AttachedDistillation, ModelFacts, attach
from visper.distillation.heads import ResamplerHead, TokenHead, build_head, check_head_fits, query_rows
from visper.distillation.layout import TokenLayout
from visper.distillation.objective import EmbeddingDistillation
from visper.distillation.reading import Reading, readings_of
from visper.distillation.resampler import PerceiverResampler
from visper.distillation.tap import HiddenStateTap, InputTap
from visper.distillation.targets import Targets, gather_rows, gather_targets
from visper.distillation.task import PROJECTED, DistilledTask
from visper.distillation.teachers import TargetSpec, Teacher, build_teacher, target_spec

__all__ = [
    "PROJECTED",
    "TEACHERS",
    "AttachedDistillation",
    "DistilledTask",
    "EmbeddingDistillation",
    "Head",
    "HiddenStateTap",
    "InputTap",
    "ModelFacts",
    "PerceiverResampler",
    "Position",
    "Reading",
    "ResamplerHead",
    "TargetSpec",
    "Targets",
    "Teacher",
    "TokenHead",
    "TokenLayout",
    "attach",
    "build_head",
    "build_teacher",
    "check_head_fits",
    "gather_rows",
    "gather_targets",
    "query_rows",
    "readings_of",
    "target_spec",
]
