"""What can be patched, and how: the names that the functions and the command take. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """Where an activation is: TransformerLens' hook under `blocks.{layer}.`, and what one cell of it is."""

    hook: str
    unit: str  # "pos", "head" or "neuron"


SITES = {
    "resid_pre": Site("hook_resid_pre", "pos"),
    "resid_mid": Site("hook_resid_mid", "pos"),
    "resid_post": Site("hook_resid_post", "pos"),
    "attn_out": Site("hook_attn_out", "pos"),
    "mlp_out": Site("hook_mlp_out", "pos"),
    "z": Site("attn.hook_z", "head"),
    "q": Site("attn.hook_q", "head"),
    "k": Site("attn.hook_k", "head"),
    "v": Site("attn.hook_v", "head"),
    "pattern": Site("attn.hook_pattern", "head"),
    "neurons": Site("mlp.hook_post", "neuron"),
}
METHODS = ("gradient", "integrated", "second_order", "atp_star", "relp")
DIRECTIONS = ("denoising", "noising")
# Total effects below, in the metric's units (logits, for logit_diff), are not normalised by.
LEAST = 0.5
# Name -> the metric, made by the module `metrics` for a model and its pairs.
METRICS = {
    "logit_diff": lambda metrics, model, pairs: metrics.logit_diff,
    "right_log_prob": lambda metrics, model, pairs: metrics.right_log_prob(pairs),
    "kl_from_clean": lambda metrics, model, pairs: metrics.kl_from_clean(model, pairs),
}
