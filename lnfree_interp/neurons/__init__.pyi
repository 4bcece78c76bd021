from .ablate import ablate_cumulatively as ablate_cumulatively, ablate_neurons as ablate_neurons
from .rank import rank_confidence_neurons as rank_confidence_neurons
from .result import NeuronAblation as NeuronAblation
