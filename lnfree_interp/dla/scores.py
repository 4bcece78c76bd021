"""Attention scores, split into what pairs of earlier components make of them.

A score is a product of a query and a key, and each of the two is a sum of what the components before put there. So a
score is a sum over pairs, one component on the side of the query and one on the side of the key:

    score[q, k] = sum over c, e of <query that c makes at q, key that e makes at k> / attn_scale

Biases are a component of their own on either side. Rotary positions turn each part as they turn the whole; norms, of
the residual stream and of queries and keys, divide each part by the whole's scale as it is. Without norms nothing is
held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import whole
from ..batching import Places, Tokens, check_tokens, indices
from ..layers import Layer, Norm, Rotary
from ..lens import LensModel, ModelOrName
from ..models import as_model
from ..results import Prompts, Result, counted, drawing
from ..results import by as shape_of
from ..weights import own_hooks, weights_alone
from .attribution import attribution_to
from .readers import Reader
from .record import DECOMPOSITIONS, Place, check_by, component_labels
from .result import ReaderAttribution

# Numbers held for the two sides of some prompts, and pairs at a time where only the largest are wanted.
HELD = {"cpu": 2**27}
PAIRS = 2**24
BLOCK = 64  # components of one side at a time, there

Parts = Float[Tensor, "batch _ _ d_head"]  # batch pos component d_head


@dataclass(frozen=True, repr=False)
class ScoreAttribution(Result):
    """What pairs of components contribute to the attention scores of a head.

    Attributes:
        values: Float[Tensor, "query_component key_component batch query key"], in scores (what the softmax takes the
            exponential of, before any soft cap); with `top` the largest pairs alone, largest first, Float[Tensor, "top
            batch query key"].
        pairs: with `top` which pairs these are, Int[Tensor, "two top batch query key"]: places in `query_labels` and
            in `key_labels`; else None.
        query_labels, key_labels: a name per component, as in `attribution_to`; last "b_Q" and "b_K", the biases
            (what the norm's own bias adds to them included).
        bias: Float[Tensor, "batch query key"], the product of the two biases, which no component has part in (and
            whose entry in `values` is 0).
        scores: Float[Tensor, "batch query key"], the scores themselves: `values.sum((0, 1)) + bias`.
        queries, keys: the positions in the prompt of the entries along query and key.
        visible: Bool[Tensor, "query key"], where the query may look: the scores of others are masked in the model.
        head: whose scores: "L2H1".
        prompts: what the model read.
    """

    values: Float[Tensor, "*pairs batch query key"]
    pairs: Int[Tensor, "two top batch query key"] | None
    query_labels: tuple[str, ...]
    key_labels: tuple[str, ...]
    bias: Float[Tensor, "batch query key"]
    scores: Float[Tensor, "batch query key"]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    visible: Bool[Tensor, "query key"]
    head: str = ""
    prompts: Prompts | None = None

    def summary(self) -> str:
        """One line: of which head and model, how many pairs and scores."""
        model = f" in {self.prompts.model}" if self.prompts else ""
        batch, n_queries, n_keys = self.scores.shape
        pairs = shape_of((len(self.query_labels), "component"), (len(self.key_labels), "component"))
        if self.pairs is not None:
            pairs = f"the {counted(len(self.values), 'largest pair')} of {pairs}"
        shape = ((batch, "prompt"), (n_queries, "query position"), (n_keys, "key position"))
        return f"of {self.head or 'a head'}'s attention scores{model}: {pairs} x {shape_of(*shape)}, before the softmax"

    def picture(self) -> str:
        """A grid of components on the query's side by those on the key's, mean over what the queries see."""
        from ..figures.pictures import of_scores

        return of_scores(self)

    def plot(self, *, top: int = 40):
        """A figure of plotly: the `top` largest components on either side, mean over what the queries see.

        Raises:
            ImportError: there is no plotly.
        """
        with drawing():
            from ..figures.dla import scores_figure

        return scores_figure(self, whole(top, "top", least=1))

    def table(self):
        """One row per pair, over the scores that are not masked: how many of them (with `top`: where the pair is among
        the largest), and there mean, mean absolute value and standard deviation; what adds up to most first."""
        import numpy as np
        import pandas as pd

        values = self.values[..., self.visible].cpu().double().numpy()  # [*pairs, batch, seen]
        n_keys = len(self.key_labels)
        if self.pairs is None:
            values = values.reshape(values.shape[0] * n_keys, -1)
            values = values if values.size else values[:0]
            pair, n = np.arange(len(values)), np.full(len(values), values.shape[1])
            total, sizes = values.sum(1), np.abs(values).sum(1)
            squares = ((values - (total / n)[:, None]) ** 2).sum(1)
        else:
            first, second = self.pairs[..., self.visible].cpu().numpy()
            pair, where = np.unique(first * n_keys + second, return_inverse=True)
            where, values = where.ravel(), values.ravel()
            n, total, sizes = (np.bincount(where, w, len(pair)) for w in (None, values, np.abs(values)))
            squares = np.bincount(where, (values - (total / n)[where]) ** 2, len(pair))
        table = pd.DataFrame(
            {
                "query_component": [self.query_labels[i] for i in pair // n_keys],
                "key_component": [self.key_labels[i] for i in pair % n_keys],
                "scores": n,
                "mean": total / n,
                "mean_abs": sizes / n,
                "std": np.sqrt(squares / n),
            }
        )
        return table.iloc[np.argsort(-sizes, kind="stable")].reset_index(drop=True)


@torch.no_grad()
def attention_score_attribution(
    model: ModelOrName,
    tokens: Tokens,
    layer: int,
    head: int,
    *,
    by: str = "component",
    queries: Places | None = None,
    keys: Places | None = None,
    top: int | None = None,
) -> ScoreAttribution:
    """How much each pair of earlier components contributes to a head's attention scores.

    A score is <query, key> / attn_scale before mask and soft cap, what TransformerLens has at hook_attn_scores. Query
    and key are sums over components, so that the score is one over pairs of them. With norms, of the residual stream
    or of queries and keys, each part is taken with the scale as it is; without, nothing is approximate. (Elhage et al.
    2021, "A Mathematical Framework for Transformer Circuits": the QK circuit, applied to activations.)

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        tokens: Int[Tensor, "batch pos"], an array or lists of such, a text or a list of texts of one token length.
        layer, head: whose scores; negative ones count from the end.
        by: "component" (embed, pos_embed, attn and mlp of each layer before), "head" or "neuron".
        queries, keys: positions; default all. Negative ones count from the end; or a mask of all.
        top: keep only so many pairs for each score, those of largest absolute value. All pairs are never held.

    Returns:
        ScoreAttribution, in scores; its values and bias sum to the scores. With all pairs it holds
        components^2 x batch x queries x keys numbers.

    Raises:
        ValueError: tokens, positions, layer or head out of range, an unknown `by`, `top` below 1, a model whose scores
            are not products of queries and keys alone.

    Example:
        >>> from lnfree_interp import attention_score_attribution
        >>> found = attention_score_attribution("tiny-noLN", "It was a dark and stormy night, it was", 2, 1, by="head")
        >>> bool((found.values.sum((0, 1)) + found.bias - found.scores).abs().max() < 1e-4)
        True
        >>> list(found.table().columns[:2])
        ['query_component', 'key_component']
    """
    model = as_model(model)
    check_by(model, by, DECOMPOSITIONS)
    tokens = check_tokens(model, tokens)
    layer, head = _one(layer, "layer", model.cfg.n_layers), _one(head, "head", model.cfg.n_heads)
    n_pos, n_most = tokens.shape[1], None if top is None else whole(top, "top", least=1)
    at_queries, at_keys = (
        list(range(n_pos)) if places is None else indices(places, n_pos, what, range(n_pos), "positions")
        for what, places in (("query position", queries), ("key position", keys))
    )
    block = _attention(model, layer)
    key_head = head * len(block.W_K) // len(block.W_Q)
    found, pairs = [], []
    for part in tokens.split(_prompts_at_once(model, layer, by, len(at_queries) + len(at_keys))):
        of_queries = attribution_to(model, part, Reader.query(layer, head), positions=at_queries, by=by)
        of_keys = attribution_to(model, part, Reader.key(layer, key_head), positions=at_keys, by=by)
        q = _placed(of_queries, block.q_norm, block.rotary, at_queries) / block.attn_scale
        k = _placed(of_keys, block.k_norm, block.rotary, at_keys)
        bias, scores = (
            torch.einsum("bqd,bkd->bqk", x, y) for x, y in ((q[:, :, -1], k[:, :, -1]), (q.sum(2), k.sum(2)))
        )
        if n_most is None:
            values = _all_pairs(q, k)
        else:
            values, which = _largest_pairs(q, k, n_most)
            pairs.append(which)
        found.append((values, bias, scores))
    values, bias, scores = (x[0] if len(x) == 1 else torch.cat(x, -3) for x in zip(*found))
    return ScoreAttribution(
        values=values,
        pairs=torch.cat(pairs, -3) if pairs else None,
        query_labels=(*of_queries.labels, "b_Q"),
        key_labels=(*of_keys.labels, "b_K"),
        bias=bias,
        scores=scores,
        queries=tuple(at_queries),
        keys=tuple(at_keys),
        visible=block.visible(n_pos, n_pos, slice(0, n_pos), tokens.device)[at_queries][:, at_keys],
        head=f"L{layer}H{head}",
        prompts=Prompts.of(model, tokens),
    )


_BETWEEN = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_attn_scores")


def _attention(model: LensModel, layer: int) -> Layer:
    """What makes scores of the queries and keys of a layer.

    Raises:
        ValueError: more than a `Layer` does.
    """
    name = f"blocks.{layer}.attn"
    between = (name, f"{name}.q", f"{name}.k", *(f"{name}.{hook}" for hook in _BETWEEN))
    for hook in own_hooks(model):
        if hook in between or hook.startswith((f"{name}.q_norm", f"{name}.k_norm")):
            raise ValueError(f"the model carries a hook at {hook}, between the layer's queries and keys and its scores")
    return weights_alone(model).layers[layer]


def _one(which: int, what: str, n: int) -> int:
    return indices(whole(which, what), n, what, range(n), f"{what}s")[0]


def _prompts_at_once(model: LensModel, layer: int, by: str, n_positions: int) -> int:
    """How many prompts' parts of queries and keys are held together."""
    n_components = len(component_labels(model.cfg, by, Place(layer))) + 2  # the bias, and hooks
    numbers = n_positions * n_components * model.cfg.d_head
    return max(1, HELD.get(torch.device(model.cfg.device).type, 2**29) // numbers)


def _placed(side: ReaderAttribution, norm: Norm, rotary: Rotary | None, positions: list[int]) -> Parts:
    """The parts of queries or keys as they are compared, of what the product makes of each component; last the bias."""
    parts = torch.cat([side.values, side.bias[:, None]], 1).permute(2, 3, 1, 0)
    parts, scale = (
        parts - parts.mean(-1, keepdim=True) if norm.centres else parts,
        norm.scale(parts.sum(2, keepdim=True)),
    )
    parts = parts / scale if norm.w is None else parts / scale * norm.w
    if norm.b is not None:
        parts[:, :, -1] += norm.b
    if rotary is None:
        return parts
    rotary.reach(max(positions) + 1)
    return rotary(parts, torch.tensor(positions, device=parts.device))


def _all_pairs(queries: Parts, keys: Parts) -> Float[Tensor, "component key_component batch query key"]:
    values = torch.einsum("bqcd,bked->cebqk", queries, keys)
    values[-1, -1] = 0  # of two biases
    return values


def _largest_pairs(
    queries: Parts, keys: Parts, n: int
) -> tuple[Float[Tensor, "top batch query key"], Int[Tensor, "two top batch query key"]]:
    """Prompt by prompt, some queries at a time."""
    step = max(1, PAIRS // (BLOCK**2 * keys.shape[1]))
    found = [[_largest(part, k, n) for part in q.split(step)] for q, k in zip(queries, keys)]
    values, at = (
        torch.stack([torch.cat([x[i] for x in of_prompt]) for of_prompt in found]).movedim(-1, 0) for i in (0, 1)
    )
    return values, torch.stack([at // keys.shape[2], at % keys.shape[2]])


def _largest(
    q: Float[Tensor, "query component d_head"], k: Float[Tensor, "key key_component d_head"], n: int
) -> tuple[Float[Tensor, "query key top"], Int[Tensor, "query key top"]]:
    """The n largest products for each query and key, and of which components, as component * key_components + other.

    Components go in blocks, the longest first. A product is at most the two lengths multiplied: where no pair of the
    blocks to come can be among the largest, they are never made.
    """
    orders, reaches = zip(*(_by_length(x) for x in (q, k)))
    n, bias = min(n, q.shape[1] * k.shape[1]), q.shape[1] * k.shape[1] - 1
    values = q.new_zeros(len(q), len(k), n)
    at = torch.full_like(values, -1, dtype=torch.long)  # as yet none
    for i, first in enumerate(orders[0]):
        for j, second in enumerate(orders[1]):
            sizes = values.abs().masked_fill(at < 0, -1)
            if bool((reaches[0][:, None, i] * reaches[1][None, :, j] <= sizes[..., -1]).all()):
                break
            which = (first[:, None] * k.shape[1] + second).flatten()
            new = torch.einsum("qcd,ked->qkce", q[:, first], k[:, second]).flatten(2)
            new[..., which == bias] = 0
            best = new.abs().topk(min(n, len(which))).indices
            values, at = torch.cat([values, new.gather(-1, best)], -1), torch.cat([at, which[best]], -1)
            best = values.abs().masked_fill(at < 0, -1).topk(n).indices
            values, at = values.gather(-1, best), at.gather(-1, best)
    return values, at


def _by_length(x: Float[Tensor, "row component d_head"]) -> tuple[tuple[Tensor, ...], Float[Tensor, "row block"]]:
    """Components in blocks, the longest first; and in each row the longest from each block on, rounding allowed for."""
    lengths = x.norm(dim=-1)
    order = lengths.amax(0).argsort(descending=True)
    blocks = order.split(BLOCK)
    longest = torch.stack([lengths[:, block].amax(1) for block in blocks], 1)
    return blocks, longest.flip(1).cummax(1).values.flip(1) * (1 + 1e-5)
