"""Confidence neurons: ranking them, ablating them, scanning all of a layer.

Sources: P2 = arXiv 2507.02559; the neurons' first description is arXiv 2406.16254.
"""

from .ablate import ablate_cumulatively, ablate_neurons
from .rank import rank_confidence_neurons
from .result import NeuronAblation

__all__ = ["NeuronAblation", "ablate_cumulatively", "ablate_neurons", "rank_confidence_neurons"]
