"""Prompts made here: recall of pairs that a prompt has just named, which a small model does, and analogies."""

from __future__ import annotations

import random
import re

from ..arguments import one_of, shown, whole
from ..batching import check_next_token, encode
from ..lens import LensModel, ModelOrName
from ..models import as_model
from .data import ProbeData, ProbePrompt
from .words import KINDS, RECALL, TEMPLATES

# What a word is, for recall.
WORD = re.compile(r" [a-z]{4,}")


def recall_data(
    model: ModelOrName, n: int = 2000, *, keys: int = 4, values: int = 20, pairs: int = 4, reads: int = 3, seed: int = 0
) -> ProbeData:
    """Lists of words in pairs, read several times, the last time as far as a key: what was it paired with?

    Nothing but the prompt says which word goes with which: it is induction that answers, and chance is 1 in `values`. A
    prompt's pairs are the one read last and the one that is asked for.

    Args:
        n: how many prompts.
        keys, values: how many words there are of each: single tokens from the rarer half of the vocabulary (of common
            words a model expects what usually follows them).
        pairs: in a list.
        reads: how often it is read, the last time in part.
        seed: of what is drawn.

    Raises:
        ValueError: the tokenizer has too few words of one token; more pairs than keys or values.

    Example:
        >>> from lnfree_interp import load_model, recall_data
        >>> data = recall_data(load_model("tiny-noLN"), 4, pairs=2, reads=2)
        >>> len(data), len(data.prompts[0].pairs), data.prompts[0].answer.strip() == data.prompts[0].value
        (4, 2, True)
    """
    model = as_model(model)
    n, keys, values = (whole(x, name, least=1) for x, name in ((n, "n"), (keys, "keys"), (values, "values")))
    pairs, reads = whole(pairs, "pairs", least=2), whole(reads, "reads", least=2)
    if pairs > min(keys, values):
        raise ValueError(f"lists of {pairs} pairs cannot be made of {keys} keys and {values} values")
    words = _words(model, keys + values)
    of_keys, of_values = words[:keys], words[keys:]
    rng, templates, prompts = random.Random(whole(seed, "seed", least=0)), list(RECALL), []
    for i in range(n):
        template = templates[i % len(templates)]
        pair, between = RECALL[template]
        chosen = list(zip(rng.sample(of_keys, pairs), rng.sample(of_values, pairs)))
        at = rng.randrange(1, pairs)
        whole_list = between.join(pair.format(k=k, v=v) for k, v in chosen)
        last = [pair.format(k=k, v=v) for k, v in chosen[:at]]
        last.append(pair.format(k=chosen[at][0], v="").rstrip())
        text = between.join([*[whole_list] * (reads - 1), *last])
        prompts.append(ProbePrompt(text, (chosen[at - 1], chosen[at]), f" {chosen[at][1]}", template))
    return ProbeData(tuple(prompts))


def _words(model: LensModel, n: int) -> list[str]:
    """Words of one token, evenly spaced over the second half of the vocabulary, which has what is rarer."""
    check_next_token(model)
    encode(model, "")  # there is a tokenizer
    found = []
    for i in range(model.cfg.d_vocab // 2, min(model.cfg.d_vocab, len(model.tokenizer))):
        text = model.tokenizer.decode([i])
        if WORD.fullmatch(text) and encode(model, text) == [i]:
            found.append(text.strip())
    if len(found) < n:
        raise ValueError(f"the tokenizer has {len(found)} words of one token, {n} are wanted")
    return [found[i * len(found) // n] for i in range(n)]


def analogy_data(model: ModelOrName, n: int = 3000, *, kinds: list[str] | None = None, seed: int = 0) -> ProbeData:
    """Analogies of eight kinds (capitals, currencies, plurals, comparatives, opposites, family, past tenses, homes).

    Values that the tokenizer does not tell from an earlier one, since they begin with the same token, are left out:
    `left_out` says how many pairs.

    Args:
        n: how many prompts at most; all there are if that is less.
        kinds: which; None: all.
        seed: of which are drawn.

    Raises:
        ValueError: an unknown kind; fewer than two pairs left of all kinds.

    Example:
        >>> from lnfree_interp import analogy_data, load_model
        >>> data = analogy_data(load_model("tiny-noLN"), 20, kinds=["family"])
        >>> data.prompts[0].template in TEMPLATES, len(data)
        (True, 20)
    """
    model, n = as_model(model), whole(n, "n", least=1)
    chosen = list(KINDS) if kinds is None else list(one_of(kinds, "kinds", (list, tuple), "a list of kinds"))
    seed = whole(seed, "seed", least=0)
    if not chosen:
        raise ValueError("kinds name no kind of pair")
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"unknown kind {shown(unknown[0])}; allowed are {', '.join(KINDS)}")
    concept_at: dict[int, str] = {}
    kept: dict[str, list[tuple[str, str]]] = {}
    total = 0
    for kind in chosen:
        kept[kind] = []
        for key, value in KINDS[kind]:
            total += 1
            first = encode(model, f" {value}")[0]
            if concept_at.setdefault(first, value.lower()) == value.lower():
                kept[kind].append((key, value))
    prompts = [
        ProbePrompt(text.format(a=a, b=b, c=c), ((a, b), (c, d)), f" {d}", name)
        for pairs in kept.values()
        for a, b in pairs
        for c, d in pairs
        if a != c
        for name, text in TEMPLATES.items()
    ]
    if not prompts:
        raise ValueError("the tokenizer tells too few of the words apart")
    left = total - sum(map(len, kept.values()))
    drawn = random.Random(seed).sample(prompts, min(n, len(prompts)))
    said = f"{left} of {total} pairs: their values begin with the token of another" if left else ""
    return ProbeData(tuple(drawn), said)
