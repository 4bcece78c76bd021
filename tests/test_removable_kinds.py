"""Removal beyond one forward: steps cut into micro-batches and processes, massive tokens, loading, what is refused."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from removable_models import EOT, KINDS, exact, log_probs, make_plain, make_tokens, measured, same
from safetensors.torch import load_file
from transformers import Trainer

from lnfree_interp.finetune import load_trainable
from lnfree_interp.finetune.export import export_ln_free, plain_model, plain_state
from lnfree_interp.finetune.removable import (
    TIMES_ORDINARY,
    auxiliary_loss,
    collect_std,
    family_of,
    final_norm,
    freeze,
    make_removable,
    n_layers,
    removal_sites,
    update_averages,
)
from lnfree_interp.finetune.trainable import ready

of_every_kind = pytest.mark.parametrize("kind", KINDS)
FROZEN = {"none": (), "some": ("ln_2", "v"), "all": ("ln_2", "qk", "v", "ln_f")}


# -- steps --------------------------------------------------------------------------------------------------


def train_step(model, tokens, sizes, share=1.0):
    """The trainer's step on micro-batches of these sizes: its loss, auxiliary loss included; gradients and averages."""
    model.train().zero_grad()
    total, norm = 0.0, final_norm(model)
    for batch in tokens.split(sizes):
        with exact():
            logits = model(batch).logits  # transformers' own loss is in fp32
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss = (loss + 0.1 * auxiliary_loss(norm.std, norm.target)) * len(batch) / len(tokens) * share
        loss.backward()
        total += loss.item()
        collect_std(model)
    update_averages(model)
    return total


@of_every_kind
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("massive", [None, 1.5])
def test_how_a_step_is_cut_changes_nothing(kind, frozen, massive):
    """Losses, gradients, averages and targets of three steps, in fp64."""
    results = []
    for sizes in ([6], [2, 2, 2], [1, 5]):
        model = measured(make_plain(kind), make_tokens(), massive=massive)
        sites = removal_sites(model)
        final_norm(model).keep_std = True
        train_step(model, make_tokens(batch=6, seed=9), sizes)  # the first with an average to tell massive tokens by
        chosen = [name for name in sites if name[0] in FROZEN[frozen]]
        freeze(model, chosen, position0=True, eot=True, massive=massive is not None)
        losses = [train_step(model, make_tokens(batch=6, seed=seed), sizes) for seed in range(3)]
        averages = torch.stack([site.average for site in sites.values()])
        assert massive is None or averages[:, 2].isfinite().any(), "massive tokens were there"
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((torch.tensor(losses), averages.nan_to_num(), final_norm(model).target, gradients))
    for other in results[1:]:
        for ours, theirs in zip(other[:3], results[0][:3], strict=True):
            same(ours, theirs, atol=1e-10)
        for name, gradient in results[0][3].items():
            same(other[3][name], gradient, atol=1e-10)


def in_two_processes(rank, kind, directory):
    """A step on half of the batch of each, weights sharded; what comes out is checked by the test."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29511 + list(KINDS).index(kind))}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    model = make_removable(make_plain(kind))
    family = family_of(model)
    for layer in range(n_layers(model)):
        fully_shard(model.get_submodule(family.prefix + family.block.format(layer)))
    fully_shard(model)
    final_norm(model).keep_std = True
    tokens = make_tokens(batch=4)
    train_step(model, tokens[2 * rank : 2 * rank + 2], [1, 1])
    freeze(model, removal_sites(model))
    train_step(model, tokens[2 * rank : 2 * rank + 2], [2])
    with exact():
        exported = export_ln_free(model)
    found = {
        "exported": exported.state_dict(),
        "target": final_norm(model).target,
        "gradients": {name: p.grad.full_tensor() for name, p in model.named_parameters()},
        "plain": plain_state(model),
    }
    torch.save(found, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT-2", "GPT-NeoX", "Llama"])
def test_two_processes_with_sharded_weights_equal_one(kind, tmp_path):
    torch.multiprocessing.spawn(in_two_processes, (kind, tmp_path), nprocs=2)
    model, tokens = make_removable(make_plain(kind)), make_tokens(batch=4)
    final_norm(model).keep_std = True
    train_step(model, tokens, [4])
    freeze(model, removal_sites(model))
    train_step(model, tokens, [4])
    exported = export_ln_free(model).state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        same(found["target"], final_norm(model).target, atol=1e-10)
        for name, p in model.named_parameters():
            same(found["gradients"][name], p.grad, atol=1e-10)
        assert found["exported"].keys() == exported.keys() and found["plain"].keys() == exported.keys()
        for name, weight in exported.items():
            torch.testing.assert_close(found["exported"][name], weight, rtol=1e-12, atol=1e-12)
            assert torch.equal(found["plain"][name], plain_state(model)[name])


# -- massive tokens -------------------------------------------------------------------------------------------


def with_massive_token(model, token=7, times=30.0):
    """A model in which one token is long in the stream from its embedding on."""
    model.get_input_embeddings().weight.data[token] *= times
    return model


@of_every_kind
def test_massive_tokens_are_a_class_of_their_own(kind):
    """Averages of both classes by the definition; frozen sites divide by each token's own class'; off in the end."""
    model, tokens = with_massive_token(make_plain(kind, tie_word_embeddings=False)), make_tokens(batch=8)
    make_removable(model, massive=2.0).train()
    sites = removal_sites(model)
    norms = {site: m for m in model.modules() if hasattr(m, "sites") for site in m.sites.values()}

    def streams():
        seen, hooks = {}, []
        for norm in set(norms.values()):
            hooks.append(norm.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].detach()})))
        with exact():
            model(tokens)
        for hook in hooks:
            hook.remove()
        return seen

    expected = {}
    for step in range(2):
        seen = streams()
        for site, norm in norms.items():
            std, (rows, columns) = norm.std_of(seen[norm])[..., 0], tokens.shape
            limit = float("inf") if step == 0 else 2.0 * site.average[0].item()
            classes = [[], [], []]
            for b in range(rows):
                for p in range(columns):
                    value = std[b, p].item()
                    classes[1 if p == 0 else 2 if value > limit else 0].append(value)
            means = [sum(values) / len(values) if values else float("nan") for values in classes]
            expected.setdefault(site, []).append(means)
        collect_std(model)
        update_averages(model)
    for site in norms:
        first, second = (torch.tensor(means, dtype=torch.float64) for means in expected[site])
        same(site.average[:2], 0.9 * first[:2] + 0.1 * second[:2])
        assert site.average[2].item() == pytest.approx(second[2].item(), rel=1e-12, nan_ok=True)
    assert sum(site.average[2].isfinite().item() for site in norms) > 2
    freeze(model, sites, position0=True, massive=True)
    for norm, x in streams().items():
        for site in norm.sites.values():
            inverse, std = norm.inverse(site, x), norm.std_of(x)
            for b in range(len(tokens)):
                for p in range(tokens.shape[1]):
                    massive = std[b, p, 0] > 2 * site.average[0] and site.average[2].isfinite()
                    average = site.average[1 if p == 0 else 2 if massive else 0]
                    assert inverse[b, p, 0].item() == pytest.approx(1 / average.item(), rel=1e-12)
            assert not inverse.requires_grad
    on = log_probs(model, tokens)
    freeze(model, sites)
    assert not torch.allclose(on, log_probs(model, tokens), atol=1e-3)
    same(log_probs(export_ln_free(model), tokens), log_probs(model, tokens), atol=1e-5)


def test_massive_tokens_are_asked_for():
    assert TIMES_ORDINARY == 4
    model = measured(make_plain(), make_tokens())
    with pytest.raises(ValueError, match="massive tokens are not told apart"):
        freeze(model, removal_sites(model), massive=True)
    with pytest.raises(ValueError, match=r"massive is 0\.5: it must be above 1"):
        make_removable(make_plain(), massive=0.5)
    model = measured(make_plain(), make_tokens(), massive=4)
    freeze(model, removal_sites(model), massive=True)
    with pytest.raises(ValueError, match="apart"):
        export_ln_free(model)


# -- the same training ------------------------------------------------------------------------------------------


@of_every_kind
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_live_sites_train_as_the_plain_model_does(kind, autocast):
    """Bit for bit, gradients included, with recomputed activations too; weights keep their names and dtype."""
    plain, tokens = make_plain(kind).float(), make_tokens()
    models = [plain, make_removable(copy.deepcopy(plain)), make_removable(copy.deepcopy(plain))]
    models[2].gradient_checkpointing_enable()
    for model in models:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for model in models[1:]:
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
        collect_std(model)
        update_averages(model)
        assert all(site.average.dtype == torch.float32 for site in removal_sites(model).values())
        assert plain_state(model).keys() == plain.state_dict().keys()


@of_every_kind
def test_frozen_sites_train_in_half_precision_and_with_checkpointing(kind):
    """Autocast, and weights in bfloat16 beside averages in float32, as sharding has them."""
    tokens, gradients = make_tokens(batch=6), {}
    for way in ("plain", "checkpointing", "autocast", "bfloat16"):
        model = make_removable(make_plain(kind).float(), massive=1.5).train()
        for _ in range(2):
            model(tokens)
            collect_std(model)
            update_averages(model)
        if way != "plain":
            model.gradient_checkpointing_enable()
        chosen = [name for name in removal_sites(model) if name[0] != "qk"]
        freeze(model, chosen, position0=True, eot=True, massive=True)
        if way == "bfloat16":
            for p in model.parameters():
                p.data = p.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            logits = model(tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert all(site.average.dtype == torch.float32 for site in removal_sites(model).values())
        gradients[way] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    expected = gradients["plain"]
    assert torch.equal(gradients["checkpointing"], expected)
    for way in ("autocast", "bfloat16"):
        assert (gradients[way] - expected).norm() < 0.1 * expected.norm(), way


@of_every_kind
def test_the_same_weights_decay(kind, tmp_path):
    """Trainer leaves norms and biases out of weight decay, by type and name: of removable models the same ones."""
    plain = make_plain(kind)
    trainer = SimpleNamespace(model=plain)
    expected = Trainer.get_decay_parameter_names(trainer, plain)
    assert expected == Trainer.get_decay_parameter_names(trainer, make_removable(copy.deepcopy(plain)))
    assert 0 < len(expected) < len(list(plain.parameters()))


@of_every_kind
def test_ready_keeps_the_function(kind):
    act = "activation_function" if kind == "GPT-2" else "hidden_act"
    dropout = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}
    model = make_plain(kind, use_cache=True, hidden_dropout=0.3, **{act: "gelu_new"}, **dropout)
    expected = log_probs(model, make_tokens())
    ready(model)
    assert not model.config.use_cache
    same(log_probs(model.train(), make_tokens()), expected, atol=1e-9)
    assert any("GELUTanh" in type(m).__name__ for m in model.modules()), "one kernel"


@of_every_kind
def test_what_trainer_saves_it_can_go_on_from(kind, tmp_path):
    """Every weight and average, under the names that save_pretrained gives them, as Trainer loads them."""
    model = measured(make_plain(kind, tie_word_embeddings=False), make_tokens()).float()
    ready(model)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    other = make_removable(make_plain(kind, tie_word_embeddings=False, seed=1).float())
    ready(other)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), False)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, atol=0, rtol=0, equal_nan=True)


# -- what is refused, and what is loaded --------------------------------------------------------------------------


def test_what_norms_cannot_be_removed_from_is_named():
    def made(model_type, **fields):
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.AutoConfig.for_model(model_type, vocab_size=9, **shape, **fields)
        return transformers.AutoModelForCausalLM.from_config(config)

    served = "GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM"
    for model, message in (
        (made("qwen3", head_dim=4, num_key_value_heads=2), f"has norms of queries and keys.* removed from {served}"),
        (made("gpt_neox", attention_bias=False), "attention_bias false leaves no bias.*must be true"),
        (made("llama", mlp_bias=True, num_key_value_heads=2), "mlp_bias"),
        (made("opt", ffn_dim=8, word_embed_proj_dim=8), f"removed from {served}, not from a OPTForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            make_removable(model)
        assert "\n" not in str(raised.value)
    assert not removal_sites(make_plain("Llama"))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    eot = "<|endoftext|>"
    words = {eot: 0} | {chr(97 + i): i + 1 for i in range(22)}
    inner = Tokenizer(models.WordLevel(words, unk_token=eot))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eot)


@of_every_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_is_loaded_to_be_trained(kind, tied, tokenizer, tmp_path):
    model = make_plain(kind, tie_word_embeddings=tied).float()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_trainable(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    loaded, its = load_trainable(str(tmp_path))
    assert its.eos_token_id == 0 and type(loaded) is type(model)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    reference = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(make_tokens()).logits, reference(make_tokens()).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    # a control: the same format, ordinary norms
    plain_model(model.config, plain_state(loaded)).save_pretrained(tmp_path / "control")
    again = type(model).from_pretrained(tmp_path / "control")
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in again.state_dict().items())
    measured(loaded, make_tokens())
    freeze(loaded, removal_sites(loaded))
    export_ln_free(loaded).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LN-free already"):
        load_trainable(str(tmp_path))


def test_vocabularies_may_be_padded(tokenizer, tmp_path):
    for size, fits in ((64, True), (24, False), (22, False)):
        tokenizer.save_pretrained(tmp_path / str(size))
        make_plain("Llama", vocab_size=size).float().save_pretrained(tmp_path / str(size))
        if fits:
            load_trainable(str(tmp_path / str(size)))
        else:
            with pytest.raises(
                ValueError, match=f"the tokenizer has 23 tokens, the model's vocabulary {size}: it must"
            ):
                load_trainable(str(tmp_path / str(size)))


def test_a_head_that_is_stored_counts_though_the_config_ties_it(tokenizer, tmp_path):
    make_plain("Llama", tie_word_embeddings=False).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    untied, _ = load_trainable(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    loaded, _ = load_trainable(str(tmp_path))
    assert torch.equal(loaded(make_tokens()).logits, untied(make_tokens()).logits)


def test_eot_may_be_several():
    model = measured(make_plain("Llama"), make_tokens(), eot=[EOT, 5])
    freeze(model, removal_sites(model), eot=True)
    tokens = make_tokens()
    log_probs(model, tokens)
    mask = removal_sites(model)["v", 0].classes.at_eot[..., 0]
    assert torch.equal(mask, (tokens == EOT) | (tokens == 5)) and (tokens == 5).any()
