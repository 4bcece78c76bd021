"""Whether a checkpoint is LN-free: in the published format an epsilon makes constant what norms divide by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

# The published LN-free format: plain GPT-2 with an epsilon so large that every std is sqrt(eps) = 1e6.
LN_FREE_EPS = 1e12
# A variance of 1e4 (a residual norm of 3,200 at d_model 1024) shifts a std by 5e-6 at this epsilon.
HUGE_EPS = 1e9


def _find(state: Mapping[str, Tensor], name: str) -> str:
    """The key of a GPT-2 weight, with or without HF's "transformer." prefix."""
    return name if name in state else "transformer." + name


def is_ln_free(config, state: Mapping[str, Tensor]) -> bool:
    """Whether a GPT-2 checkpoint is LN-free, read from its epsilon and LayerNorm weights alone.

    Args:
        config: GPT2Config, of which layer_norm_epsilon and n_layer are read.
        state: HF GPT-2 state dict, names with or without "transformer.".

    Raises:
        ValueError: half-way: some LayerNorms neutral and some not, or epsilon and weights that disagree.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> is_ln_free(config, GPT2LMHeadModel(config).state_dict())
        False
    """
    norms = [f"h.{layer}.ln_{i}" for layer in range(config.n_layer) for i in (1, 2)] + ["ln_f"]
    weights = ((norm, state[_find(state, f"{norm}.weight")]) for norm in norms)
    return are_constant(weights, float(config.layer_norm_epsilon), "layer_norm_epsilon")


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
