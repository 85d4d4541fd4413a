"""The half that measures: an attack, and the accuracy that is left under it."""

from free_adv.evaluation.accuracy import Evaluation, evaluate
from free_adv.evaluation.attack import pgd

__all__ = ["Evaluation", "evaluate", "pgd"]
