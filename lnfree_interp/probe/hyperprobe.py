"""A probe that was fitted: from the stream at a prompt's last token to symbols."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..arguments import as_path, one_of
from ..batching import Tokens
from ..files import as_value_error, replace_file
from ..lens import LensModel, ModelOrName
from ..models import as_model
from .data import SPLITS, ProbeData, Splits
from .streams import Prompt, observe, pooled
from .symbols import Codebook, signs
from .training import Training, encoder_of

FORMAT = "lnfree_interp.probe 1"
TENSORS = ("mean", "scale", "linear.weight", "linear.bias", "means", "raw_means", "tuned.weight", "tuned.bias")


@dataclass(frozen=True, eq=False)
class HyperProbe:
    """A probe of a model. Made by `fit_probe`.

    Attributes:
        model: whose it is;
        n_layers, d_model: that model's.
        codebook: the concepts and their vectors.
        layers: where the stream is read, as it enters them; n_layers is the final stream.
        pooling, clusters: how one vector is made of the layers'.
        normalised: whether the stream is read through the norm there, as the model reads it.
        answers: the concepts that were answers in training: the classes of the linear probe and of the means.
        splits: what was held out.
        training: how the encoder was trained.
        encoder: from a pooled stream, [batch, d_model], to [batch, dim].
        tensors: by name. mean [layer, d_model] and scale [layer]: what is taken from each layer's stream, and what
            it is divided by, so that no layer outweighs the others; linear.weight [answer, d_model], linear.bias; means
            [answer, d_model] of pooled streams, raw_means [layer, answer, d_model] of the stream itself; tuned.weight
            [d_model, d_model], tuned.bias: from a pooled stream to the final one.
        facts: numbers of the training: n_train, n_stop, right (share of all prompts that the model itself gets right).
        history: (loss, 1 less the mean cosine of what is held out) of each epoch.
    """

    model: str
    n_layers: int
    d_model: int
    codebook: Codebook
    layers: tuple[int, ...]
    pooling: str
    clusters: int
    normalised: bool
    answers: tuple[str, ...]
    splits: Splits
    training: Training
    encoder: nn.Sequential = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    facts: dict[str, float | int] = field(default_factory=dict)
    history: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        name = f"HyperProbe of {self.model}: {len(self.codebook.concepts)} concepts in {self.codebook.dim} signs"
        return f"<{name}, layers {self.layers[0]} to {self.layers[-1]}, {self.pooling}>"

    @property
    def points(self) -> tuple[str, ...]:
        """The layers by name: "L4", "final"."""
        return tuple("final" if layer == self.n_layers else f"L{layer}" for layer in self.layers)

    def read(self, model: ModelOrName, prompt: Tokens, keys: Sequence[str] | None = None) -> Any:
        """Which concepts the probe finds in the stream at a prompt's last token.

        Args:
            prompt: a text, or token ids.
            keys: concepts that it is asked about, one after the other: what are they bound with? None: all that the
                prompt names. What the answer is plays no part.

        Returns:
            ProbeReading: cosines of each key with each concept, of all layers together and layer by layer.

        Raises:
            ValueError: a model of another shape, a key that is no concept, a prompt that names none.
        """
        from .reading import reading_of

        model = as_model(model)
        check_model(self, model)
        return reading_of(self, model, prompt, keys)

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file.

        Raises:
            ValueError: the disk refuses.
        """
        about = asdict(self.splits), asdict(self.training)
        facts = {
            "format": FORMAT,
            "model": self.model,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "concepts": self.codebook.concepts,
            "dim": self.codebook.dim,
            "codebook_seed": self.codebook.seed,
            "layers": self.layers,
            "pooling": self.pooling,
            "clusters": self.clusters,
            "normalised": self.normalised,
            "answers": self.answers,
            "splits": about[0],
            "training": about[1],
            "facts": self.facts,
            "history": self.history,
        }
        tensors = {f"encoder.{name}": x for name, x in self.encoder.state_dict().items()} | self.tensors
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        path = Path(as_path(path, "path"))
        replace_file(path, lambda beside: save_file(tensors, beside, {"probe": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> HyperProbe:
        """A probe from a file that `save` wrote, to the bit.

        Raises:
            ValueError: there is no such file, or it holds no probe.
        """
        as_path(path, "path")
        with as_value_error(f"read probe {path}"), safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("probe")
            tensors = {name: file.get_tensor(name) for name in [*file.keys()]}
        try:
            facts = json.loads(about or "{}")
            if facts.get("format") != FORMAT:
                raise ValueError("format")
            training, splits = Training(**facts["training"]), facts["splits"]
            held_out: list[Any] = [tuple(map(tuple, splits[name])) for name in ("concepts", "templates")]
            encoder = encoder_of(facts["d_model"], facts["dim"], training)
            state = {n.removeprefix("encoder."): x for n, x in tensors.items() if n.startswith("encoder.")}
            encoder = encoder.to(tensors["mean"].dtype)
            encoder.load_state_dict(state)
            encoder.eval().requires_grad_(False)
            return cls(
                **{name: facts[name] for name in ("model", "n_layers", "d_model", "pooling", "clusters", "normalised")},
                codebook=Codebook(tuple(facts["concepts"]), facts["dim"], facts["codebook_seed"]),
                layers=tuple(facts["layers"]),
                answers=tuple(facts["answers"]),
                splits=Splits(splits["seed"], *held_out),
                training=training,
                encoder=encoder,
                tensors={name: tensors[name] for name in TENSORS},
                facts=facts["facts"],
                history=tuple(map(tuple, facts["history"])),
            )
        except (ValueError, KeyError, TypeError, RuntimeError):
            raise ValueError(f"{path} holds no probe of this package") from None


# ---------------------------------------------------------------------------------------------------------
# What a probe makes of streams


def check_model(probe: HyperProbe, model: LensModel) -> None:
    """Raise ValueError unless the model has the shape of the one that the probe was fitted on."""
    one_of(probe, "probe", HyperProbe, "a HyperProbe")
    there = (model.cfg.n_layers, model.cfg.d_model)
    if there != (probe.n_layers, probe.d_model):
        raise ValueError(
            f"the probe is of a model of {probe.n_layers} layers and d_model {probe.d_model} ({probe.model}), "
            f"this one has {there[0]} and {there[1]}"
        )


def observed(probe: HyperProbe, model: LensModel, prompts: Sequence[Prompt], answers: Sequence[int], **options: Any):
    """`observe` at the probe's layers."""
    return observe(model, prompts, probe.layers, answers, normalised=probe.normalised, **options)


def standard(probe: HyperProbe, streams: Float[Tensor, "layer batch d"]) -> Float[Tensor, "layer batch d"]:
    """Streams less their mean, divided by each layer's scale."""
    mean, scale = probe.tensors["mean"], probe.tensors["scale"]
    return (streams.to(mean) - mean[:, None]) / scale[:, None, None]


def pool(
    probe: HyperProbe, streams: Float[Tensor, "layer batch d"]
) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "layer batch"]]:
    """One vector for each prompt, and how much each layer counts in it."""
    return pooled(standard(probe, streams), probe.pooling, probe.clusters)


@torch.no_grad()
def output(probe: HyperProbe, pooled: Float[Tensor, "batch d"]) -> Float[Tensor, "batch dim"]:
    """The encoder's output as signs."""
    return signs(probe.encoder(pooled))


def linear_logits(probe: HyperProbe, pooled: Float[Tensor, "batch d"]) -> Float[Tensor, "batch answer"]:
    """The linear probe's logits of the answers."""
    return pooled @ probe.tensors["linear.weight"].T + probe.tensors["linear.bias"]


def held_out(probe: HyperProbe, data: ProbeData) -> list[int]:
    """The numbers of the prompts that are held out and whose answer was an answer in training, too.

    Raises:
        ValueError: there is none.
    """
    rows = [i for i in probe.splits.rows(data, *SPLITS) if data.prompts[i].value in probe.answers]
    if not rows:
        raise ValueError("no held-out prompt has an answer that the probe was trained on")
    return rows


def answer_number(probe: HyperProbe, concept: str) -> int:
    """Which of the answers a concept is.

    Raises:
        ValueError: none of them.
    """
    name = probe.codebook.concepts[probe.codebook.number(concept)]
    if name not in probe.answers:
        raise ValueError(f"concept {concept!r} is no answer that the probe was trained on")
    return probe.answers.index(name)
