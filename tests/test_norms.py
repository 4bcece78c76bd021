import math

import pytest
import torch
from conftest import NORMALIZATIONS, make_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lnfree_interp.norms import attention_sinks, residual_norms
from lnfree_interp.norms.__main__ import main
from lnfree_interp.norms.residual import GROUPS


def stream_of(model, tokens):
    """Label -> activation, from TransformerLens' own forward."""
    names = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "blocks.0.hook_resid_pre": "L0.resid_pre"}
    for i in range(model.cfg.n_layers):
        names |= {f"blocks.{i}.hook_resid_{w}": f"L{i}.resid_{w}" for w in ("mid", "post")}
    _, cache = model.run_with_cache(tokens, names_filter=list(names))
    return {label: cache[name].expand(len(tokens), -1, -1) for name, label in names.items()}


def test_norms_are_those_of_transformer_lens_cache(any_model):
    tokens = random_tokens(any_model, batch=5, pos=9)
    tokens[:, 4] = 7
    tokens[0, 0] = 7  # an EOT at position 0 is position 0's
    result = residual_norms(any_model, tokens, eot_token=7, per_pass=18)
    stream = stream_of(any_model, tokens)
    assert result.points == tuple(stream) and result.groups == GROUPS
    eot = tokens == 7
    eot[:, 0] = False
    first = torch.zeros_like(eot)
    first[:, 0] = True
    previous = None
    for i, (label, x) in enumerate(stream.items()):
        norm = x.norm(dim=-1)
        for j, mask in enumerate((first, eot, ~first & ~eot)):
            per_sequence = torch.stack([norm[b][mask[b]].mean() for b in range(5)])
            expected = [per_sequence.mean(), per_sequence.std() / math.sqrt(5), per_sequence.median()]
            torch.testing.assert_close(result.norm[i, j, :3], torch.stack(expected))
            assert result.tokens[j] == mask.sum()
            if label.endswith("embed"):
                assert result.growth[i, j].isnan().all() and result.cosine[i, j].isnan().all()
            else:
                ratio = norm / previous.norm(dim=-1)
                cosine = torch.cosine_similarity(x, previous, dim=-1)
                for values, statistic in ((ratio, result.growth), (cosine, result.cosine)):
                    mean = torch.stack([values[b][mask[b]].mean() for b in range(5)]).mean()
                    torch.testing.assert_close(statistic[i, j, 0], mean)
        if label != "pos_embed":
            previous = x


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_groups_without_tokens_are_nan_and_others_untouched(kind, random_model):
    model = random_model(kind)
    tokens = random_tokens(model)
    result = residual_norms(model, tokens, eot_token=None)
    assert result.tokens.tolist() == [3, 0, 18] and result.norm[:, 1].isnan().all()
    assert result.norm[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", [None, "LNPre"])
def test_per_position_is_every_position(kind, random_model):
    model = random_model(kind)
    tokens = random_tokens(model, batch=4, pos=6)
    result = residual_norms(model, tokens, per_position=True)
    expected = torch.stack([x.norm(dim=-1).mean(0) for x in stream_of(model, tokens).values()])
    torch.testing.assert_close(result.norm[:, :, 0], expected)
    assert result.groups[-1] == "position 5"


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(NORMALIZATIONS), per_pass=st.integers(1, 60), seed=st.integers(0, 3))
def test_batching_changes_nothing(kind, per_pass, seed):
    model = make_model(kind, n_layers=1, seed=seed)
    tokens = random_tokens(model, batch=6, pos=8, seed=seed)
    whole = residual_norms(model, tokens, eot_token=3, per_pass=10**6)
    parts = residual_norms(model, iter([tokens[:2], tokens[2:]]), eot_token=3, per_pass=per_pass)
    torch.testing.assert_close(parts.norm, whole.norm, equal_nan=True)
    torch.testing.assert_close(parts.cosine, whole.cosine, equal_nan=True)
    a, b = (attention_sinks(model, tokens), attention_sinks(model, iter([tokens[:2], tokens[2:]]), per_pass=per_pass))
    torch.testing.assert_close(a.attention, b.attention)
    assert a.query_rate == pytest.approx(b.query_rate)


def test_sample_stays_bounded_and_means_exact(monkeypatch, random_model):
    from lnfree_interp.norms import residual as norms

    monkeypatch.setattr(norms, "KEPT_NUMBERS", 1)  # 100 rows at least
    model = random_model(None, n_layers=1)
    tokens = random_tokens(model, batch=400, pos=2)
    assert len(norms.norm_sums(model, tokens).sample[0]) == 100
    result = residual_norms(model, tokens)
    everything = torch.stack([x.norm(dim=-1)[:, 0] for x in stream_of(model, tokens).values()])
    torch.testing.assert_close(result.norm[:, 0, 0], everything.mean(1))
    # The median of a sample of 100 lies among the middle third of all 400, but for one chance in a thousand.
    low, high = everything.quantile(0.33, dim=1), everything.quantile(0.67, dim=1)
    assert ((result.norm[:, 0, 2] >= low) & (result.norm[:, 0, 2] <= high)).all()


def test_sinks_are_those_of_the_patterns(any_model):
    tokens = random_tokens(any_model, batch=4, pos=9)
    result = attention_sinks(any_model, tokens, threshold=0.25)
    _, cache = any_model.run_with_cache(tokens)
    patterns = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"] for i in range(any_model.cfg.n_layers)])
    on_first = patterns[:, :, :, 1:, 0]
    mean = on_first.mean((1, 3)).flatten()
    torch.testing.assert_close(result.attention, mean)
    torch.testing.assert_close(result.queries, (on_first >= 0.25).double().mean((1, 3)).flatten())
    assert result.head_rate == (mean >= 0.25).double().mean()
    assert result.query_rate == pytest.approx((on_first >= 0.25).double().mean().item())
    torch.testing.assert_close(result.stderr, on_first.mean(3).std(1).flatten() / 2)


@pytest.mark.parametrize("kind", [None, "LNPre"])
@pytest.mark.parametrize("function", [residual_norms, attention_sinks])
def test_progress_is_told_in_sequences(function, kind, random_model):
    model, told = random_model(kind), []
    function(model, random_tokens(model, batch=5, pos=6), per_pass=12, progress=lambda *share: told.append(share))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_bad_input_is_named(random_model):
    model = random_model(None)
    tokens = random_tokens(model)
    with pytest.raises(ValueError, match=r"threshold is 1\.5; threshold must be a number of at least 0 and at most 1"):
        attention_sinks(model, tokens, threshold=1.5)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        attention_sinks(model, tokens[:, :1])
    with pytest.raises(ValueError, match="token id 61 is outside"):
        residual_norms(model, tokens.clone().fill_(61))
    with pytest.raises(ValueError, match="33 tokens, the model's context holds 32"):
        residual_norms(model, torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \[7\]"):
        residual_norms(model, tokens[0])
    with pytest.raises(ValueError, match="no common positions"):
        residual_norms(model, iter([tokens, tokens[:, :3]]), per_position=True)


def test_command_refuses_bad_input_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--model", "no-such-model", "--out", str(out)]) == 2
    assert main(["--model", "tiny", "--threshold", "3", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "no-such-model" in lines[0]
    assert not out.exists()
