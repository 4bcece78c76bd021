from .causal import ConceptSwap as ConceptSwap, swap_concepts as swap_concepts
from .data import ProbeData as ProbeData, ProbePrompt as ProbePrompt
from .evaluation import ProbeEvaluation as ProbeEvaluation, evaluate_probe as evaluate_probe
from .evidence import ConceptEvidence as ConceptEvidence, concept_evidence as concept_evidence
from .fitting import fit_probe as fit_probe
from .hyperprobe import HyperProbe as HyperProbe
from .reading import ProbeReading as ProbeReading
from .symbols import Codebook as Codebook
from .tasks import analogy_data as analogy_data, recall_data as recall_data
from .training import Training as Training
