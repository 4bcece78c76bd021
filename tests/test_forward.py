"""The packed forward is TransformerLens' forward: same activations, same effect of hooks, at any positions."""

from functools import partial

import pytest
import torch
from conftest import NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import forward

TOLERANCE = 1e-10
SITES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


@settings(max_examples=25, deadline=None)
@given(
    normalization=st.sampled_from(NORMALIZATIONS),
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    d_head=st.sampled_from([1, 4, 6]),
    act_fn=st.sampled_from(["gelu", "gelu_new", "relu", "silu"]),
    attn_only=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_logits_are_the_models_own(normalization, n_layers, n_heads, d_head, act_fn, attn_only, inverse, seed):
    model = make_model(
        normalization,
        n_layers=n_layers,
        n_heads=n_heads,
        d_head=d_head,
        act_fn=act_fn,
        attn_only=attn_only,
        scale_attn_by_inverse_layer_idx=inverse,
        seed=seed,
    )
    assert forward.covers(model)
    tokens = random_tokens(model, seed=seed)
    logits = forward.unembed(model, forward.run(model, tokens))
    torch.testing.assert_close(logits, model(tokens), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("site", SITES)
def test_hooks_see_and_change_what_transformer_lens_hooks_do(any_model, site):
    tokens, name = random_tokens(any_model), f"blocks.0.{site}"
    seen = {}

    def hook(where):
        def call(x):
            seen[where] = x.clone()
            return x * 1.5

        return call

    ours = forward.run(any_model, tokens, hooks={name: hook("packed")})
    other = hook("hooked")
    theirs = any_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: other(x))])
    torch.testing.assert_close(seen["packed"], seen["hooked"], atol=TOLERANCE, rtol=TOLERANCE)
    logits = forward.unembed(any_model, ours)
    torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("positions", [[0], [2, 5], slice(1, 6), [6]])
def test_positions_give_the_rows_of_the_whole_pass_on_both_paths(any_model, positions):
    tokens = random_tokens(any_model)
    whole = forward.run(any_model, tokens)
    ours = forward.run(any_model, tokens, positions=positions)
    theirs = forward._run_hooked(any_model, tokens, None, 0, {}, positions)
    for rows in (ours, theirs):
        torch.testing.assert_close(rows, whole[:, positions], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("site", SITES)
def test_hooks_at_positions_are_the_same_on_both_paths(any_model, site):
    tokens, name, positions = random_tokens(any_model), f"blocks.1.{site}", [2, 5]
    hooks = {name: lambda x: x * 1.5}
    ours = forward.run(any_model, tokens, hooks=hooks, positions=positions)
    theirs = forward._run_hooked(any_model, tokens, None, 0, hooks, positions)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_starting_from_a_layer_continues_the_run(any_model):
    tokens, kept = random_tokens(any_model), {}
    whole = forward.run(any_model, tokens, hooks={"blocks.1.hook_resid_pre": lambda x: kept.update(x=x)})
    for run in (
        forward.run(any_model, resid=kept["x"], start_layer=1),
        forward._run_hooked(any_model, None, kept["x"], 1, {}, None),
    ):
        torch.testing.assert_close(run, whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_few_columns_of_the_unembedding(any_model):
    tokens = random_tokens(any_model)
    resid = forward.run(any_model, tokens)
    columns = torch.randint(any_model.cfg.d_vocab, (*tokens.shape, 2))
    few = forward.unembed(any_model, resid, columns)
    torch.testing.assert_close(few, any_model(tokens).gather(-1, columns), atol=TOLERANCE, rtol=TOLERANCE)


def _set_eps(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 3.0


EDITS = {
    "in place": lambda model: model.blocks[0].attn.W_Q.mul_(2),
    "through .data": lambda model: model.blocks[0].attn.W_K.data.mul_(2),
    "another tensor": lambda model: setattr(model.blocks[1].attn.b_V, "data", model.blocks[1].attn.b_V + 1),
    "the norms' eps": _set_eps,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["LNPre", "RMS", None])
def test_edits_of_a_model_are_followed(edit, kind):
    model = make_model(kind)
    tokens = random_tokens(model)
    before = forward.run(model, tokens)
    with torch.no_grad():
        EDITS[edit](model)
    after = forward.run(model, tokens)
    assert torch.equal(before, after) == (kind is None and "eps" in edit)
    torch.testing.assert_close(forward.unembed(model, after), model(tokens), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_a_pass_under_inference_mode_leaves_later_gradients_alone(kind):
    model = make_model(kind)
    tokens, nodes = random_tokens(model), []
    with torch.inference_mode():
        forward.run(model, tokens)
    grab = {"blocks.0.hook_resid_pre": lambda x: nodes.append(x.detach().requires_grad_()) or nodes[-1]}
    final = forward.run(model, tokens, hooks=grab)
    (gradient,) = torch.autograd.grad(final.square().sum(), nodes)
    assert gradient.abs().min() > 0


# ---------------------------------------------------------------------------------------------------------
# Hooks that the model carries itself

OWN = (
    "hook_embed",
    "hook_pos_embed",
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_resid_post",
)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_a_models_own_hooks_are_run_once_wherever_a_pass_starts(name, kind):
    model = make_model(kind, n_layers=3)
    tokens, steer = random_tokens(model), torch.randn(3, dtype=torch.float64)
    before = model(tokens)
    model.add_hook(name, lambda x, hook: x * 1.5 + steer[0], is_permanent=True)
    assert forward.own_hooks(model) == (name,) and not forward.covers(model)
    kept = {}
    watch = {f"blocks.{i}.hook_resid_pre": partial(kept.__setitem__, i) for i in range(3)}
    whole = forward.run(model, tokens, hooks=watch)
    assert not torch.allclose(forward.unembed(model, whole), before)
    torch.testing.assert_close(forward.unembed(model, whole), model(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    for start, resid in kept.items():
        again = forward.run(model, resid=resid, start_layer=start)
        torch.testing.assert_close(again, whole, atol=TOLERANCE, rtol=TOLERANCE)
        # What is put in by a hook of ours is what a hook of TransformerLens' would put in.
        name = f"blocks.{start}.hook_resid_pre"
        ours = forward.run(model, resid=resid, start_layer=start, hooks={name: lambda x: x + 1})
        theirs = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x + 1)])
        torch.testing.assert_close(forward.unembed(model, ours), theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_hooks_of_any_module_are_run():
    model = make_model("LNPre")
    tokens = random_tokens(model)
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
    assert forward.own_hooks(model) == ("blocks.0.mlp",)
    logits = forward.unembed(model, forward.run(model, tokens))
    torch.testing.assert_close(logits, model(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    handle.remove()
    assert forward.own_hooks(model) == () and forward.covers(model)


def test_modules_of_a_users_are_run():
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = make_model("LNPre")
    tokens = random_tokens(model)
    model.blocks[0].mlp = Twice(model.blocks[0].mlp)
    assert not forward.covers(model)
    logits = forward.unembed(model, forward.run(model, tokens))
    torch.testing.assert_close(logits, model(tokens), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["ln_final.hook_scale", "ln_final.hook_normalized"])
def test_hooks_on_the_final_norm_are_refused(name):
    model = make_model("LNPre")
    model.add_hook(name, lambda x, hook: x * 2, is_permanent=True)
    with pytest.raises(ValueError, match=f"carries a hook at {name}"):
        forward.unembed(model, forward.run(model, random_tokens(model)))


def test_a_hook_on_the_whole_model_is_refused():
    model = make_model(None)
    model.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="carries a hook at its root"):
        forward.unembed(model, forward.run(model, random_tokens(model)))


# ---------------------------------------------------------------------------------------------------------
# Other blocks

OTHER_BLOCKS = (
    {"positional_embedding_type": "rotary", "rotary_dim": 8},
    {"gated_mlp": True},
    {"n_key_value_heads": 1},
    {"parallel_attn_mlp": True},
    {"positional_embedding_type": "shortformer"},
    {"positional_embedding_type": "alibi"},
    {"attention_dir": "bidirectional"},
)


@pytest.mark.parametrize("fields", OTHER_BLOCKS, ids=lambda fields: str(next(iter(fields.values()))))
def test_other_blocks_go_through_transformer_lens(fields):
    model = make_model(None if "shortformer" in fields.values() else "LNPre", **fields)
    assert not forward.covers(model)
    tokens, kept = random_tokens(model), {}
    whole = forward.run(model, tokens, hooks={"blocks.1.hook_resid_pre": partial(kept.__setitem__, 1)})
    torch.testing.assert_close(forward.unembed(model, whole), model(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    again = forward.run(model, resid=kept[1], start_layer=1, positions=[-1, 2])
    torch.testing.assert_close(again, whole[:, [-1, 2]], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("fields", [{}, *OTHER_BLOCKS], ids=lambda fields: str(next(iter(fields.values()), "GPT-2")))
def test_after_the_last_layer_nothing_is_left_to_run(fields):
    model = make_model(None, **fields)
    resid = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.equal(forward.run(model, resid=resid, start_layer=2), resid)
    assert torch.equal(forward.run(model, resid=resid, start_layer=2, positions=[4, 1]), resid[:, [4, 1]])
    with pytest.raises(ValueError, match=r"start_layer 3 is outside 0\.\.2"):
        forward.run(model, resid=resid, start_layer=3)


def test_an_unknown_hook_is_an_error(any_model):
    with pytest.raises(ValueError, match=r"no hook 'blocks\.9\.hook_z'"):
        forward.run(any_model, random_tokens(any_model), hooks={"blocks.9.hook_z": lambda x: x})


# ---------------------------------------------------------------------------------------------------------
# Two passes in step


@pytest.mark.parametrize("kind", [None, "LN", "LNPre", "RMS"])
@pytest.mark.parametrize("positions", [None, [-1, 1]])
def test_a_pass_that_follows_kept_keys_and_values_is_the_end_of_the_whole(kind, positions, random_model):
    model = random_model(kind)
    tokens = random_tokens(model, batch=3, pos=7)
    kept = {"k": {}, "v": {}}
    hooks = {
        f"blocks.{i}.attn.hook_{name}": partial(lambda into, i, x: into.__setitem__(i, x[:, :3]), into, i)
        for name, into in kept.items()
        for i in range(model.cfg.n_layers)
    }
    whole = forward.run(model, tokens, hooks=hooks)
    past = forward.Past(3, {i: (kept["k"][i], kept["v"][i]) for i in kept["k"]})
    end = forward.run(model, tokens[:, 3:], past=past, positions=positions)
    torch.testing.assert_close(end, whole[:, 3:] if positions is None else whole[:, 3:][:, positions])


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_two_passes_in_step_are_the_two_passes(kind, random_model):
    model = random_model(kind)
    first, second = random_tokens(model, batch=3, pos=5), random_tokens(model, batch=2, pos=7, seed=1)
    nodes = {}

    def watch(where, x):
        nodes[where] = x.detach().requires_grad_()
        return nodes[where]

    def gradient(where, run):
        final = run({"blocks.0.hook_resid_mid": partial(watch, where)})
        return final, torch.autograd.grad(final.square().sum(), nodes[where])[0]

    options = {"tokens": second, "positions": [-1]}
    plain = []

    def in_step(hooks):
        final, other = forward.run_both(model, {"tokens": first, "hooks": hooks}, options)
        plain.append(other)
        return final

    expected, expected_gradient = gradient("alone", lambda hooks: forward.run(model, first, hooks=hooks))
    final, found_gradient = gradient("in step", in_step)
    torch.testing.assert_close(final, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)
    torch.testing.assert_close(plain[0], forward.run(model, **options))
    assert final.requires_grad and not plain[0].requires_grad


def test_what_the_packed_forward_does_not_serve_is_said(random_model):
    model = random_model(None, positional_embedding_type="rotary", rotary_dim=4)
    tokens = random_tokens(model)
    with pytest.raises(ValueError, match="past keys and values need a model"):
        forward.run(model, tokens, past=forward.Past(1, {}))
    with pytest.raises(ValueError, match="two passes in step need a model"):
        forward.run_both(model, {"tokens": tokens}, {"tokens": tokens})
