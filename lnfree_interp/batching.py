"""Token ids from whatever holds them, checked once, in passes of bounded size; and the arguments that name some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeGuard

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .arguments import listener, whole
from .lens import LensModel

Tokens = Tensor | np.ndarray | Sequence
"""Int[Tensor, "batch pos"], or an array or lists of such; or a text, or a list of texts of one token length."""

TokenSource = Tokens | Iterable
"""`Tokens`, or an iterable of such, for sets that are read as they go."""

Targets = Tensor | np.ndarray | Sequence | SupportsIndex
"""Token ids [batch] (at the last position) or [batch pos] (at every one) in a tensor, an array or lists; one id or one
text of a single token (the same for all), or a list of such texts (one per prompt), at the last position."""

Places = Tensor | np.ndarray | Sequence | SupportsIndex | slice
"""An integer, a slice, or a list, range, array or tensor of integers (negative ones count from the end), or a mask."""

Progress = Callable[[int, "int | None"], object]
"""Told (done, in all) as the work goes on; in all is None where nobody knows. What is counted, each function says."""


# ---------------------------------------------------------------------------------------------------------
# Tokens


def check_tokens(model: LensModel, tokens: Tokens, *, least: int = 1) -> Int[Tensor, "batch pos"]:
    """The tokens on the model's device; texts are read as `model.to_tokens` does, with a BOS token where it puts one.

    Raises:
        ValueError: as `tokens_as_given`.
    """
    return tokens_as_given(model, tokens, least=least).to(model.cfg.device)


def tokens_as_given(model: LensModel, tokens: Tokens, *, least: int = 1) -> Int[Tensor, "batch pos"]:
    """The tokens where they are; those of texts on the CPU.

    Raises:
        ValueError: no integers, not [batch pos], empty, fewer than `least` positions, longer than the model's
            context, ids outside its vocabulary, or pads on the left; texts of several token lengths.
    """
    cfg = model.cfg
    tokens = _as_tokens(model, tokens)
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; wanted is [batch, pos], neither of them empty")
    if tokens.shape[1] < least:
        raise ValueError(f"sequences have {tokens.shape[1]} tokens, at least {least} are needed")
    if tokens.shape[1] > cfg.n_ctx:
        raise ValueError(f"sequences have {tokens.shape[1]} tokens, the model's context holds {cfg.n_ctx}")
    check_ids(tokens, cfg.d_vocab)
    check_pads(model, tokens)
    return tokens


def _as_tokens(model: LensModel, tokens: object) -> Int[Tensor, ...]:
    texts = [tokens] if isinstance(tokens, str) else tokens
    if not _are_texts(texts):
        return as_ids(tokens, "tokens")
    _tokenizer(model)
    rows = [model.to_tokens(_readable(text), move_to_device=False, truncate=False)[0] for text in texts]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the texts have {min(lengths)} to {max(lengths)} tokens: they must be of one length, unpadded"
        )
    return torch.stack(rows)


def _readable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text {text!r} holds half a character, a surrogate without its other half") from None
    return text


def _are_texts(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def as_ids(value: object, what: str) -> Int[Tensor, ...]:
    """Whole numbers in a tensor, an array or (nested) lists, or a single one, as int64.

    Raises:
        ValueError: something else, or lists of unequal lengths.
    """
    wanted = f"{what} must be a tensor of token ids (or an array, lists, texts)"
    if not isinstance(value, Tensor):
        try:
            array = _array(value)
        except (ValueError, TypeError):
            raise ValueError(f"{wanted}, not lists of unequal lengths") from None
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{wanted}, not {type(value).__name__}" + f" of {array.dtype}" * (array.ndim > 0))
        return torch.from_numpy(array.astype(np.int64))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{wanted}, not {value.dtype}")
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{wanted}, not one that is {'without data' if value.is_meta else 'sparse'}")
    return value.long()


def check_targets(targets: object, what: str) -> None:
    """Raise ValueError unless these may be target tokens: of which model is not asked."""
    if not isinstance(targets, str) and not _are_texts(targets):
        as_ids(targets, what)


def _array(value: object) -> np.ndarray:
    """What holds numbers, or one of them, as an array."""
    if isinstance(value, Tensor):
        value = value.tolist()
    elif isinstance(value, (list, tuple)):
        value = [item.tolist() if isinstance(item, Tensor) else item for item in value]
    return np.asarray(value)


def check_ids(ids: Tensor, d_vocab: int, what: str = "tokens") -> None:
    """Raise ValueError unless all token ids are in the vocabulary."""
    low, high = torch.stack(ids.aminmax()).tolist()  # one transfer from the device
    if low < 0 or high >= d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"{what}: token id {wrong} is outside the model's vocabulary of {d_vocab}")


def check_pads(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Raise ValueError if TransformerLens would mask some of the tokens as pads and shift the positions after them.

    It does so with a tokenizer that pads on the left: for what looks like pads at a prompt's beginning, except a
    BOS token that is the pad token too. Nothing here runs with such a mask.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or getattr(tokenizer, "padding_side", "right") != "left":
        return
    bos_is_pad = getattr(model.cfg, "default_prepend_bos", True) and tokenizer.bos_token_id == pad
    leading = (tokens == pad).long().cumprod(1).sum(1)
    if leading.max() > int(bos_is_pad):
        raise ValueError(f"prompts begin with pads (token {pad}), which nothing here masks: give prompts of one length")


def _is_one_set(tokens: object) -> bool:
    """Whether these are tokens themselves, not an iterable of such."""
    if isinstance(tokens, (list, tuple)):
        return len(tokens) > 0 and not isinstance(tokens[0], (Tensor, np.ndarray))
    return isinstance(tokens, (Tensor, np.ndarray, str, Mapping)) or not isinstance(tokens, Iterable)


def token_batches(
    model: LensModel, tokens: TokenSource, *, per_pass: int = 4096, least: int = 1, progress: Progress | None = None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Batches of at most `per_pass` tokens (at least one sequence each), in order.

    Args:
        progress: told of the sequences done, once the next batch (or the end) is asked for.

    Raises:
        ValueError: see `check_tokens`; an iterable that holds nothing.
    """
    listener(progress)
    per_pass = whole(per_pass, "per_pass", least=1)
    parts = [_as_tokens(model, tokens)] if _is_one_set(tokens) else tokens
    total = sum(sum(np.shape(part)[:1]) for part in parts) if isinstance(parts, (list, tuple)) else None
    done = 0
    for part in parts:
        part = check_tokens(model, part, least=least)
        for batch in part.split(max(1, per_pass // part.shape[1])):
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, total)
    if done == 0:
        raise ValueError("there are no tokens to run on")


# ---------------------------------------------------------------------------------------------------------
# Text -> token ids, target tokens


def encode(model: LensModel, text: str) -> list[int]:
    """Token ids of a text as it stands: no BOS token, nothing cut off.

    Raises:
        ValueError: the model has no tokenizer, or the text is no Unicode.
    """
    return _tokenizer(model)(_readable(text), add_special_tokens=False, verbose=False)["input_ids"]


def _tokenizer(model: LensModel):
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer, so text cannot be read for it")
    return tokenizer


def one_token(model: LensModel, text: str, what: str) -> int:
    """The token that a text is.

    Raises:
        ValueError: it is none or several (they are shown), one beyond the model's vocabulary, or one without a logit.
    """
    check_next_token(model)
    ids = encode(model, text)
    if len(ids) != 1:
        shown = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(f"{what} {text!r} is {len(ids)} tokens {shown}, it must be one")
    if ids[0] >= model.cfg.d_vocab:
        raise ValueError(f"{what} {text!r} is token {ids[0]}, outside the model's vocabulary of {model.cfg.d_vocab}")
    return ids[0]


def d_vocab_out(cfg) -> int:
    """How many logits the model has."""
    width = getattr(cfg, "d_vocab_out", -1)
    return cfg.d_vocab if width in (-1, None) else width


def check_next_token(model: LensModel) -> None:
    """Raise ValueError unless the logits are over the vocabulary of the tokens, so that a token has a logit."""
    cfg = model.cfg
    if d_vocab_out(cfg) != cfg.d_vocab:
        raise ValueError(
            f"the model's logits are over {d_vocab_out(cfg)} outputs, not over its {cfg.d_vocab} tokens: "
            "a next token has no logit"
        )


def target_ids(model: LensModel, targets: Targets, n_batch: int, what: str = "targets") -> Int[Tensor, ...]:
    """Target tokens on the model's device: one per prompt or, where that was given, per prompt and position.

    Raises:
        ValueError: no token ids or texts of one token each, or ids that have no logit.
    """
    given: object = targets
    name = "target" if what == "targets" else what
    if isinstance(targets, str):
        given = one_token(model, targets, name)
    elif _are_texts(targets):
        given = [one_token(model, text, name) for text in targets]
    ids = as_ids(given, what)
    ids = ids.expand(n_batch) if ids.ndim == 0 else ids
    if ids.numel():
        check_ids(ids, d_vocab_out(model.cfg), what)
    return ids.to(model.cfg.device)


# ---------------------------------------------------------------------------------------------------------
# Places


def check_places(which: object, what: str) -> None:
    """Raise ValueError unless this may name places: of how many is not asked."""
    _places(which, None, f"{what} must be an integer, a slice, a list of integers or a mask")


def check_rows(rows: object, what: str) -> None:
    """Raise ValueError unless this names several rows of a tensor: a slice, numbers or a mask."""
    if not isinstance(rows, (slice, Tensor)):
        raise ValueError(f"{what} must be a slice, or a tensor of numbers or a mask, not {type(rows).__name__}")
    check_places(rows, what)


def _places(which: object, n: int | None, wanted: str) -> np.ndarray:
    """The places as they are named, masks resolved; n None: of any number."""
    try:
        array = np.arange(n or 0)[which] if isinstance(which, slice) else np.atleast_1d(_array(which))
    except (ValueError, TypeError):  # lists of unequal lengths, slices that are none
        raise ValueError(f"{wanted}, not such a {type(which).__name__}") from None
    if (
        array.dtype == bool
        and array.shape == (array.size if n is None else n,)
        and not isinstance(which, (bool, np.bool_))
    ):
        array = array.nonzero()[0]
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{wanted}, not {type(which).__name__} of {array.dtype} {list(array.shape)}")
    return array


def indices(which: Places, n: int, what: str, there: range, those: str) -> list[int]:
    """The places named, counted from 0, in the order in which they are named.

    Args:
        n: how many places there are: where negative ones count from, and the length of a mask.
        what: one place, for errors.
        there: the places that may be named, and
        those: what is at them, for errors.

    Raises:
        ValueError: no places at all, one that is not there, or something that names no places.
    """
    array = _places(which, n, f"{what}s must be an integer, a slice, a list of integers or a mask of [{n}]")
    found = []
    for place in array.tolist():
        at = place + n if place < 0 else place
        if at not in there:
            raise ValueError(f"{what} {place} is out of range: {those} reach from {there[0]} to {there[-1]}")
        found.append(at)
    if not found:
        raise ValueError(f"the {what}s given name none of {there[0]} to {there[-1]}")
    return found
