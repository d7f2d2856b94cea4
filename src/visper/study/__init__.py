"""A controlled comparison of visual supervision: equal training in every arm, several seeds and numbers of labels."""

from visper.study.arms import ARMS, FAST, FULL, Arm, Size
from visper.study.run import study

__all__ = ["ARMS", "FAST", "FULL", "Arm", "Size", "study"]
