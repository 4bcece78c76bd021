from .prompt_pairs import PairedPrompts as PairedPrompts, PromptPairs as PromptPairs, as_pairs as as_pairs
from .tasks import (
    NAMES as NAMES,
    OBJECTS as OBJECTS,
    PLACES as PLACES,
    TEMPLATES as TEMPLATES,
    induction_pairs as induction_pairs,
    ioi_pairs as ioi_pairs,
)
from .texts import groups_from_file as groups_from_file, pairs_from_text as pairs_from_text
