"""Every family of checkpoints loads as the model transformers makes of it; what would not be exact is refused."""

import json
import shutil
import sys
import weakref
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lnfree_interp import load_model, read_weights
from lnfree_interp.checkpoints import open_checkpoint
from lnfree_interp.families import FAMILIES
from lnfree_interp.folding import fold
from lnfree_interp.names import CHECKPOINTS

TRAINED_FOR, CONTEXT = 8, 24
# From TransformerLens 4 on a model's positions are transformers' own, in fp32 whatever its dtype.
POSITIONS_IN_FP32 = int(version("transformer_lens").split(".")[0]) >= 4
# Scalings of rotary positions, and how far fp64 log-probabilities may be off: TransformerLens computes the frequencies
# of Llama 3's scaling in fp32, whatever the model's dtype.
ROPES = {
    "default": ({}, 1e-9),
    "linear": ({"factor": 3.0}, 1e-9),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": TRAINED_FOR},
        1e-5,
    ),
    "yarn": ({"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR}, 1e-9),
    "yarn with all options": (
        {"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR, "beta_fast": 4.0, "beta_slow": 2.0}
        | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        1e-9,
    ),
    "yarn with a factor on attention": (
        {"factor": 3.0, "original_max_position_embeddings": TRAINED_FOR, "attention_factor": 1.3},
        1e-9,
    ),
}


def rope(name, base=500.0, **more):
    return {"rope_type": name.split()[0], "rope_theta": base} | ROPES[name][0] | more


def random_checkpoint(directory, model_type, *, ln_free=False, seed=0, shards=False, **fields):
    """A small model of a family with random weights, norms and biases included, as transformers writes it."""
    family = FAMILIES[model_type]
    config = make_config(model_type, **{family.eps: 1e12 if ln_free else 2**-7}, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            around = 1.0 if is_norm and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + around)
            if ln_free and around:
                p.mul_(1e6)
    model.save_pretrained(directory, max_shard_size=4000 if shards else "5GB")
    return config


def make_config(model_type, **fields):
    common = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    else:
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28}
        shape |= {"max_position_embeddings": CONTEXT}
    if model_type == "gpt_neox":
        shape |= {"rotary_pct": 0.7}
    elif model_type != "gpt2":
        shape |= {"num_key_value_heads": 2, "head_dim": 6}
    return transformers.AutoConfig.for_model(model_type, **(common | shape | fields))


def tokens_of(vocabulary=61):
    return torch.randint(vocabulary, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(directory, **arguments):
    """transformers' log-probabilities in fp64, its fp32 included: that is what it computes norms and positions in."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **arguments)
    with patch.multiple(torch, float=torch.float64, float32=torch.float64):
        model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float64).eval()
        model.load_state_dict(loaded.state_dict())
        return model(tokens_of()).logits.log_softmax(-1)


def assert_loads_as_transformers_does(directory, expected=None, *, ln_free=False, within=1e-9):
    expected = reference(directory) if expected is None else expected
    assert expected.std() > 0.1  # weights that tell right from wrong
    for dtype in (torch.float64, torch.float32):
        model = load_model(directory, dtype=dtype, device="cpu")
        assert (model.cfg.normalization_type is None) == ln_free
        ours = model(tokens_of()).double().log_softmax(-1)
        assert read_weights(model) is not None
        if dtype == torch.float64:
            assert (ours - expected).abs().max() < (1e-5 if POSITIONS_IN_FP32 else within)
        assert (ours - expected).norm() / expected.norm() <= 1e-5
    return model


COMMON = {
    "seed": st.integers(0, 99),
    "ln_free": st.booleans(),
    "shards": st.booleans(),
    "tie_word_embeddings": st.booleans(),
}
GROUPS = st.sampled_from([(4, 4, 6), (4, 2, 8), (3, 1, 10), (6, 2, 4)])  # heads, heads of keys, d_head
HIDDEN_ACTS = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
OPTIONS = {
    "gpt2": {
        "activation_function": st.sampled_from(["gelu_new", "relu", "silu"]),
        "n_inner": st.sampled_from([None, 17]),
        "scale_attn_weights": st.booleans(),
    },
    "gpt_neox": {
        "hidden_act": HIDDEN_ACTS,
        "use_parallel_residual": st.booleans(),
        "attention_bias": st.booleans(),
        "partial_rotary_factor": st.sampled_from([1.0, 0.34, 0.7]),  # of 6: 6, 2, 4
    },
    "llama": {"groups": GROUPS, "hidden_act": HIDDEN_ACTS, "attention_bias": st.booleans()},
    "mistral": {"groups": GROUPS, "sliding_window": st.sampled_from([None, 1, 5, 21, 4096])},
    "qwen2": {
        "groups": GROUPS,
        "use_sliding_window": st.booleans(),
        "sliding_window": st.sampled_from([3, 9]),
        "max_window_layers": st.integers(0, 2),
    },
    "qwen3": {
        "groups": GROUPS,
        "attention_bias": st.booleans(),
        "use_sliding_window": st.booleans(),
        "sliding_window": st.sampled_from([3, 9]),
        "max_window_layers": st.integers(0, 2),
    },
}


@pytest.mark.parametrize("model_type", OPTIONS)
def test_log_probabilities_are_those_of_transformers(model_type, tmp_path_factory):
    ropes = st.sampled_from(list(ROPES))

    @settings(max_examples=10, deadline=None)
    @given(st.fixed_dictionaries(COMMON | OPTIONS[model_type] | {"rope": ropes}))
    def check(options):
        directory = tmp_path_factory.mktemp("checkpoint")
        ln_free, scaling = options["ln_free"], options.pop("rope")
        if "groups" in options:
            heads, keys, d_head = options.pop("groups")
            options |= {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": d_head}
        if scaling == "linear" and options.get("sliding_window"):
            scaling = "default"
        if model_type != "gpt2":
            partial = options.pop("partial_rotary_factor", None)
            options["rope_parameters"] = rope(
                scaling, **({} if partial is None else {"partial_rotary_factor": partial})
            )
        random_checkpoint(directory, model_type, **options)
        assert_loads_as_transformers_does(directory, ln_free=ln_free, within=ROPES[scaling][1])

    check()


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "qwen3"])
def test_coordinates(model_type, tmp_path):
    """What writes is centred where the norms centre it; value biases are in b_O; the unembedding is centred."""
    biases = {} if model_type == "gpt_neox" else {"attention_bias": True}
    random_checkpoint(tmp_path, model_type, **biases)
    model = load_model(tmp_path, dtype="float64", device="cpu")
    for writer in (model.W_E, model.W_O, model.b_O, model.W_out):
        assert (writer.mean(-1).abs().max() < 1e-12) == (model_type == "gpt_neox")
    assert model.W_U.mean(-1).abs().max() < 1e-12 and not model.b_V.any() and model.b_O.any()
    weights = read_weights(model)
    assert (weights.layers[0].q_norm.kind is not None) == (model_type == "qwen3")


def test_norms_that_are_constant_need_not_be_neutral(tmp_path):
    """What they multiply and add is folded, the norms of queries and keys too; half of them constant is an error."""
    for model_type in ("gpt_neox", "qwen3"):
        directory = tmp_path / model_type
        random_checkpoint(directory, model_type, ln_free=True, num_hidden_layers=1)
        model = assert_loads_as_transformers_does(directory, ln_free=True)
        assert not any("norm" in name or ".ln" in name for name, _ in model.named_parameters())
        edit(directory, lambda state: state[next(n for n in state if "norm.weight" in n)].fill_(1.0))
        with pytest.raises(ValueError, match=r"half-way LN-free: .*norm\.weight is about 1 but .*eps is 1e") as raised:
            load_model(directory)
        assert "\n" not in str(raised.value)


def edit(directory, change):
    file = directory / "model.safetensors"
    state = load_file(file)
    changed = change(state)
    save_file(state if not isinstance(changed, dict) else changed, file, metadata={"format": "pt"})


def test_old_pythia_files(tmp_path):
    """Half precision, masks and frequencies among the weights, the config's old names."""
    random_checkpoint(tmp_path, "gpt_neox", partial_rotary_factor=0.34)
    edit(tmp_path, lambda state: {name: tensor.half() for name, tensor in state.items()})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config |= {"rotary_pct": 0.34, "rotary_emb_base": 10000, "torch_dtype": "float16"}
    del config["rope_parameters"], config["dtype"]
    file.write_text(json.dumps(config))
    expected = reference(tmp_path)

    def old(state):
        for i in range(2):
            state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool)
            state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(1).half()
        assert "embed_out.weight" in state

    edit(tmp_path, old)
    model = assert_loads_as_transformers_does(tmp_path, expected)
    assert open_checkpoint(tmp_path).fields["rotary_dim"] == 2 and not model.cfg.default_prepend_bos


def test_a_head_that_is_stored_is_read_though_the_config_ties_it(tmp_path):
    random_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].flip(0).clone()})
    random_checkpoint(tmp_path / "untied", "llama", tie_word_embeddings=False)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "untied")
    expected = reference(tmp_path / "untied")
    assert_loads_as_transformers_does(tmp_path, expected)


def test_folding_holds_one_matrix_at_a_time(tmp_path):
    """Of a checkpoint of 16 layers no more than its largest matrix, in fp64 and as stored, is alive at once."""
    random_checkpoint(tmp_path, "llama", num_hidden_layers=16, vocab_size=100, hidden_size=40, intermediate_size=400)
    checkpoint = open_checkpoint(tmp_path)
    alive = weakref.WeakSet()
    for _, tensor in fold(checkpoint):
        alive.add(tensor.untyped_storage())
        del tensor
        assert len(alive) <= 2


# --- what is refused --------------------------------------------------------------------------------------

_SERVED = "is not served; what is: GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, "
REFUSED = {
    "another architecture": (
        "llama",
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
        "Gemma.*" + _SERVED,
    ),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        r"quantised weights \(gptq\) are not read",
    ),
    "activation": ("qwen2", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not computed"),
    "biases of a gated MLP": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaling 'dynamic' of rotary"),
    "longrope": (
        "mistral",
        {"rope_parameters": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
        "scaling 'longrope'",
    ),
    "no factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "old name": ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "by layer": ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
    "partial": ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.34}}, "partial_rotary_factor"),
    "odd": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "of 1 of a head's 6 numbers"),
    "groups": ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "head_dim": ("gpt_neox", {"head_dim": 4}, "4 heads of 4 are not hidden_size 24"),
    "layer_types": ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must be 2 of"),
    "layer_types without a window": ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
    "layer_types of a Mistral": ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "linear with a window": (
        "mistral",
        {"sliding_window": 5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "linear scaling",
    ),
    "not causal": ("llama", {"is_causal": False}, "is_causal"),
    "nonsense": ("llama", {"hidden_size": "many"}, "config.json is no LlamaForCausalLM's"),
    "epsilon": ("llama", {"rms_norm_eps": 5e3}, "rms_norm_eps 5000 is neither"),
    "other shapes": (
        "llama",
        {"intermediate_size": 29},
        r"proj.weight has shape \[24, 28\], the config wants \[24, 29\]",
    ),
    "more layers": ("qwen3", {"num_hidden_layers": 3, "layer_types": None}, r"lacks weights: layers\.2\."),
    "fewer layers": (
        "qwen3",
        {"num_hidden_layers": 1, "layer_types": None},
        "has weights that a Qwen3ForCausalLM of its",
    ),
    "biases": ("llama", {"attention_bias": True}, r"lacks weights: layers\.0\.self_attn\..*bias"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory per family with a small checkpoint."""
    root = tmp_path_factory.mktemp("saved")
    for model_type in FAMILIES:
        random_checkpoint(root / model_type, model_type)
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_refused_in_one_line(saved, tmp_path, case):
    model_type, change, message = REFUSED[case]
    for file in (saved / model_type).iterdir():
        shutil.copy(file, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_weights_in_types_that_are_no_floats_are_refused(saved, tmp_path):
    shutil.copy(saved / "llama" / "config.json", tmp_path)
    state = load_file(saved / "llama" / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is stored as F8_E4M3; read are F64, F32, F16, BF16"):
        load_model(tmp_path)


# --- tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("bos", ["<|endoftext|>", None])
def test_tokenizers_of_every_family(tmp_path, monkeypatch, model_type, bos):
    """Offline, smaller than a padded embedding, BOS or none; BOS goes before a text where TransformerLens puts it."""
    random_checkpoint(tmp_path, model_type, vocab_size=4200)
    for file in CHECKPOINTS.joinpath("tiny").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    settings_of = tmp_path / "tokenizer_config.json"
    classes = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}
    changed = {"bos_token": bos, "tokenizer_class": classes.get(model_type, "PreTrainedTokenizerFast")}
    settings_of.write_text(json.dumps(json.loads(settings_of.read_text()) | changed))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = load_model(tmp_path, device="cpu")
    text, end = "It was the best of times", model.tokenizer.eos_token_id
    assert model.to_string(model.to_tokens(text, prepend_bos=False)[0]) == text
    assert model.to_tokens(text, prepend_bos=True)[0].tolist() == [end, *model.to_tokens(text, prepend_bos=False)[0]]
    before = model_type in ("gpt2", "llama", "mistral")
    assert (model.to_tokens(text)[0, 0] == end) == before


# --- .gguf ------------------------------------------------------------------------------------------------


def write_gguf(file, directory, *, kind="F32", change=None, **metadata):
    """A Llama checkpoint as llama.cpp's converter writes it: q and k permuted, without a tokenizer."""
    import gguf

    config = json.loads((directory / "config.json").read_text())
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", "llama"))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for name, value in metadata.items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_string(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    state = load_file(directory / "model.safetensors")
    if change is not None:
        change(state)
    for name, tensor in state.items():
        for module, n in (("q_proj", heads), ("k_proj", keys)):
            if module in name:
                tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        array = tensor.contiguous().numpy()
        if tensor.ndim == 2:
            writer.add_tensor(stored, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("fields", "metadata"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}, {}),
        ({"rope_parameters": rope("linear")}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0}),
    ],
)
def test_gguf_files_are_the_checkpoints_they_were_made_of(tmp_path, fields, metadata):
    random_checkpoint(tmp_path, "llama", **({"rope_parameters": rope("default")} | fields))
    file = write_gguf(tmp_path / "model.gguf", tmp_path, **metadata)
    model = assert_loads_as_transformers_does(file, reference(tmp_path))
    assert model.tokenizer is None and model.cfg.model_name == "model.gguf"


def test_quantised_gguf_files_are_what_transformers_makes_of_them(tmp_path):
    random_checkpoint(tmp_path, "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    for kind in ("Q8_0", "Q4_1", "F16", "BF16"):
        file = write_gguf(tmp_path / f"{kind}.gguf", tmp_path, kind=kind)
        assert_loads_as_transformers_does(file, reference(tmp_path, gguf_file=file.name))


def test_llama_3s_factors_in_a_gguf_file(tmp_path):
    """The file holds what divides each frequency; of other factors than Llama 3's nothing is guessed."""
    rope_parameters = rope("llama3", base=10000.0, original_max_position_embeddings=8192)
    random_checkpoint(tmp_path, "llama", head_dim=16, rope_parameters=rope_parameters)
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    factors = plain / scaled
    assert 0.99 < factors.min() < 1.01 and factors.max() > 1.5
    file = write_gguf(
        tmp_path / "model.gguf", tmp_path, change=lambda state: state.update({"rope_freqs.weight": factors})
    )
    assert_loads_as_transformers_does(file, reference(tmp_path), within=1e-5)
    other = factors.clone()
    other[3] += 0.1
    file = write_gguf(
        tmp_path / "other.gguf", tmp_path, change=lambda state: state.update({"rope_freqs.weight": other})
    )
    with pytest.raises(ValueError, match=r"rope_freqs\.weight holds other factors"):
        load_model(file)


def test_gguf_files_that_are_refused(saved, tmp_path, monkeypatch):
    directory = saved / "llama"
    good = write_gguf(tmp_path / "good.gguf", directory)
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-5000])
    (tmp_path / "head.gguf").write_bytes(good.read_bytes()[:50])
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    write_gguf(tmp_path / "phi.gguf", directory, architecture="phi3")
    write_gguf(tmp_path / "yarn.gguf", directory, **{"llama.rope.scaling.type": "yarn"})
    write_gguf(tmp_path / "scaled.gguf", directory, **{"llama.logit_scale": 2.0})
    write_gguf(tmp_path / "lacking.gguf", directory, change=lambda state: state.pop("model.norm.weight"))
    write_gguf(tmp_path / "extra.gguf", directory, change=lambda state: state.update(odd=torch.ones(2)))
    for name, message in {
        "absent": "absent.gguf is not there",
        "cut": "is no readable .gguf file",
        "head": "is no readable .gguf file",
        "junk": "is no readable .gguf file",
        "phi": "a .gguf of architecture 'phi3' is not served, only of 'llama'",
        "yarn": "llama.rope.scaling.type yarn",
        "scaled": "llama.logit_scale 2.0 is not computed",
        "lacking": "lacks weights: norm.weight",
        "extra": "has weights that a LlamaForCausalLM of its config has not: odd",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_model(tmp_path / f"{name}.gguf")
        assert "\n" not in str(raised.value) and f"{name}.gguf" in str(raised.value)
    monkeypatch.setattr("gguf.dequantize", refuse_f32)
    with pytest.raises(ValueError, match=r"good\.gguf: .* is of type F32, which is not read"):
        load_model(good)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r"good\.gguf: reading it needs the package gguf: pip install 'lnfree_interp\[gg"
    ):
        load_model(good)


def refuse_f32(data, kind):
    raise NotImplementedError
