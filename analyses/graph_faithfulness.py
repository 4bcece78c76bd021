"""Attribution graphs against real interventions: what freezing costs, with LayerNorm and without.

python analyses/graph_faithfulness.py
python analyses/graph_faithfulness.py --model gpt2 gpt2-vanilla gpt2-noLN --data Skylion007/openwebtext
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import common
from common import Claim, Family

from lnfree_interp import cli

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
# What follows a removal: everything, or all but what stays as it was. The last leaves the norms alone to follow.
RUNGS = {"everything": (False, False), "all but patterns": (True, False), "norms only": (True, True)}
_RUNGS = {"all but patterns": "all but<br>patterns", "norms only": "norms<br>only"}  # what is too wide for a figure
READOUTS = ("logit", "against the runner-up")


def prompts(args, model, length: int):
    """[prompt, pos]: BOS and the first tokens of blocks of the text."""
    return cli.load_tokens(args, model, context=min(256, model.cfg.n_ctx), prepend_bos=True)[:, :length]


class Run:
    """A model on one prompt: its activations, and logits when nodes are taken out."""

    def __init__(self, model, tokens):
        from lnfree_interp import forward

        self.model, self.seen = model, {}
        parts = ("hook_resid_pre", "attn.hook_pattern", "mlp.hook_pre", "mlp.hook_post")
        names = [f"blocks.{i}.{part}" for i in range(model.cfg.n_layers) for part in parts]
        hooks = {name: lambda x, name=name: self.seen.__setitem__(name, x) for name in names}
        self.final = forward.run(model, tokens[None], hooks=hooks)
        self.logits = forward.unembed(model, self.final[0, -1])

    def without(self, masks: dict, start: int, held: tuple[bool, bool], resid=None):
        """Logits [row, token] at the end when heads and neurons write so many times what they would.

        Args:
            masks: hook name -> [row, pos, unit].
            start: the layer to run from.
            held: whether patterns, and whether each neuron's output / input, stay as they were.
            resid: what enters that layer; None: what did.
        """
        from lnfree_interp import forward

        rows = len(next(iter(masks.values())))
        entering = self.seen[f"blocks.{start}.hook_resid_pre"] if resid is None else resid
        hooks, pre = {}, {}
        for i in range(start, self.model.cfg.n_layers):
            name, here = f"blocks.{i}.", {}
            if held[0]:
                here["attn.hook_pattern"] = lambda x, at=name: self.seen[f"{at}attn.hook_pattern"].expand_as(x)
            if f"{name}attn.hook_z" in masks:
                here["attn.hook_z"] = lambda x, at=name: x * masks[f"{at}attn.hook_z"][..., None]
            if held[1]:
                here["mlp.hook_pre"] = lambda x, at=name: pre.__setitem__(at, x)
            if held[1] or f"{name}mlp.hook_post" in masks:
                here["mlp.hook_post"] = lambda x, at=name: self._post(at, x, pre.get(at), masks)
            hooks |= {name + part: hook for part, hook in here.items()}
        entering = entering.expand(rows, -1, -1).clone()
        final = forward.run(self.model, resid=entering, start_layer=start, hooks=hooks)
        return forward.unembed(self.model, final[:, -1])

    def _post(self, at: str, post, pre, masks):
        if pre is not None:
            before = self.seen[at + "mlp.hook_pre"]
            post = (self.seen[at + "mlp.hook_post"] / before).where(before != 0, 0) * pre
        return post * masks.get(at + "mlp.hook_post", 1.0)


def ablated(run: Run, nodes: Sequence, held: tuple[bool, bool]):
    """Logits [node, token] without each of some nodes, one at a time."""
    import torch

    found = torch.empty(len(nodes), len(run.logits))
    for layer in sorted({node.layer for node in nodes}):
        for kind, hook in (("head", "attn.hook_z"), ("neuron", "mlp.hook_post")):
            rows = [i for i, node in enumerate(nodes) if (node.layer, node.kind) == (layer, kind)]
            if rows:
                mask = _mask(run, kind, 1.0, len(rows))
                for row, i in enumerate(rows):
                    mask[row, nodes[i].pos, nodes[i].unit] = 0
                found[rows] = run.without({f"blocks.{layer}.{hook}": mask}, layer, held).cpu()
    return found


def alone(run: Run, sets: Sequence[Sequence]):
    """Logits [set, token] when of all heads and neurons only those in a set write anything; tokens and biases stay."""
    masks = {}
    for i in range(run.model.cfg.n_layers):
        masks[f"blocks.{i}.attn.hook_z"] = _mask(run, "head", 0.0, len(sets))
        masks[f"blocks.{i}.mlp.hook_post"] = _mask(run, "neuron", 0.0, len(sets))
    for row, nodes in enumerate(sets):
        for node in nodes:
            part = "attn.hook_z" if node.kind == "head" else "mlp.hook_post"
            masks[f"blocks.{node.layer}.{part}"][row, node.pos, node.unit] = 1
    return run.without(masks, 0, (False, False)).cpu()


def _mask(run: Run, kind: str, value: float, rows: int):
    cfg, like = run.model.cfg, run.final
    units = cfg.n_heads if kind == "head" else cfg.d_mlp
    return like.new_full((rows, like.shape[1], units), value)


def as_many(run: Run, nodes: Sequence, seed: int) -> list:
    """As many heads and neurons as these, drawn at random from the same layers."""
    import random
    from collections import Counter
    from dataclasses import replace

    drawn, generator = [], random.Random(seed)
    for (layer, kind), count in Counter((node.layer, node.kind) for node in nodes).items():
        units = run.model.cfg.n_heads if kind == "head" else run.model.cfg.d_mlp
        example = next(node for node in nodes if node.kind == kind)
        for place in generator.sample(range(run.final.shape[1] * units), count):
            drawn.append(replace(example, layer=layer, pos=place // units, unit=place % units))
    return drawn


def measure_prompt(run: Run, tokens, readout: str, args, seed: int) -> dict:
    """One prompt's effects and removals [rung][node], and of each share the nodes and what is left of the logit."""
    import torch

    from lnfree_interp import attribution_graph
    from lnfree_interp.graph.prune import prune

    first, second = run.logits.topk(2).indices.tolist()
    versus = None if readout == "logit" else second

    def read(logits):
        return logits[:, first] - (0 if versus is None else logits[:, versus])

    options = {"versus": versus, "max_neurons": args.max_neurons}
    whole = attribution_graph(run.model, tokens, first, share=1.0, edge_share=1.0, **options)
    inner = [i for i, node in enumerate(whole.nodes) if node.kind in ("head", "neuron")]
    largest = sorted(inner, key=lambda i: -float(whole.influence[i]))[: args.nodes]
    value, nodes = read(run.logits[None].cpu()), [whole.nodes[i] for i in largest]
    removed = {rung: (value - read(ablated(run, nodes, held))).tolist() for rung, held in RUNGS.items()}

    sets = []
    for share in SHARES:
        kept = set(prune(whole.adjacency, len(tokens), share, 1.0)[0].tolist())
        sets.append([whole.nodes[i] for i in inner if i in kept])
    left = alone(run, [*sets, *(as_many(run, nodes, seed) for nodes in sets), []])
    lost = (value - read(left)).abs()
    same = left.argmax(-1) == first
    n = len(SHARES)
    return {
        "effects": whole.effects[torch.tensor(largest)].tolist(),
        "removed": removed,
        "discrepancy": attribution_graph(run.model, tokens, first, **options).discrepancy,
        "nodes": [len(nodes) for nodes in sets],
        "lost": lost[:n].tolist(),
        "lost_random": lost[n:-1].tolist(),
        "lost_all": [float(lost[-1])] * n,
        "same": same[:n].double().tolist(),
        "same_random": same[n:-1].double().tolist(),
    }


def measure(name: str, model, args) -> list[dict]:
    """Rows of the table of one model."""
    tokens = prompts(args, model, args.length)
    rows = []
    for readout in READOUTS:
        found = []
        with cli.bar(f"{name}, {readout}", "prompt") as progress:
            for i, prompt in enumerate(tokens):
                found.append(measure_prompt(Run(model, prompt), prompt, readout, args, args.seed + i))
                progress(i + 1, len(tokens))
        rows += [{"model": name, "readout": readout, **row} for row in summary(found, args)]
    return rows


def summary(found: list[dict], args) -> list[dict]:
    """Measures over prompts, with 95% intervals over them."""
    import numpy as np
    from scipy.stats import binomtest

    from lnfree_interp.statistics import correlation, correlation_interval, mean_interval, ratio_interval

    options, rows = {"draws": args.draws, "seed": args.seed}, []

    def add(measure: str, what, value, interval) -> None:
        rows.append({"measure": measure, "what": str(what), "value": float(value), **_ends(interval)})

    least = min(len(one["effects"]) for one in found)
    effects = np.array([one["effects"][:least] for one in found])
    for rung in RUNGS:
        real = np.array([one["removed"][rung][:least] for one in found])
        wrong, size = np.abs(effects - real).sum(1), np.abs(real).sum(1)
        add("error", rung, wrong.sum() / size.sum(), ratio_interval(wrong, size, **options))
        add("correlation", rung, correlation(effects, real), correlation_interval(effects, real, **options))
        agree = (np.sign(effects) == np.sign(real)).mean(1)
        add("same sign", rung, agree.mean(), mean_interval(agree, **options))
    discrepancy = np.array([one["discrepancy"] for one in found])
    add("discrepancy", "entries", discrepancy.mean(), mean_interval(discrepancy, **options))
    for measure in ("nodes", "lost", "lost_random", "lost_all", "same", "same_random"):
        values = np.array([one[measure] for one in found], dtype=float)
        low, high = mean_interval(values, **options)
        for i, share in enumerate(SHARES):
            ends = low[i], high[i]
            if measure.startswith("same"):  # counts: Wilson's interval
                ends = binomtest(int(values[:, i].sum()), len(values)).proportion_ci(method="wilson")
            add(measure, share, values[:, i].mean(), ends)
    return rows


def _ends(interval) -> dict:
    return {"low": float(interval[0]), "high": float(interval[1])}


def claims(family: Family, table: pd.DataFrame) -> list[Claim]:
    at = table.set_index(["readout", "measure", "what", "model"])
    names = tuple(dict.fromkeys((family.original, family.control, family.free)))

    def each(measure: str, what, readout=READOUTS[0], form="{:.1%} [{:.1%}, {:.1%}]") -> str:
        rows = ((name, at.loc[(readout, measure, str(what), name)]) for name in names)
        return "; ".join(f"{name} " + form.format(row.value, row.low, row.high) for name, row in rows)

    def value(measure: str, what, name: str, end="value", readout=READOUTS[0]) -> float:
        return float(at.loc[(readout, measure, str(what), name), end])

    free = value("discrepancy", "entries", family.free)
    normed = min(value("discrepancy", "entries", name, "low") for name in names if name != family.free)
    all_but_norms = max(value("error", "norms only", family.free, readout=readout) for readout in READOUTS)
    nearer = [
        value("error", "everything", family.free, "high", r) < value("error", "everything", family.control, "low", r)
        for r in READOUTS
    ]
    return [
        Claim(
            "Without LayerNorm the entries of a graph are what its nodes write into each other; with it, estimates.",
            "circuit-tracer and TransformerLens freeze every LayerNorm's scale (not measured there)",
            "sum |entry - exact| / sum |exact|, the norm computed again without the sender: "
            + each("discrepancy", "entries"),
            common.agreement(free < 1e-6, normed > 0.01),
        ),
        Claim(
            "Without LayerNorm a node's effect in the graph is exact, patterns and neurons' ratios held.",
            "not measured before",
            "error against removals in a model where patterns and ratios stay and the rest runs again: "
            + each("error", "norms only"),
            common.yes_no(all_but_norms < 1e-3),
        ),
        Claim(
            "Effects in the graph are nearer to real removals, where everything runs again, without LayerNorm.",
            "not measured before",
            f"error, the logit: {each('error', 'everything')}; against the runner-up: "
            f"{each('error', 'everything', READOUTS[1])}",
            common.agreement(*nearer),
            f"With patterns held: {each('error', 'all but patterns')}; against the runner-up: "
            f"{each('error', 'all but patterns', READOUTS[1])}. The final norm rescales all logits: a large one feels "
            "it, the difference of two near ones hardly. Nodes whose removal moves the logit the way the graph says: "
            f"{each('same sign', 'everything')}.",
        ),
        Claim(
            "A graph's nodes alone make the model predict what it does.",
            "not measured before",
            "the most likely token stays when all heads and neurons outside a graph of share 0.8 write nothing: "
            + each("same", 0.8),
            "open question",
            f"With as many drawn at random: {each('same_random', 0.8)}. With a share of 0.99: {each('same', 0.99)}.",
        ),
    ]


def draw(table: pd.DataFrame) -> go.Figure:
    from plotly.subplots import make_subplots

    from lnfree_interp.figures.style import colour, line, styled

    names, table = list(table.model.unique()), table.assign(what=table.what.astype(str))
    titles = ("effects on the logit", "effects on it less the runner-up's")
    titles += ("a graph's nodes alone<br>(dotted: as many at random)",)
    fig = make_subplots(cols=3, column_widths=[0.35, 0.35, 0.3], horizontal_spacing=0.1, subplot_titles=titles)
    for i, name in enumerate(names):
        part = table[table.model == name]
        for col, readout in enumerate(READOUTS, 1):
            rows = part[(part.measure == "error") & (part.readout == readout)]
            bar = {"x": [_RUNGS.get(w, w) for w in rows.what], "y": rows.value, "marker_color": colour(i), "name": name}
            bars = common.bars(rows.value, rows.low, rows.high)
            hover = f"%{{customdata}} follows: error %{{y:.1%}}<extra>{name}, {readout}</extra>"
            look = {"customdata": rows.what, "hovertemplate": hover, "showlegend": col == 1, "legendgroup": name}
            fig.add_bar(**bar, error_y=bars, **look, row=1, col=col)
        for measure, dash in (("same", {}), ("same_random", {"dash": "dot"})):
            rows = part[(part.measure == measure) & (part.readout == READOUTS[0])]
            x = [n + 0.13 * (i - (len(names) - 1) / 2) for n in range(len(rows))]  # side by side
            bars = common.bars(rows.value, rows.low, rows.high) | {"thickness": 1, "width": 2}
            hover = "%{text:.0%} of the influence: same prediction on %{y:.0%} of prompts<extra>"
            hover += name + ", as many at random" * bool(dash) + "</extra>"
            look = {"mode": "lines+markers", "line": line(i) | dash, "hovertemplate": hover, "showlegend": False}
            text = [float(what) for what in rows.what]
            fig.add_scatter(x=x, y=rows.value, text=text, error_y=bars, **look, legendgroup=name, row=1, col=3)
    for col in (1, 2):
        fig.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=col)
        fig.update_xaxes(title_text="what follows the removal", tickangle=0, row=1, col=col)
        fig.update_yaxes(title_text="sum |effect - real| / sum |real|", title_standoff=4, row=1, col=col)
    fig.update_yaxes(title_text="same prediction (prompts)", title_standoff=4, row=1, col=3)
    fig.update_yaxes(tickformat=".0%", range=[0, 1.02], row=1, col=3)
    shares = [f"{100 * float(what):g}%" for what in table.what[table.measure == "same"].unique()]
    ticks = {"tickvals": list(range(len(shares))), "ticktext": shares, "zeroline": False}
    fig.update_xaxes(title_text="share of the influence kept", **ticks, row=1, col=3)
    title = "Effects in attribution graphs against real interventions [95% over prompts]"
    return styled(fig, title=title, height=420)


def flags(parser) -> None:
    parser.add_argument("--length", type=cli.positive_int, default=16, help="tokens of a prompt, BOS included (16)")
    parser.add_argument(
        "--nodes", type=cli.positive_int, default=64, help="nodes taken out one by one, per prompt (64)"
    )
    parser.add_argument("--max-neurons", type=cli.positive_int, default=2000, help="neurons that can be nodes (2,000)")
    parser.add_argument("--draws", type=cli.positive_int, default=1000, help="bootstrap draws (1,000)")


def run(args) -> common.Output:
    import pandas as pd
    import torch

    rows, free = [], {}
    with torch.no_grad():
        for name, model in cli.models(args):
            if getattr(model.cfg, "gated_mlp", False):
                raise ValueError(f"{name} has gated MLPs, which this script does not hold")
            rows += measure(name, model, args)
            free[name] = model.cfg.normalization_type is None
    table = pd.DataFrame(rows)
    n = max(1, args.tokens // 256)
    caption = (
        f"{n} prompts of {args.length} tokens of {common.source(args)}, the logit of each model's most likely token; "
        f"the {args.nodes} heads and neurons of the largest influence are taken out one by one. Error of the effects "
        "in the graph, on that logit and on its distance to the runner-up, when all that comes after the removal runs "
        "again, all but the attention patterns, or the norms alone. Right: every head and neuron outside the graph "
        "writes nothing (dotted: as many drawn at random from the same layers). 95% intervals over prompts."
    )
    found = common.families(free)
    return common.Output(table, None, [c for f in found for c in claims(f, table)], caption)


ANALYSIS = common.Analysis(run, tokens=8192, flags=flags, draw=draw)
main = ANALYSIS.main

if __name__ == "__main__":
    raise SystemExit(main())
