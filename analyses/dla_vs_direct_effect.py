"""Direct logit attribution against the true direct effect.

python analyses/dla_vs_direct_effect.py
python analyses/dla_vs_direct_effect.py --model gpt2 gpt2-vanilla gpt2-noLN --data lucabaroni/apollo-pile-filtered-10k
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TARGETS = ("next token", "token just read")


def claims(family: Family, table: pd.DataFrame, checked: dict[str, float]) -> list[Claim]:
    pooled = table[(table.component == "pooled") & (table.target == "next token")].set_index("model")
    shown = "; ".join(
        f"{name}: {pooled.nmae[name]:.2%} [{pooled.low[name]:.2%}, {pooled.high[name]:.2%}]"
        for name in dict.fromkeys((family.original, family.control, family.free))
    )
    by_read = table[(table.component == "pooled") & (table.target != "next token")].set_index("model").nmae
    return [
        Claim(
            "Without LayerNorm direct logit attribution is the direct effect (P2).",
            "small: pooled error of the heads 0.00%",
            f"{family.free}: {pooled.nmae[family.free]:.4%}",
            common.yes_no(pooled.nmae[family.free] < 1e-4 and checked[family.free] < 1e-3),
            "The direct effect is computed in closed form. Each head taken out of the final residual stream by "
            f"hand gives the same but for {checked[family.free]:.0e} logits at most "
            f"({checked[family.original]:.0e} with LayerNorm).",
        ),
        Claim(
            "With LayerNorm direct logit attribution is far from the direct effect (P2).",
            "small: original 49.07% [29.92, 66.10], fine-tuned control 57.85% [38.52, 74.52]",
            shown,
            common.yes_no(min(pooled.low[family.original], pooled.low[family.control]) > 0.05),
            "All are for the logit of the next token. For that of the token just read, which the paper's code "
            f"scored: {by_read[family.original]:.1%} and {by_read[family.control]:.1%}.",
        ),
    ]


def measure(name: str, model, tokens, args) -> pd.DataFrame:
    """Errors of every head and pooled, for both targets; of the next token each head's mean attribution and effect."""
    import pandas as pd

    from lnfree_interp import attribution_error, direct_effect, direct_logit_attribution
    from lnfree_interp.dla import HEADS

    errors = []
    for target in TARGETS:
        parts, done = [], 0
        with cli.bar(f"{name}, {target}", "sequence") as progress:
            for batch in tokens.split(max(1, 2048 // tokens.shape[1])):
                targets = None if target == "next token" else batch
                parts.append([f(model, batch, targets, by="head") for f in (direct_logit_attribution, direct_effect)])
                done += len(batch)
                progress(done, len(tokens))
        linear, exact = (joined([p[i] for p in parts]) for i in (0, 1))
        error = attribution_error(linear, exact, components=HEADS, draws=args.draws, seed=args.seed)
        table = error.table().assign(model=name, target=target)
        if target == "next token":
            for column, result in (("attribution", linear), ("direct_effect", exact)):
                means = result.table().set_index("component")["mean"].filter(regex=f"^{HEADS}$")
                table[column] = table.component.map(means)
        errors.append(table)
    return pd.concat(errors)


def largest_difference(model, tokens) -> float:
    """Largest |direct effect - what removing the head by hand changes|, next token, all heads (logits)."""
    from lnfree_interp import direct_effect
    from lnfree_interp.dla import HEADS

    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z") or name == last)
    effect = direct_effect(model, tokens, by="head")
    norm = model.ln_final if model.cfg.normalization_type else (lambda x: x)

    def logit(x):
        return model.unembed(norm(x))[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]

    stream, most = cache[last], 0.0
    for i, label in enumerate(effect.labels):
        if re.fullmatch(HEADS, label):
            layer, head = (int(n) for n in re.findall(r"\d+", label))
            written = cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ model.W_O[layer, head]
            by_hand = logit(stream) - logit(stream - written)
            most = max(most, (by_hand - effect.values[i]).abs().max().item())
    return most


def joined(parts: list):
    """Results on batches of sequences as one, on the CPU."""
    import torch

    values = torch.cat([p.values.cpu() for p in parts], 1)
    return type(parts[0])(values, parts[0].labels, torch.cat([p.bias.cpu() for p in parts]), parts[0].positions)


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import MARK, colour, styled, symbol

    titles = ("each head, mean over tokens", "pooled error of the heads")
    fig = make_subplots(cols=2, column_widths=[0.52, 0.48], horizontal_spacing=0.13, subplot_titles=titles)
    heads, pooled = table[table.attribution.notna()], table[table.component == "pooled"]
    most = 1.08 * heads[["attribution", "direct_effect"]].abs().max().max()
    fig.add_scatter(x=[-most, most], y=[-most, most], line=MARK, mode="lines", showlegend=False, row=1, col=1)
    for i, name in enumerate(table.model.unique()):
        part, rows = heads[heads.model == name], pooled[pooled.model == name]
        marker = {"color": colour(i), "size": 8, "symbol": symbol(i), "line": {"width": 2 if i % 3 < 2 else 0}}
        hover = "%{text}: attribution %{y:.3f} logits, direct effect %{x:.3f}<extra>" + name + "</extra>"
        dots = {"x": part.direct_effect, "y": part.attribution, "text": part.component, "mode": "markers"}
        fig.add_scatter(**dots, marker=marker, name=name, hovertemplate=hover, row=1, col=1)
        hover = f"logit of the %{{x}}: error %{{y:.2%}}<extra>{name}</extra>"
        bar = {"x": rows.target, "y": rows.nmae, "error_y": common.bars(rows.nmae, rows.low, rows.high)}
        # Below the bar's end, where its interval does not run through it.
        text = {"text": [f"{x:.1%}" if x else "0" for x in rows.nmae], "insidetextanchor": "start", "textangle": 0}
        text["textposition"] = ["inside" if x > 0.05 else "outside" for x in rows.nmae]
        look = {"marker_color": colour(i), "name": name, "hovertemplate": hover, "showlegend": False}
        fig.add_bar(**bar, **text, **look, cliponaxis=False, row=1, col=2)
    fig.update_xaxes(title_text="direct effect (logits)", row=1, col=1)
    fig.update_yaxes(title_text="attribution (logits)", title_standoff=4, row=1, col=1)
    fig.update_yaxes(title_text="mean |difference| / mean |effect|", tickformat=".0%", rangemode="tozero", row=1, col=2)
    fig.update_xaxes(title_text="logit of the", row=1, col=2)
    return styled(fig, title="Direct logit attribution against direct effect, attention heads", height=430)


def flags(parser) -> None:
    parser.add_argument("--draws", type=cli.positive_int, default=1000, help="bootstrap draws (1,000)")


def run(args) -> common.Output:
    import pandas as pd

    tables, free, checked = [], {}, {}
    for name, model in cli.models(args):
        tokens = cli.load_tokens(args, model)
        tables.append(measure(name, model, tokens, args))
        free[name] = model.cfg.normalization_type is None
        checked[name] = largest_difference(model, tokens[:1, :128])
    table = pd.concat(tables, ignore_index=True)
    table = table[["model", "target", "component", "nmae", "low", "high", "attribution", "direct_effect"]]
    caption = f"{tokens.numel():,} tokens of {common.source(args)}, all positions; "
    caption += "95% intervals over heads and sequences."
    found = common.families(free)
    return common.Output(table, None, [c for f in found for c in claims(f, table, checked)], caption)


ANALYSIS = common.Analysis(run, tokens=32768, flags=flags, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
