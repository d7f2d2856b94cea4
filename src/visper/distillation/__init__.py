"""Hidden states and teacher targets become losses."""

from visper.config import PredictorSpec
from visper.config.teacher_kinds import TEACHERS
from visper.distillation.attach import AttachedDistillation, ModelFacts, attach
from visper.distillation.heads import EmbeddingPredictor, PerceiverResampler, check_predictor, query_rows
from visper.distillation.layout import TokenLayout
from visper.distillation.losses import info_nce_per_sample, smooth_l1_per_sample
from visper.distillation.objective import DistilledTask, EmbeddingDistillation
from visper.distillation.tap import HiddenStateTap
from visper.distillation.targets import Targets, gather_targets
from visper.distillation.teachers import TargetSpec, Teacher, build_teacher, target_spec

__all__ = [
    "TEACHERS",
    "AttachedDistillation",
    "DistilledTask",
    "EmbeddingDistillation",
    "EmbeddingPredictor",
    "HiddenStateTap",
    "ModelFacts",
    "PerceiverResampler",
    "PredictorSpec",
    "TargetSpec",
    "Targets",
    "Teacher",
    "TokenLayout",
    "attach",
    "build_teacher",
    "check_predictor",
    "gather_targets",
    "info_nce_per_sample",
    "query_rows",
    "smooth_l1_per_sample",
    "target_spec",
]
