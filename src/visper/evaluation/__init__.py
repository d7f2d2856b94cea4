"""Weights become scores."""

from visper.evaluation.ask import answer, load_to_ask
from visper.evaluation.intervals import wilson
from visper.evaluation.questions import Answered, Question, Score, evaluate, read_questions, save_answers, scores

__all__ = [
    "Answered",
    "Question",
    "Score",
    "answer",
    "evaluate",
    "load_to_ask",
    "read_questions",
    "save_answers",
    "scores",
    "wilson",
]
