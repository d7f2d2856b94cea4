"""Evaluation of trained models: answers, scores, probes and drawings."""

from visper.evaluation.ask import answer, load_to_ask
from visper.evaluation.intervals import wilson
from visper.evaluation.question_files import read_questions
from visper.evaluation.questions import Answered, Question, evaluate, save_answers
from visper.evaluation.scores import Score, scores

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
