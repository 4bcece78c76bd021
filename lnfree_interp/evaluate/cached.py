"""A forward that goes on from kept keys and values."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from ..forward import KeysAndValues, Past, run
from ..lens import LensModel
from ..weights import Weights


def extend(
    model: LensModel, weights: Weights, tokens: Int[Tensor, "batch pos"], past: Past | None = None
) -> tuple[Float[Tensor, "batch pos d_model"], Past]:
    """The final residual stream of tokens that follow on what `past` holds, and keys and values of both together.

    `past` may hold fewer rows: each then serves as many consecutive rows of tokens as there are per row.
    """
    if past is not None:
        times = len(tokens) // len(past.kept[0][0])
        if times > 1:
            repeated = {
                i: (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for i, (k, v) in past.kept.items()
            }
            past = Past(past.length, repeated)
    kept: KeysAndValues = {}
    resid = run(model, tokens, past=past, keep=kept, weights=weights)
    return resid, Past(tokens.shape[1] + (0 if past is None else past.length), kept)
