"""The pairs of components sum to the attention scores that the model has; the largest pairs are those of all."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, NORMALIZATIONS, hooked_only, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bridge import IN_FP32, NAMES, bridge_of
from test_dla import BY, component_outputs

from lnfree_interp import attention_score_attribution, forward, lens
from lnfree_interp.dla import scores as module
from lnfree_interp.weights import normalises_writes


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def own_scores(model, tokens, layer, head, queries=slice(None), keys=slice(None)):
    """The model's own, before a soft cap, and where they are not masked."""
    name = f"blocks.{layer}.attn.hook_attn_scores"
    found = []
    model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: found.append(x.clone()))])
    whole = found[0][:, head]
    cap = getattr(model.cfg, "attn_scores_soft_cap", None) or -1
    shown = (whole > -1e9)[0]
    if cap > 0:
        whole = cap * torch.atanh(torch.where(shown, whole / cap, 0))
    return whole[:, queries][:, :, keys], shown[queries][:, keys]


@pytest.mark.parametrize("by", BY)
def test_pairs_sum_to_the_models_scores(any_block, by):
    tokens = random_tokens(any_block)
    if by != "component" and normalises_writes(any_block):
        with pytest.raises(ValueError, match="normalises what its blocks write"):
            attention_score_attribution(any_block, tokens, 1, 0, by=by)
        return
    for layer, head in ((0, 1), (1, 2)):
        found = attention_score_attribution(any_block, tokens, layer, head, by=by)
        wanted, shown = own_scores(any_block, tokens, layer, head)
        total = found.values.sum((0, 1)) + found.bias
        assert torch.equal(found.visible, shown)
        close(total[:, shown], wanted[:, shown], 1e-8)
        close(found.scores, total, 1e-9)
        assert found.values.shape[:2] == (len(found.query_labels), len(found.key_labels))
        assert (found.query_labels[-1], found.key_labels[-1]) == ("b_Q", "b_K") and not found.values[-1, -1].any()
        assert found.values[0, 0].abs().min() > 0


def score_without(model, tokens, layer, head, query, key, taken, scales):
    """A score of TransformerLens' own, some outputs taken out of what the layer reads: (position, output) pairs."""

    def take(x, hook):
        x = x.clone()
        for position, output in taken:
            x[:, position] -= output[:, position]
        return x

    found = []
    hooks = [(f"blocks.{layer}.hook_resid_pre", take)]
    hooks += [(name, lambda x, hook, scale=scale: scale) for name, scale in scales.items()]
    hooks.append((f"blocks.{layer}.attn.hook_attn_scores", lambda x, hook: found.append(x[:, head, query, key])))
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    cap = getattr(model.cfg, "attn_scores_soft_cap", None) or -1
    return cap * torch.atanh(found[0] / cap) if cap > 0 else found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", [False, pytest.param(True, marks=hooked_only)])
def test_a_pair_is_what_taking_both_out_changes(model_of, kind, normalised):
    """score - score without c at the query - score without e at the key + score without both; scales held."""
    model = model_of(kind, normalised, **({"attn_scores_soft_cap": 60.0} if kind == "Gemma" else {}))  # to be undone
    tokens, layer, head, query, key = random_tokens(model), 1, 2, 5, 2
    by = "component" if normalises_writes(model) else "head"
    outputs, _ = component_outputs(model, tokens, by)
    names = [name for name in model.hook_dict if re.fullmatch(r"blocks\.1\.(ln1|attn\.[qk]_norm)\.hook_scale", name)]
    _, cache = model.run_with_cache(tokens)
    scales = {name: cache[name] for name in names}
    assert bool(scales) == (normalised or kind == "Qwen") or not lens.has_hooked_transformer()
    if kind == "Qwen" and not lens.has_hooked_transformer():
        pytest.skip("a Bridge's norms of queries and keys have no scale to hold")
    found = attention_score_attribution(model, tokens, layer, head, by=by, queries=query, keys=[key])
    for i, j in ((0, 0), (1, 2), (2, 1), (len(found.query_labels) - 2, 0)):
        both = [(query, outputs[i]), (key, outputs[j])]
        without = [
            score_without(model, tokens, layer, head, query, key, t, scales) for t in ([], *([x] for x in both), both)
        ]
        close(found.values[i, j, :, 0, 0], without[0] - without[1] - without[2] + without[3], 1e-8)
    assert found.values[..., 0].abs().min() >= 0 and found.values.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_bridges_are_those_of_their_patterns(name):
    model = bridge_of(name)
    tokens, found = random_tokens(model, batch=2, pos=6), {}
    forward.run(model, tokens, hooks={"blocks.1.attn.hook_pattern": lambda x: found.__setitem__("pattern", x.clone())})
    logs = found["pattern"][:, 1].detach().log()
    result = attention_score_attribution(model, tokens, 1, 1, by="head")
    total = result.values.sum((0, 1)) + result.bias
    own, ours = (x - x.diagonal(0, 1, 2)[..., None] for x in (logs, total))
    close(ours[:, result.visible], own[:, result.visible], 1e-4 if name.split()[0] in IN_FP32 else 1e-8)


WHERE = [([3, 1], [0, 4, 4]), (-1, slice(None, None, -1)), (slice(2, 5), [0]), (np.array([6]), torch.tensor([-7]))]


@pytest.mark.parametrize("queries, keys", WHERE)
@pytest.mark.parametrize("kind", ["GPT-2", "Pythia", "Gemma"])
def test_positions_give_the_rows_of_the_whole(model_of, kind, queries, keys):
    model = model_of(kind)
    tokens = random_tokens(model)
    whole = attention_score_attribution(model, tokens, -1, -1)
    found = attention_score_attribution(model, tokens, 1, model.cfg.n_heads - 1, queries=queries, keys=keys)
    q, k = (np.atleast_1d(np.arange(7)[x]).copy() for x in (queries, keys))
    assert found.queries == tuple(q.tolist()) and found.keys == tuple(k.tolist())
    close(found.values, whole.values[..., q, :][..., k])
    close(found.bias, whole.bias[:, q][:, :, k])
    assert torch.equal(found.visible, whole.visible[q][:, k])


# ---------------------------------------------------------------------------------------------------------
# The largest pairs


def largest(found, n):
    """Of all pairs, by sorting."""
    values = found.values.flatten(0, 1)
    order = values.abs().sort(dim=0, descending=True, stable=True).indices[:n]
    return values.gather(0, order)


def assert_are_the_largest(found, whole, n):
    assert found.values.shape[0] == min(n, whole.values.shape[:2].numel())
    close(found.values.abs(), largest(whole, n).abs())
    i, j = found.pairs
    b, q, k = torch.meshgrid(*(torch.arange(size) for size in found.values.shape[1:]), indexing="ij")
    close(found.values, whole.values[i, j, b, q, k])
    ids = (i * len(found.key_labels) + j).flatten(1).T.tolist()
    assert all(len(set(row)) == len(row) for row in ids)
    close(found.scores, whole.scores)
    close(found.bias, whole.bias)
    assert (found.query_labels, found.key_labels) == (whole.query_labels, whole.key_labels)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind, normalised", [("GPT-2", True), ("GPT-2", False), ("Llama", False), ("Qwen", True)])
def test_the_largest_pairs_are_those_of_all(model_of, kind, normalised, by, monkeypatch):
    model = model_of(kind, normalised)
    tokens = random_tokens(model, batch=2, pos=5)
    whole = attention_score_attribution(model, tokens, 1, 1, by=by)
    for block, pairs in ((64, 2**24), (3, 2**10)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "PAIRS", pairs)
        for top in (1, 7):
            assert_are_the_largest(attention_score_attribution(model, tokens, 1, 1, by=by, top=top), whole, top)


def test_more_than_there_are_gives_all(random_model):
    model = random_model("LN")
    tokens = random_tokens(model)
    whole = attention_score_attribution(model, tokens, 0, 0)
    found = attention_score_attribution(model, tokens, 0, 0, top=100)
    assert_are_the_largest(found, whole, 100)
    close(found.values.sum(0) + found.bias, found.scores)


def test_few_blocks_are_made_where_few_components_count(random_model, monkeypatch):
    """Neurons: almost all products are below what is kept, and are never made."""
    model = make_model(None, d_mlp=400)
    tokens = random_tokens(model, batch=1)
    for name, p in lens.parameters(model).items():
        if name.endswith("W_out"):
            p[5:] *= 1e-4
    calls, einsum = [], torch.einsum
    whole = attention_score_attribution(model, tokens, 1, 0, by="neuron", queries=-1)
    monkeypatch.setattr(torch, "einsum", lambda eq, *args: calls.append(eq) or einsum(eq, *args))
    found = attention_score_attribution(model, tokens, 1, 0, by="neuron", queries=-1, top=5)
    assert calls.count("qcd,ked->qkce") <= 3 < (400 / module.BLOCK) ** 2
    monkeypatch.undo()
    assert_are_the_largest(found, whole, 5)


@settings(max_examples=10, deadline=None)
@given(
    normalization=st.sampled_from(NORMALIZATIONS),
    by=st.sampled_from(BY),
    n_heads=st.integers(1, 3),
    layer=st.integers(0, 2),
    rotary=st.booleans(),
    batch=st.integers(1, 3),
    pos=st.integers(1, 6),
    top=st.integers(1, 30),
    block=st.integers(1, 9),
    held=st.integers(1, 20000),
    seed=st.integers(0, 99),
)
def test_laws_hold_on_random_configurations(
    normalization, by, n_heads, layer, rotary, batch, pos, top, block, held, seed
):
    own = KINDS["Pythia"][1] if rotary else {}
    fields = {"n_layers": 3, "n_heads": 3 if rotary else n_heads, "d_mlp": 7, "d_head": 8 if rotary else 24 // n_heads}
    model = make_model(normalization, seed=seed, **(own | fields))
    tokens = random_tokens(model, batch, pos, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "HELD", {"cpu": held})
        whole = attention_score_attribution(model, tokens, layer, 0, by=by)
        found = attention_score_attribution(model, tokens, layer, 0, by=by, top=top)
    wanted, shown = own_scores(model, tokens, layer, 0)
    close((whole.values.sum((0, 1)) + whole.bias)[:, shown], wanted[:, shown], 1e-8)
    assert_are_the_largest(found, whole, top)


# ---------------------------------------------------------------------------------------------------------
# Tables, hooks, errors


def test_the_table_is_over_the_scores_that_are_not_masked(model_of):
    model = model_of("Gemma")  # whose first layer has a window of three
    tokens = random_tokens(model, pos=6)
    found = attention_score_attribution(model, tokens, 0, 1)
    table = found.table()
    shown = found.values[..., found.visible].flatten(2)
    assert found.visible.sum() == 6 * 3 - 3 and (table.scores == shown.shape[-1]).all()
    assert len(table) == shown.shape[0] * shown.shape[1]
    for row in table.iloc[[0, 3, -1]].itertuples():
        i, j = found.query_labels.index(row.query_component), found.key_labels.index(row.key_component)
        x = shown[i, j]
        assert np.allclose([row.mean, row.mean_abs, row.std], [x.mean(), x.abs().mean(), x.std(unbiased=False)])
    assert table.mean_abs.is_monotonic_decreasing


def test_the_table_of_the_largest_counts_where_they_are(random_model):
    model = random_model("LNPre")
    tokens = random_tokens(model)
    found = attention_score_attribution(model, tokens, 1, 1, top=3)
    table = found.table()
    assert table.scores.sum() == 3 * found.visible.sum() * len(tokens)
    assert np.isclose((table["mean"] * table.scores).sum(), found.values[..., found.visible].sum())
    assert (table.mean_abs * table.scores).is_monotonic_decreasing
    row = table.iloc[1]
    i, j = found.query_labels.index(row.query_component), found.key_labels.index(row.key_component)
    x = found.values[(found.pairs[0] == i) & (found.pairs[1] == j) & found.visible]
    assert np.allclose([row["mean"], row["std"], row.scores], [x.mean(), x.std(unbiased=False), len(x)])


def test_nothing_seen_makes_an_empty_table(random_model):
    model = random_model(None)
    for top in (None, 2):
        found = attention_score_attribution(model, random_tokens(model), 1, 1, queries=0, keys=[3, 4], top=top)
        assert not found.visible.any() and len(found.table()) == 0


@pytest.mark.parametrize("top", [None, 4])
def test_hooks_of_a_users_are_part_of_it(top):
    model = make_model("LN")
    tokens = random_tokens(model)
    before = attention_score_attribution(model, tokens, 1, 0)
    steer = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x + steer)
    found = attention_score_attribution(model, tokens, 1, 0, top=top)
    wanted, shown = own_scores(model, tokens, 1, 0)
    close(found.scores[:, shown], wanted[:, shown], 1e-8)
    assert (found.scores - before.scores).abs().max() > 0.1
    if top is None:
        close(found.values.sum((0, 1)) + found.bias, found.scores, 1e-8)


@pytest.mark.parametrize("hook", ["attn.hook_q", "attn.hook_k", "attn.hook_attn_scores"])
def test_hooks_between_queries_and_scores_are_refused(hook):
    model = make_model("LN")
    model.add_hook(f"blocks.1.{hook}", lambda x, hook: 2 * x)
    with pytest.raises(ValueError, match=f"the model carries a hook at blocks.1.{hook}"):
        attention_score_attribution(model, random_tokens(model), 1, 0)
    attention_score_attribution(model, random_tokens(model), 0, 0)


@hooked_only
def test_other_scores_are_refused():
    model = make_model("LN", positional_embedding_type="alibi")
    with pytest.raises(ValueError, match="'alibi'"):
        attention_score_attribution(model, random_tokens(model), 1, 0)


@hooked_only
@pytest.mark.parametrize(
    "fields",
    [{"act_fn": "solu_ln"}, {"num_experts": 2, "experts_per_token": 1}, {"use_attention_sinks": True}],
    ids=str,
)
def test_what_else_a_block_does_is_no_matter(fields):
    model = make_model("RMS", dtype=torch.float32, gated_mlp="num_experts" in fields, **fields)
    tokens = random_tokens(model)
    for by in ("component", "head"):
        found = attention_score_attribution(model, tokens, 1, 2, by=by)
        wanted, shown = own_scores(model, tokens, 1, 2)
        close((found.values.sum((0, 1)) + found.bias)[:, shown], wanted[:, shown], 1e-4)


@hooked_only
def test_more_hook_points_change_nothing():
    fields = {"use_attn_result": True, "use_split_qkv_input": True}
    tokens = random_tokens(make_model("LN"))
    found = [attention_score_attribution(make_model("LN", **f), tokens, 1, 0, by="head").values for f in ({}, fields)]
    close(*found)


WRONG = [
    ({"layer": 2}, "layer 2 is out of range: layers reach from 0 to 1"),
    ({"head": -4}, "head -4 is out of range: heads reach from 0 to 2"),
    ({"by": "layer"}, "unknown by 'layer'"),
    ({"queries": 7}, "query position 7 is out of range: positions reach from 0 to 6"),
    ({"keys": []}, "the key positions given name none of 0 to 6"),
    ({"top": 0}, "top is 0; top must be a whole number from 1 up"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=str)
def test_wrong_arguments_are_one_line(random_model, options, message):
    model = random_model(None)
    with pytest.raises(ValueError, match=message) as error:
        attention_score_attribution(model, random_tokens(model), **({"layer": 1, "head": 0} | options))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# The guide

GUIDE = (Path(__file__).parent.parent / "docs" / "readers.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", GUIDE, re.S))
def test_the_guides_examples_run(code):
    exec(compile(code, "readers.md", "exec"), {})
