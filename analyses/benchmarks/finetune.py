"""A training step of a removal against a plain model's: forward, backward, and what the trainer adds to them.

The plain model has the same activation kernel and no dropout. The optimiser's own work, the same in all ways, is left
out: it would bring the ratios nearer to 1. Asked are at most 1.10 while sites are live and 1.00 once all are frozen.
"""

from __future__ import annotations

import contextlib
import copy

import pandas as pd
import torch
import transformers

from lnfree_interp.finetune.removable import (
    auxiliary_loss,
    collect_std,
    final_norm,
    freeze,
    make_removable,
    removal_sites,
    update_averages,
)
from lnfree_interp.finetune.trainable import ready

from .common import interleaved, median, peak_memory
from .shapes import SHAPES

# Way -> kinds that are frozen, whether treatments are on, whether the auxiliary loss is: the stages of a schedule.
WAYS = {
    "all live": ((), True, True),
    "ln_2 frozen": (("ln_2",), True, True),
    "ln_2 and qk frozen": (("ln_2", "qk"), True, True),
    "all frozen, treated": (("ln_2", "qk", "v", "ln_f"), True, True),
    "all frozen": (("ln_2", "qk", "v", "ln_f"), False, False),
}


def run(args) -> pd.DataFrame:
    """Seconds, ratios to the plain step of the same round, peak memory; 4 x 1024 tokens in fp32, on a GPU 8 in bf16.

    Medians over rounds, of ratios the least and the most too. The plain step is run at both ends of a round, and their
    mean is what ratios are to: what the two differ by is the machine's doing.
    """
    on_gpu = args.device.startswith("cuda")
    batch, pos = (1, 128) if args.quick else (8 if on_gpu else 4, 1024)
    plain = model_of(args.shape, n_layers=2 if args.quick else None).to(args.device).train()
    ready(plain)
    removed = make_removable(copy.deepcopy(plain), eot=0)
    vocabulary = plain.config.vocab_size
    tokens = torch.randint(1, vocabulary, (batch, pos), generator=torch.Generator().manual_seed(0)).to(args.device)

    def step(model, kinds=None, treated=False, auxiliary=False):
        if kinds is not None:
            freeze(model, [n for n in removal_sites(model) if n[0] in kinds], position0=treated, eot=treated)
            final_norm(model).keep_std = auxiliary
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = model(tokens, labels=tokens).loss
        if auxiliary:
            norm = final_norm(model)
            loss = loss + 0.1 * auxiliary_loss(norm.std, norm.target)
            norm.std = None
        loss.backward()
        if kinds is not None:
            collect_std(model)
            update_averages(model)
        return loss.detach()

    expected, found = step(plain), step(removed, ())
    assert (expected - found).abs() <= 1e-6 * expected, f"losses are {expected} and {found}"
    step(removed, *WAYS["all frozen"])
    for model in (plain, removed):
        least = least_probability(model, tokens[:1]) / tokens.numel()
        assert least >= torch.finfo(torch.float32).tiny, f"the logits' gradient has numbers as small as {least}"
    ways = {"plain": lambda: step(plain)}
    ways |= {name: lambda state=state: step(removed, *state) for name, state in WAYS.items()}
    ways["plain, again"] = lambda: step(plain)
    seconds = interleaved(ways, args.repeats, args.device)
    usual = [(first + last) / 2 for first, last in zip(seconds["plain"], seconds["plain, again"], strict=True)]
    ratios = {name: [t / plain for t, plain in zip(seconds[name], usual, strict=True)] for name in ways}
    return pd.DataFrame(
        [
            {
                "way": name,
                "seconds": median(seconds[name]),
                "times a plain step": median(ratios[name]),
                "least": min(ratios[name]),
                "most": max(ratios[name]),
                "peak MiB": peak_memory(way, args.device),
            }
            for name, way in ways.items()
        ]
    )


@torch.no_grad()
def least_probability(model, tokens) -> float:
    return model(tokens).logits.softmax(-1).min().item()


@torch.no_grad()
def model_of(shape: str, n_layers: int | None = None):
    """A model of transformers of a shape with random weights, its stream and its logits of the size of 1.

    As transformers initialises it, with a stream of 0.02, it would explode once frozen. The unembedding being the
    embedding, a token's own logit is about `d_model ** 0.5` times the others' size: with logits of a trained model's
    size the others' probabilities are denormal numbers, with which a CPU is slow, and more of them once frozen.
    """
    fields = SHAPES[shape]
    common = {"vocab_size": fields["d_vocab"], "max_position_embeddings": fields["n_ctx"], "eos_token_id": 0}
    common |= {"hidden_size": fields["d_model"], "num_attention_heads": fields["n_heads"], "bos_token_id": 0}
    common |= {"num_hidden_layers": n_layers or fields["n_layers"]}
    if not fields.get("gated_mlp"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common))
    else:
        llama = {"num_key_value_heads": fields["n_key_value_heads"], "intermediate_size": fields["d_mlp"]}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **llama, tie_word_embeddings=True))
    model.get_input_embeddings().weight.normal_()
    final_norm(model).weight.fill_(fields["d_model"] ** -0.5)
    return model
