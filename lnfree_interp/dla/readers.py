"""What reads the residual stream: the logits, a neuron, a query, a key, a value, any direction.

A `Reader` says what is read, and knows no model. `resolve` makes of it, on a model, a `Reading`: a place on the stream,
the norm there, and directions u with reading = <x, u> / scale + bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import choice, switch, whole
from ..batching import Places, Targets, check_places, check_targets

KINDS = ("neuron", "query", "key", "value", "direction", "logits")
SITES = ("resid_pre", "resid_mid", "final")


@dataclass(frozen=True, eq=False)
class Reader:
    """Something that reads the residual stream, or several of a kind at once. Made by the functions below.

    Attributes:
        kind: "neuron", "query", "key", "value", "direction" or "logits".
        layer: negative ones count from the end; None for "logits" and the final stream.
        units: the neurons or heads; None for all.
        vector: Float[Tensor, "d"] or Float[Tensor, "k d"], the direction of a head's or of the stream's space.
        site: for "direction", where.
        normalised: for "direction", whether it reads what the norm there hands on.
        linear: for "neuron", whether it is the linear part of a gated MLP.
        targets, versus: for "logits".

    Example:
        >>> from lnfree_interp import Reader, attribution_to, load_model
        >>> model = load_model("tiny-noLN", device="cpu")
        >>> result = attribution_to(model, "It was a dark and stormy", Reader.neuron(2, [5, 7]), by="head")
        >>> result.readers
        ('L2N5', 'L2N7')
    """

    kind: str
    layer: int | None = None
    units: Places | None = None
    vector: Any = None  # whatever holds numbers when it is made; then a Tensor
    site: str = "resid_pre"
    normalised: bool = False
    linear: bool = False
    targets: Targets | None = None
    versus: Targets | None = None

    def __post_init__(self):
        choice(self.kind, "kind", KINDS)
        choice(self.site, "site", SITES)
        for name in ("normalised", "linear"):
            switch(getattr(self, name), name)
        if self.kind not in ("direction", "logits") or self.layer is not None:
            object.__setattr__(self, "layer", whole(self.layer, "layer"))
        if self.units is not None:
            check_places(self.units, "units")
        for name in ("targets", "versus"):
            if getattr(self, name) is not None:
                check_targets(getattr(self, name), name)
        object.__setattr__(self, "vector", _vector(self.vector))

    @classmethod
    def neuron(cls, layer: int, n: Places | None = None, *, linear: bool = False) -> Reader:
        """Neurons before their activation function: `mlp.hook_pre`; in a gated MLP the gate's, or the linear part's.

        Args:
            n: one, several, or all (None).
            linear: read `mlp.hook_pre_linear` of a gated MLP.
        """
        return cls("neuron", layer, n, linear=linear)

    @classmethod
    def query(cls, layer: int, head: Places | None = None, direction: Any = None) -> Reader:
        """Queries as the product makes them (`attn.hook_q`): before norms of queries and rotary positions.

        Args:
            head: one, several, or all (None).
            direction: [d_head], or [k, d_head] for several: <q, direction> is read; None: every coordinate.
        """
        return cls("query", layer, head, direction)

    @classmethod
    def key(cls, layer: int, head: Places | None = None, direction: Any = None) -> Reader:
        """Keys (`attn.hook_k`), as `query`; where there are fewer heads of keys, those are counted."""
        return cls("key", layer, head, direction)

    @classmethod
    def value(cls, layer: int, head: Places | None = None, direction: Any = None) -> Reader:
        """Values (`attn.hook_v`), as `key`."""
        return cls("value", layer, head, direction)

    @classmethod
    def direction(cls, layer: int | None, vector: Any, site: str = "resid_pre", *, normalised: bool = False) -> Reader:
        """A direction of the stream: a probe's, or a feature's of a sparse autoencoder.

        Args:
            layer: None for the final stream.
            vector: [d_model], or [k, d_model] for several.
            site: "resid_pre", "resid_mid" or "final".
            normalised: read what the norm there hands on (attention's, the MLP's, the final), not the stream.

        Raises:
            ValueError: an unknown site; a layer where there is none, or none where one is wanted; no vector.
        """
        choice(site, "site", SITES)
        if (layer is None) != (site == "final"):
            raise ValueError(
                "site='final' has no layer: give None" if site == "final" else f"site={site!r} wants a layer"
            )
        if vector is None:
            raise ValueError("a direction wants a vector, [d_model] or [k, d_model], not None")
        return cls("direction", layer, vector=vector, site=site, normalised=normalised)

    @classmethod
    def logits(cls, targets: Targets | None = None, versus: Targets | None = None) -> Reader:
        """The logit of a token, or the difference of two, as `direct_logit_attribution` takes them."""
        return cls("logits", site="final", targets=targets, versus=versus)


def _vector(value: Any) -> Tensor | None:
    """A vector or several of whatever holds them.

    Raises:
        ValueError: no numbers, or not one or two axes of them.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, Sequence) and len(value) and all(isinstance(row, Tensor) for row in value):
            value = torch.stack(list(value))
        try:
            value = torch.as_tensor(np.asarray(value))
        except (ValueError, TypeError):
            raise ValueError(f"a direction must be a vector of numbers, not {type(value).__name__}") from None
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"a direction must be a vector of numbers, not {value.dtype}")
    if value.ndim not in (1, 2) or value.numel() == 0:
        raise ValueError(f"a direction, a vector, has shape {list(value.shape)}; allowed are [d] and [k, d]")
    return value.detach()
