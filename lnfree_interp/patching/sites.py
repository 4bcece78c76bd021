"""What can be patched, and how: the names that the functions and the command take. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

RESID, HEADS, NEURONS = ("prompt", "pos", "d_model"), ("prompt", "pos", "head", "d_head"), ("prompt", "pos", "neuron")


@dataclass(frozen=True)
class Site:
    """One kind of activation: where it is, what a cell of it is, and what a change of it reaches.

    Attributes:
        hook: TransformerLens' name, under `blocks.{layer}.`.
        unit: which axis the cells of a layer go along: "pos", "head" or "neuron".
        axes: of the activation. A pattern's position is the query's.
        of_token: in the first layer each position's is the same function of the token there and of nothing else.
        scores: the scores of attention are made of it.
        of_keys: its heads are those of keys and values, of which there may be fewer than of queries.
        spreads: this layer's own attention carries a change at one position to others; of another site, only later
            layers' does, so that in the last layer nothing but the positions read matters.
        of_mlp: blocks without an MLP have none.
        edited_through: the site whose edit is an edit of this one, where a model's hook of it is not on the residual
            stream's way: the two differ by resid_pre.
    """

    hook: str
    unit: str
    axes: tuple[str, ...]
    of_token: bool = False
    scores: bool = False
    of_keys: bool = False
    spreads: bool = False
    of_mlp: bool = False
    edited_through: str | None = None

    @property
    def positional(self) -> bool:
        """Whether cells are positions, not units at a position or at all of them."""
        return self.unit == "pos"

    @property
    def pos_axis(self) -> int:
        return self.axes.index("pos")

    @property
    def unit_axis(self) -> int:
        return self.axes.index(self.unit)

    @property
    def inner_axes(self) -> tuple[int, ...]:
        """Those of the numbers that one unit has at one position."""
        return tuple(i for i, axis in enumerate(self.axes) if axis not in ("prompt", "pos", self.unit))

    def name(self, layer: int) -> str:
        """The hook's full name in a layer."""
        return f"blocks.{layer}.{self.hook}"


SITES = {
    "resid_pre": Site("hook_resid_pre", "pos", RESID, of_token=True, spreads=True),
    "resid_mid": Site("hook_resid_mid", "pos", RESID, of_mlp=True, edited_through="attn_out"),
    "resid_post": Site("hook_resid_post", "pos", RESID),
    "attn_out": Site("hook_attn_out", "pos", RESID),
    "mlp_out": Site("hook_mlp_out", "pos", RESID, of_mlp=True),
    "z": Site("attn.hook_z", "head", HEADS),
    "q": Site("attn.hook_q", "head", HEADS, of_token=True, scores=True),
    "k": Site("attn.hook_k", "head", HEADS, of_token=True, scores=True, of_keys=True, spreads=True),
    "v": Site("attn.hook_v", "head", HEADS, of_token=True, of_keys=True, spreads=True),
    "pattern": Site("attn.hook_pattern", "head", ("prompt", "head", "pos", "key")),
    "neurons": Site("mlp.hook_post", "neuron", NEURONS, of_mlp=True),
}
METHODS = ("gradient", "integrated", "second_order", "atp_star", "relp")
DIRECTIONS = ("denoising", "noising")
# Total effects below, in the metric's units (logits, for logit_diff), are not normalised by.
LEAST = 0.5
# What metrics are in.
UNITS = {"logit_diff": "logits", "right_log_prob": "nats", "kl_from_clean": "nats"}
# Name -> the metric, made by the module `metrics` for a model and its pairs.
METRICS = {
    "logit_diff": lambda metrics, model, pairs: metrics.logit_diff,
    "right_log_prob": lambda metrics, model, pairs: metrics.right_log_prob(pairs),
    "kl_from_clean": lambda metrics, model, pairs: metrics.kl_from_clean(model, pairs),
}
