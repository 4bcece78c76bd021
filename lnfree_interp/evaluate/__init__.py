"""What every claim about an LN-free model is measured with: losses, divergences, calibration, HellaSwag, samples.

Sources: P1 = arXiv 2409.13710, P2 = arXiv 2507.02559.
"""

from .compare import ModelComparison, compare_models
from .hellaswag import HellaSwag, hellaswag, hellaswag_items
from .loss import LossEvaluation, LossTable, WorstSequence, evaluate_loss, loss_table
from .samples import Samples, generate_samples

__all__ = [
    "HellaSwag",
    "LossEvaluation",
    "LossTable",
    "ModelComparison",
    "Samples",
    "WorstSequence",
    "compare_models",
    "evaluate_loss",
    "generate_samples",
    "hellaswag",
    "hellaswag_items",
    "loss_table",
]
