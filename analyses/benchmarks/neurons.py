"""Scanning the last layer's neurons against computing the final layer again for each.

Weights are random, but scaled so that predictions and neurons are about as strong as a trained model's: logits
with a standard deviation of 2.5, neurons that move them by up to a nat. All ways compute the same: the change of
cross-entropy and entropy, and with LayerNorm once more with its scale frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lnfree_interp import forward
from lnfree_interp.forward import unembed
from lnfree_interp.metrics import cross_entropy, entropy
from lnfree_interp.neurons import ablate_neurons

from .common import LOGITS, interleaved, median, random_model

EFFECT = 0.03  # mean effect of a neuron on the logits: 3,072 of them write two thirds of the logits' deviation


def benchmark_model(shape: str, kind: str | None, device):
    """A model of GPT-2's shape whose predictions and neurons have a trained model's strength."""
    model = random_model(shape, kind is not None, device)
    with torch.no_grad():
        tokens = torch.randint(model.cfg.d_vocab, (1, 64), device=device)
        # Activations of a trained last layer are sparse and heavy-tailed: a negative bias, inputs that vary.
        mlp, pre = model.blocks[-1].mlp, []
        forward.run(model, tokens, hooks={f"blocks.{model.cfg.n_layers - 1}.mlp.hook_pre": pre.append})
        mlp.W_in *= 1.5 / pre[0].std()
        mlp.b_in -= 1.5
        model.unembed.W_U -= model.unembed.W_U.mean(1, keepdim=True)
        for _ in range(4):  # without LayerNorm the neurons' strength and the logits' depend on each other
            mlp.W_out *= EFFECT / typical_effect(model, tokens)
            model.unembed.W_U *= LOGITS / unembed(model, forward.run(model, tokens)).std()
    return model


def typical_effect(model, tokens) -> float:
    """Standard deviation over the vocabulary of what one standard deviation of a neuron does to the logits."""
    post, name = [], f"blocks.{model.cfg.n_layers - 1}.mlp.hook_post"
    final = forward.run(model, tokens, hooks={name: post.append})
    scale = forward.final_norm(model).scale(final).mean()
    w = model.blocks[-1].mlp.W_out[:64]
    w = w - w.mean(-1, keepdim=True) if model.cfg.normalization_type else w
    return ((w @ model.unembed.W_U).std(1) * post[0].flatten(0, 1).std(0)[:64] / scale).mean().item()


def straightforward(model, tokens, neurons):
    """Each neuron set to its mean, then the rest of the last layer, the unembedding, and both quantities again."""
    mlp, name = model.blocks[-1].mlp, f"blocks.{model.cfg.n_layers - 1}."
    kept = {}

    def keep(key):
        def hook(x):
            kept[key] = x

        return hook

    def quantities(final, scale=None):
        if scale is None:
            logits = unembed(model, final)
        else:
            hidden = (final - final.mean(-1, keepdim=True)) / scale
            logits = hidden @ model.unembed.W_U + model.unembed.b_U
        return torch.stack([cross_entropy(logits, tokens), entropy(logits[:, :-1])])

    final = forward.run(
        model, tokens, hooks={f"{name}hook_resid_mid": keep("mid"), f"{name}mlp.hook_post": keep("post")}
    )
    scale = forward.final_norm(model).scale(final)
    before = quantities(final)
    changes = []
    for neuron in neurons:
        post = kept["post"].clone()
        post[..., neuron] = post[..., neuron].mean()
        final = kept["mid"] + F.linear(post, mlp.W_out.T, mlp.b_out)
        total = quantities(final) - before
        frozen = quantities(final, scale) - before if model.cfg.normalization_type else total
        changes.append(torch.cat([total, frozen]))
    return changes


def rows_of(args, kind: str | None):
    """One row per way: seconds per million (neuron, token) pairs, pairs per second, ratio to the first."""
    torch.manual_seed(0)
    model = benchmark_model(args.shape, kind, args.device)
    n_positions = 17 if args.quick else 257
    tokens = torch.randint(model.cfg.d_vocab, (4, n_positions), device=args.device)
    few = list(range(2 if args.quick else 4))
    some = list(range(16 if args.quick else 64))
    every = list(range(256 if args.quick else model.cfg.d_mlp))
    results = {}

    def scan(method, neurons):
        def way():
            results[method] = ablate_neurons(model, tokens, neurons=neurons, method=method)

        return way

    ways = {
        "final layer per neuron": lambda: straightforward(model, tokens, few),
        "streaming": scan("stream", some),
        "moments": scan("moments", every),
    }
    with torch.no_grad():
        seconds = interleaved(ways, args.repeats, args.device)
        reference = straightforward(model, tokens, few)
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    pairs = {"final layer per neuron": len(few), "streaming": len(some), "moments": len(every)}
    rows, first = [], None
    for way, times in seconds.items():
        rate = positions * pairs[way] / median(times)
        first = first or rate
        row = {"shape": args.shape, "normalization": str(kind), "way": way, "neurons": pairs[way]}
        row |= {"tokens": positions, "seconds": median(times), "pairs_per_second": rate, "ratio": rate / first}
        result = results.get({"streaming": "stream"}.get(way, way))
        if result is not None:
            row |= {"summed_exactly": result.streamed, "certified": result.bound}
            row["off_by"] = _difference(result, reference, {"streaming": some, "moments": every}[way], few)
        rows.append(row)
    return rows


def _difference(result, reference, neurons, few) -> float:
    """Largest difference from the straightforward way on the neurons both have, in nats."""
    off = 0.0
    for neuron, change in zip(few, reference):
        if neuron in neurons:
            at = neurons.index(neuron)
            found = (result.loss, result.entropy, result.loss_frozen, result.entropy_frozen)
            off = max(off, (torch.stack([x[at] for x in found]) - change.cpu()).abs().max().item())
    return off


def run(args):
    """Neurons x tokens per second of the three ways, with LayerNorm and without."""
    import pandas as pd

    return pd.DataFrame([row for kind in ("LNPre", None) for row in rows_of(args, kind)])
