"""Every argument of every public function and method, given what it is not: one line that says what is wanted.

The cases come from the stubs: a new public name is tried as soon as it is listed, and fails here until RIGHT has
arguments for it.
"""

import ast
import importlib
import inspect
import linecache
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import make_model, random_tokens
from minute import MINUTE, byte_tokenizer, minute_blocks, minute_gpt2, probe_data
from test_patching import make_pairs
from transformers import Trainer, TrainerCallback

import lnfree_interp
from lnfree_interp import Reader, load_model
from lnfree_interp.names import VALIDATION_TEXT
from lnfree_interp.patching import Estimate
from lnfree_interp.probe import Training
from lnfree_interp.results import Result

PACKAGE = Path(lnfree_interp.__file__).parent


class Thing:
    """What no argument is."""

    def __repr__(self):
        return "Thing()"


THING = Thing()
# What is tried, and the words of an annotation by which it may be right; without one it must be refused.
WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, "None|Any"),
    "text": ("x", "str|Path|Tokens|Targets|ModelOrName|MetricLike|TokenSource|Document"),
    "fraction": (3.5, "float"),
    "nan": (math.nan, ""),
    "negative": (-1, "int|SupportsIndex|Targets|Places|float"),
    "bool": (True, "bool"),
    "floats": (torch.zeros(2, 2), "Tensor|Float|Any"),
    "empty": ([], "Sequence|Iterable|Places|Targets|tuple"),
    "thing": (THING, ""),
    "things": ([THING], ""),
    "mapping": ({"a": THING}, "dict"),
}
MODEL = make_model("LNPre")
TOKENS = random_tokens(MODEL, batch=2, pos=6)
PAIRS = make_pairs(MODEL, n=2, pos=5, changed=((1,), (2,)))
ROWS = [("the girl said that", "the man said that", " she", " he")]
ITEM = {"ctx": "He opened the", "endings": ["door.", "sky."], "label": 0}


@cache
def tiny():
    return load_model("tiny-noLN", device="cpu")


def of(name: str, **more: Any) -> Any:
    """What a public function gives for arguments that are right."""
    function = FUNCTIONS[name]
    return function(**RIGHT[name]() | more)


def public() -> Iterator[tuple[str, Any]]:
    """The public names of the package and its folders, each thing once."""
    seen = set()
    for stub in sorted(PACKAGE.rglob("__init__.pyi")):
        module = importlib.import_module(".".join(("lnfree_interp", *stub.parent.relative_to(PACKAGE).parts)))
        for node in ast.parse(stub.read_text("utf-8")).body:
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                thing = getattr(module, alias.name)
                if id(thing) not in seen:
                    seen.add(id(thing))
                    yield alias.name, thing


FUNCTIONS: dict[str, Callable] = {name: thing for name, thing in public() if inspect.isfunction(thing)}
CLASSES: dict[str, type] = {name: thing for name, thing in public() if inspect.isclass(thing)}

_MODEL = {"model": MODEL}
_TOKENS = _MODEL | {"tokens": TOKENS}
_PAIRS = _MODEL | {"pairs": PAIRS}
_TEXTS = ("the girl said that", "the man said that")
_LOGITS = torch.zeros(2, 3, 5)


@cache
def probe():
    return of("fit_probe")


def probe_file() -> str:
    probe_data().save("data.jsonl")
    return "data.jsonl"


def saved_probe() -> str:
    probe().save("probe.safetensors")
    return "probe.safetensors"


_PROBED = {"prompt": (1, 2, 3)}


@cache
def effect():
    return of("activation_patching")


# Function -> arguments that are right, made when wanted.
RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "analogy_data": lambda: {"model": tiny(), "n": 4},
    "concept_evidence": lambda: _MODEL | _PROBED | {"probe": probe()},
    "evaluate_probe": lambda: _MODEL | {"probe": probe(), "data": probe_data()},
    "fit_probe": lambda: (
        _MODEL | {"data": probe_data(), "dim": 8, "mastered": False, "training": Training(hidden=2, epochs=1)}
    ),
    "recall_data": lambda: {"model": tiny(), "n": 2},
    "swap_concepts": lambda: _MODEL | {"probe": probe(), "data": probe_data(), "n": 2},
    "ablate_cumulatively": lambda: _TOKENS | {"neurons": [3]},
    "ablate_neurons": lambda: _TOKENS | {"neurons": [3]},
    "activation_patching": lambda: _PAIRS,
    "as_pairs": lambda: {"pairs": PAIRS},
    "attention_patterns": lambda: _TOKENS,
    "attention_score_attribution": lambda: _TOKENS | {"layer": 1, "head": 0},
    "attention_sinks": lambda: _TOKENS,
    "attribution_error": lambda: {
        "approximate": of("direct_logit_attribution"),
        "exact": of("direct_effect"),
        "draws": 2,
    },
    "attribution_graph": lambda: _MODEL | {"prompt": TOKENS[:1], "bos": False},
    "attribution_patching": lambda: _PAIRS,
    "attribution_to": lambda: _TOKENS | {"reader": Reader.neuron(1, 3)},
    "attributions_to": lambda: _TOKENS | {"reader": Reader.neuron(1, 3)},
    "available_models": dict,
    "check_model": lambda: _TOKENS,
    "checkpoint_to_resume": lambda: {"out": "none", "resume": False},
    "compare": lambda: {"models": {"m": MODEL}, "measure": lambda model: of("evaluate_loss")},
    "compare_models": lambda: {"models": {"m": MODEL}, "tokens": TOKENS, "draws": 2},
    "composition_scores": lambda: _MODEL | {"kind": "K"},
    "cross_entropy": lambda: {"logits": _LOGITS, "tokens": torch.zeros(2, 3, dtype=torch.long)},
    "direct_effect": lambda: _TOKENS,
    "direct_logit_attribution": lambda: _TOKENS,
    "documents_of": lambda: {"source": VALIDATION_TEXT},
    "edge_attribution": lambda: _PAIRS,
    "edge_patching": lambda: _PAIRS | {"edges": [("embed", "logits")]},
    "effect_on": lambda: _TOKENS | {"reader": Reader.neuron(1, 3)},
    "entropy": lambda: {"logits": _LOGITS},
    "evaluate_loss": lambda: _TOKENS | {"draws": 2},
    "explain": lambda: _MODEL | {"prompt": TOKENS[:1]},
    "finished": lambda: {"out": "none"},
    "generate_samples": lambda: {"models": {"m": tiny()}, "prompt": "He", "max_new_tokens": 1},
    "groups_from_file": lambda: {"path": pairs_file(), "model": tiny()},
    "hellaswag": lambda: {"model": tiny(), "items": [ITEM]},
    "hellaswag_items": lambda: {"source": items_file()},
    "induction_pairs": lambda: _MODEL | {"n": 2, "length": 8},
    "ioi_pairs": lambda: {"model": tiny(), "n": 2},
    "js_divergence": lambda: {"logits_a": _LOGITS, "logits_b": _LOGITS},
    "kl_divergence": lambda: {"logits": _LOGITS, "other": _LOGITS},
    "last_checkpoint": lambda: {"out": "none"},
    "load_model": lambda: {"name_or_path": "tiny-noLN", "device": "cpu"},
    "load_trainable": lambda: {"name": "tiny"},
    "logit_attributions": lambda: _TOKENS,
    "logit_lens": lambda: _TOKENS,
    "loss_table": lambda: {
        "evaluations": {"a": of("evaluate_loss"), "b": of("evaluate_loss")},
        "baselines": {"b": "a"},
        "draws": 2,
    },
    "moved": lambda: {"effect": effect()},
    "normalized": lambda: {"effect": effect()},
    "pairs_from_text": lambda: {"model": tiny(), "rows": ROWS},
    "patching_error": lambda: {"approximate": effect(), "exact": effect(), "normalize": False, "draws": 2},
    "rank_confidence_neurons": lambda: _MODEL,
    "read_corpus": lambda: {"sources": VALIDATION_TEXT, "tokenizer": tiny().tokenizer, "block_size": 9, "cache": "c"},
    "read_documents": lambda: {"path": VALIDATION_TEXT},
    "read_weights": lambda: _MODEL,
    "remove_layernorm": lambda: {
        "model": minute_gpt2(),
        "tokenizer": byte_tokenizer(),
        "dataset": minute_blocks(),
        "schedule": MINUTE,
        "out": "run",
        "device": "cpu",
    },
    "residual_norms": lambda: _TOKENS,
    "save_checkpoint": lambda: {"model": minute_gpt2(), "tokenizer": None, "directory": "saved"},
    "screen": lambda: _PAIRS | {"budget": 1.0, "normalize": False},
    "screen_edges": lambda: _PAIRS | {"budget": 2.0, "normalize": False},
    "solved": lambda: {"effect": effect()},
    "token_blocks": lambda: {"tokenizer": tiny().tokenizer, "documents": ["He opened the door."], "block_size": 3},
    "token_losses": lambda: _TOKENS,
    "total_effect": lambda: {"effect": effect()},
    "virtual_weights": lambda: _MODEL | {"sender": "L0H1", "receiver": "L1.mlp"},
    "why_not_read": lambda: _MODEL,
    # What people make, and methods that want arguments.
    "Codebook": lambda: {"concepts": ("a", "b"), "dim": 8},
    "Codebook.number": lambda: {"concept": "a"},
    "Codebook.of": lambda: {"concepts": ["a"]},
    "HyperProbe.load": lambda: {"path": saved_probe()},
    "HyperProbe.read": lambda: _MODEL | _PROBED | {"keys": ["k0"]},
    "HyperProbe.save": lambda: {"path": "probe.safetensors"},
    "ProbeData": lambda: {"prompts": probe_data().prompts},
    "ProbeData.from_file": lambda: {"path": probe_file()},
    "ProbeData.save": lambda: {"path": "data.jsonl"},
    "ProbePrompt": lambda: {"prompt": "a b", "pairs": (("a", "b"),), "answer": " b"},
    "Training": dict,
    "Guard": dict,
    "Guard.is_good": lambda: {"loss": 1.0, "baseline": 1.0},
    "Integrated": dict,
    "Metric": lambda: {"name": "m", "function": lambda logits: logits[:, -1, 0]},
    "Metric.check": lambda: {"pairs": PAIRS},
    "Metric.columns": lambda: {"pairs": PAIRS},
    "Metric.reads": lambda: {"n_pos": 5},
    "PromptPairs": lambda: {"clean": PAIRS.clean, "corrupted": PAIRS.corrupted, "answers": PAIRS.answers},
    "PromptPairs.__getitem__": lambda: {"rows": 0},
    "PromptPairs.to": lambda: {"device": "cpu"},
    "PromptPairs.from_file": lambda: {"path": pairs_file(), "model": tiny()},
    "PromptPairs.from_texts": lambda: {
        "model": tiny(),
        "clean": _TEXTS[0],
        "corrupted": _TEXTS[1],
        "answers": (" she", " he"),
    },
    "Reader": lambda: {"kind": "neuron", "layer": 1, "units": 3},
    "Reader.neuron": lambda: {"layer": 1, "n": 3},
    "Reader.query": lambda: {"layer": 1, "head": 0},
    "Reader.key": lambda: {"layer": 1, "head": 0},
    "Reader.value": lambda: {"layer": 1, "head": 0},
    "Reader.direction": lambda: {"layer": 1, "vector": torch.ones(24)},
    "Reader.logits": dict,
    "RelP": dict,
    "RemovalSchedule": lambda: {field: getattr(MINUTE, field) for field in MINUTE.__dataclass_fields__},
    "RemovalSchedule.preset": lambda: {"name": "tiny"},
    "RemovalSchedule.scaled": lambda: {"steps": 7},
    "RemovalSchedule.to_json": lambda: {"path": "schedule.json"},
    "RemovalSchedule.from_json": lambda: {"path": schedule_file()},
    "RemovalSchedule.events": lambda: {"n_layer": 2},
    "RemovalSchedule.state": lambda: {"step": 1, "n_layer": 2},
    "RemovalSchedule.state_after": lambda: {"happened": MINUTE.events(2)[:1], "step": 9, "n_events": 8},
    "RemovalSchedule.table": lambda: {"n_layer": 2},
    "RemovalSchedule.describe": lambda: {"n_layer": 2},
    "SecondOrder": dict,
    "AttributionGraph.save": lambda: {"path": "graph.safetensors"},
    "Comparison.__getitem__": lambda: {"name": "m"},
    "EdgeEffect.__getitem__": lambda: {"prompts": slice(0, 1)},
    "Explanation.parts": lambda: {"kind": "component"},
    "Explanation.word": lambda: {"token": 3},
    "PatchingEffect.__getitem__": lambda: {"prompts": slice(0, 1)},
}
# Class -> one, to try its methods on.
ONE: dict[str, Callable[[], Any]] = {
    "ConceptEvidence": lambda: of("concept_evidence"),
    "ConceptSwap": lambda: of("swap_concepts"),
    "HyperProbe": probe,
    "ProbeEvaluation": lambda: of("evaluate_probe"),
    "ProbeReading": lambda: probe().read(**_MODEL, **_PROBED, keys=["k0"]),
    "AttentionPatterns": lambda: of("attention_patterns"),
    "AttentionSinks": lambda: of("attention_sinks"),
    "AttributionError": lambda: of("attribution_error"),
    "AttributionGraph": lambda: of("attribution_graph"),
    "Comparison": lambda: of("compare"),
    "EdgeEffect": lambda: of("edge_attribution"),
    "Explanation": lambda: of("explain"),
    "HellaSwag": lambda: of("hellaswag"),
    "LogitAttribution": lambda: of("direct_effect"),
    "LogitLens": lambda: of("logit_lens"),
    "LossEvaluation": lambda: of("evaluate_loss"),
    "LossTable": lambda: of("loss_table"),
    "ModelCheck": lambda: of("check_model"),
    "ModelComparison": lambda: of("compare_models"),
    "NeuronAblation": lambda: of("ablate_neurons"),
    "PatchingEffect": effect,
    "PatchingError": lambda: of("patching_error"),
    "ReaderAttribution": lambda: of("attribution_to", by="source"),
    "ResidualNorms": lambda: of("residual_norms"),
    "Samples": lambda: of("generate_samples"),
    "ScoreAttribution": lambda: of("attention_score_attribution"),
    "Screening": lambda: of("screen"),
    "TokenLosses": lambda: of("token_losses"),
}
# Public classes that no user makes, besides results.
NOT_HERE = {("AttentionPatterns", "circuitsvis"): "wants another package", ("Samples", "plot"): "has no figure"}
MADE_BY_OTHERS = {
    "Diverged": "an error",
    "ErrorLeft": "part of a Screening",
    "GraphNode": "part of an AttributionGraph",
    "HyperProbe": "made by fit_probe",
    "Law": "part of a ModelCheck",
    "PairedPrompts": "part of a PatchingEffect",
    "Way": "part of a ModelCheck",
    "WorstSequence": "part of a LossEvaluation",
}
# Arguments that take anything, or nothing that could be told from something wrong.
ANYTHING = {
    ("Guard.is_good", "loss"): "nan is a loss, and not a good one",
    ("Guard.is_good", "baseline"): "the run's own",
    ("Metric", "tokens"): "token ids of any make, held against the pairs when it is used",
    ("save_checkpoint", "state"): "what JSON holds",
    ("PromptPairs.to", "device"): "any device of torch's, which says in a line what it has",
    ("as_pairs", "model"): "read where pairs are texts",
    ("as_pairs", "pairs"): "what it is asked to tell; tests of pairs have its errors",
    ("PromptPairs", "tokenizer"): "anything that decodes; asked only when texts are shown",
}
# What a message calls an argument that it does not name itself.
ALSO_CALLED = {
    "prompt": "tokens", "name_or_path": "model", "n": "units|neuron", "head": "units|head", "rows": "pair",
    "prompts": "prompt", "documents": "document", "reader": "reader", "logits_a": "logits", "logits_b": "logits",
    "other": "logits", "queries": "query", "only": "mask", "dataset": "text", "name": "preset",
}  # fmt: skip


def pairs_file() -> str:
    Path("pairs.jsonl").write_text('{"clean": "the girl", "corrupted": "the man", "right": " she", "wrong": " he"}')
    return "pairs.jsonl"


def items_file() -> str:
    Path("items.jsonl").write_text('{"ctx": "He opened the", "endings": ["door.", "sky."], "label": 0}')
    return "items.jsonl"


def schedule_file() -> str:
    MINUTE.to_json("schedule.json")
    return "schedule.json"


def of_trainer(thing: type) -> bool:
    """Whether transformers' Trainer calls its methods, and nobody else does."""
    return issubclass(thing, (Trainer, TrainerCallback))


def methods(thing: type) -> Iterator[tuple[str, Callable]]:
    for name, member in inspect.getmembers(thing):
        ours = inspect.isroutine(member) and str(getattr(member, "__module__", "")).startswith("lnfree_interp")
        if ours and (thing.__name__, name) not in NOT_HERE and (name == "__getitem__" or not name.startswith("_")):
            yield name, member


def callables() -> Iterator[tuple[str, Callable]]:
    """Name -> what is called: functions, what users make themselves, and methods."""
    yield from FUNCTIONS.items()
    for name, thing in CLASSES.items():
        if of_trainer(thing) or name in ("Estimate", "Law"):
            continue
        made = not issubclass(thing, Result) and name not in MADE_BY_OTHERS
        if made:
            yield name, thing
        if name == "PairedPrompts" or issubclass(thing, Estimate):  # their methods are for the functions that read them
            continue
        yield from ((f"{name}.{method}", member) for method, member in methods(thing))


def parameters(function: Callable) -> list[inspect.Parameter]:
    of_several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [p for p in found if p.kind not in of_several and p.name not in ("self", "cls")]


CASES = [
    (name, parameter.name, str(parameter.annotation) if parameter.annotation is not parameter.empty else "")
    for name, function in callables()
    for parameter in parameters(function)
    if (name, parameter.name) not in ANYTHING
]


def called(name: str, /, **arguments: Any) -> Any:
    owner, _, method = name.partition(".")
    function = FUNCTIONS.get(name) or CLASSES.get(name)
    if function is None:
        plain = inspect.getattr_static(CLASSES[owner], method)
        bound = CLASSES[owner] if isinstance(plain, classmethod) else one(owner)
        function = getattr(bound, method)
    right = RIGHT[name]() if name in RIGHT else {}
    result = function(**right | arguments)
    return next(result) if isinstance(result, Iterator) else result


@cache
def one(owner: str) -> Any:
    if owner in ONE:
        return ONE[owner]()
    return MINUTE if owner == "RemovalSchedule" else CLASSES[owner](**RIGHT[owner]())


@pytest.fixture(autouse=True)
def as_users_have_it(tmp_path, monkeypatch):
    """Without the checks of shapes that only tests have; in an empty directory."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    monkeypatch.chdir(tmp_path)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def faults(name: str, argument: str, annotation: str, label: str) -> str:
    """What is wrong with the answer; empty if nothing is."""
    wrong, words = WRONG[label]
    allowed = bool(words and re.search(rf"\b({words})\b", annotation))
    if name in SLOW and allowed:
        return ""
    given = f"{name}({argument}={label})"
    if wrong is None and name in RIGHT and RIGHT[name]().get(argument, 0) is None and not annotation:
        return ""  # what is given as None where it is right
    try:
        called(name, **{argument: wrong})
    except Exception as error:
        frame = inspect.getinnerframes(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno).strip()
        text = str(error)
        if not (str(PACKAGE) in frame.filename and line.startswith("raise ")):
            return f"{given}: {type(error).__name__} {text!r} of {os.path.basename(frame.filename)}: {line}"
        names = {argument, argument.removesuffix("s"), *ALSO_CALLED.get(argument, argument).split("|")}
        absent = isinstance(error, KeyError) and allowed and name.endswith("__getitem__")
        if not (isinstance(error, (ValueError, TypeError)) or absent):
            return f"{given}: {type(error).__name__} {text!r}"
        if "\n" in text:
            return f"{given}: more than a line: {text!r}"
        if not allowed and not re.search(rf"\b({'|'.join(names)})s?\b", f"{text} {text.replace('_', ' ')}"):
            return f"{given}: does not name the argument: {text!r}"
        return ""
    return "" if allowed else f"{given}: served"


# Right arguments of these take too long to be run for what may be right.
SLOW = {"remove_layernorm", "check_model", "load_trainable", "load_model"}


@pytest.mark.parametrize("name, argument, annotation", CASES, ids=lambda x: x if " " not in x else "")
def test_what_an_argument_is_not(name, argument, annotation):
    said = [fault for label in WRONG if (fault := faults(name, argument, annotation, label))]
    assert not said, "\n".join(["", *said])


@pytest.mark.parametrize("name", [name for name, _ in callables() if name not in SLOW])
def test_what_is_right_is_served(name):
    called(name)
