"""Fitting a probe: the model is run once; on what it had, the encoder and its yardsticks are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..arguments import choice, listener, one_of, switch, whole
from ..batching import Places, Progress, indices
from ..lens import ModelOrName
from ..models import as_model
from ..results import name_of
from .data import ProbeData, Splits, answer_tokens
from .hyperprobe import HyperProbe
from .streams import POOLINGS, check_clusters, observe, one_hot, pooled
from .symbols import Codebook, bind
from .training import Training, bundle_loss, distance, encoder_of, train

# Of the ridge regression to the final stream, in parts of the mean variance.
RIDGE = 1e-2


def fit_probe(
    model: ModelOrName,
    data: ProbeData,
    *,
    layers: Places | None = None,
    pooling: str = "mean",
    clusters: int = 5,
    normalised: bool = True,
    codebook: Codebook | None = None,
    dim: int = 4096,
    mastered: bool = True,
    training: Training | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HyperProbe:
    """Fit a hyperdimensional probe (arXiv 2509.25045) to a model.

    The stream at the last token of each prompt is read where it enters some layers, each layer's is centred and
    brought to one scale, and they are pooled into one vector; an encoder learns to make of it the bundle of the
    prompt's pairs. Beside it the readouts that it must be compared with are fitted to the same vectors:
    `evaluate_probe`.

    Args:
        model: any HookedTransformer or TransformerBridge, or a name.
        data: prompts; some are held out, see `Splits`.
        layers: which streams, from 0 to n_layers, the final one; negative ones count from the end, -1 is the final one.
            None: from the middle up, n_layers // 2 to n_layers.
        pooling: "mean" of the layers; "kmeans": of the centroids of `clusters` clusters of layers, as in the paper;
            "last": the last of the layers alone.
        normalised: read each stream through the norm that reads it there, as the model does; nothing where there is
            none.
        codebook: the symbols; None: those of the data, of `dim` signs.
        mastered: train on the prompts alone that the model gets right: the answer's token has the largest logit of all
            answers'.
        training: the encoder's size and how it is trained.
        seed: of symbols, splits, and training.
        progress: told of the prompts run, then of the epochs done.

    Returns:
        HyperProbe.

    Raises:
        ValueError: fewer than two answers, or answers that the tokenizer does not tell apart; layers that are not
            there, or fewer than clusters; concepts that the codebook lacks; too few prompts left to train on.

    Example:
        >>> from lnfree_interp import fit_probe, load_model, recall_data
        >>> from lnfree_interp.probe import Training
        >>> model = load_model("tiny-noLN")
        >>> data = recall_data(model, 80, keys=4, values=4)
        >>> probe = fit_probe(model, data, dim=64, mastered=False, training=Training(hidden=16, epochs=2))
        >>> probe.points[-1]
        'final'
    """
    model = as_model(model)
    training = Training() if training is None else one_of(training, "training", Training, "a Training")
    n_layers = model.cfg.n_layers
    seed, clusters = whole(seed, "seed", least=0), whole(clusters, "clusters", least=1)
    choice(pooling, "pooling", POOLINGS)
    switch(normalised, "normalised")
    switch(mastered, "mastered")
    listener(progress)
    which = slice(n_layers // 2, None) if layers is None else layers
    at = sorted(set(indices(which, n_layers + 1, "layer", range(n_layers + 1), "the streams")))
    if pooling == "kmeans":
        check_clusters(len(at), clusters)
    one_of(data, "data", ProbeData, "ProbeData")
    if len(data.answers) < 2:
        raise ValueError(f"a probe wants two answers at least, not {data.answers[0]!r} alone")
    book = Codebook(data.concepts, dim, seed)
    if codebook is not None:
        book = one_of(codebook, "codebook", Codebook, "a Codebook")
    for concept in data.concepts:
        book.number(concept)
    tokens = answer_tokens(model, data)
    splits = Splits.of(data, seed)
    seen = observe(
        model, [p.prompt for p in data], at, [tokens[a] for a in data.answers], normalised=normalised, progress=progress
    )
    truth = torch.tensor([data.answers.index(prompt.value) for prompt in data])
    right = seen.logits.argmax(-1) == truth
    use = right if mastered else torch.ones_like(right)
    rows, stop = ([i for i in splits.rows(data, name) if use[i]] for name in ("train", "stop"))
    classes = tuple(sorted({data.prompts[i].value for i in rows}))
    if len(classes) < 2:
        said = f", of which the model gets {int(right.sum())} right" if mastered else ""
        raise ValueError(f"{len(data)} prompts{said} leave {len(rows)} to train on, with {len(classes)} answers")

    x = seen.streams
    mean = x[:, rows].mean(1)
    centred = x - mean[:, None]
    scale = centred[:, rows].pow(2).mean((1, 2)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    vectors, _ = pooled(centred / scale[:, None, None], pooling, clusters)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = encoder_of(model.cfg.d_model, book.dim, training).to(vectors.dtype)
        linear = nn.Linear(model.cfg.d_model, len(classes)).to(vectors.dtype)
    goal = targets(book, data).to(vectors)
    of_encoder = (vectors[rows], goal[rows]), (vectors[stop], goal[stop])
    history = train(encoder, bundle_loss, *of_encoder, training, seed, progress, judge=distance)
    known = [i for i in stop if data.prompts[i].value in classes]
    number = torch.tensor([classes.index(p.value) if p.value in classes else -1 for p in data])
    train(linear, F.cross_entropy, (vectors[rows], number[rows]), (vectors[known], number[known]), training, seed)
    member = one_hot(number[rows], len(classes)).to(vectors)
    shares = member / member.sum(0)
    tuned, bias = _ridge(vectors[rows], seen.final[rows])
    tensors = {
        "mean": mean,
        "scale": scale,
        "linear.weight": linear.weight.detach(),
        "linear.bias": linear.bias.detach(),
        "means": shares.T @ vectors[rows],
        "raw_means": shares.T @ seen.raw[:, rows],
        "tuned.weight": tuned,
        "tuned.bias": bias,
    }
    return HyperProbe(
        model=name_of(model),
        n_layers=n_layers,
        d_model=model.cfg.d_model,
        codebook=book,
        layers=tuple(at),
        pooling=pooling,
        clusters=clusters,
        normalised=normalised,
        answers=classes,
        splits=splits,
        training=training,
        encoder=encoder,
        tensors=tensors,
        facts={"n_train": len(rows), "n_stop": len(stop), "right": right.double().mean().item()},
        history=tuple(history),
    )


def targets(codebook: Codebook, data: ProbeData | Sequence) -> Float[Tensor, "prompt dim"]:
    """The bundle of each prompt's pairs, ties as 0: in training nothing is drawn for them."""
    rows = []
    for prompt in data:
        keys, values = (codebook.of([pair[i] for pair in prompt.pairs]) for i in (0, 1))
        rows.append(bind(keys, values).sum(0).sign())
    return torch.stack(rows)


def _ridge(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """y = x W^T + b by least squares, W kept small."""
    x0, y0 = x.mean(0), y.mean(0)
    a, b = x - x0, y - y0
    gram = a.T @ a
    gram = gram + RIDGE * (gram.diagonal().mean() + torch.finfo(x.dtype).tiny) * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, a.T @ b).T
    return weight, y0 - weight @ x0
