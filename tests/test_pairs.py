"""Pairs: aligned, single-token answers, and one clear line for everything that is wrong with a file."""

import csv
import gzip
import io
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lnfree_interp.pairs import (
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    PromptPairs,
    groups_from_file,
    induction_pairs,
    ioi_pairs,
    pairs_from_text,
)


def make_tokenizer(words):
    """A tokenizer of bytes that knows some words (after a space, as GPT-2's does) as one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = ["<|endoftext|>", *alphabet]
    merges = []
    for word in words:
        for end in range(2, len(word) + 2):
            left, right = ("Ġ" + word)[: end - 1], ("Ġ" + word)[end - 1]
            if left + right not in vocab:
                vocab.append(left + right)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model():
    known = ["and", "went", "to", "the", "gave", "a", "Mary", "John", "Tom", *PLACES[:5], *OBJECTS[:5]]
    tokenizer = make_tokenizer(known)
    cfg = SimpleNamespace(n_ctx=200, d_vocab=len(tokenizer), model_name="test")
    return fake(tokenizer, cfg)


def fake(tokenizer, cfg):
    """As much of a model as pairs read."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=cfg, hook_dict={}, blocks=())


def bare(d_vocab=50, n_ctx=32):
    return fake(None, SimpleNamespace(n_ctx=n_ctx, d_vocab=d_vocab, model_name="bare"))


# ---------------------------------------------------------------------------------------------------------
# PromptPairs


def test_wrong_pairs():
    a, b, answers = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]]), torch.tensor([[4, 6]])
    PromptPairs(a, b, answers)
    for arguments, message in (
        ((a, b[:, :2], answers), "clean has 3 tokens, corrupted has 2: pairs must align"),
        ((a, torch.cat([b, b]), answers), "clean has 1 prompts, corrupted has 2: pairs must align"),
        ((a, a, answers), "clean equals corrupted in pair 0"),
        ((a, b, torch.tensor([[4, 4]])), "pair 0 has token 4 as right and as wrong"),
        ((a, b, torch.tensor([[4, 5, 6]])), "answers have shape"),
        ((a[:0], b[:0], answers[:0]), "pairs are empty"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptPairs(*arguments)


def test_first_difference_and_rows():
    clean = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    corrupted = torch.tensor([[1, 0, 3, 0], [5, 6, 7, 0]])
    pairs = PromptPairs(clean, corrupted, torch.tensor([[1, 2], [3, 4]]))
    assert pairs.first_difference.tolist() == [1, 3]
    assert pairs[1:].clean.tolist() == [[5, 6, 7, 8]] and pairs.reversed().clean is corrupted


# ---------------------------------------------------------------------------------------------------------
# IOI


def test_ioi_pairs(model):
    pairs = ioi_pairs(model, 12, seed=3)
    decode = model.tokenizer.decode
    names = set()
    for clean, corrupted, (right, wrong) in zip(pairs.clean, pairs.corrupted, pairs.answers.tolist()):
        where = (clean != corrupted).nonzero().flatten().tolist()
        assert len(where) == 1
        assert (clean[where[0]], corrupted[where[0]]) == (wrong, right)  # the giver receives in the other prompt
        text = decode(clean.tolist())
        assert text.count(decode([wrong])) == 2 and text.count(decode([right])) == 1
        names.add(decode([right]).strip())
    assert names <= {"Mary", "John", "Tom"} and len(names) > 1  # the only names known as single tokens
    first = [
        decode(row.tolist()).index(decode([right])) < decode(row.tolist()).index(decode([wrong]))
        for row, (right, wrong) in zip(pairs.clean, pairs.answers.tolist())
    ]
    assert first == [True, False] * 6  # ABBA, BABA in turn
    assert pairs.clean[0, 0] == model.tokenizer.bos_token_id
    assert ioi_pairs(model, 12, seed=3, prepend_bos=False).clean.shape[1] == pairs.clean.shape[1] - 1
    assert torch.equal(ioi_pairs(model, 12, seed=3).clean, pairs.clean)
    assert not torch.equal(ioi_pairs(model, 12, seed=4).clean, pairs.clean)


def test_every_template(model):
    for i in range(len(TEMPLATES)):
        assert ioi_pairs(model, 4, template=i).differ.sum(1).tolist() == [1] * 4


def test_wrong_ioi(model):
    nameless = fake(make_tokenizer(["and"]), model.cfg)
    with pytest.raises(ValueError, match="the tokenizer has 0 names, 0 places and 0 objects that are one token"):
        ioi_pairs(nameless, 2)
    with pytest.raises(ValueError, match="template 9 is unknown; known are 0 to"):
        ioi_pairs(model, 2, template=9)
    with pytest.raises(ValueError, match=r"lacks \{B\}"):
        ioi_pairs(model, 2, template="Then {A} saw {S} and")
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        ioi_pairs(bare(), 2)
    with pytest.raises(ValueError, match="n is 0"):
        ioi_pairs(model, 0)
    assert len(set(NAMES)) == len(NAMES)


# ---------------------------------------------------------------------------------------------------------
# Induction


@pytest.mark.parametrize("length", range(4, 12))
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_induction_pairs(model, length, with_tokenizer):
    m = model if with_tokenizer else bare()
    pairs = induction_pairs(m, 5, length=length)
    assert pairs.clean.shape == (5, length)
    n_bos = int(with_tokenizer)
    for row, other, (right, wrong) in zip(pairs.clean.tolist(), pairs.corrupted.tolist(), pairs.answers.tolist()):
        for tokens, answer in ((row, right), (other, wrong)):
            # What followed the last token where it stood before is the answer.
            before = tokens[n_bos:-1].index(tokens[-1]) + n_bos
            assert tokens[before + 1] == answer
        assert sum(a != b for a, b in zip(row, other)) == 1
    if with_tokenizer:
        assert (pairs.clean[:, 0] == model.tokenizer.bos_token_id).all()
        assert not (pairs.clean[:, 1:] == model.tokenizer.bos_token_id).any()


def test_wrong_induction():
    for n, length, message in ((0, 8, "n is 0"), (1, 3, "length is 3"), (1, 33, "length is 33, it must be from 4")):
        with pytest.raises(ValueError, match=message):
            induction_pairs(bare(), n, length=length)
    with pytest.raises(ValueError, match="length 16 needs 10 different tokens, the vocabulary has 6"):
        induction_pairs(bare(d_vocab=6), 2, length=16)


# ---------------------------------------------------------------------------------------------------------
# Files

GOOD = {"clean": "Mary and John", "corrupted": "Mary and Mary", "right": " Mary", "wrong": " John"}


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    else:
        path.write_text("clean,corrupted,right,wrong\n" + "\n".join(",".join(r.values()) for r in records))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_file_of_pairs(model, tmp_path, kind):
    longer = {key: value.replace("Mary and", "Mary and the") for key, value in GOOD.items()}
    path = write(tmp_path / f"pairs.{kind}", [GOOD, longer, GOOD])
    groups = groups_from_file(path, model)
    assert [(n, len(g)) for n, g in groups.items()] == [(n, len(groups[n])) for n in sorted(groups)]
    assert [len(g) for g in groups.values()] == [2, 1]
    n = min(groups)
    only = PromptPairs.from_file(path, model, length=n)
    assert torch.equal(only.clean, groups[n].clean)
    decoded = (model.tokenizer.decode(only.clean[0].tolist()), model.tokenizer.decode([int(only.answers[0, 0])]))
    assert decoded == ("<|endoftext|>Mary and John", " Mary")
    with pytest.raises(ValueError, match=rf"pairs of {n} tokens \(2 pairs\), {max(groups)} tokens \(1 pairs\)"):
        PromptPairs.from_file(path, model)
    with pytest.raises(ValueError, match="no pairs of 3 tokens"):
        PromptPairs.from_file(path, model, length=3)
    assert len(PromptPairs.from_file(write(tmp_path / f"one.{kind}", [GOOD]), model)) == 1


def test_wrong_files(model, tmp_path):
    cases = [
        ([GOOD, GOOD | {"right": " Mississippi"}], r"line 2: answer ' Mississippi' is \d+ tokens \[' M', 'i'"),
        ([GOOD | {"corrupted": "Mary and the John"}], r"line 1: clean has \d+ tokens, corrupted has \d+: pairs must"),
        ([GOOD | {"corrupted": GOOD["clean"]}], "line 1: clean equals corrupted"),
        ([GOOD | {"wrong": " Mary"}], "line 1: ' Mary' is the right and the wrong answer"),
        ([{k: v for k, v in GOOD.items() if k != "wrong"}], "line 1 lacks wrong; wanted are clean, corrupted"),
        (["[1, 2]"], "line 1 lacks clean"),
        (["{nonsense"], "line 1: no JSON"),
        ([GOOD | {"clean": "Mary " * 300, "corrupted": "John " + "Mary " * 299}], "the model's context is 200"),
        ([], "holds no pairs"),
    ]
    for records, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            groups_from_file(write(tmp_path / "pairs.jsonl", records), model)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"neither \.jsonl nor \.csv"):
        groups_from_file(tmp_path / "pairs.txt", model)
    with pytest.raises(ValueError, match="cannot read pairs file"):
        groups_from_file(tmp_path / "absent.csv", model)


def as_csv(records):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["clean", "corrupted", "right", "wrong"])
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def as_jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@settings(max_examples=30, deadline=None)
@given(
    middle=st.text(st.sampled_from('a\n\u2028\x85\x0b\x0c",é '), min_size=1, max_size=6),
    windows=st.booleans(),
    bom=st.booleans(),
    packed=st.booleans(),
)
def test_texts_are_read_as_they_stand(model, tmp_path_factory, middle, windows, bom, packed):
    """Whatever characters are in a text, line ends and quotes among them, however the file was saved."""
    records = [GOOD | {"clean": f"Mary{middle}and", "corrupted": f"John{middle}and"}] * 2
    rows = [tuple(records[0].values())] * 2
    wanted = next(iter(pairs_from_text(model, rows).values()))
    for kind, text in (("csv", as_csv(records)), ("jsonl", as_jsonl(records))):
        text = text.replace("\r\n", "\n").replace("\n", "\r\n") if windows else text
        raw = ("\ufeff" * bom + text).encode()
        path = tmp_path_factory.mktemp("pairs") / (f"pairs.{kind}" + ".gz" * packed)
        path.write_bytes(gzip.compress(raw) if packed else raw)
        found = PromptPairs.from_file(path, model)
        assert torch.equal(found.clean, wanted.clean) and torch.equal(found.corrupted, wanted.corrupted)


def test_errors_name_the_line_a_record_begins_at(model, tmp_path):
    header, good = "clean,corrupted,right,wrong", "Mary and,John and, Mary, John"
    two_lines, wrong = '"Mary\nand","John\nand", Mary, John', "Mary and,John and, Mary, Mary"
    for lines, message in (
        ([header, two_lines, "", wrong], "line 6: ' Mary' is the right and the wrong answer"),
        ([header, good, '"Mary\nand","John\nand", Mary, Mary'], "line 3: ' Mary' is the right and the wrong"),
        ([header, good, "Mary and,John and, Mary"], "line 3 lacks wrong"),
        ([header, good, '"Mary and,John and, Mary, John', good], "line 3 is no CSV: unexpected end of data"),
        ([header, "When Mary, John and,Then Mary, John and, Mary, John"], "line 2 has 6 fields for 4 columns"),
        (["", header, "", wrong], "line 4: ' Mary' is"),
        ([header], "holds no pairs"),
        ([], "holds no pairs"),
    ):
        for end in ("\n", "\r\n"):
            path = tmp_path / "pairs.csv"
            path.write_bytes("\n".join(lines).replace("\n", end).encode())
            with pytest.raises(ValueError, match=message) as caught:
                groups_from_file(path, model)
            assert "\n" not in str(caught.value)


def test_rows_that_are_no_four_texts(model, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the function's own checks, not the tests'
    for rows in ([("a", "b", "c")], ["abcd"], [("a", "b", 3, "d")]):
        with pytest.raises(ValueError, match="pair 0: a pair is four texts"):
            pairs_from_text(model, rows)
    with pytest.raises(ValueError, match=r"pair 0: text .* holds half a character"):
        pairs_from_text(model, [("a\ud800", "b", "c", "d")])
    with pytest.raises(ValueError, match="there are no pairs"):
        pairs_from_text(model, [])
