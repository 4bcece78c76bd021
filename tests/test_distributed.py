"""Several processes find what one does: parts of the data merge into the whole, and none is left waiting."""

import contextlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import ITEMS, with_letters

from lnfree_interp import (
    attention_sinks,
    attribution_error,
    cli,
    compare_models,
    distributed,
    evaluate_loss,
    hellaswag,
    load_model,
    logit_attributions,
    residual_norms,
    running,
    token_blocks,
)
from lnfree_interp.dla import error
from lnfree_interp.evaluate.compare import comparison_of, comparison_sums
from lnfree_interp.evaluate.hellaswag import ending_scores, hellaswag_of
from lnfree_interp.evaluate.loss import evaluation_of, loss_sums
from lnfree_interp.norms.residual import norm_sums, norms_of
from lnfree_interp.norms.sinks import sink_sums, sinks_of
from lnfree_interp.results import name_of

ROOT = Path(__file__).parents[1]


def same(a, b, tolerance=1e-9):
    """Two results, field by field."""
    for name, x in vars(a).items():
        y = getattr(b, name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, equal_nan=True)
        elif isinstance(x, (float, tuple)) and not any(isinstance(part, str) for part in np.ravel(x).tolist()):
            assert np.ravel(x).tolist() == pytest.approx(np.ravel(y).tolist(), abs=tolerance, nan_ok=True)
        else:
            assert x == y, name


def split(n, cuts):
    """Consecutive parts of n things, in another order than theirs."""
    edges = sorted({0, n, *(cut % n for cut in cuts)})
    return list(pairwise(edges))[::-1]


cut_anywhere = st.lists(st.integers(0, 10**6), max_size=4)
few = settings(max_examples=5, deadline=None)

# ---------------------------------------------------------------------------------------------------------
# Merging


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    columns=st.integers(1, 3),
    cuts=cut_anywhere,
    seed=st.integers(0, 99),
    far=st.sampled_from([0, 1e6]),
)
def test_moments_of_parts_are_those_of_the_whole(n, columns, cuts, seed, far):
    random = np.random.default_rng(seed)
    rows = np.where(random.random((n, columns)) < 0.2, np.nan, random.normal(size=(n, columns)) + far)
    whole = running.moments(rows)
    parts = [running.moments(rows[a:b]) for a, b in split(n, cuts)]
    found = parts[0]
    for part in parts[1:]:
        found = running.joined(found, part)
    np.testing.assert_array_equal(found.n, (~np.isnan(rows)).sum(0))
    for moments in (whole, found):
        for column in range(columns):
            there = rows[~np.isnan(rows[:, column]), column]
            if len(there):
                np.testing.assert_allclose(moments.mean()[column], there.mean(), rtol=1e-12)
            if len(there) > 1:
                stderr = there.std(ddof=1) / np.sqrt(len(there))
                np.testing.assert_allclose(moments.stderr()[column], stderr, rtol=1e-6, atol=1e-9 * max(far, 1))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), most=st.integers(1, 60) | st.none(), cuts=cut_anywhere, step=st.integers(1, 70))
def test_samples_of_parts_are_that_of_the_whole(n, most, cuts, step):
    rows = np.arange(n * 2.0).reshape(n, 2)

    def sample(pieces):
        found = running.Sample(2, most)
        for index, some in pieces:
            found.add(index, some)
        assert len(found._rows) <= (most or 2 * max(n, 64))
        return found.kept()

    index, kept = sample([(np.arange(n), rows)])
    keys = running.scrambled(np.arange(n))
    np.testing.assert_array_equal(index, np.sort(np.argsort(keys)[:most]))
    np.testing.assert_array_equal(kept, rows[index])
    of_parts = []
    for a, b in split(n, cuts):
        of_parts.append(sample((np.arange(i, min(i + step, b)), rows[i : min(i + step, b)]) for i in range(a, b, step)))
    for one, other in zip(sample(of_parts), (index, kept)):
        np.testing.assert_array_equal(one, other)


def test_a_sample_is_uniform():
    keys = running.scrambled(np.arange(40000))
    assert len(set(keys.tolist())) == 40000
    chosen = np.sort(np.argsort(keys)[:4000])
    counts = np.histogram(chosen, 20, (0, 40000))[0]
    assert ((counts - 200) ** 2 / 180).sum() < 45  # chi-squared of 19 degrees: one chance in a thousand
    assert abs((chosen % 2).mean() - 0.5) < 0.03


@few
@given(kind=st.sampled_from([None, "LN", "RMS"]), n=st.integers(1, 7), cuts=cut_anywhere, seed=st.integers(0, 3))
def test_parts_of_the_sequences_give_what_the_whole_gives(kind, n, cuts, seed):
    model = make_model(kind, n_layers=1, seed=seed)
    other = make_model(None, n_layers=1, seed=seed + 1)
    tokens = random_tokens(model, batch=n, pos=6, seed=seed)
    parts = split(n, cuts)
    keep = 10  # tokens: two sequences

    norms = [norm_sums(model, tokens[a:b], first=a, eot_token=3) for a, b in parts]
    same(norms_of(norms, model=name_of(model)), residual_norms(model, tokens, eot_token=3))
    sinks = [sink_sums(model, tokens[a:b], threshold=0.2) for a, b in parts]
    same(sinks_of(sinks, threshold=0.2, model=name_of(model)), attention_sinks(model, tokens, threshold=0.2))
    for kept in (None, keep):
        losses = [loss_sums(model, tokens[a:b], first=a, keep=kept, worst=2) for a, b in parts]
        merged = evaluation_of(model, losses, keep=kept, worst=2)
        whole = evaluate_loss(model, tokens, keep=kept, worst=2)
        assert len(whole.losses) == (n if kept is None else min(n, 2)) and len(whole.per_sequence) == n
        assert [w.index for w in merged.worst] == [w.index for w in whole.worst]
        same(*(replace(e, worst=()) for e in (merged, whole)))
    models = {"a": model, "b": other}
    compared = [comparison_sums(models, tokens[a:b], first=a) for a, b in parts]
    same(comparison_of(("a", "b"), compared), compare_models(models, tokens))


@few
@given(
    kind=st.sampled_from([None, "LN"]),
    n=st.integers(1, 9),
    cuts=cut_anywhere,
    places=st.integers(2, 12),
    seed=st.integers(0, 3),
)
def test_errors_of_parts_are_those_of_the_whole(kind, n, cuts, places, seed):
    model = make_model(kind, n_layers=1, seed=seed)
    tokens = random_tokens(model, batch=n, pos=5, seed=seed)
    linear, exact = logit_attributions(model, tokens, by="head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error, "PLACES", places)
        parts = []
        for a, b in split(n, cuts):
            sums = error.no_sums(linear.labels, n)
            for i in range(a, b):  # sequence by sequence
                error.add(sums, linear.values[:, i : i + 1], exact.values[:, i : i + 1], first=i)
            parts.append(sums)
        merged = error.merged(parts)
    found, whole = (error.error_of(merged, draws=50, model=name_of(model)), attribution_error(linear, exact, draws=50))
    assert merged.size.shape == (len(linear.labels), min(n, places)) and merged.tokens == exact.values[0].numel()
    assert found.pooled == pytest.approx(whole.pooled, abs=1e-12)
    torch.testing.assert_close(found.per_component, whole.per_component)
    means = torch.stack([linear.values, exact.values]).mean((2, 3))
    np.testing.assert_allclose(merged.means(), means, rtol=1e-10, atol=1e-12)
    if n <= places:
        same(found, whole)
    else:  # sequences that share a place are drawn together
        grouped = [
            torch.stack([x[:, i::places].sum((1, 2)) for i in range(places)], 1)
            for x in ((linear.values - exact.values).abs(), exact.values.abs())
        ]
        for held, wanted in zip((merged.difference, merged.size), grouped):
            np.testing.assert_allclose(held, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n_parts", [1, 2, 3, 5])
def test_items_in_parts_are_scored_as_in_one(n_parts):
    model = with_letters("LNPre", n_layers=1)
    edges = [len(ITEMS) * i // n_parts for i in range(n_parts + 1)]
    parts = [ending_scores(model, ITEMS, slice(a, b)) for a, b in pairwise(edges)]
    same(hellaswag_of(parts, model=name_of(model)), hellaswag(model, ITEMS))


@given(n=st.integers(0, 50), world=st.integers(1, 9))
def test_shards_are_all_there_is_in_order(n, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        found = []
        for rank in range(world):
            patch.setenv("RANK", str(rank))
            found.append(range(n)[distributed.shard(n)])
    assert [i for part in found for i in part] == list(range(n))
    assert max(map(len, found)) - min(map(len, found)) <= 1


# ---------------------------------------------------------------------------------------------------------
# Memory


def test_what_is_gathered_does_not_grow_with_the_tokens(monkeypatch):
    """Beyond what is kept of each sequence, and all of it up to a bound."""
    model = make_model("LN", n_layers=1, n_ctx=64)
    monkeypatch.setattr(error, "PLACES", 8)
    monkeypatch.setattr("lnfree_interp.norms.residual.KEPT_NUMBERS", 1)
    sizes = []
    for n in (120, 480):
        tokens = random_tokens(model, batch=n, pos=8)
        linear, exact = logit_attributions(model, tokens, by="head")
        sums = error.no_sums(linear.labels, n)
        error.add(sums, linear.values, exact.values)
        losses = loss_sums(model, tokens, keep=200)
        found = sums, norm_sums(model, tokens), sink_sums(model, tokens, threshold=0.3), losses.kept, losses.worst
        sizes.append([len(pickle.dumps(part)) for part in found])
    few, many = np.array(sizes)
    assert (many <= few + 64).all()


def test_tokens_lie_in_a_file_that_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = load_model("tiny-noLN", device="cpu")
    args = cli.parser("dla", "").parse_args(["--tokens", "1000"])
    rows = cli.token_rows(args, model, context=64)
    assert isinstance(rows, np.memmap) and list(tmp_path.iterdir()) == []
    wanted = token_blocks(model.tokenizer, cli.documents(args), 64, max_blocks=15)
    np.testing.assert_array_equal(rows, wanted)
    assert torch.equal(cli.load_tokens(args, model, context=64), wanted)
    monkeypatch.setattr(cli, "ROWS_AT_ONCE", 130)
    first, parts = cli.shards(rows)
    assert first == 0 and {len(part) for part in parts} == {2, 1} and np.array_equal(np.concatenate(parts), wanted)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"cannot keep tokens in .*none: No such file"):
        cli.token_rows(args, model)


PEAK = """
import contextlib, importlib, io, resource, sys
main = importlib.import_module(f"lnfree_interp.{sys.argv[1]}.__main__").main
for n in sys.argv[3:]:
    with contextlib.redirect_stdout(io.StringIO()):
        flags = ["--model", "tiny-noLN", "--device", "cpu", "--text", "text", "--out", sys.argv[2], "--tokens", n]
        assert main(flags) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dla", "norms"])
def test_the_peak_does_not_grow_with_the_tokens(name, tmp_path):
    """With every token's attributions kept, 98,000 more of them took 70 MiB more, a third of which is too much."""
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times.\n\n" * 16000)
    given_back = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}  # or chance decides what the allocator keeps
    command = [sys.executable, "-c", PEAK, name, "out", "4096", "16384", "65536"]
    out = start(command, cwd=tmp_path, env=given_back).communicate()[0]
    _, before, after = map(int, out.split())  # first all that comes once
    assert after - before < 12 * 1024, out  # KiB, for 49,152 tokens


# ---------------------------------------------------------------------------------------------------------
# Processes


def start(command, **fields):
    env = os.environ | fields.pop("env", {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **fields)


def by_hand(*arguments, world=2, **fields):
    """(status, stdout, stderr) of each process of a group, started without torchrun."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    command = [sys.executable, str(ROOT / "tests" / "several_processes.py"), *arguments]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    started = [start(command, env=group | rank, **fields) for rank in ranks]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, printed)]


def torchrun(arguments, world=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
    return start([*command, *arguments])


def test_what_processes_tell_each_other():
    told = by_hand("sums", "0", world=3)
    assert [status for status, *_ in told] == [0, 0, 0]
    found = [json.loads(out) for _, out, _ in told]
    assert found == [
        [0, [1, 2, 3], ["a", "b", "c"], ["there"] * 2],
        [1, [], ["a", "b", "c"], []],
        [2, [], ["a", "b", "c"], []],
    ]


@pytest.mark.parametrize("wrong", [0, 1])
def test_one_process_that_fails_ends_all_in_one_line(wrong):
    told = by_hand("fail", str(wrong))
    assert [status for status, *_ in told] == [2, 2]
    assert "".join(out for _, out, _ in told) == ""
    assert [err for *_, err in told] == [f"test: error: wrong in {wrong}\n" * (rank == wrong) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["neurons", "patching", "graph", "check"])
def test_other_commands_say_that_they_run_in_one_process(name, monkeypatch, capsys, tmp_path):
    main = import_module(f"lnfree_interp.{name}.__main__").main
    flags = ["tiny"] if name == "check" else ["--model", "tiny", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "runs in one process, not in 2" in printed.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--tokens", "3"], ["--model", "tiny", "tiny-noLN"]])
def test_without_torchrun_no_group_is_started(flags, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.processes():
        assert distributed.gather(3) == [3] and distributed.gather(None) == [] and distributed.exchange(4) == [4]
        assert not torch.distributed.is_initialized()


def tables(folder):
    found = {str(file.relative_to(folder)): pd.read_csv(file) for file in sorted(folder.rglob("*.csv"))}
    assert found
    return found


def same_tables(one, other):
    assert one.keys() == other.keys()
    for name in one:
        pd.testing.assert_frame_equal(one[name], other[name], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_two_processes_on_one_sequence_write_what_one_does(tmp_path, capfd):
    """And print it: all but where the files are."""
    common = ["--model", "tiny-noLN", "--tokens", "200", "--device", "cpu", "--dtype", "float64", "--out"]

    def flags(folder):
        own = {name: [*common, str(folder / name)] for name in ("dla", "norms", "evaluate")}
        own["dla"] += ["--draws", "20"]
        return list(own.items())

    for name, own in flags(tmp_path / "one"):
        assert import_module(f"lnfree_interp.{name}.__main__").main(own) == 0
    printed = capfd.readouterr().out
    (status, out, err), (other_status, *nothing) = by_hand("commands", json.dumps(flags(tmp_path / "two")))
    assert (status, other_status) == (0, 0), err
    assert nothing[0] == "" and out == printed.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    same_tables(tables(tmp_path / "one"), tables(tmp_path / "two"))


COMMANDS = [
    ("dla", ["--draws", "50", "--context", "100"]),
    ("dla", ["--draws", "50", "--positions", "last"]),
    ("norms", []),
    ("norms", ["--per-position"]),
    ("evaluate", ["--hellaswag", "ITEMS", "--prompt", "It was"]),
]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder, what each command printed in one process, and what they all did in three that torchrun started."""
    folder = tmp_path_factory.mktemp("uneven")
    items = folder / "items.jsonl"
    items.write_text("\n".join(json.dumps(item) for item in ITEMS))
    common = ["--model", "tiny", "tiny-noLN", "--device", "cpu", "--dtype", "float64", "--tokens", "1400", "--out"]

    def asked(where):
        for index, (name, flags) in enumerate(COMMANDS):
            own = [str(items) if flag == "ITEMS" else flag for flag in flags]
            yield name, [*own, *common, str(folder / where / str(index))]

    printed = []
    for name, flags in asked("one"):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert import_module(f"lnfree_interp.{name}.__main__").main(flags) == 0
        printed.append(said.getvalue())
    group = [str(ROOT / "tests" / "several_processes.py"), "commands", json.dumps(list(asked("several")))]
    process = torchrun(group, world=3)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return folder, printed, out


@pytest.mark.slow
def test_torchrun_prints_what_one_process_does(uneven):
    folder, printed, out = uneven
    assert all(printed) and out == "".join(printed).replace(str(folder / "one"), str(folder / "several"))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[" ".join([name, *flags]) for name, flags in COMMANDS])
def test_torchrun_on_uneven_shards_writes_what_one_process_does(index, uneven):
    one, several = (uneven[0] / where / str(index) for where in ("one", "several"))
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in several.iterdir())
    same_tables(tables(one), tables(several))


@pytest.mark.slow
def test_bad_input_under_torchrun_is_one_line(tmp_path):
    text = tmp_path / "text"
    text.write_text("too short")
    flags = ["--model", "tiny", "--text", str(text), "--device", "cpu", "--out", str(tmp_path / "out")]
    process = torchrun(["-m", "lnfree_interp.dla", *flags])
    out, err = process.communicate(timeout=600)
    said = [line for line in err.splitlines() if "lnfree_interp.dla: error:" in line]
    assert process.returncode != 0 and out == "" and not (tmp_path / "out").exists()
    assert len(said) == 1 and "too few for one block of 256" in said[0]
    assert "exitcode  : 2" in err  # torchrun's own report of its processes
