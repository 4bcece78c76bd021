"""A loaded model is the HF model: log-probabilities, tokenizer, coordinates; and bad checkpoints say what is wrong."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import hooked_only
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lnfree_interp import available_models, cli, load_model, models
from lnfree_interp.checkpoints import open_checkpoint
from lnfree_interp.names import CHECKPOINTS, EMBEDDED, display_name, display_names


def random_checkpoint(directory, *, ln_free, seed=0, prefix=True, **fields):
    """A GPT2LMHeadModel with random weights on disk, with LayerNorm or in the published LN-free format."""
    fields = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 97, "n_positions": 16} | fields
    eps = 1e12 if ln_free else 1e-5
    config = GPT2Config(**fields, layer_norm_epsilon=eps, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + around)
            if ln_free and (".ln_1." in name or ".ln_2." in name):
                p.fill_(1e6 * around)
            elif ln_free and name.endswith("ln_f.weight"):
                p.mul_(1e6 / 3)
    model.save_pretrained(directory)
    if not prefix:
        file = directory / "model.safetensors"
        state = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the mask buffer that old checkpoints carry
        save_file(state, file)
    return model


def compare(directory, ln_free):
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    reference = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64)(tokens).logits.log_softmax(-1)
    for dtype in (torch.float64, torch.float32):
        model = load_model(directory, dtype=dtype, device="cpu")
        assert model.cfg.normalization_type == (None if ln_free else "LNPre")
        ours = model(tokens).double().log_softmax(-1)
        if dtype == torch.float64:
            assert (ours - reference).abs().max() < 1e-6
        assert (ours - reference).norm() / reference.norm() <= 1e-5
    return model


@pytest.mark.parametrize("ln_free", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_log_probabilities_are_hf_s(tmp_path, ln_free, prefix):
    random_checkpoint(tmp_path, ln_free=ln_free, prefix=prefix)
    model = compare(tmp_path, ln_free)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@settings(max_examples=8, deadline=None)
@given(
    ln_free=st.booleans(),
    n_head=st.integers(1, 4),
    n_layer=st.integers(1, 3),
    n_inner=st.sampled_from([None, 17]),
    inverse=st.booleans(),
    scaled=st.booleans(),
    act=st.sampled_from(["gelu_new", "gelu_pytorch_tanh", "relu"]),
    seed=st.integers(0, 99),
)
def test_on_random_configurations(tmp_path_factory, ln_free, n_head, n_layer, n_inner, inverse, scaled, act, seed):
    directory = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(
        directory,
        ln_free=ln_free,
        seed=seed,
        n_head=n_head,
        n_embd=6 * n_head,
        n_layer=n_layer,
        n_inner=n_inner,
        scale_attn_by_inverse_layer_idx=inverse,
        scale_attn_weights=scaled,
        activation_function=act,
    )
    compare(directory, ln_free)


def test_an_untied_head_is_read(tmp_path):
    config = GPT2Config(
        n_embd=24,
        n_layer=1,
        n_head=3,
        vocab_size=97,
        n_positions=16,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    compare(tmp_path, ln_free=False)


@pytest.mark.parametrize("ln_free", [True, False])
def test_both_kinds_are_in_centred_coordinates(tmp_path, ln_free):
    random_checkpoint(tmp_path, ln_free=ln_free)
    model = load_model(tmp_path, dtype="float64", device="cpu")
    for writer in (model.W_E, model.W_pos, model.W_O, model.b_O, model.W_out, model.b_out, model.W_U, model.b_U):
        assert writer.mean(-1).abs().max() < 1e-12
    for reader in (model.W_Q, model.W_K, model.W_V, model.W_in):
        assert reader.mean(-2).abs().max() < 1e-12
    assert not model.b_V.any()


@hooked_only
def test_with_layernorm_the_weights_are_transformer_lens_own(tmp_path):
    """TransformerLens' usual processing of the same weights, in its own fp32."""
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf = random_checkpoint(tmp_path, ln_free=False)
    ours = load_model(tmp_path, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = open_checkpoint(tmp_path).fields
        theirs = models.build_model(fields, None, device="cpu", dtype=torch.float32, name="theirs")
        theirs.cfg.normalization_type = "LN"
        state = convert_gpt2_weights(hf, theirs.cfg)
        state["unembed.b_U"] = torch.zeros(97)  # without the key TransformerLens drops ln_f's bias
        theirs.load_and_process_state_dict(state)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], p.detach(), atol=2e-5, rtol=2e-5)


def test_bf16_is_folded_before_it_is_rounded(tmp_path):
    random_checkpoint(tmp_path, ln_free=True)
    exact, rounded = (load_model(tmp_path, dtype=d, device="cpu") for d in ("float64", "bfloat16"))
    for p, q in zip(exact.parameters(), rounded.parameters()):
        assert q.dtype == torch.bfloat16 and torch.equal(p.to(torch.bfloat16), q)


def test_sharded_checkpoints(tmp_path):
    model = random_checkpoint(tmp_path / "whole", ln_free=True)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    compare(tmp_path / "shards", ln_free=True)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors or a part of it"):
        load_model(tmp_path / "shards")


@pytest.mark.slow
def test_loading_holds_one_matrix_at_a_time(tmp_path):
    """The peak of folding is the model and a few matrices, not a second model: what lets GPT-2 XL in."""
    code = (
        "import sys, resource; from lnfree_interp import lens, load_model, models\n"
        "from transformer_lens.model_bridge import TransformerBridge\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model = load_model(sys.argv[1], device='cpu')\n"
        "print((peak() - before) / (4 * sum(p.numel() for p in lens.parameters(model).values())))"
    )
    fields = {"n_embd": 512, "n_layer": 12, "n_head": 8, "vocab_size": 2000, "n_positions": 64}
    random_checkpoint(tmp_path, ln_free=True, **fields)
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True)
    assert float(out.stdout) < 2.5, out.stderr


# --- names ------------------------------------------------------------------------------------------------


def test_available_models():
    table = available_models().set_index("name")
    assert table.loc["gpt2-xl-noLN", "source"] == "schaeff/gpt2-xl_LNFree800"
    assert table.loc["gpt2-vanilla", "source"] == "schaeff/gpt2-small_vanilla300"
    assert table.loc["gpt2-noLN-v4", ["source", "revision"]].tolist() == ["apollo-research/gpt2_noLN", "v4"]
    assert table.loc["pythia-1.4b", "source"] == "EleutherAI/pythia-1.4b"
    assert table.loc["smollm2-135m", ["source", "kind"]].tolist() == ["HuggingFaceTB/SmolLM2-135M", "original"]
    assert len(table) == 3 + 4 * 3 + 5 + 6 + 2


def test_what_runs_left_is_called_by_the_run(tmp_path, monkeypatch):
    for run in ("one", "two"):
        random_checkpoint(tmp_path / run / "final", ln_free=False)
    shutil.copytree(tmp_path / "one" / "final", tmp_path / "elsewhere" / "one")
    one, two, other = (str(tmp_path / name) for name in ("one/final", "two/final", "elsewhere/one"))
    assert load_model(two).cfg.model_name == "two"
    assert display_names([one, two, "tiny"]) == ["one", "two", "tiny"]
    assert display_names([one, two, other]) == [one, "two", other]
    monkeypatch.chdir(one)
    assert display_name(".") == "one" and display_name("../../elsewhere/one/") == "one"
    args = cli.parser("dla", "").parse_args(["--model", one, two, "--device", "cpu"])
    assert [name for name, _ in cli.models(args)] == ["one", "two"]


@pytest.mark.parametrize("name", ["tiny-nolN", "gpt2-XL", "gpt3"])
def test_unknown_names_name_the_nearest(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; nearest known: "):
        load_model(name)


def test_hub_models_out_of_reach_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'gpt2-xl-noLN' \(schaeff/gpt2-xl_LNFree800\) is neither in the cache"):
        load_model("gpt2-xl-noLN")
    with pytest.raises(ValueError, match=r"apollo-research/gpt2_noLN at revision v2\) is neither"):
        load_model("gpt2-noLN-v2")


def test_hub_models_come_from_the_cache_without_a_look_up(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--schaeff--gpt2-small_LNFree300" / "snapshots" / "abc"
    random_checkpoint(snapshot, ln_free=True)
    refs = tmp_path / "models--schaeff--gpt2-small_LNFree300" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    assert load_model("gpt2-noLN", device="cpu").cfg.normalization_type is None


# --- bad checkpoints --------------------------------------------------------------------------------------


def edit(directory, change):
    file = directory / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def drop(state):
    del state["transformer.h.1.mlp.c_fc.bias"]


def add(state):
    state["transformer.h.1.rotary"] = torch.ones(2)


def poison(state):
    state["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")


def reshape(state):
    state["transformer.ln_f.bias"] = torch.zeros(25)


def half_way(state):
    state["transformer.h.1.ln_2.weight"].fill_(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"lacks weights: h\.1\.mlp\.c_fc\.bias"),
        (add, r"has weights that a GPT2LMHeadModel of its config has not: h\.1\.rotary"),
        (poison, r"h\.1\.mlp\.c_fc\.bias holds values that are not finite"),
        (reshape, r"ln_f\.bias has shape \[25\], the config wants \[24\]"),
        (half_way, r"half-way LN-free.*h\.1\.ln_2\.weight"),
    ],
)
def test_bad_weights_name_the_weight(tmp_path, change, message):
    random_checkpoint(tmp_path, ln_free=True)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it holds no config.json"),
        ({"config.json": "{"}, "not readable"),
        ({"config.json": "[]"}, r"\[\] is not served; what is: GPT2LMHeadModel, GPTNeoX"),
        ({"config.json": "{}"}, "model_type None is not served"),
        ({"config.json": '{"model_type": "bloom"}'}, "model_type 'bloom' is not served"),
        ({"config.json": '{"model_type": "gpt2"}'}, "lacks model.safetensors"),
        ({"config.json": '{"model_type": "gpt2"}', "model.safetensors": "junk"}, "no readable safetensors"),
        ({"config.json": '{"model_type": "gpt2", "n_head": 7}'}, "768 is no multiple of n_head 7"),
    ],
)
def test_directories_that_are_no_gpt2(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    random_checkpoint(tmp_path, ln_free=True)
    plain, tokens = load_model(tmp_path, device="cpu"), torch.arange(9)[None]
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert torch.equal(load_model(tmp_path, device="cpu")(tokens), plain(tokens))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path, text):
    random_checkpoint(tmp_path, ln_free=True)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of safetensors files") as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_of_another_size(tmp_path):
    random_checkpoint(tmp_path, ln_free=True)
    for file in CHECKPOINTS.joinpath("tiny").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 4096 tokens, the model's vocabulary 97"):
        load_model(tmp_path)


def test_devices_and_dtypes_that_are_not_there(tmp_path):
    random_checkpoint(tmp_path, ln_free=True)
    for arguments, message in [
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there; present: cpu"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; allowed are float32, float64, bfloat16, float16"),
        ({"dtype": torch.int64}, r"unknown dtype 'torch\.int64'"),
        ({"revision": "v2"}, "revision 'v2' given for"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, **arguments)


# --- the embedded models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models(name):
    model = load_model(name, device="cpu", dtype="float64")
    assert model.cfg.normalization_type == (None if name == "tiny-noLN" else "LNPre")
    text = "It was the best of times, it was the worst of times."
    tokens = model.to_tokens(text, prepend_bos=False)
    assert model.to_string(tokens[0]) == text
    assert model.to_tokens(text)[0, 0] == model.tokenizer.eos_token_id
    hf = GPT2LMHeadModel.from_pretrained(CHECKPOINTS / name, dtype=torch.float64)
    difference = model(tokens).log_softmax(-1) - hf(tokens).logits.log_softmax(-1)
    assert difference.abs().max() < 1e-6
    assert json.loads((CHECKPOINTS / name / "config.json").read_text())["model_type"] == "gpt2"


def test_embedded_models_are_small():
    files = [f for f in CHECKPOINTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16e6
