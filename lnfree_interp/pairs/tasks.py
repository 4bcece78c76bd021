"""Pairs of tasks that models are known to do: indirect object identification, induction."""

from __future__ import annotations

import random
from string import Formatter
from typing import SupportsIndex

import torch

from ..arguments import whole
from ..batching import check_next_token, encode
from ..lens import LensModel, ModelOrName
from ..models import as_model
from .prompt_pairs import PromptPairs
from .texts import bos_of, pairs_from_text

# ---------------------------------------------------------------------------------------------------------
# Indirect object identification

NAMES = tuple(
    """
    Mary John Tom James Dan Martin Amy David Peter Sarah Anna Paul Mark Kate Laura Simon Alice Jack Emma George
    Henry William Charles Robert Richard Edward Arthur Frank Lucy Jane Elizabeth Margaret Ruth Helen Alex Michael
    Thomas Philip Joseph Joe Sam Ben Will Harry Kelly Rachel Lisa Jessica
    """.split()
)
PLACES = tuple(
    """
    store garden restaurant school hospital office house station church library market park village town city castle
    hotel theatre river sea
    """.split()
)
OBJECTS = tuple(
    """
    ring kiss bone basketball computer necklace drink snack book letter key box cup glass flower hat coat knife
    picture pen stick watch purse cat dog
    """.split()
)
TEMPLATES = (
    "Then, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "When {A} and {B} went to the {PLACE}, {S} gave a {OBJECT} to",
    "After {A} and {B} came to the {PLACE}, {S} handed the {OBJECT} to",
    "While {A} and {B} were at the {PLACE}, {S} decided to give the {OBJECT} to",
)
"""{S} is the giver. In the clean prompt it is one of the two names, in the corrupted prompt the other one."""


_SLOTS = ("A", "B", "PLACE", "S", "OBJECT")


def ioi_pairs(
    model: ModelOrName,
    n: SupportsIndex,
    *,
    seed: SupportsIndex = 0,
    template: SupportsIndex | str = 0,
    prepend_bos: bool = True,
) -> PromptPairs:
    """Pairs for indirect object identification: clean and corrupted differ in who gives, so in who receives.

    Names, places and objects are drawn from those that are one token each (after a space) in the model's
    tokenizer, so that all pairs have one length; half of the pairs name the receiver first (ABBA), half the giver
    (BABA). Answers: the clean prompt's receiver is right, the corrupted prompt's is wrong. Template 0 is P2's
    (arXiv 2507.02559).

    Args:
        template: index into TEMPLATES, or your own text with {A}, {B}, {PLACE}, {S}, {OBJECT}, in each case
            after a space.
        prepend_bos: put the tokenizer's BOS token first.

    Raises:
        ValueError: no tokenizer, fewer than two single-token names or no place or object, an unknown template,
            n not positive.

    Example:
        >>> from lnfree_interp import load_model
        >>> pairs = ioi_pairs(load_model("tiny-noLN"), 4)
        >>> len(pairs), pairs.differ.sum(1).tolist()
        (4, [1, 1, 1, 1])
    """
    model = as_model(model)
    n, draw, template = whole(n, "n", least=1), random.Random(whole(seed, "seed")), _template(template)
    names, places, objects = (
        [word for word in words if len(encode(model, " " + word)) == 1] for words in (NAMES, PLACES, OBJECTS)
    )
    if len(names) < 2 or not places or not objects:
        raise ValueError(
            f"the tokenizer has {len(names)} names, {len(places)} places and {len(objects)} objects that are one "
            "token each; at least 2, 1 and 1 are needed"
        )
    rows = []
    for i in range(n):
        receiver, giver = draw.sample(names, 2)
        a, b = (receiver, giver) if i % 2 == 0 else (giver, receiver)
        fill = {"A": a, "B": b, "PLACE": draw.choice(places), "OBJECT": draw.choice(objects)}
        clean, corrupted = (template.format(S=s, **fill) for s in (giver, receiver))
        rows.append((clean, corrupted, f" {receiver}", f" {giver}"))
    groups = pairs_from_text(model, rows, prepend_bos=prepend_bos)
    if len(groups) > 1:
        raise ValueError(
            f"template {template!r} gives pairs of {', '.join(map(str, groups))} tokens, not of one length"
        )
    return next(iter(groups.values()))


def _template(template: SupportsIndex | str) -> str:
    """The text of a template that is named by its number or given, with no slots but the known ones."""
    if not isinstance(template, str):
        number = whole(template, "template")
        if not 0 <= number < len(TEMPLATES):
            raise ValueError(f"template {number} is unknown; known are 0 to {len(TEMPLATES) - 1}, or a text")
        return TEMPLATES[number]
    known = ", ".join(f"{{{slot}}}" for slot in _SLOTS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template {template!r} has a brace too many or too few ({error}); slots are {known}"
        ) from None
    slots = []
    for _, name, spec, conversion in parts:
        if name is None:  # the text after the last slot
            continue
        slots.append(name)
        if name not in _SLOTS or spec or conversion:
            raise ValueError(f"template {template!r} has an unknown slot {{{name}}}; known are {known}")
    lacking = [slot for slot in ("A", "B", "S") if slot not in slots]
    if lacking:
        raise ValueError(f"template {template!r} lacks {', '.join(f'{{{slot}}}' for slot in lacking)}")
    return template


# ---------------------------------------------------------------------------------------------------------
# Induction


def induction_pairs(
    model: ModelOrName, n: SupportsIndex, *, length: SupportsIndex = 16, seed: SupportsIndex = 0
) -> PromptPairs:
    """Random tokens repeated up to the one before the last: the model must copy what came next the first time.

    The pairs differ in that token's first occurrence alone; what stands there is the answer, right in the clean
    and wrong in the corrupted prompt. Tokens are all different within a prompt, and drawn from the whole
    vocabulary; where there is a tokenizer, without special tokens and parts of characters, and with a BOS token
    first if it has one.

    Args:
        length: positions per prompt, BOS included; at least 4.

    Raises:
        ValueError: n not positive, a length below 4 or beyond the context, a vocabulary too small for it.

    Example:
        >>> from lnfree_interp import load_model
        >>> pairs = induction_pairs(load_model("tiny-noLN"), 8, length=12)
        >>> pairs.clean.shape, pairs.differ.sum().item()
        (torch.Size([8, 12]), 8)
    """
    model = as_model(model)
    check_next_token(model)
    n, length, draw = whole(n, "n", least=1), whole(length, "length"), random.Random(whole(seed, "seed"))
    if not 4 <= length <= model.cfg.n_ctx:
        raise ValueError(f"length is {length}, it must be from 4 to the model's context of {model.cfg.n_ctx}")
    bos, special = [], set()
    if model.tokenizer is not None:
        bos, special = bos_of(model), set(model.tokenizer.all_special_ids)
    period = (length - len(bos)) // 2 + 1
    allowed = [i for i in range(model.cfg.d_vocab) if i not in special]
    # The first period is repeated up to the token before the one asked for, which stands at offset `asked`.
    asked = length - len(bos) - period
    clean, corrupted, answers = [], [], []
    for _ in range(n):
        *first, other = _whole_tokens(model, allowed, period + 1, draw, length)
        changed = [*first[:asked], other, *first[asked + 1 :]]
        clean.append(bos + first + first[:asked])
        corrupted.append(bos + changed + changed[:asked])
        answers.append([first[asked], other])
    return PromptPairs(torch.tensor(clean), torch.tensor(corrupted), torch.tensor(answers), model.tokenizer)


def _whole_tokens(model: LensModel, allowed: list[int], n: int, draw: random.Random, length: int) -> list[int]:
    """n different tokens that are text by themselves."""
    found: list[int] = []
    for size in (4 * n, len(allowed)):  # nearly always, a few are enough to look at
        found = draw.sample(allowed, min(size, len(allowed)))
        if model.tokenizer is not None:
            found = [i for i in found if "\ufffd" not in model.tokenizer.decode([i])]
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"length {length} needs {n} different tokens, the vocabulary has {len(found)}")
