"""Composition scores are the definition's, and virtual weights are what an intervention on the direct path does."""

import pytest
import torch
from conftest import KINDS, hooked_only, make_model, random_tokens

from lnfree_interp import composition_scores, forward, lens, load_model, read_weights, virtual_weights

DEEP = {"n_layers": 3}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------------
# Composition scores


def of_norm(model, module, W):
    """diag(w) W and, where layer norm centres, C diag(w) W: by the matrices themselves."""
    kind = model.cfg.normalization_type
    if getattr(module, "w", None) is not None:
        W = torch.diag(module.w) @ W
    if kind is not None and kind.startswith("LN"):
        W = (torch.eye(model.cfg.d_model, dtype=W.dtype) - 1 / model.cfg.d_model) @ W
    return W


def by_definition(model, kind):
    """|W_OV W| / (|W_OV| |W|) of matrices [d_model, d_model]."""
    cfg = model.cfg
    OV, QK, given = [], [], lens.parameters(model)
    for i, block in enumerate(model.blocks):
        for h in range(cfg.n_heads):
            g = h * (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) // cfg.n_heads
            W_K, W_V = (getattr(block.attn, f"_W_{x}", getattr(block.attn, f"W_{x}")) for x in "KV")
            # TransformerLens' W_K of grouped heads may be repeated.
            W_K, W_V = (W[g if len(W) < cfg.n_heads else h] for W in (W_K, W_V))
            q, k, v = (of_norm(model, block.ln1, W) for W in (block.attn.W_Q[h], W_K, W_V))
            if f"blocks.{i}.attn.q_norm.w" in given:
                q, k = (x * given[f"blocks.{i}.attn.{n}_norm.w"] for x, n in ((q, "q"), (k, "k")))
            W_O = block.attn.W_O[h]
            if getattr(cfg, "use_normalization_before_and_after", False) and cfg.normalization_type is not None:
                W_O = W_O * block.ln1_post.w
            if cfg.normalization_type in ("LN", "LNPre"):
                W_O = W_O - W_O.mean(-1, keepdim=True)
            OV.append(v @ W_O)
            QK.append(q @ k.T)
    right = {"Q": QK, "K": [W.T for W in QK], "V": OV}[kind]
    scores = torch.stack([torch.stack([(a @ b).norm() / (a.norm() * b.norm()) for b in right]) for a in OV])
    scores = scores.view(cfg.n_layers, cfg.n_heads, cfg.n_layers, cfg.n_heads)
    for i in range(cfg.n_layers):
        scores[i, :, : i + 1] = 0
    return scores


@pytest.mark.parametrize("kind", "QKV")
def test_scores_are_the_definitions(any_block, kind):
    before = {name: p.clone() for name, p in lens.parameters(any_block).items()}
    close(composition_scores(any_block, kind), by_definition(any_block, kind))
    assert all(torch.equal(p, before[name]) for name, p in lens.parameters(any_block).items())


def of_transformer_lens(model, kind):
    found = model.all_composition_scores(kind)
    return found if isinstance(found, torch.Tensor) else found.scores


@pytest.mark.parametrize("kind", "QKV")
@pytest.mark.parametrize("name", ["tiny", "tiny-vanilla", "tiny-noLN"])
def test_scores_are_transformer_lens_on_folded_models(name, kind):
    model = load_model(name)
    close(composition_scores(model, kind), of_transformer_lens(model, kind), 1e-5)


@pytest.mark.parametrize("block", ["GPT-2", "Pythia", "Llama"])
def test_scores_are_transformer_lens_without_norms(model_of, block):
    model = model_of(block, False, **DEEP)
    for kind in "QKV":
        close(composition_scores(model, kind), of_transformer_lens(model, kind))


@hooked_only
def test_heads_wider_than_the_stream():
    wide = make_model("LN", d_model=6, d_head=8, n_heads=2)
    for kind in "QKV":
        close(composition_scores(wide, kind), by_definition(wide, kind))


def test_hooks_are_no_matter_of_weights(random_model):
    hooked, plain = make_model("LN"), random_model("LN")
    hooked.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 2 * x)
    close(composition_scores(hooked, "V"), composition_scores(plain, "V"))
    close(*(virtual_weights(model, "L0.mlp", "logits").AB for model in (hooked, plain)))


@hooked_only
def test_nor_is_what_happens_inside_mlps():
    experts = make_model("RMS", dtype=torch.float32, num_experts=2, experts_per_token=1, gated_mlp=True)
    close(composition_scores(experts, "K"), by_definition(experts, "K").float(), 1e-5)
    solu = make_model(None, act_fn="solu_ln")
    close(composition_scores(solu, "K"), by_definition(solu, "K"))
    tokens = random_tokens(solu)
    coefficients, write = sent(solu, tokens, "L0.mlp")
    close(coefficients @ virtual_weights(solu, "L0.mlp", "L1H2.q").AB, moved(solu, tokens, "L1H2.q", write))
    with pytest.raises(ValueError, match=r"sender 'L0\.mlp' is unknown; allowed are embed, pos_embed, L0H0 to L1H2$"):
        virtual_weights(experts, "L0.mlp", "logits")


def test_a_head_set_to_zero_scores_zero():
    model = make_model("LN")
    given = lens.parameters(model)
    given["blocks.0.attn.W_O"][1] = 0
    given["blocks.1.attn.W_Q"][2] = 0
    scores = composition_scores(model, "Q")
    assert not scores[0, 1].any() and not scores[0, :, 1, 2].any() and scores[0, 0, 1, 0] > 0


def test_one_layer_has_no_later_one():
    assert not composition_scores(make_model(None, n_layers=1), "Q").any()


# ---------------------------------------------------------------------------------------------------------
# Virtual weights


def recorded(model, tokens, names, hooks=None):
    """Activations of a run, and the final residual stream, with hooks that change it."""
    found = {}

    def record(name):
        def hook(x):
            found[name] = x.clone()

        return hook

    resid = forward.run(model, tokens, hooks={name: record(name) for name in names} | (hooks or {}))
    return found, resid


def site_of(model, receiver):
    """Where a receiver's input is recorded, and where the stream that it reads can be changed."""
    i = receiver[1]
    if "H" in receiver:
        return f"blocks.{i}.attn.hook_{receiver[-1]}", f"blocks.{i}.hook_resid_pre"
    point = "hook_pre_linear" if receiver.endswith("linear") else "hook_pre"
    parallel = getattr(model.cfg, "parallel_attn_mlp", False)
    return f"blocks.{i}.mlp.{point}", f"blocks.{i}.hook_resid_" + ("pre" if parallel else "mid")


def units_of(model, receiver, x):
    """The receiver's own part of what is recorded."""
    if "H" in receiver:
        head = int(receiver[3])
        return x[:, :, head * x.shape[2] // model.cfg.n_heads]
    return x if ".mlp" in receiver else x[..., [int(receiver.removesuffix(".linear")[3:])]]


def moved(model, tokens, receiver, write):
    """By how much the receiver's input falls when the write is taken out of the stream that it reads."""
    if receiver == "logits":
        resid = forward.run(model, tokens)
        return forward.unembed(model, resid) - forward.unembed(model, resid - write)
    name, where = site_of(model, receiver)
    before = recorded(model, tokens, [name])[0][name]
    after = recorded(model, tokens, [name], {where: lambda x: x - write})[0][name]
    return units_of(model, receiver, before - after)


def sent(model, tokens, sender):
    """A sender's coefficients, and what it writes."""
    n_pos = tokens.shape[1]
    if sender == "embed":
        coefficients = torch.nn.functional.one_hot(tokens, model.cfg.d_vocab).double()
        return coefficients, model.embed.W_E[tokens]
    if sender == "pos_embed":
        coefficients = torch.eye(n_pos, model.cfg.n_ctx, dtype=torch.float64).expand(len(tokens), -1, -1)
        return coefficients, model.pos_embed.W_pos[:n_pos].expand(len(tokens), -1, -1)
    block = model.blocks[int(sender[1])]
    name = f"blocks.{sender[1]}." + ("attn.hook_z" if "H" in sender else "mlp.hook_post")
    x = recorded(model, tokens, [name])[0][name]
    if "H" in sender:
        z = x[:, :, int(sender[3])]
        return z, z @ block.attn.W_O[int(sender[3])]
    if "N" in sender:
        n = int(sender[3:])
        return x[..., [n]], x[..., [n]] @ block.mlp.W_out[[n]]
    return x, x @ block.mlp.W_out


SENDERS = ("embed", "pos_embed", "L0.mlp", "L1N5", "L1H2")
RECEIVERS = ("L2.mlp", "L2N7", "L2H1.q", "L2H2.k", "L2H1.v", "logits")
UNCAPPED = DEEP | {"output_logits_soft_cap": -1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_weights_are_what_taking_the_sender_out_does(model_of, kind):
    model = model_of(kind, False, **UNCAPPED)
    tokens = random_tokens(model)
    gated = getattr(model.cfg, "gated_mlp", False)
    for sender in SENDERS[: 1 + (kind == "GPT-2")] + SENDERS[2:]:
        coefficients, write = sent(model, tokens, sender)
        for receiver in RECEIVERS + ("L2.mlp.linear", "L2N7.linear") * gated:
            weights = virtual_weights(model, sender, receiver)
            assert weights.shape == (coefficients.shape[-1], weights.AB.shape[-1])
            close(coefficients @ weights.AB, moved(model, tokens, receiver, write))
    coefficients, write = sent(model, tokens, "L2H0")  # within a block, one after the other
    if not getattr(model.cfg, "parallel_attn_mlp", False):
        close(coefficients @ virtual_weights(model, "L2H0", "L2.mlp").AB, moved(model, tokens, "L2.mlp", write))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["L1H2", ["L1H0"], ["L0H1", "L1H2"]])
def test_through_heads_they_are_what_goes_along_their_patterns(model_of, kind, through):
    model = model_of(kind, False, **UNCAPPED)
    tokens = random_tokens(model)
    coefficients, write = sent(model, tokens, "embed")
    along = coefficients
    for head in [through] if isinstance(through, str) else through:
        i, h = int(head[1]), int(head[3])
        v, z, pattern = (f"blocks.{i}.attn.hook_{x}" for x in ("v", "z", "pattern"))
        found, _ = recorded(model, tokens, [z, pattern])
        less = moved(model, tokens, head + ".v", write)  # of this head's values alone
        group = h * recorded(model, tokens, [v])[0][v].shape[2] // model.cfg.n_heads

        def change(x, less=less, group=group):
            x = x.clone()
            x[:, :, group] -= less
            return x

        after = recorded(model, tokens, [z], {v: change})[0][z]
        write = (found[z] - after)[:, :, h] @ model.blocks[i].attn.W_O[h]
        along = found[pattern][:, h] @ along
    for receiver in ("L2.mlp", "L2H1.q", "logits"):
        weights = virtual_weights(model, "embed", receiver, through)
        assert weights.mdim == model.cfg.d_head
        close(along @ weights.AB, moved(model, tokens, receiver, write))


# A norm after a block's part has a scale of its own.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Gemma"])
@pytest.mark.parametrize("receiver", ["L2N7", "L2H1.q", "L2H2.k", "logits"])
def test_with_a_norm_all_senders_over_its_scale_are_the_input_but_for_biases(kind, receiver):
    normalization, own = KINDS[kind]
    model = make_model(normalization, **(own | UNCAPPED))
    for name, p in lens.parameters(model).items():
        if name.endswith((".b_O", ".b_out")):
            p.zero_()
    tokens = random_tokens(model)
    senders = ["embed"] + ["pos_embed"] * (kind == "GPT-2") + [f"L{i}.mlp" for i in range(2)]
    senders += [f"L{i}H{h}" for i in range(2) for h in range(model.cfg.n_heads)]
    parallel = getattr(model.cfg, "parallel_attn_mlp", False)
    if receiver == "logits":
        senders += ["L2.mlp"]
    if receiver == "logits" or (receiver == "L2N7" and not parallel):
        senders += [f"L2H{h}" for h in range(model.cfg.n_heads)]
    parts = sum(sent(model, tokens, s)[0] @ virtual_weights(model, s, receiver).AB for s in senders)
    if receiver == "logits":
        resid = forward.run(model, tokens)
        scale, whole = read_weights(model).ln_final.scale(resid), forward.unembed(model, resid)
    else:
        name, where = site_of(model, receiver)
        found, _ = recorded(model, tokens, [name, where])
        layer = read_weights(model).layers[2]
        scale = (layer.ln2 if "N" in receiver else layer.ln1).scale(found[where])
        whole = units_of(model, receiver, found[name])
    left = whole - parts / scale
    close(left, left[:1, :1].expand_as(left))
    assert (parts / scale).std() > 0.1


@pytest.mark.parametrize("kind, folded", [("LN", "LNPre"), ("RMS", "RMSPre")])
def test_norms_unfolded_give_what_folded_ones_give(kind, folded):
    model, other = make_model(kind, n_layers=3), make_model(folded, n_layers=3)
    given = lens.parameters(model)
    for name, p in lens.parameters(other).items():
        p.copy_(given[name])
        norm = {"Q": "ln1", "K": "ln1", "V": "ln1", "in": "ln2"}.get(name.split("W_")[-1])
        W = p
        if norm is not None:
            W = given[f"blocks.{name.split('.')[1]}.{norm}.w"][:, None] * p
        if name == "unembed.W_U":
            W = given["ln_final.w"][:, None] * p
        if kind == "LN" and W is not p:
            W = W - W.mean(-2, keepdim=True)
        if kind == "LN" and name.endswith((".W_O", ".W_out", "W_E", "W_pos")):
            W = W - W.mean(-1, keepdim=True)
        p.copy_(W)
    for composed in "QKV":
        close(composition_scores(model, composed), composition_scores(other, composed))
    for sender in SENDERS:
        for receiver in RECEIVERS:
            close(virtual_weights(model, sender, receiver).AB, virtual_weights(other, sender, receiver).AB)
    close(*(virtual_weights(m, "embed", "L2.mlp", ["L0H1", "L1H2"]).AB for m in (model, other)))


# ---------------------------------------------------------------------------------------------------------
# Errors

WRONG = [
    (("L0.mpl", "logits"), "sender 'L0.mpl' is unknown; allowed are embed, pos_embed, L0H0 to L1H2, L0N0 to L1N39"),
    (("L0H1.q", "logits"), "sender 'L0H1.q' is unknown"),
    (("logits", "logits"), "sender 'logits' is unknown"),
    (("L2H0", "logits"), "sender 'L2H0' is unknown"),
    (("L0H3", "logits"), "sender 'L0H3' is unknown"),
    (("L-1H0", "logits"), "sender 'L-1H0' is unknown"),
    (("embed", "L0N40"), "receiver 'L0N40' is unknown; allowed are L0H0 to L1H2 with .q, .k or .v, L0N0 to L1N39"),
    (("embed", "L1H0"), "receiver 'L1H0' is unknown"),
    (("embed", "L1H0.z"), "receiver 'L1H0.z' is unknown"),
    (("embed", "L1.mlp.linear"), "receiver 'L1.mlp.linear' is unknown"),
    (("embed", "logits", "L0.mlp"), "head 'L0.mlp' is unknown; allowed are L0H0 to L1H2$"),
    (("L1H0", "L1H1.q"), "L1H0 writes after L1H1.q has read"),
    (("L1H0", "L0.mlp"), "L1H0 writes after L0.mlp has read"),
    (("L1.mlp", "L1.mlp"), "L1.mlp writes after L1.mlp has read"),
    (("L0.mlp", "logits", "L0H0"), "L0.mlp writes after L0H0 has read"),
    (("embed", "logits", ("L1H0", "L0H0")), "L1H0 writes after L0H0 has read"),
    (("embed", "L1H1.v", "L1H0"), "L1H0 writes after L1H1.v has read"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=str)
def test_wrong_names_and_orders_are_one_line(random_model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        virtual_weights(random_model(None), *arguments)
    assert "\n" not in str(error.value)


def test_parts_of_a_parallel_block_do_not_read_each_other(model_of):
    with pytest.raises(ValueError, match=r"L1H0 writes after L1\.mlp has read"):
        virtual_weights(model_of("Pythia"), "L1H0", "L1.mlp")


def test_what_a_model_does_not_have_is_said(model_of, random_model):
    with pytest.raises(ValueError, match="sender 'pos_embed' is unknown; allowed are embed, L0H0 to L1H3"):
        virtual_weights(model_of("Llama"), "pos_embed", "logits")
    with pytest.raises(ValueError, match=r"sender 'L0\.mlp' is unknown; allowed are embed, pos_embed, L0H0 to L1H2$"):
        virtual_weights(random_model(None, attn_only=True), "L0.mlp", "logits")
    with pytest.raises(ValueError, match="unknown kind 'q'; allowed are Q, K, V"):
        composition_scores(random_model(None), "q")
