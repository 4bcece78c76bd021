"""Which neurons write where the unembedding hardly reads?"""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import whole
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..weights import block_of
from .last_layer import WITH_FP64, folded_unembedding


def mlp_of(model: LensModel, layer: SupportsIndex) -> tuple[Any, int]:
    """The layer's MLP and its number counted from 0.

    Raises:
        ValueError: no such layer, or a layer whose MLP has no single W_out.
    """
    layer, n_layers = whole(layer, "layer"), model.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"layer {layer} is outside -{n_layers}..{n_layers - 1}")
    layer %= n_layers
    mlp = getattr(block_of(model, int(layer)), "mlp", None)
    if getattr(mlp, "W_out", None) is None:
        raise ValueError(f"layer {layer} has no MLP with one W_out, so it has no neurons to look at")
    return mlp, int(layer)


def in_fp64(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """On the CPU where the device has no fp64."""
    return (x if x.device.type in WITH_FP64 else x.cpu()).double()


def rank_confidence_neurons(model: ModelOrName, layer: SupportsIndex = -1, *, null_directions: int | None = None):
    """The papers' score |w_out| / LogitVar of every neuron of a layer, largest first (P2, confidence neurons).

    LogitVar is the variance over the vocabulary of the cosine of w_out with the columns of W_U. A neuron with a
    large score moves the residual stream a lot and no logit more than another: it acts through the final
    LayerNorm's scale. A dead neuron, which writes nothing, scores 0. Beside it, `null_share` is the share of
    |w_out|^2 in the near-null space of W_U: the span of the left singular vectors of its last (smallest) singular
    values. The final norm's weights, where a model still has them apart, and the mean it subtracts count as part of
    W_U. The constant direction is left out where W_U does not read it, as in centred models: nothing is written there.

    Args:
        layer: any layer, negative ones from the end.
        null_directions: how many of the smallest singular values; default 1 in 64 of d_model (GPT-2 small: 12).

    Returns:
        DataFrame with columns neuron, score, norm (|w_out|), logit_var, null_share.

    Raises:
        ValueError: no such layer, a layer without an MLP, null_directions outside 1..d_model.

    Example:
        >>> from lnfree_interp import load_model, rank_confidence_neurons
        >>> ranking = rank_confidence_neurons(load_model("tiny-noLN", device="cpu"))
        >>> list(ranking.columns)
        ['neuron', 'score', 'norm', 'logit_var', 'null_share']
    """
    import pandas as pd

    model = as_model(model)
    mlp, layer = mlp_of(model, layer)
    d_model = model.cfg.d_model
    if null_directions is None:
        null_directions = max(1, d_model // 64)
    if whole(null_directions, "null_directions", least=1) > d_model:
        raise ValueError(f"null_directions is {null_directions}, outside 1..{d_model}")
    with torch.no_grad():
        unembedding = folded_unembedding(model, centre=False)
        W_out = unembedding.centred(mlp.W_out.to(unembedding.W.dtype))
        W_U = unembedding.centred(unembedding.W.T).T
        norm = W_out.norm(dim=1)
        least = torch.finfo(norm.dtype).tiny
        directions = W_out / norm[:, None].clamp_min(least)
        # The variance of a cosine is the mean square of what a column has beyond the mean column: nothing cancels.
        columns = W_U / W_U.norm(dim=0).clamp_min(least)
        columns -= columns.mean(1, keepdim=True)
        parts = [(directions @ part).square_().sum(1) for part in columns.split(8192, dim=1)]
        logit_var = in_fp64(torch.stack(parts)).sum(0) / W_U.shape[1]
        # Left singular vectors from the d_model x d_model Gram matrix, in fp64: W_U itself is 65 times as wide.
        gram: Any = sum(part @ part.T for part in map(in_fp64, W_U.split(8192, dim=1)))
        constant = torch.full_like(gram[0], d_model**-0.5)
        if constant @ gram @ constant < 1e-9 * gram.trace() / d_model:
            gram += gram.trace() * constant.outer(constant)  # now the largest singular value, not the last
        null = torch.linalg.eigh(gram).eigenvectors[:, :null_directions]
        null_share = (in_fp64(directions) @ null).square().sum(1)
        norm = in_fp64(norm)
        score = torch.where(norm > 0, norm / logit_var, 0.0)
    table = pd.DataFrame(
        {
            "neuron": range(len(norm)),
            "score": score.tolist(),
            "norm": norm.tolist(),
            "logit_var": logit_var.tolist(),
            "null_share": null_share.tolist(),
        }
    )
    return table.sort_values("score", ascending=False, ignore_index=True)
