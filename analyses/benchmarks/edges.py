"""Edges here against the usual way, interleaved: 16 pairs of 16 tokens that differ at positions 3 and 5.

`edge_attribution` of all edges against TransformerLens 4's own edge attribution or, with a TransformerLens that has
none, against what scripts do: one prompt at a time, two cached runs, and a forward and a backward of the corrupted
prompt in which every head and MLP reads a copy of the residual stream of its own, weights' gradients included. Both
ways' numbers are means over prompts. `--quick` times the usual way on some prompts and scales that up, since it takes
the same time for each.

`edge_patching` of some edges between heads, spread over all, against running the whole model again for each edge, all
prompts together, with hooks on the split inputs; the latter is timed on fewer of them and scaled up.
"""

from __future__ import annotations

import re
from functools import partial

import pandas as pd
import torch

from lnfree_interp.lens import has_hooked_transformer
from lnfree_interp.patching import edge_attribution, edge_patching
from lnfree_interp.weights import block_of

from .common import interleaved, median, random_model
from .patching import shaped_pairs

PROMPTS = 2  # of the usual way, with --quick
EDGES, PLAIN_EDGES = 60, 3  # patched here, and the usual way


def split(model, on: bool) -> None:
    model.set_use_split_qkv_input(on)
    model.set_use_hook_mlp_in(on)


def by_scripts(model, pairs, effect) -> torch.Tensor:
    """Mean effects [sender, receiver] of one prompt at a time."""
    split(model, True)
    total = torch.zeros(effect.edges.shape)
    layers = range(model.cfg.n_layers)
    inputs = [f"blocks.{i}.hook_{part}" for i in layers for part in ("q_input", "k_input", "v_input", "mlp_in")]
    final = f"blocks.{layers[-1]}.hook_resid_post"
    for clean, corrupted, (right, wrong) in zip(pairs.clean, pairs.corrupted, pairs.answers.tolist()):
        caches, grads = [], {}
        for tokens in (clean, corrupted):
            with torch.no_grad():
                caches.append(model.run_with_cache(tokens[None])[1])
        for name in (*inputs, final):
            model.add_hook(name, partial(_keep, kept=grads, name=name), "bwd")
        logits = model(corrupted[None])[0, -1]
        (logits[right] - logits[wrong]).backward()
        model.reset_hooks()
        model.zero_grad()
        writes = [[cache["blocks.0.hook_resid_pre"][0]] for cache in caches]
        for cache, found in zip(caches, writes):
            for i in layers:
                heads = torch.einsum("phe,hed->hpd", cache[f"blocks.{i}.attn.hook_z"][0], block_of(model, i).attn.W_O)
                found += [*heads, cache[f"blocks.{i}.hook_mlp_out"][0]]
        d = torch.stack(writes[0]) - torch.stack(writes[1])
        g = [
            x for name in inputs for x in (grads[name].transpose(0, 1) if grads[name].ndim == 3 else grads[name][None])
        ]
        total += torch.einsum("spd,rpd->sr", d, torch.stack([*g, grads[final]])) * effect.edges
    split(model, False)
    return total / len(pairs)


def _keep(g, hook, kept: dict, name: str) -> None:
    kept[name] = g.detach()[0]


def by_transformer_lens(model, pairs, effect) -> torch.Tensor:
    """The same from TransformerLens 4's edge attribution."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    answers = iter(pairs.answers.repeat_interleave(2, 0).tolist())  # it asks once for each prompt of a pair

    def difference(logits):
        right, wrong = next(answers)
        return (logits[:, -1, right] - logits[:, -1, wrong]).sum()

    config = EdgeAttributionConfig(granularity="edge")
    found = attribution_patch(model, pairs.clean, pairs.corrupted, difference, config)
    senders, receivers = ({name: i for i, name in enumerate(names)} for names in (effect.senders, effect.receivers))
    total = torch.zeros(effect.edges.shape)
    for (writer, reader), score in found.edge_scores.items():
        total[senders[_label(writer)], receivers[_label(reader)]] += score
    return total


def _label(node) -> str:
    """The name here of a node of TransformerLens'."""
    if node.kind in ("embed", "logits"):
        return node.kind
    name = f"L{node.layer}" if node.head is None else f"L{node.layer}H{node.head}"
    return name + {"attn_head_out": "", "mlp_out": ".mlp", "mlp_in": ".mlp"}.get(node.kind, f".{node.kind[0]}")


@torch.no_grad()
def by_plain_runs(model, pairs, edges: list[tuple[str, str]]) -> torch.Tensor:
    """Effects [prompt, edge], the whole model run for each edge."""

    def difference(logits):
        last = logits[:, -1].gather(-1, pairs.answers)
        return last[:, 0] - last[:, 1]

    _, clean = model.run_with_cache(pairs.clean)
    logits, base = model.run_with_cache(pairs.corrupted)
    unpatched, found = difference(logits), []
    split(model, True)
    for sender, receiver in edges:
        layer, head = (int(n) for n in re.findall(r"\d+", sender))
        name = f"blocks.{layer}.attn.hook_z"
        change = (clean[name] - base[name])[:, :, head] @ block_of(model, layer).attn.W_O[head]
        layer, head = (int(n) for n in re.findall(r"\d+", receiver))

        def hook(x, hook, head=head, change=change):
            x = x.clone()
            x[:, :, head] += change
            return x

        hooks = [(f"blocks.{layer}.hook_{receiver[-1]}_input", hook)]
        found.append(difference(model.run_with_hooks(pairs.corrupted, fwd_hooks=hooks)) - unpatched)
    split(model, False)
    return torch.stack(found, 1)


def run(args) -> pd.DataFrame:
    """Median seconds of both ways, their ratio, and the largest difference between the results."""
    model = random_model(args.shape, True, args.device, native=False)
    if not has_hooked_transformer() and getattr(model.cfg, "n_key_value_heads", None) not in (None, model.cfg.n_heads):
        raise SystemExit("TransformerLens 4 has no edge attribution for grouped keys: take another shape")
    pairs = shaped_pairs(model, (3, 5))
    few = pairs[:PROMPTS] if args.quick else pairs
    results, usual = {}, by_scripts if has_hooked_transformer() else by_transformer_lens
    wiring = edge_attribution(model, few)

    def ours():
        results["ours"] = edge_attribution(model, pairs)

    def theirs():
        model.requires_grad_(True)
        results["theirs"] = usual(model, few, wiring)
        model.requires_grad_(False)

    seconds = interleaved({"ours": ours, "theirs": theirs}, args.repeats, args.device)
    wanted, got = results["theirs"].to(wiring.values), results["ours"].values[: len(few)].mean(0)
    rows = [
        _row(
            f"edge_attribution, {int(wiring.edges.sum())} edges",
            median(seconds["theirs"]) * len(pairs) / len(few),
            median(seconds["ours"]),
            wanted,
            got,
        )
    ]
    for method in ("integrated", "relp", "second_order", "atp_star"):
        call = partial(edge_attribution, model, pairs, method=method)
        spent = interleaved({method: call}, max(1, args.repeats // 2), args.device)[method]
        rows.append({"what": f"edge_attribution, {method}", "lnfree_interp s": median(spent)})
    rows.append(_patching(model, pairs, wiring, args))
    return pd.DataFrame(rows)


def _patching(model, pairs, wiring, args) -> dict:
    # Edges between heads: one of each in so many, over all layers.
    there = [
        (s, r)
        for s, r in ((wiring.senders[i], wiring.receivers[j]) for i, j in wiring.edges.nonzero().tolist())
        if "H" in s and "H" in r
    ]
    edges = there[:: max(1, len(there) // EDGES)]
    some = edges[:: max(1, len(edges) // PLAIN_EDGES)]
    results = {}

    def ours():
        results["ours"] = edge_patching(model, pairs, edges=edges)

    def theirs():
        results["theirs"] = by_plain_runs(model, pairs, some)

    seconds = interleaved({"ours": ours, "theirs": theirs}, args.repeats, args.device)
    effect = results["ours"]
    at = [(effect.senders.index(s), effect.receivers.index(r)) for s, r in some]
    got = torch.stack([effect.values[:, s, r] for s, r in at], 1)
    slow = median(seconds["theirs"]) * len(edges) / len(some)
    row = _row(f"edge_patching, {len(edges)} edges", slow, median(seconds["ours"]), results["theirs"], got)
    spent, plain = effect.flops or (float("nan"), float("nan"))
    return row | {"times fewer FLOPs": plain / spent}


def _row(what: str, slow: float, fast: float, wanted: torch.Tensor, got: torch.Tensor) -> dict:
    return {
        "what": what,
        "the usual way s": slow,
        "lnfree_interp s": fast,
        "times faster": slow / fast,
        "largest effect": wanted.abs().max().item(),
        "largest difference": (got - wanted).abs().max().item(),
    }
