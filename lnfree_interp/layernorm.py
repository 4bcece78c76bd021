"""Whether a checkpoint is LN-free: in the published format an epsilon makes constant what norms divide by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .families import FAMILIES

# The published LN-free format: a plain checkpoint with an epsilon so large that every std is sqrt(eps) = 1e6.
LN_FREE_EPS = 1e12
# A variance of 1e4 (a residual norm of 3,200 at d_model 1024) shifts a std by 5e-6 at this epsilon.
HUGE_EPS = 1e9


def is_ln_free(config, state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint of a family in `families.FAMILIES` is LN-free, read from its epsilon and norms alone.

    Args:
        config: transformers' own; its epsilon and number of layers are read.
        state: transformers' state dict, names with or without the family's prefix ("transformer." of a GPT-2).

    Raises:
        ValueError: half-way: some norms neutral and some not, or epsilon and weights that disagree; another family.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> is_ln_free(config, GPT2LMHeadModel(config).state_dict())
        False
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not served; what is: {', '.join(FAMILIES)}")
    family = FAMILIES[config.model_type]
    found = {n: n if f"{n}.weight" in state else family.prefix + n for n in family.norms(config.num_hidden_layers)}
    weights = ((norm, state[f"{stored}.weight"]) for norm, stored in found.items())
    return are_constant(weights, float(getattr(config, family.eps)), family.eps)


def are_constant(weights: Iterable[tuple[str, Tensor]], eps: float, eps_name: str) -> bool:
    """Whether norms, of a mean or not, divide by a constant: an epsilon so large that its root is all there is to it.

    Args:
        weights: the norms' names and weights.
        eps: of all of them.
        eps_name: what to call it.

    Raises:
        ValueError: half-way: an epsilon that the size of the weights does not go with.
    """
    if 1 < eps < HUGE_EPS:
        raise ValueError(f"{eps_name} {eps:g} is neither an ordinary norm's nor an LN-free checkpoint's")
    # Both bounds are far from any trained weight; the upper one also catches inf (1e6 in float16) and nan.
    least, most = (1e-5 * eps**0.5, float("inf")) if eps >= HUGE_EPS else (0.0, 1e4)
    for name, weight in weights:
        size = as_double(weight).abs().median().item()
        if not least <= size < most:
            raise ValueError(
                f"checkpoint is half-way LN-free: {name}.weight is about {size:g} but {eps_name} is {eps:g}"
            )
    return eps >= HUGE_EPS


def as_double(x: Tensor) -> Tensor:
    """In fp64, on the CPU: not every device has it."""
    return x.detach().cpu().double()
