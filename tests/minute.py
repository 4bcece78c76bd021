"""A model, data and schedule of a minute size, for tests of whole removal runs."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from lnfree_interp import ProbeData, ProbePrompt
from lnfree_interp.data import Blocks
from lnfree_interp.finetune import remove_layernorm
from lnfree_interp.finetune.removable import removal_sites
from lnfree_interp.schedule import RemovalSchedule


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an end-of-text token: 257 in all."""
    vocabulary = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def minute_gpt2(n_positions=16, dtype=torch.float32, **config) -> GPT2LMHeadModel:
    fields = {"vocab_size": 257, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=n_positions, **fields | config)).to(dtype)


def minute_blocks(n=64, pos=16, seed=0) -> Blocks:
    return Blocks(torch.randint(0, 257, (n, pos), generator=torch.Generator().manual_seed(seed)))


@cache
def probe_data() -> ProbeData:
    """Prompts of three tokens, of which the last one, 3 to 6, decides the answer."""
    rows = [(i, (("key", f"v{(i + 1) % 4}"), (f"k{i % 2}", f"v{i % 4}"))) for i in range(60)]
    prompts = [ProbePrompt((i % 7, i % 5, 3 + i % 4), pairs, 3 + i % 4) for i, pairs in rows]
    return ProbeData(tuple(prompts))


# 2 layers gone by step 11 of 14, four sequences of 16 tokens a step
MINUTE = RemovalSchedule(
    steps=14,
    start=2,
    gaps={"ln_2": 1, "qk": 1, "v": 1, "ln_f": 1},
    position0_gap=2,
    tokens_per_step=64,
    block_size=16,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    warmup_steps=2,
    auxiliary_weight=0.1,
)


class Recorder(TrainerCallback):
    """What was logged, the running averages after each step, and the batches."""

    def __init__(self):
        self.logs, self.averages, self.batches = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def keep(module, args, kwargs):
            if module.training:
                self.batches.append(kwargs["input_ids"])

        model.register_forward_pre_hook(keep, with_kwargs=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ce" in logs:
            self.logs.append({"step": state.global_step, **logs})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averages.append({name: site.average.clone() for name, site in removal_sites(model).items()})


class At(TrainerCallback):
    """Does something before a step (or after it), each time the run comes by, or only the first `times`."""

    def __init__(self, step, do, *, after=False, times=None):
        self.step, self.do, self.after, self.left = step, do, after, times

    def _at(self, state, model):
        if state.global_step == self.step and self.left != 0:
            self.left = None if self.left is None else self.left - 1
            self.do(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.after:
            self._at(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.after:
            self._at(state, model)


def interrupt(model):
    raise KeyboardInterrupt


def train(tokenizer, out, schedule=MINUTE, *, callbacks=(), model=None, data=None, **arguments):
    model = minute_gpt2() if model is None else model
    data = minute_blocks() if data is None else data
    defaults = {"device": "cpu", "save_steps": 5, "disable_tqdm": True}
    final = remove_layernorm(model, tokenizer, data, schedule, out, callbacks=callbacks, **defaults | arguments)
    return model, final


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Aside(Blocks):
    """Blocks that set some aside: the last ones."""

    def set_aside(self, n: int):
        return self.blocks[-n:], Blocks(self.blocks[:-n])
