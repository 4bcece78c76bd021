"""Prompts, the pairs of concepts that they are about, which of them the model can do, and what is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..arguments import as_path, as_text, one_of
from ..batching import encode
from ..documents import read_text
from ..files import replace_file
from ..lens import LensModel
from .symbols import concept_of

# Shares that are held out: of answers and templates for the test and again for stopping, of prompts likewise.
CONCEPTS, PROMPTS = 0.15, 0.1
SPLITS = ("prompts", "templates", "concepts")
"""What of a test prompt was never trained on: itself; its template; its answer, as an answer."""


@dataclass(frozen=True)
class ProbePrompt:
    """A prompt whose last pair lacks its second concept, the answer.

    Attributes:
        prompt: text, or token ids as the model reads them (BOS included).
        pairs: (key, value) names of concepts, the last one that which is asked for.
        answer: what follows the prompt: text with its blank, or a token id.
        template: a name; prompts of one template share it.
    """

    prompt: str | tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    answer: str | int
    template: str = ""

    def __post_init__(self):
        if not isinstance(self.prompt, (str, tuple)) or not self.prompt:
            raise ValueError("a prompt must be a text or a tuple of token ids, not empty")
        if not isinstance(self.prompt, str) and not all(isinstance(i, int) for i in self.prompt):
            raise ValueError("a prompt must be a text or a tuple of token ids, all whole numbers")
        if not isinstance(self.pairs, (tuple, list)) or not self.pairs or not all(map(_is_pair, self.pairs)):
            raise ValueError(
                f"pairs of prompt {str(self.prompt)[:40]!r} must be a list of (key, value), names of concepts"
            )
        answer = self.answer
        if (
            isinstance(answer, bool)
            or not isinstance(answer, (str, int))
            or answer == ""
            or (isinstance(answer, int) and answer < 0)
        ):
            raise ValueError(f"the answer of prompt {str(self.prompt)[:40]!r} must be a text or a token id")
        as_text(self.template, "template")
        pairs = tuple((concept_of(key), concept_of(value)) for key, value in self.pairs)
        object.__setattr__(self, "pairs", pairs)

    @property
    def key(self) -> str:
        """What is asked about."""
        return self.pairs[-1][0]

    @property
    def value(self) -> str:
        """The answer's concept."""
        return self.pairs[-1][1]


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Prompts for a probe.

    Attributes:
        prompts: at least one.
        left_out: what the maker left out and why, for people.

    Raises:
        ValueError: no prompts, or one that is none.

    Example:
        >>> mexico = ProbePrompt("Denmark : krone = Mexico :", (("Denmark", "krone"), ("Mexico", "peso")), " peso")
        >>> data = ProbeData((mexico,))
        >>> len(data), data.concepts
        (1, ('denmark', 'krone', 'mexico', 'peso'))
    """

    prompts: tuple[ProbePrompt, ...] = field(repr=False)
    left_out: str = ""

    def __post_init__(self):
        prompts = one_of(self.prompts, "prompts", (tuple, list), "a list of ProbePrompts")
        if not prompts:
            raise ValueError("a probe's data have no prompts")
        for prompt in prompts:
            one_of(prompt, "a prompt", ProbePrompt, "a ProbePrompt")
        as_text(self.left_out, "left_out")
        object.__setattr__(self, "prompts", tuple(prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[ProbePrompt]:
        return iter(self.prompts)

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """All concepts, in the order of the alphabet."""
        return tuple(sorted({name for prompt in self.prompts for pair in prompt.pairs for name in pair}))

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The concepts that are answers."""
        return tuple(sorted({prompt.value for prompt in self.prompts}))

    @cached_property
    def templates(self) -> tuple[str, ...]:
        return tuple(sorted({prompt.template for prompt in self.prompts}))

    def save(self, path: str | Path) -> None:
        """Write .jsonl, a prompt a line, as `from_file` reads it.

        Raises:
            ValueError: the disk refuses.
        """
        as_path(path, "path")
        lines = [json.dumps(_as_json(prompt), ensure_ascii=False) + "\n" for prompt in self.prompts]
        replace_file(path, lambda beside: beside.write_text("".join(lines), encoding="utf-8"))

    @classmethod
    def from_file(cls, path: str | Path) -> ProbeData:
        """Prompts of a .jsonl file: {"prompt", "pairs": [[key, value], ...], "answer", "template"} a line.

        Raises:
            ValueError: no such file, a line that is no such prompt.
        """
        as_path(path, "path")
        rows = []
        for number, line in enumerate(read_text(path, "probe data").splitlines(), 1):
            if not line.strip():
                continue
            try:
                given = json.loads(line)
                prompt, answer = given["prompt"], given["answer"]
                pairs = tuple((pair[0], pair[1]) for pair in given["pairs"])
                prompt = tuple(prompt) if isinstance(prompt, list) else prompt
                rows.append(ProbePrompt(prompt, pairs, answer, given.get("template", "")))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error.msg}") from None
            except (KeyError, TypeError, IndexError, AttributeError):
                wanted = '{"prompt": ..., "pairs": [[key, value], ...], "answer": ...}'
                raise ValueError(f"{path}, line {number} is no {wanted}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
        if not rows:
            raise ValueError(f"{path} holds no prompts")
        return cls(tuple(rows))


def _as_json(prompt: ProbePrompt) -> dict:
    return {"prompt": prompt.prompt, "pairs": prompt.pairs, "answer": prompt.answer, "template": prompt.template}


def _is_pair(pair: object) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, str) and x.strip() for x in pair)


# ---------------------------------------------------------------------------------------------------------
# Tokens


def answer_tokens(model: LensModel, data: ProbeData) -> dict[str, int]:
    """Concept -> the first token of it as an answer, for all concepts that are answers.

    Raises:
        ValueError: two concepts that begin with the same token, or one that is given two tokens.
    """
    found: dict[str, int] = {}
    concept_at: dict[int, str] = {}
    given: dict[tuple[str, str | int], int] = {}
    for prompt in data:
        answer = prompt.answer
        if (prompt.value, answer) not in given:
            token = answer if isinstance(answer, int) else _first(model, answer)
            if not 0 <= token < model.cfg.d_vocab:
                raise ValueError(f"answer {answer!r} is outside the model's vocabulary of {model.cfg.d_vocab}")
            given[prompt.value, answer] = token
        token = given[prompt.value, answer]
        if found.setdefault(prompt.value, token) != token:
            raise ValueError(f"concept {prompt.value!r} has answers that begin with different tokens")
        other = concept_at.setdefault(token, prompt.value)
        if other != prompt.value:
            raise ValueError(
                f"concepts {other!r} and {prompt.value!r} begin with the same token {token}: "
                "the tokenizer does not tell them apart"
            )
    return found


def _first(model: LensModel, text: str) -> int:
    ids = encode(model, text)
    if not ids:
        raise ValueError(f"answer {text!r} has no tokens")
    return ids[0]


# ---------------------------------------------------------------------------------------------------------
# What is held out


@dataclass(frozen=True)
class Splits:
    """Which prompts are trained on, stop the training, or test; each follows from the prompt and the seed alone.

    Attributes:
        concepts: answers that only test prompts have, and those that only stop the training;
        templates: likewise.
    """

    seed: int
    concepts: tuple[tuple[str, ...], tuple[str, ...]]
    templates: tuple[tuple[str, ...], tuple[str, ...]]

    @classmethod
    def of(cls, data: ProbeData, seed: int) -> Splits:
        """Held out are 15% of the answers twice, for the test and for stopping, if there are ten of them at least; and
        one template twice if there are four, one for the test if there are three."""
        n = round(CONCEPTS * len(data.answers)) if len(data.answers) >= 10 else 0
        answers = sorted(data.answers, key=lambda name: _drawn(seed, "answer", name))
        m = len(data.templates)
        templates = sorted(data.templates, key=lambda name: _drawn(seed, "template", name))
        test, stop = (1 if m >= 3 else 0), (1 if m >= 4 else 0)
        return cls(
            seed,
            (tuple(answers[:n]), tuple(answers[n : 2 * n])),
            (tuple(templates[:test]), tuple(templates[test : test + stop])),
        )

    def split(self, prompt: ProbePrompt) -> str:
        """ "train", "stop", one of SPLITS, or "unused" for what is held out in two ways."""
        concept = [prompt.value in names for names in self.concepts]
        template = [prompt.template in names for names in self.templates]
        if any(concept) and any(template):
            return "unused"
        if any(concept) or any(template):
            return "stop" if concept[1] or template[1] else "concepts" if concept[0] else "templates"
        drawn = _drawn(self.seed, "prompt", repr(prompt.prompt))
        return "prompts" if drawn < PROMPTS else "stop" if drawn < 2 * PROMPTS else "train"

    def rows(self, data: ProbeData, *names: str) -> list[int]:
        """The numbers of the prompts in some of the splits."""
        return [i for i, prompt in enumerate(data) if self.split(prompt) in names]


def _drawn(seed: int, what: str, name: str) -> float:
    """A number from 0 to 1 that is a name's own."""
    digest = hashlib.sha256(f"{seed}:{what}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
