"""Which sequences a step reads: the same in one process and in several, whatever the micro-batch and the beginning."""

from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minute import At, Recorder, byte_tokenizer, interrupt, minute_blocks, train, weights_equal

from lnfree_interp.finetune.order import Share, ShuffledSteps, StreamedSteps, collate, loader
from lnfree_interp.finetune.saving import state_in


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def steps_of(batches, share: Share, n_steps: int) -> list[list]:
    """The sequences of each step of one process."""
    batches = iter(batches)
    per_step = share.sequences // share.world // share.micro_batch
    return [[item for batch in islice(batches, per_step) for item in batch] for _ in range(n_steps)]


def joined(parts):
    """The steps of all processes, their parts one after another."""
    return [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def cuts(draw):
    sequences = draw(st.integers(1, 24))
    world = draw(st.sampled_from(divisors(sequences)))
    return sequences, world, draw(st.sampled_from(divisors(sequences // world))), draw(st.integers(0, 9))


@settings(max_examples=60, deadline=None)
@given(cut=cuts(), extra=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_step_is_the_same_however_it_is_cut(cut, extra, seed):
    sequences, world, micro, begin = cut
    n = sequences + extra
    alone = steps_of(ShuffledSteps(n, Share(sequences, sequences), seed), Share(sequences, sequences), begin + 6)
    shares = [Share(sequences, micro, rank, world, begin) for rank in range(world)]
    parts = [steps_of(ShuffledSteps(n, share, seed), share, 6) for share in shares]
    assert joined(parts) == alone[begin:]
    # every pass reads everything once
    order = [i for step in alone for i in step]
    passes = [order[at : at + n] for at in range(0, len(order) - n + 1, n)]
    assert all(sorted(one) == list(range(n)) for one in passes)
    assert n < 20 or len(passes) < 2 or len(set(map(tuple, passes))) == len(passes)


class Stream(torch.utils.data.IterableDataset):
    """Sequences 0, 1, 2 ... of which it has n; it may know where to go on."""

    read = 0

    def __init__(self, n, begin=0):
        self.n, self.begin = n, begin

    def __iter__(self):
        for i in range(self.begin, self.n):
            Stream.read += 1
            yield i


class Placed(Stream):
    def place(self, n):
        return {"at": n % self.n}

    def go_on(self, place):
        return Placed(self.n, place["at"])


@settings(max_examples=40, deadline=None)
@given(cut=cuts(), n=st.integers(1, 60))
def test_so_is_a_stream_s_which_begins_again_at_its_end(cut, n):
    sequences, world, micro, begin = cut
    expected = [[i % n for i in range(s * sequences, (s + 1) * sequences)] for s in range(begin, begin + 5)]
    for stream in (Stream, Placed):
        moved = Placed(n).go_on(Placed(n).place(begin * sequences)) if stream is Placed else None
        shares = [Share(sequences, micro, rank, world, begin) for rank in range(world)]
        parts = [steps_of(StreamedSteps(stream(n), share, list, moved), share, 5) for share in shares]
        assert joined(parts) == expected


def test_a_stream_that_knows_its_place_is_not_read_again():
    share = Share(4, 4, begin=10)
    for moved, read in ((Placed(100).go_on({"at": 40}), 4), (None, 44)):
        Stream.read = 0
        assert next(iter(StreamedSteps(Placed(100), share, list, moved))) == [40, 41, 42, 43]
        assert Stream.read == read
    with pytest.raises(ValueError, match="no blocks"):
        next(iter(StreamedSteps(Stream(0), share, list)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_has_no_end_and_leaves_the_global_generator_alone(workers):
    arguments = {"num_workers": workers, "pin_memory": False, "prefetch_factor": None, "persistent_workers": False}
    args = SimpleNamespace(**{f"dataloader_{name}": value for name, value in arguments.items()})
    before = torch.get_rng_state()
    made = loader(minute_blocks(6), Share(4, 2), 0, collate, args)
    with pytest.raises(TypeError):
        len(made)
    batches = list(islice(made, 20))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(batch["input_ids"].shape == (2, 16) and (batch["labels"][:, 0] == -100).all() for batch in batches)


class MinuteStream(torch.utils.data.IterableDataset):
    """The minute blocks one after another."""

    def __init__(self, begin=0):
        self.begin, self.asked = begin, []

    def __iter__(self):
        for block in minute_blocks().blocks[self.begin :]:
            yield {"input_ids": block}

    def place(self, n):
        self.asked.append(n)
        return {"blocks": n}

    def go_on(self, place):
        return MinuteStream(place["blocks"])


def test_a_stream_is_resumed_at_its_place(tokenizer, tmp_path):
    recorder, again = Recorder(), Recorder()
    _, final = train(tokenizer, tmp_path / "a", data=MinuteStream(), callbacks=[recorder])
    read = torch.cat(recorder.batches)
    assert torch.equal(read, minute_blocks().blocks[:56]), "in its order"
    stream = MinuteStream()
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "b", data=stream, callbacks=[At(7, interrupt)])
    assert stream.asked == [4, 20] and state_in(tmp_path / "b" / "checkpoint-5")["place"] == {"blocks": 20}
    _, resumed = train(tokenizer, tmp_path / "b", data=MinuteStream(), resume=True, callbacks=[again])
    assert torch.equal(torch.cat(again.batches), read[20:]) and weights_equal(resumed, final)
