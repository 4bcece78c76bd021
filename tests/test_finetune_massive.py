"""A removal of a model with massive tokens: their treatment lasts as long as the schedule says, and leaves nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from minute import MINUTE, At, Recorder, byte_tokenizer, interrupt, minute_blocks, minute_gpt2, train, weights_equal
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from lnfree_interp.data import Blocks
from lnfree_interp.finetune.removable import removal_sites
from lnfree_interp.finetune.saving import checkpoints, state_in
from lnfree_interp.layernorm import is_ln_free
from lnfree_interp.models import load_model

MASSIVE_TOKEN, TIMES = 7, 40.0
# 2 layers gone by step 9 of 18, end-of-text's treatment by step 9, position 0's by 11, massive tokens' by 15
SCHEDULE = replace(MINUTE, steps=18, massive=2, massive_gap=4)


def minute_llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 257, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0))


MODELS = {"GPT-2": lambda: minute_gpt2(tie_word_embeddings=False), "Llama": minute_llama}


def planted(kind):
    """A model of which one token is massive, and data of which every tenth token is that one."""
    model, blocks = MODELS[kind](), minute_blocks().blocks
    model.get_input_embeddings().weight.data[MASSIVE_TOKEN] *= TIMES
    there = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    return model, Blocks(blocks.masked_fill(there, MASSIVE_TOKEN))


class Treated(TrainerCallback):
    """Which sites are frozen and treat massive tokens apart, in each step."""

    def __init__(self):
        self.frozen, self.massive = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        sites = removal_sites(model)
        self.frozen.append({name for name, site in sites.items() if site.frozen})
        self.massive.append({name for name, site in sites.items() if site.massive})


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module", params=MODELS)
def run(request, tokenizer, tmp_path_factory):
    model, data = planted(request.param)
    out, recorder, treated = tmp_path_factory.mktemp("massive") / "out", Recorder(), Treated()
    model, final = train(tokenizer, out, SCHEDULE, model=model, data=data, callbacks=[recorder, treated])
    found = {"out": out, "model": model, "final": final, "recorder": recorder, "treated": treated, "data": data}
    return SimpleNamespace(kind=request.param, **found)


def test_frozen_sites_treat_massive_tokens_until_the_schedule_says(run):
    last = SCHEDULE.events(2)[-1]
    assert last == (15, "massive", None)
    for step, (frozen, massive) in enumerate(zip(run.treated.frozen, run.treated.massive, strict=True)):
        assert frozen == SCHEDULE.state(step, 2).frozen
        assert massive == (frozen if step < last.step else set())
    averages = run.recorder.averages[-1]
    ordinary, theirs = (torch.stack([average[i] for average in averages.values()]) for i in (0, 2))
    assert theirs[: len(theirs) - 1].isfinite().all() and (theirs[0] > 5 * ordinary[0]), "there were massive tokens"
    happened = [tuple(event) for event in state_in(run.out / "final")["progress"]["happened"]]
    assert happened == [tuple(event) for event in SCHEDULE.events(2)]
    assert [("aux" in log) for log in run.recorder.logs] == [step < last.step for step in range(SCHEDULE.steps)]


def test_what_is_left_is_the_frozen_model_and_ln_free(run):
    reloaded = AutoModelForCausalLM.from_pretrained(run.out / "final")
    assert is_ln_free(reloaded.config, reloaded.state_dict()) and weights_equal(reloaded, run.final)
    tokens = run.data.blocks[:8]
    assert (tokens == MASSIVE_TOKEN).any()
    with torch.no_grad():
        ours, theirs = (m.double().eval()(tokens).logits for m in (run.model, reloaded))
    # constants are folded in fp64 and written in fp32; a Llama's positions are fp32 whatever it is in
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    loaded = load_model(run.out / "final", device="cpu")
    assert loaded.cfg.normalization_type is None
    expected = run.final.double().eval()(tokens).logits.log_softmax(-1).float()
    got = loaded(tokens, prepend_bos=False).log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at", [pytest.param(6, id="while sites go", marks=pytest.mark.slow), 13])
def test_a_run_resumed_in_the_middle_of_it_equals_an_uninterrupted_one(run, tokenizer, tmp_path, at):
    out, (model, data) = tmp_path / "out", planted(run.kind)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, SCHEDULE, model=model, data=data, callbacks=[At(at, interrupt)], save_steps=at - 1)
    saved = checkpoints(out)[0]
    assert saved.name == f"checkpoint-{at - 1}" and SCHEDULE.state(at - 1, 2).massive
    recorder, treated, (model, data) = Recorder(), Treated(), planted(run.kind)
    callbacks = [recorder, treated]
    _, final = train(tokenizer, out, SCHEDULE, model=model, data=data, callbacks=callbacks, resume=True)
    assert weights_equal(final, run.final) and recorder.logs == run.recorder.logs[at - 1 :]
    assert treated.massive == run.treated.massive[at - 1 :] and treated.massive[0]
    for ours, theirs in zip(recorder.averages, run.recorder.averages[at - 1 :], strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def test_without_the_class_all_is_as_it_was(run, tokenizer, tmp_path):
    """No averages of theirs, no event; and what they are treated for shows in the loss of a frozen site."""
    (model, data), recorder, treated = planted(run.kind), Recorder(), Treated()
    plain = replace(SCHEDULE, massive=None)
    train(tokenizer, tmp_path / "out", plain, model=model, data=data, callbacks=[recorder, treated])
    assert not any(treated.massive) and treated.frozen == run.treated.frozen
    assert all(average[2].isnan() for average in recorder.averages[-1].values())
    first = SCHEDULE.start
    with_class, without = ([log["ce"] for log in r.logs] for r in (run.recorder, recorder))
    assert with_class[:first] == without[:first] and with_class[first] != without[first]


def test_a_control_and_an_adaptive_run(tokenizer, tmp_path):
    """The control of a schedule with the class is that of one without; at its own pace the class goes last too."""
    model, data = planted("GPT-2")
    long = replace(SCHEDULE, steps=40)
    train(tokenizer, tmp_path / "control", replace(long, massive=None).vanilla(), model=model, data=data)
    model, data = planted("GPT-2")
    schedule, treated = long.adaptive(margin=9.0, settle=2), Treated()
    arguments = {"control": tmp_path / "control", "callbacks": [treated]}
    _, final = train(tokenizer, tmp_path / "out", schedule, model=model, data=data, **arguments)
    happened = [tuple(event) for event in state_in(tmp_path / "out" / "final")["progress"]["happened"]]
    assert happened[-1] == (15, "massive", None) and len(treated.massive) == 17
    assert treated.massive[14] and not treated.massive[15]
    assert is_ln_free(final.config, final.state_dict())


def test_a_run_of_a_version_that_did_not_know_the_class(tokenizer, tmp_path):
    """It goes on without it, and not with it."""
    out, plain = tmp_path / "out", replace(SCHEDULE, massive=None, massive_gap=3.5)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, out, plain, callbacks=[At(7, interrupt)])
    stored = json.loads((out / "run.json").read_text())
    for name in ("massive", "massive_gap"):
        del stored["settings"][name]
    old = json.dumps(stored)
    (out / "run.json").write_text(old)
    with pytest.raises(ValueError, match=r"^cannot resume .*: massive was None, now 4$"):
        train(tokenizer, out, replace(plain, massive=4), resume=True)
    assert (out / "run.json").read_text() == old
    _, final = train(tokenizer, out, plain, resume=True)
    _, other = train(tokenizer, tmp_path / "other", plain)
    assert weights_equal(final, other)
    with pytest.raises(ValueError, match=r"massive was None, now 4; massive_gap was 3\.5, now 2$"):
        train(tokenizer, out, replace(plain, massive=4, massive_gap=2), resume=True)
