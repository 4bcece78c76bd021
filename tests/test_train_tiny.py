"""The script that makes the embedded models and their siblings: its stages on models that are smaller still."""

from pathlib import Path

import pytest
import torch

from lnfree_interp import RemovalSchedule, load_model
from lnfree_interp.names import locate_checkpoint

ANALYSES = Path(__file__).parents[1] / "analyses"


@pytest.fixture
def train_tiny(monkeypatch):
    monkeypatch.syspath_prepend(ANALYSES)
    import train_tiny

    monkeypatch.setattr(train_tiny, "D_MODEL", 16)
    monkeypatch.setattr(train_tiny, "LAYERS", 2)
    return train_tiny


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate_checkpoint("tiny"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_either_family_is_freed_and_scored(family, train_tiny, tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    source, freed = tmp_path / "source", tmp_path / "freed"
    train_tiny.untrained(family, tokenizer).save_pretrained(source)
    tokenizer.save_pretrained(source)
    blocks = torch.randint(1, train_tiny.VOCAB, (64, train_tiny.CONTEXT))
    blocks[:, 0] = tokenizer.bos_token_id
    train_tiny.remove(source, blocks, freed, RemovalSchedule.preset("tiny").scaled(2))
    model = load_model(str(freed / "final"))
    assert model.cfg.normalization_type is None and model.cfg.n_layers == 2
    assert "ln_f " in capsys.readouterr().out
    train_tiny.score({"source": source, "freed": freed / "final"}, blocks[:4], tmp_path)
    shown, losses = ((tmp_path / f"tiny_{stem}.csv").read_text().splitlines() for stem in ("shows", "losses"))
    assert [len(shown), len(losses)] == [3, 3] and losses[2].startswith(f"freed,{4 * (train_tiny.CONTEXT - 1)},")


def test_the_course_lies_on_straight_lines_between_its_points(train_tiny):
    for (step, rate, decay), (later, next_rate, next_decay) in zip(train_tiny.COURSE, train_tiny.COURSE[1:]):
        assert train_tiny.course(step) == pytest.approx((rate, decay))
        between = ((rate + next_rate) / 2, (decay + next_decay) / 2)
        assert train_tiny.course((step + later) / 2) == pytest.approx(between)


def test_tokens_kept_by_the_training_script(train_tiny, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "tokens.safetensors"
    train, val = (torch.randint(4096, (n, 256)) for n in (3, 2))
    train_tiny.write_tokens(path, train, val)
    for kept, written in zip(train_tiny.read_tokens(path), (train, val), strict=True):
        assert kept.equal(written)
    for stored, message in (
        ({"train": train}, "holds no val blocks of 256 token ids"),
        ({"train": train, "val": val[:, :9].contiguous()}, "holds no val blocks of 256"),
        ({"train": train.float(), "val": val}, "holds no train blocks"),
        ({"train": train[:0], "val": val}, "holds no train blocks"),
        ({"train": train + 4096, "val": val}, "train: token id .* is outside the model's vocabulary of 4096"),
    ):
        save_file(stored, path)
        with pytest.raises(ValueError, match=message):
            train_tiny.read_tokens(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        train_tiny.read_tokens(path)
