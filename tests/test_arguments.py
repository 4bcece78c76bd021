"""Arguments as people write them: served as the plain form is, or refused with one line that says what is wanted."""

import copy
import dataclasses
import gzip
import json
from functools import cache
from unittest.mock import Mock, call

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from minute import probe_data
from torch.utils._python_dispatch import TorchDispatchMode

import lnfree_interp
from lnfree_interp import (
    Reader,
    ablate_cumulatively,
    ablate_neurons,
    activation_patching,
    analogy_data,
    attention_patterns,
    attention_score_attribution,
    attention_sinks,
    attribution_graph,
    attribution_patching,
    attribution_to,
    attributions_to,
    check_model,
    compare,
    compare_models,
    composition_scores,
    concept_evidence,
    direct_effect,
    direct_logit_attribution,
    edge_attribution,
    edge_patching,
    effect_on,
    evaluate_loss,
    evaluate_probe,
    explain,
    fit_probe,
    generate_samples,
    hellaswag,
    hellaswag_items,
    induction_pairs,
    ioi_pairs,
    load_model,
    logit_attributions,
    logit_lens,
    models,
    rank_confidence_neurons,
    read_documents,
    read_weights,
    recall_data,
    residual_norms,
    screen,
    screen_edges,
    swap_concepts,
    token_losses,
    virtual_weights,
    why_not_read,
)
from lnfree_interp.batching import check_ids, check_tokens, token_batches
from lnfree_interp.metrics import kl_from_clean
from lnfree_interp.names import CHECKPOINTS
from lnfree_interp.pairs import PromptPairs, groups_from_file, pairs_from_text
from lnfree_interp.probe import Training

NAME = "tiny-noLN"
TEXT = "It was the best of times"
TEXTS = ["It was the best of times", "It was the last of times"]
ITEM = {"ctx": "He opened the", "endings": ["door.", "sky.", "cat.", "sea."], "label": 0}
ROWS = [("the girl said that", "the man said that", " she", " he")]


@pytest.fixture(scope="module")
def model():
    return load_model(NAME, device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    return torch.cat([model.to_tokens(text) for text in TEXTS])


@pytest.fixture
def pairs():
    clean = torch.arange(5, 30).view(5, 5)
    corrupted = clean.clone()
    corrupted[:, 2] += 100
    return PromptPairs(clean, corrupted, torch.stack([clean[:, 2], corrupted[:, 2]], 1))


@pytest.fixture
def as_users_have_it():
    """Without the shape checks that only tests have: they would refuse before the functions' own checks do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_same(a, b):
    """Results, tensors and texts that are equal, entry by entry; nan is nan."""
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            if not field.compare:  # a tokenizer, of which each model has its own
                continue
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert_same(list(a.items()), list(b.items()))
    elif hasattr(a, "equals"):
        assert a.equals(b)
    else:
        assert a == b or (a != a and b != b)


def refused(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as raised:
        function(*args, **kwargs)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------
# Models

OF_TOKENS = {
    "direct_logit_attribution": direct_logit_attribution,
    "direct_effect": direct_effect,
    "logit_attributions": logit_attributions,
    "ablate_neurons": lambda model, tokens: ablate_neurons(model, tokens, neurons=[3]),
    "ablate_cumulatively": lambda model, tokens: ablate_cumulatively(model, tokens, [3, 5]),
    "residual_norms": residual_norms,
    "attention_sinks": attention_sinks,
    "evaluate_loss": evaluate_loss,
    "compare_models": lambda model, tokens: compare_models({"m": model}, tokens),
    "attribution_to": lambda model, tokens: attribution_to(model, tokens, Reader.neuron(1, 3)),
    "effect_on": lambda model, tokens: effect_on(model, tokens, Reader.query(1, 0), top=3),
    "attributions_to": lambda model, tokens: list(attributions_to(model, tokens, Reader.value(1, 0))),
    "attention_score_attribution": lambda model, tokens: attention_score_attribution(model, tokens, 1, 0),
    "logit_lens": logit_lens,
    "attention_patterns": attention_patterns,
    "token_losses": token_losses,
}
READ_NO_LOGITS = {
    "residual_norms",
    "attention_sinks",
    "attribution_to",
    "effect_on",
    "attributions_to",
    "attention_score_attribution",
    "attention_patterns",
}


SMALL = {"dim": 8, "mastered": False, "training": Training(hidden=2, epochs=1)}


@cache
def a_probe():
    return fit_probe(load_model(NAME, device="cpu"), probe_data(), **SMALL)


def pairs_file(folder):
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(dict(zip(("clean", "corrupted", "right", "wrong"), ROWS[0]))))
    return path


def of_model(folder, pairs):
    """Every public function that takes a model and no tokens."""
    return {
        "activation_patching": lambda m: activation_patching(m, pairs, layers=[0]),
        "attribution_patching": lambda m: attribution_patching(m, pairs, layers=[0]),
        "edge_patching": lambda m: edge_patching(m, pairs, edges=[("embed", "logits")]),
        "edge_attribution": lambda m: edge_attribution(m, pairs),
        "screen": lambda m: screen(m, pairs, budget=3, site="z", seed=1),
        "screen_edges": lambda m: screen_edges(m, pairs, budget=3, seed=1),
        "attribution_graph": lambda m: attribution_graph(m, TEXT),
        "explain": lambda m: explain(m, TEXT).effect,
        "compare": lambda m: compare({"m": m}, "residual_norms", TEXT).table(),
        "composition_scores": lambda m: composition_scores(m, "K"),
        "virtual_weights": lambda m: virtual_weights(m, "L0H1", "L1.mlp").AB,
        "kl_from_clean": lambda m: kl_from_clean(m, pairs).context,
        "rank_confidence_neurons": rank_confidence_neurons,
        "read_weights": lambda m: read_weights(m).layers[-1].W_O,
        "why_not_read": why_not_read,
        "check_model": lambda m: check_model(m, [[1, 2, 3]]).holds,
        "hellaswag": lambda m: hellaswag(m, [ITEM]),
        "generate_samples": lambda m: generate_samples({"m": m}, TEXT, max_new_tokens=2),
        "ioi_pairs": lambda m: ioi_pairs(m, 2),
        "induction_pairs": lambda m: induction_pairs(m, 2),
        "pairs_from_text": lambda m: pairs_from_text(m, ROWS),
        "groups_from_file": lambda m: groups_from_file(pairs_file(folder), m),
        "from_file": lambda m: PromptPairs.from_file(pairs_file(folder), m),
        "recall_data": lambda m: [(p.prompt, p.answer) for p in recall_data(m, 2)],
        "analogy_data": lambda m: [(p.prompt, p.answer) for p in analogy_data(m, 4)],
        "fit_probe": lambda m: fit_probe(m, probe_data(), **SMALL).tensors["means"],
        "evaluate_probe": lambda m: evaluate_probe(m, a_probe(), probe_data()).at_1,
        "concept_evidence": lambda m: concept_evidence(m, a_probe(), (1, 2, 3)).values,
        "swap_concepts": lambda m: swap_concepts(m, a_probe(), probe_data(), layers=-1, n=2).after,
    }


def every_function(folder, pairs, tokens):
    return {name: lambda m, f=f: f(m, tokens) for name, f in OF_TOKENS.items()} | of_model(folder, pairs)


@pytest.mark.slow
def test_a_model_by_name_is_loaded_once(model, pairs, tokens, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(models, "load_model", lambda name: loaded.append(name) or model)
    for i, function in enumerate(every_function(tmp_path, pairs, tokens).values()):
        name = (NAME, CHECKPOINTS / NAME)[i % 2]
        loaded.clear()
        assert_same(function(name), function(model))
        assert loaded == [name]


def test_the_table_names_every_public_function_of_a_model(pairs, tokens, tmp_path):
    import inspect

    public = {name: getattr(lnfree_interp, name) for name in lnfree_interp.__all__}
    of_models = {
        name
        for name, f in public.items()
        if inspect.isfunction(f) and {"model", "models"} & set(list(inspect.signature(f).parameters)[:1])
    }
    assert of_models - {"remove_layernorm"} <= set(every_function(tmp_path, pairs, tokens))


def test_what_is_no_model(model, pairs, tokens, tmp_path, as_users_have_it):
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=4))
    spread = copy.copy(model)
    spread.cfg = copy.copy(model.cfg)
    spread.cfg.n_devices = 2
    for function in every_function(tmp_path, pairs, tokens).values():
        for wrong, kind in (
            (7, "int"),
            (None, "NoneType"),
            (hf, "GPT2LMHeadModel"),
            (type(model), type(model).__name__),
        ):
            message = f"model must be a HookedTransformer or TransformerBridge .see load_model. or a name, not {kind}"
            refused(message, function, wrong)
        refused("unknown model 'tinny'; nearest known: tiny", function, "tinny")
        refused("the model is spread over 2 devices", function, spread)
    refused("models must be a mapping of names to models, not list", compare_models, ["tiny"], tokens)
    refused("models must be a mapping of names to models, not str", generate_samples, "tiny", TEXT)


# ---------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TOKENS)
def test_tokens_of_every_make(model, tokens, name):
    function, array = OF_TOKENS[name], tokens.numpy()
    plain = function(model, tokens)
    for odd in (
        TEXTS,
        tuple(TEXTS),
        tokens.tolist(),
        tokens.int(),
        array,
        array.astype(np.uint16),
        list(array.tolist()),
    ):
        assert_same(function(model, odd), plain)
    assert_same(function(model, TEXT), function(model, tokens[:1]))


@pytest.mark.parametrize("name", ["residual_norms", "attention_sinks", "evaluate_loss", "compare_models"])
def test_parts_of_every_make(model, tokens, name):
    plain = OF_TOKENS[name](model, iter(tokens.split(1)))
    for parts in ([tokens[:1], tokens[1:].numpy()], iter(TEXTS), ([row] for row in tokens.tolist())):
        assert_same(OF_TOKENS[name](model, parts), plain)


def test_progress_counts_sequences_of_every_make(model, tokens):
    for odd in (tokens, tokens.numpy(), tokens.tolist(), TEXTS, [tokens[:1], tokens[1:]]):
        told = Mock()
        assert len(list(token_batches(model, odd, per_pass=1, progress=told))) == 2
        assert told.call_args_list == [call(1, 2), call(2, 2)]


@pytest.mark.parametrize("name", OF_TOKENS)
def test_what_are_no_tokens(model, name, as_users_have_it):
    function = OF_TOKENS[name]
    for wrong, message in (
        (["It was", "It was the best of times"], "the texts have 3 to 7 tokens: they must be of one length"),
        (TEXT * 60, "tokens, the model's context holds 256"),
        ("a\ud800", "holds half a character"),
        ([[1, 2, 3], [4, 5]], "lists of unequal lengths"),
        ([[0.5, 1.0]], "tokens must be a tensor of token ids .*, not list of float64"),
        (torch.zeros(2, 3), "not torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "not torch.bool"),
        (torch.ones(2, 3, dtype=torch.long).to_sparse(), "not one that is sparse"),
        (torch.ones(2, 3, dtype=torch.long, device="meta"), "not one that is without data"),
        (3.5, "not float"),
        (None, "not NoneType"),
        (model.tokenizer("It was"), "not BatchEncoding"),  # its keys are texts
        (5, r"tokens have shape \[\]"),
        (np.zeros((2, 3, 4), int), r"tokens have shape \[2, 3, 4\]"),
        (np.full((1, 3), 5000), "token id 5000 is outside"),
        ([[1, -1, 2]], "token id -1 is outside"),
    ):
        refused(message, function, model, wrong)
    bare = make_model(None)
    refused("has no tokenizer, so text cannot be read", function, bare, TEXT)


def test_texts_get_the_bos_token_that_the_model_gives_them(model):
    assert torch.equal(check_tokens(model, TEXT), model.to_tokens(TEXT))
    without = copy.copy(model)
    without.cfg = copy.copy(model.cfg)
    without.cfg.default_prepend_bos = False
    assert torch.equal(check_tokens(without, TEXT), model.to_tokens(TEXT)[:, 1:])


@settings(max_examples=30, deadline=None)
@given(
    side=st.sampled_from(["left", "right"]),
    pad_is_bos=st.booleans(),
    prepend_bos=st.booleans(),
    n_pads=st.lists(st.integers(0, 3), min_size=2, max_size=2),
)
def test_pads_are_served_as_transformer_lens_does_or_refused(side, pad_is_bos, prepend_bos, n_pads):
    from transformer_lens.utilities import get_attention_mask

    model = PADDED
    model.tokenizer.padding_side = side
    model.tokenizer.pad_token = model.tokenizer.bos_token if pad_is_bos else "a"
    model.cfg.default_prepend_bos = prepend_bos
    tokens = torch.tensor([[model.tokenizer.pad_token_id] * n + [300 + i for i in range(6 - n)] for n in n_pads])
    if side == "left" and not get_attention_mask(model.tokenizer, tokens, prepend_bos).all():
        refused("prompts begin with pads", evaluate_loss, model, tokens)
    else:
        theirs = model(tokens, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(evaluate_loss(model, tokens).losses, theirs, atol=1e-4, rtol=1e-4)


PADDED = load_model(NAME, device="cpu")


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait for a device."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_values_are_read_once(pairs):
    with HostReads() as reads:
        check_ids(pairs.clean, 200)
        PromptPairs(pairs.clean, pairs.corrupted, pairs.answers)
    assert reads.n == 0  # each a single tolist


# ---------------------------------------------------------------------------------------------------------
# Positions and targets

ATTRIBUTIONS = (direct_logit_attribution, direct_effect, logit_attributions)


@pytest.mark.slow
@pytest.mark.parametrize("function", ATTRIBUTIONS)
def test_positions_of_every_make(model, tokens, function):
    mask = [False, True, False, True, False, False, False]
    for plain, odd in (
        (2, (np.int64(2), torch.tensor(2), [2], slice(2, 3), slice(np.int64(2), np.int64(3)))),
        (-3, (np.int64(-3), torch.tensor(-3), (-3,))),
        ([1, 3], ((1, 3), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3]), [torch.tensor(1), np.int64(3)])),
        ([1, 3], (mask, tuple(mask), np.array(mask), torch.tensor(mask))),
    ):
        wanted = function(model, tokens, positions=plain)
        for positions in odd:
            assert_same(function(model, tokens, positions=positions), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("function", ATTRIBUTIONS)
def test_targets_of_every_make(model, tokens, function):
    a, b = (model.to_single_token(text) for text in (" his", " the"))
    vector, other = torch.tensor([a, b]), torch.tensor([b, a])
    wanted = function(model, tokens, vector, versus=other)
    array = np.array([a, b])
    for odd in ([" his", " the"], (" his", " the"), [a, b], array, array.astype(np.int32), vector.int(), list(array)):
        assert_same(function(model, tokens, odd, versus=other), wanted)
    for odd in ([" the", " his"], [b, a], np.array([b, a])):
        assert_same(function(model, tokens, vector, versus=odd), wanted)
    wanted = function(model, tokens, torch.tensor([a, a]), versus=torch.tensor([b, b]))
    for one, two in ((" his", " the"), (a, b), (np.int64(a), np.int64(b)), (torch.tensor(a), torch.tensor(b))):
        assert_same(function(model, tokens, one, versus=two), wanted)
    every = torch.arange(14).view(2, 7)
    assert_same(function(model, tokens, every.tolist()), function(model, tokens, every))
    assert_same(function(model, TEXT, " his"), function(model, tokens[:1], torch.tensor([a])))


@pytest.mark.parametrize("function", ATTRIBUTIONS)
def test_what_are_no_positions_or_targets(model, tokens, function, as_users_have_it):
    for arguments, message in (
        ({"positions": [True, False]}, r"or a mask of \[7\], not list of bool \[2\]"),
        ({"positions": 1.5}, "positions must be an integer, a slice, a list of integers or a mask"),
        ({"positions": "last"}, "positions must be"),
        ({"positions": [[1, 2]]}, "positions must be"),
        ({"positions": [[1], [1, 2]]}, "positions must be .*, not such a list"),
        ({"positions": slice(0, 2, 0)}, "positions must be .*, not such a slice"),
        ({"positions": slice(0.5, None)}, "positions must be .*, not such a slice"),
        ({"targets": "a\ud800"}, "holds half a character"),
        ({"positions": [0] * 0}, "name none"),
        ({"positions": torch.zeros(7, dtype=torch.bool)}, "name none"),
        ({"positions": np.array([6])}, "position 6 is out of range: targets reach from 0 to 5"),
        ({"positions": torch.ones(7, dtype=torch.bool)}, "position 6 is out of range"),
        ({"targets": " Mississippi"}, r"target ' Mississippi' is \d tokens \[' M"),
        ({"targets": ""}, r"target '' is 0 tokens"),
        ({"targets": [" his"]}, r"targets have shape \[1\]; allowed are \[2\]"),
        ({"targets": [" his", " Mississippi"]}, "target ' Mississippi' is"),
        ({"targets": [" his", 3]}, "targets must be a tensor of token ids .*, not list"),
        ({"targets": " his", "versus": " Mississippi"}, "versus ' Mississippi' is"),
        ({"targets": 5000}, "targets: token id 5000 is outside"),
        ({"targets": 0.5}, "targets must be a tensor of token ids .*, not float"),
        ({"targets": torch.zeros(2)}, "not torch.float32"),
        ({"targets": [[1, 2], [3]]}, "lists of unequal lengths"),
        ({"targets": []}, r"targets have shape \[0\]"),
    ):
        refused(message, function, model, tokens, **arguments)


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_logits_over_another_vocabulary(kind):
    model = make_model(kind, d_vocab_out=5)
    tokens = random_tokens(model)
    for targets in (torch.tensor([0, 4, 2]), 4):
        result = direct_logit_attribution(model, tokens, targets, versus=1)
        logits = model(tokens)[:, -1]
        right = logits[range(3), targets] - logits[:, 1]
        torch.testing.assert_close((result.values.sum(0) + result.bias)[:, 0], right)
    refused("targets: token id 5 is outside the model's vocabulary of 5", direct_logit_attribution, model, tokens, 5)
    for name, function in OF_TOKENS.items():
        if name in READ_NO_LOGITS:
            function(model, tokens)
        else:
            refused("logits are over 5 outputs, not over its 61 tokens", function, model, tokens)
    for function in (
        lambda m: hellaswag(m, [ITEM]),
        lambda m: generate_samples({"m": m}, "a"),
        lambda m: induction_pairs(m, 2),
        lambda m: pairs_from_text(m, ROWS),
    ):
        refused("logits are over 5 outputs, not over its 61 tokens", function, model)


# ---------------------------------------------------------------------------------------------------------
# Pairs


def test_some_of_the_pairs(pairs):
    mask = torch.tensor([True, False, False, True, False])
    for rows, wanted in (
        (0, [0]),
        (-1, [4]),
        (np.int64(2), [2]),
        (torch.tensor(3), [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [4, 2, 0]),
        ([3, -5, 3], [3, 0, 3]),
        (range(2), [0, 1]),
        (np.array([4, 0]), [4, 0]),
        (torch.tensor([4, 0]), [4, 0]),
        (mask, [0, 3]),
        (mask.numpy(), [0, 3]),
        (mask.tolist(), [0, 3]),
    ):
        some = pairs[rows]
        for name in ("clean", "corrupted", "answers"):
            assert torch.equal(getattr(some, name), getattr(pairs, name)[wanted])
    assert [one.clean[0, 0].item() for one in pairs] == pairs.clean[:, 0].tolist()
    assert pairs[1:3].clean.data_ptr() == pairs.clean[1:].data_ptr()  # a view


def test_pairs_that_are_not_there(pairs, as_users_have_it):
    for rows, message in (
        (5, "pair 5 is out of range: pairs reach from 0 to 4"),
        (-6, "pair -6 is out of range"),
        ([0, 9], "pair 9 is out of range"),
        (slice(3, 3), "the pairs given name none of 0 to 4"),
        (torch.zeros(5, dtype=torch.bool), "the pairs given name none of 0 to 4"),
        ([], "the pairs given name none"),
        (torch.ones(3, dtype=torch.bool), r"or a mask of \[5\], not Tensor of bool \[3\]"),
        ("first", "pairs must be an integer"),
        (1.0, "pairs must be an integer"),
    ):
        refused(message, pairs.__getitem__, rows)


def test_valid_pairs_are_not_checked_again(pairs, monkeypatch):
    monkeypatch.setattr(PromptPairs, "__post_init__", lambda self: pytest.fail("checked again"))
    assert len(pairs[1:]) == 4 and len(pairs.to("cpu")) == 5
    assert pairs.reversed().clean is pairs.corrupted


def test_pairs_are_tensors_of_token_ids(pairs, as_users_have_it):
    plain = (pairs.clean, pairs.corrupted, pairs.answers)
    assert_same(PromptPairs(*(ids.int() for ids in plain)), pairs)
    for i, name in enumerate(("clean", "corrupted", "answers")):
        for wrong, kind in (
            (["a", "b"], "list"),
            ("a b", "str"),
            (plain[i].float(), "torch.float32"),
            (None, "NoneType"),
        ):
            message = (
                f"{name} must be a tensor of token ids, not {kind}; PromptPairs.from_file and pairs_from_text read"
            )
            refused(message, PromptPairs, *plain[:i], wrong, *plain[i + 1 :])
    refused(r"clean has shape \[5\], wanted is \[prompt, pos\]", PromptPairs, plain[0][0], *plain[1:])
    refused("answers have shape", PromptPairs, *plain[:2], plain[2][0])


def test_as_pairs(pairs, as_users_have_it):
    from lnfree_interp.pairs import as_pairs

    plain = (pairs.clean, pairs.corrupted, pairs.answers)
    assert as_pairs(pairs) is pairs
    assert_same(as_pairs(plain), pairs)
    assert_same(as_pairs(list(plain)), pairs)
    for wrong, kind in ((plain[:2], "tuple"), ({5: pairs}, "dict"), ("pairs.csv", "str"), (plain[0], "Tensor")):
        refused(f"pairs must be PromptPairs, .* not {kind}", as_pairs, wrong)
    refused("clean must be a tensor of token ids, not str", as_pairs, ("a", "b", "c"))


def test_numbers_of_pairs_of_every_make(model, as_users_have_it):
    plain = ioi_pairs(model, 3, seed=2, template=1)
    for make in (np.int64, np.uint8, torch.tensor):
        assert_same(ioi_pairs(model, make(3), seed=make(2), template=make(1)), plain)
        odd = induction_pairs(model, make(3), length=make(9), seed=make(2))
        assert_same(odd, induction_pairs(model, 3, length=9, seed=2))
    for arguments, message in (
        ({"n": 2.0}, "n must be a whole number from 1 up, not float"),
        ({"n": "4"}, "n must be a whole number from 1 up, not str"),
        ({"n": True}, "n must be a whole number from 1 up, not bool"),
        ({"n": torch.zeros(2)}, "n must be a whole number from 1 up, not Tensor"),
        ({"n": -1}, "n is -1; n must be"),
        ({"n": 2, "seed": 0.5}, "seed must be a whole number, not float"),
    ):
        refused(message, ioi_pairs, model, **arguments)
        refused(message, induction_pairs, model, **arguments)
    refused("template must be a whole number, not float", ioi_pairs, model, 2, template=1.0)
    refused("template must be a whole number, not list", ioi_pairs, model, 2, template=["{A}"])
    refused("length must be a whole number, not float", induction_pairs, model, 2, length=8.0)


def test_templates(model):
    for template, message in (
        ("When {A} and {B} met, {S} gave it to {X}", r"unknown slot \{X\}; known are \{A\}, \{B\}, \{PLACE\}, \{S\}"),
        ("When {A} and {B} met, {S} gave it to {}", r"unknown slot \{\}; known are"),
        ("When {A} and {B} met, {S.x} gave it to", r"unknown slot \{S.x\}"),
        ("When {A} and {B} met, {S:>9} gave it to", r"unknown slot \{S\}"),
        ("When {A} and {B} met, {S} gave it to}", "has a brace too many or too few"),
        ("When {A} and {B} met, {S gave it to", "has a brace too many or too few"),
        ("When {A} met, {S} gave it to", r"lacks \{B\}"),
    ):
        refused(message, ioi_pairs, model, 4, template=template)
    own = ioi_pairs(model, 2, template="When {A} and {B} met, {S} gave it to")
    assert own.differ.sum(1).tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------
# Files

BOM = "\ufeff"


def test_documents_whatever_the_line_ends(tmp_path):
    wanted = ["One\u2028line\x85here.\nA second.", "Another é."]
    plain = "\n\n".join(wanted) + "\n"
    for i, text in enumerate((plain, BOM + plain, plain.replace("\n", "\r\n"), plain.replace("\n", "\r"))):
        path = tmp_path / f"{i}.txt"
        path.write_bytes(text.encode())
        path.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode()))
        assert read_documents(path) == read_documents(path.with_suffix(".txt.gz")) == wanted


def test_blocks_of_a_text_and_of_any_number(model):
    from lnfree_interp import token_blocks

    blocks = token_blocks(model.tokenizer, [TEXT, TEXT], 3)
    assert torch.equal(token_blocks(model.tokenizer, [TEXT, TEXT], np.int64(3), max_blocks=torch.tensor(99)), blocks)
    n = len(token_blocks(model.tokenizer, TEXT, 3))
    assert 0 < n < len(blocks) and torch.equal(token_blocks(model.tokenizer, TEXT, 3), blocks[:n])
    refused("block_size is 0", token_blocks, model.tokenizer, [TEXT], 0)
    refused("max_blocks is 0", token_blocks, model.tokenizer, [TEXT], 3, max_blocks=0)


def test_files_that_are_no_texts(tmp_path):
    damaged = bytearray(gzip.compress(b"It was the best of times. " * 99))
    damaged[20:40] = b"x" * 20
    for name, raw, message in (
        ("a.txt", "é".encode("utf-16"), "is not UTF-8 text"),
        ("a.txt.gz", b"plain", "cannot read text file .*a.txt.gz"),
        ("b.txt.gz", bytes(damaged), "cannot read text file .*b.txt.gz"),
        ("c.txt.gz", bytes(damaged)[:15], "cannot read text file .*c.txt.gz"),
        ("d.txt", (BOM + "\r\n").encode(), "is empty"),
    ):
        (tmp_path / name).write_bytes(raw)
        refused(message, read_documents, tmp_path / name)
    refused("cannot read text file .*: Is a directory", read_documents, tmp_path)


def test_hellaswag_items_with_any_character(tmp_path):
    items = [
        {"ctx": "a\u2028b\x85c", "endings": ["d", "e"], "label": 1},
        {"ctx": "f", "endings": ["d", "e"], "label": 0},
    ]
    text = "\r\n\r\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    for name, raw in (("a.jsonl", (BOM + text).encode()), ("b.jsonl.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(raw)
        assert hellaswag_items(tmp_path / name) == items
    (tmp_path / "c.jsonl").write_text(text + '\n\n{"ctx": ', encoding="utf-8")
    refused(r"c\.jsonl, line 5: no JSON", hellaswag_items, tmp_path / "c.jsonl")
