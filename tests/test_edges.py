"""Edges: patched ones are those of a forward with a stream per receiver, estimates those of plain derivatives of it."""

import re

import pytest
import torch
from conftest import HOOKED, KINDS, hooked_only, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patching import make_pairs

from lnfree_interp import edge_attribution, edge_patching, load_model, read_weights
from lnfree_interp.forward import unembed
from lnfree_interp.metrics import Metric, kl_from_clean, logit_diff
from lnfree_interp.patching import AtPStar, Gradient, Integrated, RelP, SecondOrder, attribution_patching
from lnfree_interp.products import products
from lnfree_interp.weights import block_of, normalises_writes

CHANGED = ((2, 4), (5,), (6,))
SOME = [("LNPre", "GPT-2"), ("LN", "Pythia"), (None, "Llama"), ("RMS", "Qwen"), ("RMS", "Gemma")]
quadratic = Metric("quadratic", lambda x: x[..., 0].pow(2).sum(1) - x[:, 0, 1] * x[:, 1, 1], positions=(-1, -2))


@pytest.fixture(params=SOME, ids=lambda p: f"{p[1]} {p[0]}")
def some_block(request, random_model):
    """Some of `any_block`, for what takes longer."""
    normalization, kind = request.param
    return random_model(normalization, **KINDS[kind][1])


def entered(weights, tokens):
    return weights.enter(tokens, slice(tokens.shape[1]))


def forward(weights, resid, added=None, by_head=True):
    """The final stream, and what was written and made, in a forward in which every receiver reads its own copy of the
    stream, with what is added to it."""
    added, everywhere = added or {}, slice(0, resid.shape[1])
    seen = {"embed": resid}
    for i, layer in enumerate(weights.layers):
        made = []
        for part, linear in zip("qkv", layer.of_qkv):
            heads = [
                products(layer.ln1(resid + added.get(f"L{i}H{h}.{part}", 0)), linear)[0][:, :, h]
                for h in range(len(linear[0]))
            ]
            made.append(torch.stack(heads, 2))
        q, k, v = made
        z = layer.mix(layer.pattern(layer.place_q(q, everywhere), layer.place_k(k, everywhere)), v)
        z = seen[f"L{i}.z"] = z + added.get(f"L{i}.z", 0)
        attn_out = layer.attn_out(z)
        if by_head:
            for h, W in enumerate(layer.W_O.unflatten(0, (z.shape[2], -1))):
                seen[f"L{i}H{h}"] = z[:, :, h] @ W
        else:
            seen[f"L{i}.attn"] = attn_out
        mid = resid + attn_out
        if layer.W_in is not None:
            seen[f"L{i}.mlp"] = layer.mlp((resid if layer.parallel else mid) + added.get(f"L{i}.mlp", 0))
            mid = mid + seen[f"L{i}.mlp"]
        resid = mid
    return resid + added.get("logits", 0), seen


class Plain:
    """Edges by the definition, one forward for each."""

    def __init__(self, model, pairs, effect, metric=logit_diff, rules=lambda weights: weights):
        self.model, self.pairs, self.effect, self.metric = model, pairs, effect, metric
        self.weights, self.by_head = rules(read_weights(model)), not normalises_writes(model)
        clean, corrupted = (entered(self.weights, tokens) for tokens in (pairs.clean, pairs.corrupted))
        base, source = (corrupted, clean) if effect.direction == "denoising" else (clean, corrupted)
        self.base, self.along = base, source - base
        (_, self.of_base), (_, of_source) = (forward(self.weights, x, by_head=self.by_head) for x in (base, source))
        self.delta = {name: of_source[name] - x for name, x in self.of_base.items()}

    def value(self, resid=None, added=None):
        final, seen = forward(self.weights, self.base if resid is None else resid, added, self.by_head)
        logits = unembed(self.model, final, norm=self.weights.ln_final)
        value = self.metric(logits, self.pairs) if isinstance(self.metric, Metric) else self.metric(logits)
        return value, seen

    def patched(self, step=1):
        """(edges, effects [prompt, edge])."""
        found, edges, unpatched = [], self.effect.edges.nonzero().tolist()[::step], self.value()[0]
        for s, r in edges:
            added = {self.effect.receivers[r]: self.delta[self.effect.senders[s]]}
            found.append(self.value(added=added)[0] - unpatched)
        return torch.tensor(edges).T, torch.stack(found, 1)

    def gradients(self, resid=None, also=()):
        zeros = {name: torch.zeros_like(self.base, requires_grad=True) for name in self.effect.receivers}
        zeros |= {name: torch.zeros_like(self.of_base[name], requires_grad=True) for name in also}
        value, _ = self.value(resid, zeros)
        return dict(zip(zeros, torch.autograd.grad(value.sum(), list(zeros.values()))))

    def times(self, grads):
        """[prompt, sender, receiver], 0 where there is no edge."""
        d = torch.stack([self.delta[name] for name in self.effect.senders], 1)
        g = torch.stack([grads[name] for name in self.effect.receivers], 1)
        return torch.einsum("bspd,brpd->bsr", d, g) * self.effect.edges


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance * (1 + b.abs().max().item()), rtol=tolerance)


# ---------------------------------------------------------------------------------------------------------
# The gradient


def test_gradient_is_that_at_each_receivers_copy(any_block):
    pairs = make_pairs(any_block, changed=CHANGED)
    effect = edge_attribution(any_block, pairs)
    plain = Plain(any_block, pairs, effect)
    close(effect.values, plain.times(plain.gradients()))
    assert effect.values.abs().max() > 1e-3
    clean, corrupted = (logit_diff(any_block(tokens), pairs) for tokens in (pairs.clean, pairs.corrupted))
    close(effect.clean, clean, 1e-6)
    close(effect.corrupted, corrupted, 1e-6)


def test_a_senders_edges_sum_to_its_own_effect(any_block):
    """All that a head writes reaches the metric through its receivers, each once."""
    pairs = make_pairs(any_block, changed=CHANGED)
    effect = edge_attribution(any_block, pairs)
    total = effect.values.sum(2)
    if not normalises_writes(any_block):
        of_heads = attribution_patching(any_block, pairs, site="z").values.flatten(1)
        heads = [i for i, name in enumerate(effect.senders) if re.fullmatch(r"L\d+H\d+", name)]
        close(total[:, heads], of_heads)
    mlps = [effect.senders.index(f"L{i}.mlp") for i in range(2)]
    close(total[:, mlps], attribution_patching(any_block, pairs, site="mlp_out").values.sum(2))
    close(total[:, 0], attribution_patching(any_block, pairs, site="resid_pre").values[:, 0].sum(1))


@pytest.mark.parametrize("metric", [quadratic, Metric("twice", lambda x: x[:, 0, 0] * x[:, 1, 3], (0, 5), None)])
def test_metrics_that_read_several_positions(random_model, metric):
    for normalization in (None, "LNPre"):
        model = random_model(normalization)
        pairs = make_pairs(model, changed=CHANGED)
        effect = edge_attribution(model, pairs, metric=metric)
        plain = Plain(model, pairs, effect, metric)
        close(effect.values, plain.times(plain.gradients()))
        exact = edge_patching(model, pairs, metric=metric)
        (s, r), wanted = plain.patched(step=3)
        close(exact.values[:, s, r], wanted)


# ---------------------------------------------------------------------------------------------------------
# Patching


def test_a_patched_edge_is_a_change_of_one_receivers_stream(any_block):
    pairs = make_pairs(any_block, changed=CHANGED)
    effect = edge_patching(any_block, pairs)
    (s, r), wanted = Plain(any_block, pairs, effect).patched(step=9)
    close(effect.values[:, s, r], wanted)
    assert effect.flops is not None and effect.flops[0] < effect.flops[1]
    assert not effect.values[:, ~effect.edges].any()


@hooked_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_edge_is_a_hook_on_transformer_lens_split_inputs(model_of, kind):
    model = model_of(kind)
    pairs = make_pairs(model, changed=CHANGED)
    effect = edge_patching(model, pairs)
    _, clean = model.run_with_cache(pairs.clean)
    _, base = model.run_with_cache(pairs.corrupted)
    unpatched = logit_diff(model(pairs.corrupted), pairs)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    try:
        for s, r in effect.edges.nonzero().tolist()[::5]:
            sender, receiver = effect.senders[s], effect.receivers[r]
            name, *head = sender_hook(sender)
            change = clean[name] - base[name]
            change = change[:, :, head[0]] @ block_of(model, int(sender[1])).attn.W_O[head[0]] if head else change
            name, *head = receiver_hook(model, receiver)

            def hook(x, hook, change=change, head=head):
                if head:
                    x = x.clone()
                    x[:, :, head[0]] += change
                    return x
                return x + change

            patched = logit_diff(model.run_with_hooks(pairs.corrupted, fwd_hooks=[(name, hook)]), pairs)
            close(effect.values[:, s, r], patched - unpatched)
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)


def sender_hook(label):
    if label == "embed":
        return ("blocks.0.hook_resid_pre",)
    if "." in label:
        layer, part = label[1:].split(".")
        return (f"blocks.{layer}.hook_{part}_out",)
    layer, head = label[1:].split("H")
    return f"blocks.{layer}.attn.hook_z", int(head)


def receiver_hook(model, label):
    if label == "logits":
        return (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",)
    name, part = label[1:].split(".")
    if part == "mlp":
        return (f"blocks.{name}.hook_mlp_in",)
    layer, head = name.split("H")
    return f"blocks.{layer}.hook_{part}_input", int(head)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    norm=st.booleans(),
    n_layers=st.integers(1, 3),
    attn_only=st.booleans(),
    n_pos=st.integers(2, 6),
    reads=st.sampled_from([None, (1, 0), (-1,), (-1, 0), (0,)]),
    direction=st.sampled_from(["denoising", "noising"]),
    max_memory=st.sampled_from([None, 1, 20_000]),
    data=st.data(),
)
def test_edges_of_random_models(model_of, kind, norm, n_layers, attn_only, n_pos, reads, direction, max_memory, data):
    only = {"attn_only": True} if attn_only and kind in ("GPT-2", "Llama") else {}
    cap = {} if norm else {"output_logits_soft_cap": -1.0}  # logits of several layers without norms are beyond it
    model = model_of(kind, norm, n_layers=n_layers, **(only | cap))
    changed = tuple(tuple(data.draw(st.sets(st.integers(0, n_pos - 1), min_size=1))) for _ in range(2))
    pairs = make_pairs(model, n=2, pos=n_pos, changed=changed)
    metric = logit_diff if reads is None else Metric("some", lambda x: x[..., 0].sum(1), positions=reads)
    options = {"metric": metric, "direction": direction, "max_memory": max_memory}
    estimate = edge_attribution(model, pairs, **options)
    plain = Plain(model, pairs, estimate, metric)
    close(estimate.values, plain.times(plain.gradients()), 1e-8)
    there = estimate.edges.nonzero()
    chosen = data.draw(st.lists(st.integers(0, len(there) - 1), min_size=1, max_size=6))
    edges = [(estimate.senders[s], estimate.receivers[r]) for s, r in there[chosen].tolist()]
    effect = edge_patching(model, pairs, edges=edges, **options)
    (s, r), wanted = Plain(model, pairs, effect, metric).patched()
    close(effect.values[:, s, r], wanted, 1e-8)


def test_chosen_edges_are_those_of_all(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model, changed=CHANGED)
    whole = edge_patching(model, pairs)
    labels = [("L1.mlp", "logits"), ("embed", "L0H2.v"), ("L0H1", "L0.mlp"), ("L0H1", "L0.mlp")]
    some = edge_patching(model, pairs, edges=labels)
    assert int(some.edges.sum()) == 3 == len(some.table())
    close(some.values[:, some.edges], whole.values[:, some.edges], 1e-12)
    assert not some.values[:, ~some.edges].any()
    masked = edge_patching(model, pairs, edges=some.edges)
    close(masked.values, some.values, 1e-14)
    close(edge_patching(model, pairs, edges=some.edges.numpy()).values, some.values, 1e-14)


def test_prompts_do_not_mix_and_memory_changes_nothing(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model, changed=CHANGED)
    for effect in (edge_attribution, edge_patching):
        whole, told = effect(model, pairs), []
        small = effect(model, pairs, max_memory=1, progress=lambda *counts, told=told: told.append(counts))
        close(small.values, whole.values)
        assert told[-1][0] == told[-1][1] and told == sorted(told)
        back = effect(model, pairs[[2, 0, 1]])
        close(back.values, whole.values[[2, 0, 1]])
        close(effect(model, pairs[1]).values, whole.values[1:2])
        close(whole[1:].values, whole.values[1:], 0)
        swapped = effect(model, pairs.reversed(), direction="noising")
        close(swapped.values, whole.values)


def test_where_nothing_differs_nothing_is_done(random_model):
    """Two tokens of one embedding are the same to a model, and so is what differs after the last position read."""
    model = make_model("LNPre", seed=5)
    pairs = make_pairs(model, n=2, changed=(6,))
    early = Metric("early", lambda x: x[:, 0, 0] - x[:, 0, 1], positions=(3,))
    same = make_pairs(model, n=1, changed=(2,))
    with torch.no_grad():
        model.embed.W_E[same.clean[0, 2]] = model.embed.W_E[same.corrupted[0, 2]]
    for found in (
        edge_patching(model, pairs, metric=early),
        edge_patching(model, same),
        *(edge_attribution(model, pairs, metric=early, method=m) for m in ("gradient", "second_order", "atp_star")),
        *(
            edge_attribution(model, same, method=m)
            for m in ("gradient", "second_order", "atp_star", "integrated", "relp")
        ),
    ):
        assert not found.values.any()
        assert found.reliability is None or not found.reliability.any()
    assert edge_patching(model, pairs, metric=early).cells_run == 0


@pytest.mark.parametrize("method", ["gradient", "integrated", "second_order", "atp_star", "relp"])
def test_exact_where_all_that_follows_is_linear(model_of, method):
    for kind in ("GPT-2", "Pythia", "Llama"):
        model = model_of(kind, False)
        pairs = make_pairs(model, changed=CHANGED)
        exact = edge_patching(model, pairs, edges=[(s, "logits") for s in edge_attribution(model, pairs).senders])
        estimate = edge_attribution(model, pairs, method=method)
        close(estimate.values[..., -1], exact.values[..., -1])
        assert exact.values.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# Models that go through their own forward


def test_through_hooks_the_results_are_the_same(some_block):
    pairs = make_pairs(some_block, changed=CHANGED)
    pythia = some_block.cfg.parallel_attn_mlp
    options = [{}, {"method": "integrated", "steps": 2}, {"method": "second_order"}] if pythia else [{}]
    fast = [edge_patching(some_block, pairs), *(edge_attribution(some_block, pairs, **o) for o in options)]
    some_block.add_hook("blocks.0.hook_attn_out", lambda x, hook: x)
    try:
        assert read_weights(some_block) is None
        slow = [edge_patching(some_block, pairs), *(edge_attribution(some_block, pairs, **o) for o in options)]
    finally:
        some_block.reset_hooks()
    for a, b in zip(slow, fast):
        close(a.values, b.values, 1e-8)
    if pythia:
        close(slow[-1].reliability, fast[-1].reliability, 1e-5)
    assert not some_block.cfg.use_split_qkv_input and not some_block.cfg.use_hook_mlp_in


def test_a_users_hooks_are_part_of_the_model(random_model):
    model = random_model("LN")
    pairs = make_pairs(model, changed=CHANGED)
    plain = edge_patching(model, pairs)
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
    try:
        steered, estimate = edge_patching(model, pairs), edge_attribution(model, pairs)
        unpatched = logit_diff(model(pairs.corrupted), pairs)
    finally:
        model.reset_hooks()
    close(steered.corrupted, unpatched, 1e-6)
    assert (steered.values - plain.values).abs().max() > 1e-2
    last = steered.senders.index("L1.mlp")
    assert steered.values[:, last, -1].abs().min() > 1e-6 and (estimate.values[:, last, -1]).abs().min() > 1e-6


# ---------------------------------------------------------------------------------------------------------
# The other estimates


def test_integrated_averages_along_the_embeddings(some_block):
    pairs = make_pairs(some_block, changed=CHANGED)
    effect = edge_attribution(some_block, pairs, method="integrated", steps=3)
    plain = Plain(some_block, pairs, effect)
    points = [plain.base + share * plain.along for share in (1 / 6, 3 / 6, 5 / 6)]
    close(effect.values, sum(plain.times(plain.gradients(x)) for x in points) / 3)
    assert edge_attribution(some_block, pairs, method=Integrated(steps=3)).method == "integrated"


def test_second_order_is_half_the_gradients_derivative_along_the_prompts_change(some_block):
    pairs = make_pairs(some_block, changed=CHANGED)
    effect = edge_attribution(some_block, pairs, method="second_order")
    plain, eps = Plain(some_block, pairs, effect), 1e-5
    first = plain.times(plain.gradients())
    ends = [plain.times(plain.gradients(plain.base + share * plain.along)) for share in (eps, -eps)]
    second = (ends[0] - ends[1]) / (2 * eps)
    close(effect.values, first + second / 2, 1e-6)
    assert (effect.values - first).abs().max() > 1e-3 * first.abs().max()
    where = (first.abs() > 1e-3 * first.abs().max()) & effect.edges
    close(effect.reliability[where], (second.abs() / (2 * first.abs()))[where], 1e-5)
    same = edge_attribution(some_block, pairs, method=SecondOrder(joint=True))
    close(same.values, effect.values, 1e-12)


def test_relp_is_the_gradient_by_its_rules(some_block):
    pairs = make_pairs(some_block, changed=CHANGED)
    for rules in (RelP(), RelP(half_gate=False, linear_gelu=False)):
        effect = edge_attribution(some_block, pairs, method=rules)
        plain = Plain(some_block, pairs, effect, rules=rules.rules)
        close(effect.values, plain.times(plain.gradients()))
    off = RelP(detach_norm=False, linear_gelu=False, half_gate=False)
    close(edge_attribution(some_block, pairs, method=off).values, edge_attribution(some_block, pairs).values, 1e-12)


def test_atp_star_computes_the_softmax_again(some_block):
    pairs = make_pairs(some_block, changed=CHANGED)
    effect = edge_attribution(some_block, pairs, method="atp_star", metric=quadratic)
    plain = Plain(some_block, pairs, effect, quadratic)
    grads = plain.gradients(also=("L0.z", "L1.z"))
    for s, r in effect.edges.nonzero().tolist()[::4]:
        sender, receiver = effect.senders[s], effect.receivers[r]
        if receiver[-1] in "qk":
            _, seen = plain.value(added={receiver: plain.delta[sender]})
            name = f"L{receiver[1]}.z"
            close(effect.values[:, s, r], ((seen[name] - plain.of_base[name]) * grads[name]).sum((1, 2, 3)))
    gradient = edge_attribution(some_block, pairs, method=Gradient(), metric=quadratic)
    others = torch.tensor([name[-1] not in "qk" for name in effect.receivers])
    close(effect.values[..., others], gradient.values[..., others], 1e-12)
    assert (effect.values - gradient.values).abs().max() > 1e-4
    small = edge_attribution(some_block, pairs, method=AtPStar(), metric=quadratic, max_memory=1)
    close(small.values, effect.values)


# ---------------------------------------------------------------------------------------------------------
# TransformerLens 4's own


@pytest.mark.skipif(HOOKED, reason="TransformerLens 3.9 has no edge attribution")
@pytest.mark.parametrize("kind", ["GPT-2", "Pythia"])
@pytest.mark.parametrize("normalization", ["LN", None])
def test_gradients_are_transformer_lens_own(kind, normalization):
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    model = make_model(normalization, **KINDS[kind][1])
    pairs = make_pairs(model, changed=CHANGED)
    effect = edge_attribution(model, pairs)
    model.requires_grad_(True)
    wanted = torch.zeros_like(effect.values)
    of_nodes = torch.zeros_like(effect.values[..., 0])
    for i in range(len(pairs)):
        right, wrong = pairs.answers[i].tolist()

        def difference(logits, right=right, wrong=wrong):
            return (logits[:, -1, right] - logits[:, -1, wrong]).sum()

        tokens = pairs.clean[i : i + 1], pairs.corrupted[i : i + 1]
        theirs = attribution_patch(model, *tokens, difference, EdgeAttributionConfig(granularity="edge"))
        for (writer, reader), score in theirs.edge_scores.items():
            wanted[i, effect.senders.index(label(writer)), effect.receivers.index(label(reader))] += score
        nodes = attribution_patch(model, *tokens, difference, EdgeAttributionConfig(granularity="node"))
        for node, score in nodes.node_scores.items():
            of_nodes[i, effect.senders.index(label(node))] += score
    close(effect.values, wanted, 1e-6)
    close(effect.values.sum(2), of_nodes, 1e-6)


def label(node):
    """The name here of a node of TransformerLens'."""
    kinds = {"q_input": ".q", "k_input": ".k", "v_input": ".v", "attn_head_out": ""}
    if node.kind in ("embed", "logits"):
        return node.kind
    return f"L{node.layer}H{node.head}{kinds[node.kind]}" if node.kind in kinds else f"L{node.layer}.mlp"


# ---------------------------------------------------------------------------------------------------------
# Results and errors


def test_table_has_means_and_intervals():
    model = load_model("tiny-noLN")
    pairs = make_pairs(model, n=8, changed=(2,))
    effect = edge_attribution(model, pairs, method="second_order")
    table = effect.table(5, draws=50)
    assert table.columns.tolist() == ["sender", "receiver", "effect", "low", "high", "reliability"]
    means = effect.values.mean(0)
    for row in table.itertuples():
        at = effect.senders.index(row.sender), effect.receivers.index(row.receiver)
        assert row.effect == pytest.approx(means[at].item(), rel=1e-6)
        assert row.low <= row.effect <= row.high
    largest = sorted(means[effect.edges].abs().tolist(), reverse=True)[:5]
    assert table.effect.abs().tolist() == pytest.approx(largest, rel=1e-6)
    assert len(effect.table(draws=5)) == int(effect.edges.sum()) and len(effect[: 0 + 1].table(2, draws=5)) == 2


def test_grouped_keys_and_normalised_writes_name_what_there_is(model_of):
    llama, pairs = model_of("Llama"), None
    pairs = make_pairs(llama)
    effect = edge_attribution(llama, pairs)
    assert {r for r in effect.receivers if r.startswith("L1")} == {
        *(f"L1H{h}.q" for h in range(4)),
        *(f"L1H{h}.{part}" for h in range(2) for part in "kv"),
        "L1.mlp",
    }
    assert effect.senders[:6] == ("embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp")
    gemma = model_of("Gemma")
    assert edge_attribution(gemma, make_pairs(gemma)).senders == ("embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp")
    with pytest.raises(ValueError, match=r"normalises what attention writes.*'L0\.attn'"):
        edge_patching(gemma, make_pairs(gemma), edges=[("L0H1", "logits")])


def test_in_parallel_blocks_heads_do_not_reach_their_own_mlp(model_of):
    model = model_of("Pythia")
    effect = edge_attribution(model, make_pairs(model))
    assert not effect.edges[effect.senders.index("L0H0"), effect.receivers.index("L0.mlp")]
    with pytest.raises(ValueError, match=r"'L0H0' does not write before receiver 'L0\.mlp'"):
        edge_patching(model, make_pairs(model), edges=[("L0H0", "L0.mlp")])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"edges": [("L0H9", "logits")]}, "unknown sender 'L0H9'; known are embed, L0H0, ... L1H2, L1.mlp"),
        ({"edges": [("embed", "L0H1")]}, "unknown receiver 'L0H1'; known are"),
        ({"edges": [("L1H0", "L0.mlp")]}, "'L1H0' does not write before receiver 'L0.mlp' reads"),
        ({"edges": [("L1.mlp", "L1H0.v")]}, "'L1.mlp' does not write before"),
        ({"edges": []}, "no edge at all"),
        ({"edges": "embed"}, "pairs of labels, or a mask"),
        ({"edges": [("embed",)]}, "pairs of labels, or a mask"),
        ({"edges": torch.ones(2, 2, dtype=torch.bool)}, r"a mask is torch.bool \[9, 21\]"),
        ({"edges": torch.ones(9, 21)}, "a mask is torch.bool"),
        ({"edges": torch.ones(9, 21, dtype=torch.bool)}, "there is no such edge"),
        ({"edges": torch.zeros(9, 21, dtype=torch.bool)}, "no edge at all"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"max_memory": 0}, "max_memory must be a number above 0"),
    ],
)
def test_bad_input_to_patching_is_one_line(random_model, options, message):
    model = random_model("LNPre")
    with pytest.raises(ValueError, match=message) as error:
        edge_patching(model, make_pairs(model), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "guess"}, "unknown method 'guess'; allowed are gradient"),
        ({"method": "gradient", "steps": 3}, "method 'gradient' has no option 'steps'"),
        ({"method": "integrated", "path": "layer"}, "path 'layer' is not for edges"),
        ({"method": Integrated(path="layer")}, "path 'layer' is not for edges"),
        ({"method": "second_order", "joint": False}, "joint=False is not for edges"),
        ({"method": SecondOrder()}, "joint=False is not for edges"),
        ({"method": "integrated", "steps": 0}, "steps"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"metric": lambda x: x.sum()}, "metric"),
    ],
)
def test_bad_input_to_attribution_is_one_line(random_model, options, message):
    model = random_model("LNPre")
    with pytest.raises(ValueError, match=message) as error:
        edge_attribution(model, make_pairs(model), **options)
    assert "\n" not in str(error.value)


def test_estimates_that_need_weights_say_so(random_model):
    model = random_model("LN")
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: x)
    try:
        for method in ("relp", "atp_star"):
            with pytest.raises(ValueError, match=f"method '{method}' needs a model that read_weights reads"):
                edge_attribution(model, make_pairs(model), method=method)
    finally:
        model.reset_hooks()


def test_other_metrics_and_half_precision(random_model):
    model = random_model("LNPre")
    pairs = make_pairs(model, changed=CHANGED)
    metric = kl_from_clean(model, pairs)
    effect = edge_patching(model, pairs, metric=metric)
    plain = Plain(model, pairs, effect)
    reference = model(pairs.clean)[:, -1].log_softmax(-1)
    plain.metric = lambda logits: (reference.exp() * (reference - logits[:, -1].log_softmax(-1))).sum(-1)
    (s, r), wanted = plain.patched(step=7)
    close(effect.values[:, s, r], wanted)
    half, whole = (make_model("LNPre", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        for a, b in zip(whole.parameters(), half.parameters()):
            a.copy_(b)
    for call in (edge_patching, edge_attribution):
        got, expected = call(half, pairs).values, call(whole, pairs).values
        assert got.dtype == torch.float32
        close(got, expected, 1e-4)


def test_weights_get_no_gradients(random_model):
    model = make_model("LNPre", seed=3)
    model.requires_grad_(True)
    for method in ("gradient", "second_order", "atp_star", "integrated", "relp"):
        assert not edge_attribution(model, make_pairs(model), method=method).values.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
