"""Attribution patching here against a loop over prompts with hooks on every activation, interleaved.

The loop is what attribution patching scripts do: for each prompt a cached clean run, and a forward and a backward
of the corrupted prompt with hooks that keep every activation and its gradient, weights' gradients included.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

from lnfree_interp.forward import run as forward_run
from lnfree_interp.forward import unembed
from lnfree_interp.patching import attribution_patching

from .common import interleaved, median, random_model
from .patching import shaped_pairs


def by_prompt_loop(model, pairs) -> torch.Tensor:
    """resid_pre effects [prompt, layer, pos] from one prompt at a time, hooks on everything."""
    effects = []
    for clean, corrupted, answers in zip(pairs.clean, pairs.corrupted, pairs.answers):
        with torch.no_grad():
            _, clean_cache = model.run_with_cache(clean[None])
        values, grads = {}, {}

        def keep(x, hook, name, values=values):
            values[name] = x.detach()

        def keep_gradient(g, hook, name, grads=grads):
            grads[name] = g.detach()

        model.reset_hooks()
        names = [f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)]
        for name in {*clean_cache, *names}:  # a TransformerBridge knows some hooks by several names
            model.add_hook(name, partial(keep, name=name), "fwd")
            model.add_hook(name, partial(keep_gradient, name=name), "bwd")
        logits = model(corrupted[None])[0, -1]
        (logits[answers[0]] - logits[answers[1]]).backward()
        model.reset_hooks()
        model.zero_grad()
        effects.append(torch.stack([((clean_cache[n] - values[n]) * grads[n]).sum(-1)[0] for n in names]))
    return torch.stack(effects)


def run(args) -> pd.DataFrame:
    """Median seconds of each method, as multiples of the loop and of one forward with all logits."""
    model = random_model(args.shape, True, args.device)
    pairs = shaped_pairs(model, (3, 5))
    results = {}

    def loop():
        model.requires_grad_(True)
        results["loop"] = by_prompt_loop(model, pairs)
        model.requires_grad_(False)

    def forward():
        with torch.no_grad():
            unembed(model, forward_run(model, pairs.corrupted))

    def method(name: str, **options):
        def call():
            results[name] = attribution_patching(model, pairs, **options).values

        return call

    ways = {
        "loop over prompts, hooks on everything": loop,
        "one forward, packed": forward,
        "one forward, transformer_lens": lambda: _lens(model, pairs),
        "gradient": method("gradient"),
        "relp": method("relp", method="relp"),
        "integrated, 5 steps": method("integrated", method="integrated"),
        "gradient, one layer": method("gradient of a layer", layers=[model.cfg.n_layers // 2]),
        "second order, one layer, joint": method(
            "second order", layers=[model.cfg.n_layers // 2], method="second_order", joint=True
        ),
    }
    seconds = {name: median(s) for name, s in interleaved(ways, args.repeats, args.device).items()}
    difference = (results["gradient"] - results["loop"]).abs().max().item()
    slow, one, packed = (
        seconds[n]
        for n in ("loop over prompts, hooks on everything", "one forward, transformer_lens", "one forward, packed")
    )
    return pd.DataFrame(
        [
            {
                "way": name,
                "s": s,
                "times faster than the loop": slow / s,
                "forwards (transformer_lens)": s / one,
                "forwards (packed)": s / packed,
                "gradients": s / seconds["gradient"],
                "largest difference to the loop": difference if name == "gradient" else float("nan"),
            }
            for name, s in seconds.items()
        ]
    )


def _lens(model, pairs) -> None:
    with torch.no_grad():
        model(pairs.corrupted)
