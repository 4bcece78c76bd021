"""Sources of text, corpora kept on disk, streams: each is the plain packing of its documents, however it is read."""

import gzip
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import warnings
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lnfree_interp import corpus, documents_of, read_corpus, read_documents, token_blocks
from lnfree_interp.data import Blocks, StreamedBlocks, token_stream

EOT = "<|endoftext|>"
TEXTS = [f"Document {i}: " + "é\u2028 word " * (i % 7) + "end." for i in range(23)]


def byte_tokenizer(eos: str | None = EOT, first: int = 0) -> PreTrainedTokenizerFast:
    """Bytes and an end-of-text token: 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOT: 256} | {c: (i + first) % 256 for i, c in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def beginning_tokenizer() -> PreTrainedTokenizerFast:
    """One whose texts begin with a BOS token, as Llama's do."""
    made = byte_tokenizer()
    made.bos_token = EOT
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", special_tokens=[(EOT, made.eos_token_id)]
    )
    return made


def stream_of(tokenizer, texts) -> list[int]:
    """Brute force: each text's ids and the end-of-text token, end to end."""
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return [i for text in ids for i in [*text, tokenizer.eos_token_id]]


def rows_of(texts, tokenizer=None, column="text") -> list[dict]:
    if tokenizer is None:
        return [{"id": i, column: text} for i, text in enumerate(texts)]
    return [{"input_ids": stream_of(tokenizer, [text])} for text in texts]


def write(path, rows):
    """Rows as a .jsonl or .parquet file, texts as a .txt file; .gz as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    text = "\n\n".join(rows) if ".txt" in path.name else "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A name that `load_dataset` answers to with a local dataset of two splits."""
    folder, load = tmp_path / "hub", datasets.load_dataset
    write(folder / "train.jsonl", rows_of(TEXTS))
    write(folder / "test.jsonl", rows_of(TEXTS[:3]))

    def answer(name, **arguments):
        return load(str(folder) if name == "some/texts" else name, cache_dir=tmp_path / "hf", **arguments)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return "some/texts"


# -- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet", "A.JSONL"])
def test_every_kind_of_file_gives_its_documents(name, tmp_path):
    path = write(tmp_path / name, TEXTS if ".txt" in name else rows_of(TEXTS))
    assert list(documents_of(path)) == list(documents_of(str(path))) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_columns_of_texts_and_of_token_ids(name, tokenizer, tmp_path):
    for column in ("content", "document"):
        assert list(documents_of(write(tmp_path / name, rows_of(TEXTS, column=column)))) == TEXTS
    ids = rows_of(TEXTS, tokenizer)
    assert list(documents_of(write(tmp_path / name, ids))) == [row["input_ids"] for row in ids]
    both = [{"input_ids": [1], "text": "a text goes before ids"}, {"input_ids": [2], "text": None}]
    assert list(documents_of(write(tmp_path / name, both))) == ["a text goes before ids"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab \n\r\u2028\x85\x0b\x1c", max_size=40), packed=st.booleans())
def test_a_text_file_is_read_piecewise_as_in_one(text, packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    wanted = [document for part in plain.split("\n\n") if (document := part.strip("\n"))]
    if any(document.strip() for document in wanted):
        assert list(documents_of(path)) == read_documents(path) == wanted
    else:
        for read in (read_documents, lambda path: list(documents_of(path))):
            with pytest.raises(ValueError, match="is empty"):
                read(path)


def test_a_directory_is_all_its_files_sorted(tokenizer, tmp_path):
    write(tmp_path / "b" / "z.jsonl", rows_of(TEXTS[3:5]))
    write(tmp_path / "b" / "y.txt.gz", TEXTS[2:3])
    write(tmp_path / "a.parquet", rows_of(TEXTS[:2]))
    write(tmp_path / "c.jsonl.gz", rows_of(TEXTS[5:], tokenizer))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt.bak").write_text("")
    write(tmp_path / ".cache" / "hidden.txt", ["hidden"])
    found = list(documents_of(tmp_path))
    assert found == [*TEXTS[:5], *(row["input_ids"] for row in rows_of(TEXTS[5:], tokenizer))]
    assert [i for ids in token_stream(tokenizer, found) for i in ids] == stream_of(tokenizer, TEXTS)


def test_a_directory_that_names_splits_gives_one(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows_of(TEXTS[:4]))
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows_of(TEXTS[4:9]))
    write(tmp_path / "test" / "a.parquet", rows_of(TEXTS[9:]))
    assert list(documents_of(tmp_path)) == TEXTS[:9]
    assert list(documents_of(tmp_path, split="test")) == TEXTS[9:]
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        documents_of(tmp_path, split="dev")
    write(tmp_path / "trainspotting.parquet", rows_of(TEXTS[:1]))
    assert list(documents_of(tmp_path)) == [*TEXTS, TEXTS[0]], "one that names none: all are meant"


def test_a_hub_dataset_gives_its_documents(hub):
    assert list(documents_of(hub)) == TEXTS and list(documents_of(hub, split="test")) == TEXTS[:3]
    for call in (
        lambda: next(documents_of(hub, split="dev")),
        lambda: read_corpus(hub, byte_tokenizer(), 4, split="dev"),
    ):
        with pytest.raises(ValueError, match=r"cannot read dataset 'some/texts' \(split 'dev'\)"):
            call()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na", "a.csv is not a .txt, .jsonl .both also .gz. or .parquet file"),
        ("a.parquet.gz", b"", "is not a .txt"),
        ("a.txt", b" \n\n \n", "a.txt is empty"),
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 text"),
        ("a.txt.gz", b"plain", "cannot read text file .*a.txt.gz"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"', "a.jsonl, line 3: no JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: no JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "line 2: not an object with a field text, content, document or input_ids"),
        ("a.jsonl", b'{"title": "a", "n": 1}', "line 1 has no text column .*; it has title, n"),
        ("a.jsonl", b'{"text": 3}', "line 1: text must be a text, not int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: text is not Unicode text"),
        ("a.jsonl", b'{"input_ids": [1, 2.5]}', "line 1: input_ids must be a list of whole numbers"),
        ("a.jsonl", b'{"input_ids": 7}', "line 1: input_ids must be a list of whole numbers, not '7'"),
        ("a.parquet", b"no parquet", "cannot read parquet file .*a.parquet"),
        ("b/a.png", b"", "directory .*b holds not one .txt"),
    ],
)
def test_what_is_no_source_is_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        list(documents_of(path if path.parent == tmp_path else path.parent))
    assert "\n" not in str(found.value)


def test_a_missing_file_is_known_at_once(tmp_path):
    for source in (tmp_path / "a.txt", "missing.jsonl", "no/such/folder"):
        with pytest.raises(ValueError, match="no such file"):
            documents_of(source)
    with pytest.raises(ValueError, match="cannot read dataset 'no/such-dataset'"):
        next(documents_of("no/such-dataset"))


def test_token_ids_are_the_tokenizers_own(tokenizer):
    for ids in ([257], [-1, 3]):
        with pytest.raises(ValueError, match="token ids of another tokenizer: this one's are below 257"):
            token_blocks(tokenizer, ["a", ids], 1)
    with pytest.raises(ValueError, match="no end-of-text token"):
        token_blocks(byte_tokenizer(eos=None), ["a"], 1)
    assert token_blocks(tokenizer, ["a", [3, 4, 5], "b"], 7).tolist() == [
        [*stream_of(tokenizer, "a"), 3, 4, 5, *stream_of(tokenizer, "b")]
    ]


# -- blocks -----------------------------------------------------------------------------------------------


def items(blocks) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in blocks]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(2, 60), seed=st.integers(0, 9))
def test_blocks_set_aside_and_the_rest_are_all_blocks(data, n, seed):
    tokens = torch.randint(0, 9, (n, 3), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = torch.arange(n)
    held, rest = Blocks(tokens).set_aside(data.draw(st.integers(1, n - 1)))
    assert len(rest) == n - len(held) and sorted([*held.tolist(), *items(rest)]) == tokens.tolist()
    assert items(rest) == sorted(items(rest)) and items(pickle.loads(pickle.dumps(rest))) == items(rest)
    gaps = held[:, 0].diff(prepend=torch.tensor([-1]), append=torch.tensor([n]))
    assert gaps.max() <= n / len(held) + 1, "spread evenly"
    assert rest[-1]["input_ids"].tolist() == items(rest)[-1]
    assert rest.fingerprint == Blocks(torch.tensor(items(rest))).fingerprint != Blocks(tokens).fingerprint
    if len(rest) > 1:
        again, left = rest.set_aside(data.draw(st.integers(1, len(rest) - 1)))
        assert sorted([*held.tolist(), *again.tolist(), *items(left)]) == tokens.tolist()


def test_a_fingerprint_is_of_tokens_and_block_size():
    tokens = torch.arange(24).view(6, 4)
    same = Blocks(tokens).fingerprint
    assert same == Blocks(tokens.int()).fingerprint == Blocks(tokens.clone()).fingerprint
    others = [tokens.view(4, 6), tokens.flip(0), tokens[:-1], tokens + (tokens == 23)]
    assert len({same, *(Blocks(other).fingerprint for other in others)}) == 5


def test_blocks_that_are_none_are_refused():
    blocks = Blocks(torch.zeros(3, 2, dtype=torch.long))
    for n, message in ((0, "from 1 up"), (3, "cannot be held out of 3")):
        with pytest.raises(ValueError, match=message):
            blocks.set_aside(n)
    with pytest.raises(IndexError, match="3 is out of range"):
        blocks[3]
    for tokens in (torch.zeros(3), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match="blocks must be token ids"):
            Blocks(tokens)


# -- corpora ----------------------------------------------------------------------------------------------


def test_a_corpus_is_its_documents_packed(tokenizer, tmp_path, monkeypatch, hub):
    sources = [
        write(tmp_path / "in" / "a.txt.gz", TEXTS[:9]),
        write(tmp_path / "in" / "b.parquet", rows_of(TEXTS[9:15], tokenizer)),
        hub,
    ]
    monkeypatch.setattr(corpus, "BATCH", 100)
    stream = stream_of(tokenizer, [*TEXTS[:15], *TEXTS])
    for block_size in (1, 7, 64, len(stream)):
        blocks = read_corpus(sources, tokenizer, block_size, cache=tmp_path / "cache")
        plain = torch.tensor(stream[: len(stream) // block_size * block_size]).view(-1, block_size)
        assert torch.equal(torch.tensor(items(blocks)), plain) and blocks[0]["input_ids"].dtype == torch.int64
        assert blocks.fingerprint == Blocks(plain).fingerprint
        copied = pickle.loads(pickle.dumps(blocks))
        assert torch.equal(copied[-1]["input_ids"], plain[-1]) and torch.equal(copied.blocks[0:2], plain[0:2])
        if len(blocks) > 1:
            held, rest = blocks.set_aside(1)
            assert torch.equal(held[0], plain[len(plain) // 2]) and len(rest) == len(plain) - 1
        # What is kept serves every block size.
        monkeypatch.setattr(corpus, "token_stream", None)
    with pytest.raises(ValueError, match=f"text has {len(stream)} tokens, too few for one block"):
        read_corpus(sources, tokenizer, len(stream) + 1, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="no source"):
        read_corpus([], tokenizer, 1)


def test_what_is_kept_goes_by_content(tokenizer, tmp_path):
    def entries(source, tokenizer=tokenizer):
        read_corpus(source, tokenizer, 4, cache=tmp_path / "cache")
        return len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()])

    first, second = (write(tmp_path / f"{name}.txt", [name * 9]) for name in "ab")
    assert entries(first) == 1
    shutil.copy(first, tmp_path / "copy.txt")
    assert entries(tmp_path / "copy.txt") == 1, "a copy elsewhere"
    assert entries([first, second]) == 2 and entries([second, first]) == 3, "the order of sources"
    assert entries(first, byte_tokenizer(first=1)) == 4, "another tokenizer"
    assert entries(first, byte_tokenizer()) == 4, "the same one, made again"
    padded = byte_tokenizer()
    padded.pad_token = EOT
    padded(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert entries(first, padded) == 4, "how the tokenizer was called last"
    before = first.stat()
    first.write_text("c" * 9)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert entries(first) == 5, "another text of the same size and time"
    assert items(read_corpus(first, tokenizer, 4, cache=tmp_path / "cache"))[0] == stream_of(tokenizer, ["c" * 9])[:4]


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(bytes([*(raw := path.read_bytes())[:-300], raw[-300] ^ 1, *raw[-299:]])),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [corpus.TOKENS, corpus.ABOUT])
def test_a_damaged_cache_is_made_anew_and_said_so(name, damage, tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", TEXTS)
    wanted = read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint
    [kept] = (tmp_path / "cache").glob(f"*/{name}")
    if name == corpus.ABOUT and damage == "one bit":
        kept.write_text(kept.read_text().replace('"hash": "', '"hash": "0'))
    else:
        DAMAGES[damage](kept)
    with pytest.warns(UserWarning, match="is damaged .* and made anew"):
        assert read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint == wanted


def test_one_writes_and_the_others_wait(tokenizer, tmp_path, monkeypatch):
    source, written, found = write(tmp_path / "a.txt", TEXTS), [], []
    all_ask = threading.Barrier(4, timeout=20)

    def slowly(*arguments):
        written.append(1)
        return token_stream(*arguments)

    def ask():
        all_ask.wait()
        found.append(read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint)

    monkeypatch.setattr(corpus, "token_stream", slowly)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and len(found) == 4 and len(set(found)) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", TEXTS * 40)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(ValueError, match=r"cannot write the token cache .*: File too large"):
            read_corpus(source, tokenizer, 8, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match=r"cannot write the token cache .*a\.txt"):
        read_corpus(source, tokenizer, 8, cache=source)
    write(tmp_path / "b.jsonl", [{"text": "a"}, {"input_ids": [999]}])
    with pytest.raises(ValueError, match="another tokenizer"):
        read_corpus(tmp_path / "b.jsonl", tokenizer, 8, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_where_a_killed_one_left_off_nothing_is_believed(tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", TEXTS)
    wanted = read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint
    [entry] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    entry.rename(entry.with_name(f".{entry.name}.writing"))
    assert read_corpus(source, tokenizer, 8, cache=tmp_path / "cache").fingerprint == wanted
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [entry]


MEMORY = """
import resource, sys
from itertools import islice
import datasets, pyarrow.parquet, torch, transformers
from datasets.arrow_writer import ArrowWriter
from lnfree_interp import corpus, data
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[3])
tokenizer("warm")
data.BATCH_CHARACTERS = 2**16
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
n = len(corpus.read_corpus(sys.argv[1], tokenizer, 128, cache=sys.argv[2]))
n += sum(1 for _ in islice(data.StreamedBlocks(sys.argv[1], tokenizer, 128, buffer=64), 1000))
print(n, peak() - before)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """4 MB of text, a million token ids: as Python's whole numbers alone they would be 30 MiB and more."""
    from lnfree_interp.names import VALIDATION_TEXT

    text = VALIDATION_TEXT.read_text(encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join([text] * (4_000_000 // len(text))), encoding="utf-8")
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "cache"), str(VALIDATION_TEXT.parent / "tiny")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_blocks, growth = done.stdout.split()
    assert int(n_blocks) > 9_000 and float(growth) < 35


# -- streams ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    return {
        "texts": write(folder / "a.jsonl.gz", rows_of(TEXTS)),
        "ids": write(folder / "b.parquet", rows_of(TEXTS, tokenizer)),
        "one document": write(folder / "c.txt", [" ".join(TEXTS)]),
    }


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    source=st.sampled_from(["texts", "ids", "one document"]),
    block_size=st.integers(1, 40),
    buffer=st.integers(1, 30),
    seed=st.integers(0, 3),
    passes=st.integers(1, 3),
    n_held=st.integers(0, 5),
)
def test_a_stream_goes_on_exactly_where_it_was(
    data, source, block_size, buffer, seed, passes, n_held, tokenizer, sources
):
    def made():
        stream = StreamedBlocks(sources[source], tokenizer, block_size, buffer=buffer, seed=seed, passes=passes)
        return stream.set_aside(n_held)[1] if n_held else stream

    stream = made()
    blocks = items(stream)
    # Brute force: each pass without what is held out, cut into blocks, each window in its own order.
    tokens = stream_of(tokenizer, TEXTS if source != "one document" else [" ".join(TEXTS)])
    tokens = tokens[n_held * block_size :] * passes
    plain = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
    assert len(blocks) == len(plain)
    for start in range(0, len(plain), buffer):
        assert sorted(blocks[start : start + buffer]) == sorted(plain[start : start + buffer])
    n = data.draw(st.integers(0, len(blocks)))
    read = data.draw(st.sampled_from(["all", "some", "nothing"]))
    asked = {"all": stream, "some": made(), "nothing": made()}[read]
    if read == "some":
        assert items(islice(asked, n)) == blocks[:n]
    place = json.loads(json.dumps(asked.place(n)))
    later = made().go_on(place)
    assert items(later) == items(later) == blocks[n:]
    assert later.fingerprint == stream.fingerprint
    # Places of one that went on are counted from the beginning.
    m = data.draw(st.integers(0, len(blocks)))
    assert items(made().go_on(later.place(m))) == blocks[m:]
    assert items(pickle.loads(pickle.dumps(later))) == blocks[n:]


def test_a_streams_order_is_its_seeds(tokenizer, sources):
    def blocks(**arguments):
        return items(StreamedBlocks(sources["texts"], tokenizer, 8, **arguments))

    plain = token_blocks(tokenizer, TEXTS, 8).tolist()
    assert blocks(buffer=1) == plain != blocks(buffer=10**6)
    assert sorted(blocks(buffer=10**6)) == sorted(plain)
    assert blocks(buffer=7, seed=1) == blocks(buffer=7, seed=1) != blocks(buffer=7, seed=2)
    twice = blocks(buffer=len(plain), passes=2)
    assert twice[: len(plain)] != twice[len(plain) : 2 * len(plain)], "another order in every window"
    endless = StreamedBlocks(sources["texts"], tokenizer, 8, buffer=5, passes=None)
    whole = len(twice) // 5 * 5  # what a last window that is not full holds is in another order
    assert items(islice(endless, whole)) == blocks(buffer=5, passes=2)[:whole]


def test_a_hub_dataset_is_streamed_and_resumed(tokenizer, hub):
    stream = StreamedBlocks(hub, tokenizer, 8, buffer=6)
    blocks = items(stream)
    assert sorted(blocks) == sorted(token_blocks(tokenizer, TEXTS, 8).tolist())
    for n in (0, 5, 6, 29):
        fresh = StreamedBlocks(hub, tokenizer, 8, buffer=6)
        assert items(fresh.go_on(fresh.place(n))) == blocks[n:]
    held, rest = stream.set_aside(4)
    assert torch.equal(held, token_blocks(tokenizer, TEXTS, 8)[:4])
    test = StreamedBlocks(hub, tokenizer, 8, split="test", buffer=6)
    assert sorted(items(test)) == sorted(token_blocks(tokenizer, TEXTS[:3], 8).tolist())
    prints = [s.fingerprint for s in (stream, rest, test, StreamedBlocks(hub, tokenizer, 8, buffer=6, seed=1))]
    assert len({*prints, StreamedBlocks(hub, byte_tokenizer(first=1), 8, buffer=6).fingerprint}) == 5


def test_a_local_streams_fingerprint_is_of_its_content(tokenizer, sources, tmp_path):
    def fingerprint(path):
        return StreamedBlocks(path, tokenizer, 8).fingerprint

    shutil.copy(sources["texts"], tmp_path / "elsewhere.jsonl.gz")
    assert fingerprint(sources["texts"]) == fingerprint(tmp_path / "elsewhere.jsonl.gz") == fingerprint(sources["ids"])
    assert fingerprint(sources["texts"]) != fingerprint(sources["one document"])


def test_what_a_stream_cannot_do_is_one_line(tokenizer, sources, tmp_path):
    stream = StreamedBlocks(sources["texts"], tokenizer, 8, buffer=5)
    n = len(list(stream))
    for call, message in (
        (lambda: stream.place(n + 5), "ends before"),
        (lambda: stream.place(-1), "from 0 up"),
        (lambda: stream.go_on({"window": 1}), "is no place of a stream"),
        (lambda: stream.go_on(stream.place(3)).set_aside(1), "before go_on"),
        (lambda: stream.set_aside(n + 1), f"cannot be held out of .*: it has {n}"),
        (lambda: next(iter(StreamedBlocks(sources["texts"], tokenizer, 10**6))), "too few for one block"),
        (lambda: StreamedBlocks(sources["texts"], tokenizer, 0), "block_size is 0"),
        (lambda: StreamedBlocks(sources["texts"], tokenizer, 8, buffer=0), "buffer is 0"),
        (lambda: StreamedBlocks(sources["texts"], tokenizer, 8, seed=-1), "seed is -1"),
        (lambda: StreamedBlocks(tmp_path / "a.jsonl", tokenizer, 8), "no such file"),
        (lambda: list(torch.utils.data.DataLoader(stream, num_workers=2)), "one process, not by 2 workers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_stream_left_early_leaves_no_thread(tokenizer, sources):
    before = set(threading.enumerate())
    stream = iter(StreamedBlocks(sources["texts"], tokenizer, 8, buffer=4))
    assert len(items(islice(stream, 3))) == 3
    stream.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_stream_is_what_a_loader_reads(tokenizer, sources):
    stream = StreamedBlocks(sources["ids"], tokenizer, 8, buffer=4)
    loaded = [row for batch in torch.utils.data.DataLoader(stream, batch_size=3) for row in batch["input_ids"].tolist()]
    assert loaded == items(stream) and np.shape(loaded)[1] == 8


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("own", [True, False])
def test_blocks_begin_as_the_tokenizers_texts_do(prepend_bos, own, sources, tmp_path):
    tokenizer = beginning_tokenizer() if own else byte_tokenizer()
    tokenizer.bos_token = EOT
    bos = [256] * (own if prepend_bos is None else prepend_bos)
    stream, length = stream_of(tokenizer, TEXTS), 8 - len(bos)
    wanted = [bos + stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    assert token_blocks(tokenizer, TEXTS, 8, prepend_bos=prepend_bos).tolist() == wanted
    kept = read_corpus(sources["texts"], tokenizer, 8, cache=tmp_path, prepend_bos=prepend_bos)
    assert items(kept) == wanted and kept.blocks[1:3].tolist() == wanted[1:3]
    streamed = StreamedBlocks(sources["texts"], tokenizer, 8, buffer=5, prepend_bos=prepend_bos)
    assert sorted(items(streamed)) == sorted(wanted)
    held, rest = streamed.set_aside(3)
    assert held.tolist() == wanted[:3] and sorted(items(rest)) == sorted(wanted[3:])
    assert items(StreamedBlocks(sources["texts"], tokenizer, 8, buffer=5, prepend_bos=not bos)) != items(streamed)


def test_what_blocks_cannot_begin_with_is_said(tokenizer, sources, tmp_path):
    for made in (
        lambda **k: token_blocks(tokenizer, TEXTS, 8, **k),
        lambda **k: StreamedBlocks(sources["texts"], tokenizer, 8, **k),
        lambda **k: read_corpus(sources["texts"], tokenizer, 8, cache=tmp_path, **k),
    ):
        with pytest.raises(ValueError, match="prepend_bos: the tokenizer has no BOS token"):
            made(prepend_bos=True)
    with pytest.raises(ValueError, match="block_size is 1: a block begins with BOS"):
        token_blocks(beginning_tokenizer(), TEXTS, 1)
