"""Weights become scores."""

from visper.evaluation.answers import answer
from visper.evaluation.intervals import wilson
from visper.evaluation.questions import Answered, Question, Score, evaluate, read_questions, save_answers, scores

__all__ = [
    "Answered",
    "Question",
    "Score",
    "answer",
    "evaluate",
    "read_questions",
    "save_answers",
    "scores",
    "wilson",
]
