"""The fast forward is TransformerLens' forward: same activations, same effect of hooks, at any positions."""

from functools import partial

import pytest
import torch
from conftest import KINDS, NORMALIZATIONS, copy_weights, hooked_only, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp import forward, read_weights, through_hooks
from lnfree_interp.lens import is_bridge
from lnfree_interp.weights import own_hooks

TOLERANCE = 1e-10
SITES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


ROTARY = {"positional_embedding_type": "rotary"}
NTK = {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 12, "NTK_by_parts_factor": 4.0}
YARN = {"use_yarn_rope": True, "yarn_factor": 3.0, "yarn_attention_factor": 1.3}
YARN["yarn_original_max_position_embeddings"] = 12
POSITIONS = (
    {},
    ROTARY,
    ROTARY | {"rotary_dim": 2, "rotary_adjacent_pairs": True},
    ROTARY | {"rotary_base": 7.5, "rotary_dim": 4},
    ROTARY | NTK,
    ROTARY | YARN | {"rotary_adjacent_pairs": True},
    ROTARY | {"rotary_scaling_factor": 8.0, "rotary_base_local": 10},
)
LOCAL = {"use_local_attn": True, "attn_types": ["local", "global", "local"]}


@settings(max_examples=60, deadline=None)
@given(
    normalization=st.sampled_from(NORMALIZATIONS),
    n_layers=st.integers(1, 3),
    heads=st.sampled_from([(1, None), (3, None), (3, 3), (3, 1), (4, 2)]),
    d_head=st.sampled_from([4, 6]),
    act_fn=st.sampled_from(["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"]),
    positions=st.sampled_from(POSITIONS),
    mlp=st.sampled_from([{"attn_only": True}, {}, {"parallel_attn_mlp": True}]),
    gated_mlp=st.booleans(),
    use_qk_norm=st.booleans(),
    cap=st.sampled_from([{}, {"attn_scores_soft_cap": 1.5, "output_logits_soft_cap": 2.0}]),
    window=st.sampled_from([{}, LOCAL | {"window_size": 2}, LOCAL | {"window_size": 30}]),
    norms=st.sampled_from([{}, {"post_embedding_ln": True}, {"use_normalization_before_and_after": True}]),
    final_rms=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_logits_are_the_models_own(
    normalization, n_layers, heads, d_head, positions, mlp, cap, window, norms, inverse, seed, **fields
):
    if "use_normalization_before_and_after" in norms and (normalization or "").startswith("LN"):
        norms = {}  # TransformerLens has none
    fields |= positions | mlp | cap | window | norms
    fields |= {"n_heads": heads[0], "n_key_value_heads": heads[1], "scale_attn_by_inverse_layer_idx": inverse}
    model = make_model(normalization, n_layers=n_layers, d_head=d_head, seed=seed, **fields)
    assert read_weights(model) is not None
    tokens = random_tokens(model, seed=seed)
    resid = forward.run(model, tokens)
    size = resid.abs().max().clamp(min=1).item()  # large without norms, whatever the logits are capped at
    torch.testing.assert_close(forward.unembed(model, resid), model(tokens), atol=TOLERANCE * size, rtol=TOLERANCE)


def sites_of(model):
    """The hook points of a block that the model's own forward runs."""
    sites = [site for site in SITES if f"blocks.0.{site}" in model.hook_dict]
    if is_bridge(model) and model.cfg.architecture == "GPTNeoXForCausalLM":  # names them, never runs them
        sites = [site for site in sites if "hook_rot" not in site]
    return sites


def test_hooks_see_and_change_what_transformer_lens_hooks_do(any_block):
    model, seen = any_block, {}
    tokens = random_tokens(model)

    def hook(where):
        def call(x):
            seen[where] = x.clone()
            return x * 1.5

        return call

    for site in sites_of(model):
        if is_bridge(model) and site == "hook_resid_mid":
            continue  # a Bridge's own is what ln2 reads, beside the skip path
        name, other = f"blocks.0.{site}", hook("theirs")
        ours = forward.run(model, tokens, hooks={name: hook("ours")}, weights=read_weights(model))
        theirs = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, other=other: other(x))])
        torch.testing.assert_close(seen["ours"], seen["theirs"], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(forward.unembed(model, ours), theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("positions", [[0], [2, 5], slice(1, 6), [6, -4]], ids=str)
def test_positions_give_the_rows_of_the_whole_pass_on_both_paths(any_block, positions):
    tokens = random_tokens(any_block)
    whole = forward.run(any_block, tokens)
    ours = forward.run(any_block, tokens, positions=positions)
    theirs = through_hooks.run(any_block, tokens, None, 0, {}, positions)
    for rows in (ours, theirs):
        torch.testing.assert_close(rows, whole[:, positions], atol=TOLERANCE, rtol=TOLERANCE)


def test_hooks_at_positions_are_the_same_on_both_paths(any_block):
    tokens, positions = random_tokens(any_block), [2, 5]
    for site in sites_of(any_block):
        hooks = {f"blocks.1.{site}": lambda x: x * 1.5}
        ours = forward.run(any_block, tokens, hooks=hooks, positions=positions)
        theirs = through_hooks.run(any_block, tokens, None, 0, hooks, positions)
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_starting_from_a_layer_continues_the_run(any_block):
    tokens, kept = random_tokens(any_block), {}
    whole = forward.run(any_block, tokens, hooks={"blocks.1.hook_resid_pre": lambda x: kept.update(x=x)})
    for run in (
        forward.run(any_block, resid=kept["x"], start_layer=1),
        through_hooks.run(any_block, None, kept["x"], 1, {}, None),
    ):
        torch.testing.assert_close(run, whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_layers_one_after_another_are_the_whole_pass(any_block):
    tokens = random_tokens(any_block)
    weights, everywhere = read_weights(any_block), slice(0, tokens.shape[1])
    resid = weights.enter(tokens, everywhere)
    for layer in weights.layers:
        resid = layer(resid, everywhere)
    torch.testing.assert_close(resid, forward.run(any_block, tokens), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_few_columns_of_the_unembedding(any_block):
    tokens = random_tokens(any_block)
    resid = forward.run(any_block, tokens)
    columns = torch.randint(any_block.cfg.d_vocab, (*tokens.shape, 2))
    few = forward.unembed(any_block, resid, columns)
    torch.testing.assert_close(few, any_block(tokens).gather(-1, columns), atol=TOLERANCE, rtol=TOLERANCE)


@hooked_only
@pytest.mark.parametrize("kind", ["Llama", "Pythia"])
def test_prompts_longer_than_the_table_of_rotary_positions(kind, monkeypatch):
    from transformer_lens.components import AbstractAttention

    monkeypatch.setattr(AbstractAttention, "ROTARY_INITIAL_CACHE_SIZE", 5)
    normalization, fields = KINDS[kind]
    ours, theirs = (make_model(normalization, **fields) for _ in range(2))
    tokens = random_tokens(ours, pos=13)
    with torch.inference_mode():
        logits = forward.unembed(ours, forward.run(ours, tokens))
    torch.testing.assert_close(logits, theirs(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    assert not ours.blocks[0].attn.rotary_cos.is_inference()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_transformer_lens_to_its_rounding(kind):
    normalization, fields = KINDS[kind]
    model = make_model(normalization, dtype=torch.bfloat16, **fields)
    tokens = random_tokens(model)
    exact = make_model(normalization, **fields)
    copy_weights(model, exact)
    wanted = exact(tokens)
    ours, theirs = forward.unembed(model, forward.run(model, tokens)), model(tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - wanted).abs().mean() < 1.5 * (theirs - wanted).abs().mean()


def _set_eps(model):
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):  # a Bridge's norms look in their config
            if hasattr(holder, "eps"):
                holder.eps = 3.0


EDITS = {
    "in place": lambda model: model.blocks[0].attn.W_Q.mul_(2),
    "through .data": lambda model: model.blocks[0].attn.W_K.data.mul_(2),
    "another tensor": lambda model: setattr(model.pos_embed.W_pos, "data", 2 * model.pos_embed.W_pos),
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
    assert own_hooks(model) == (name,) and read_weights(model) is None
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
    assert own_hooks(model) == ("blocks.0.mlp",)
    logits = forward.unembed(model, forward.run(model, tokens))
    torch.testing.assert_close(logits, model(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    handle.remove()
    assert own_hooks(model) == () and read_weights(model) is not None


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
    assert read_weights(model) is None
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
    {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True},
    {"clip_qkv": 0.5},
    {"use_attention_sinks": True},
    {"original_architecture": "Olmo2ForCausalLM"},
    {"act_fn": "solu_ln"},
    {"positional_embedding_type": "shortformer"},
    {"positional_embedding_type": "alibi"},
    {"attention_dir": "bidirectional"},
)


@pytest.mark.parametrize("fields", OTHER_BLOCKS, ids=lambda fields: str(next(iter(fields.values()))))
def test_other_blocks_go_through_transformer_lens(fields):
    model = make_model(None if "shortformer" in fields.values() else "LNPre", **fields)
    assert read_weights(model) is None
    tokens, kept = random_tokens(model), {}
    whole = forward.run(model, tokens, hooks={"blocks.1.hook_resid_pre": partial(kept.__setitem__, 1)})
    torch.testing.assert_close(forward.unembed(model, whole), model(tokens), atol=TOLERANCE, rtol=TOLERANCE)
    again = forward.run(model, resid=kept[1], start_layer=1, positions=[-1, 2])
    torch.testing.assert_close(again, whole[:, [-1, 2]], atol=TOLERANCE, rtol=TOLERANCE)


def test_experts_are_not_read():
    model = make_model("RMS", dtype=torch.float32, num_experts=2, experts_per_token=1, gated_mlp=True)
    tokens = random_tokens(model)
    assert read_weights(model) is None
    torch.testing.assert_close(forward.unembed(model, forward.run(model, tokens)), model(tokens))


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
# Several streams


@pytest.mark.parametrize("positions", [None, [-1, 1]])
def test_a_pass_that_follows_kept_keys_and_values_is_the_end_of_the_whole(any_block, positions):
    tokens, keep = random_tokens(any_block, batch=3, pos=7), {}
    whole = forward.run(any_block, tokens, keep=keep)
    kept = {}
    end = forward.run(any_block, tokens[:, 3:], past=forward.Past(3, keep), positions=positions, keep=kept)
    torch.testing.assert_close(end, whole[:, 3:] if positions is None else whole[:, 3:][:, positions])
    for layer, both in keep.items():
        torch.testing.assert_close(kept[layer], both)


def test_streams_together_are_the_passes_alone(any_block):
    model, weights = any_block, read_weights(any_block)
    tokens = [random_tokens(model, batch=n, pos=pos, seed=n) for n, pos in ((3, 5), (2, 7), (1, 1))]
    positions = [None, torch.tensor([-1]), slice(0, None)]

    def streams(wanting):
        """The streams, those asked for with a graph from what attention of block 0 writes on."""
        nodes = {}

        def watch(j, x):
            nodes[j] = x.detach().requires_grad_()
            return nodes[j]

        hooks = [{"blocks.0.hook_attn_out": partial(watch, j)} if j in wanting else {} for j in range(3)]
        resids = [forward.embed(weights, t) for t in tokens]
        return [forward.Stream(*parts) for parts in zip(resids, hooks, positions)], nodes

    for wanting in ((0,), (1, 2), (0, 1, 2), ()):
        alone, of_alone = streams(wanting)
        expected = [forward.run_streams(weights, [s])[0] for s in alone]
        together, of_together = streams(wanting)
        found = forward.run_streams(weights, together)
        for j in range(3):
            torch.testing.assert_close(found[j], expected[j])
            torch.testing.assert_close(expected[j], forward.run(model, tokens[j], positions=positions[j]))
            assert found[j].requires_grad == (j in wanting)
        if wanting:
            nodes = [[of[j] for j in wanting] for of in (of_alone, of_together)]
            torch.testing.assert_close(
                torch.autograd.grad(sum(x.square().sum() for x in found), nodes[1]),
                torch.autograd.grad(sum(x.square().sum() for x in expected), nodes[0]),
            )


def test_a_stream_may_follow_on_one_that_is_on_its_way(any_block):
    model, weights, keep = any_block, read_weights(any_block), {}
    tokens, rows = random_tokens(model, batch=3, pos=7), torch.tensor([2, 0, 2, 1])
    tokens_after = random_tokens(model, batch=4, pos=2, seed=1)
    past = forward.Past(3, keep, rows)
    streams = [
        forward.Stream(forward.embed(weights, tokens), keep=keep),
        forward.Stream(forward.embed(weights, tokens_after, past=past), past=past),
    ]
    whole, end = forward.run_streams(weights, streams)
    torch.testing.assert_close(whole, forward.run(model, tokens))
    torch.testing.assert_close(end, forward.run(model, torch.cat([tokens[rows, :3], tokens_after], 1))[:, 3:])


def test_hidden_activations_some_rows_at_a_time_are_the_same(any_block, monkeypatch):
    tokens = random_tokens(any_block)
    whole = forward.run(any_block, tokens)
    monkeypatch.setitem(forward.HIDDEN, "cpu", 1)
    torch.testing.assert_close(forward.run(any_block, tokens), whole)


def test_what_the_fast_forward_does_not_serve_is_said(random_model):
    model = random_model(None, positional_embedding_type="alibi")
    with pytest.raises(ValueError, match="past keys and values need a model"):
        forward.run(model, random_tokens(model), past=forward.Past(1, {}))
