"""config.json and tensor names of every family: what is read, refused, and written back."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxreward.core import trees
from jaxreward.models import decoder, families
from jaxreward.models.attention import Scaling
from jaxreward.parallel import specs as sp
from jaxreward.testing import tiny_config

RAW = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
# The fields of GSAI-ML/LLaDA-8B-Instruct's config.json, at a toy's size.
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 64,
    "embedding_size": 320,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 310,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 96,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 300,
    "weight_tying": False,
}
DREAM = RAW | {"model_type": "Dream", "num_key_value_heads": 2, "mask_token_id": 7}
DENOISER = {"mask": "full", "block": 0, "predict_offset": 1, "mask_id": 7}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"model_type": "gemma3", "text_config": {}}, "export its language model alone"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' without factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor"),
        ({"rope_parameters": {"type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": [1]}, "rope_parameters=[1]"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        (DREAM | {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
        (DREAM | {"use_mrope": True}, "use_mrope=True"),
        (DREAM | {"head_dim": 12}, "4 heads of 12 do not make up 64"),
        (DREAM | {"mask_token_id": 300}, "mask_token_id=300 in a vocabulary of 300"),
        (LLADA | {"block_type": "sequential"}, "block_type='sequential'"),
        (LLADA | {"layer_norm_type": "gemma_rms"}, "layer_norm_type='gemma_rms'"),
        (LLADA | {"activation_type": "swiglu"}, "activation_type='swiglu'"),
        (LLADA | {"alibi": True, "rope": False}, "rope=False; alibi=True"),
        (LLADA | {"include_bias": True}, "include_bias=True"),
        (LLADA | {"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'}"),
        (LLADA | {"multi_query_attention": True}, "multi_query_attention=True with n_kv_heads=2"),
        (LLADA | {"embedding_size": 256}, "embedding_size=256 below vocab_size=300"),
        (LLADA | {"mask_token_id": 320}, "mask_token_id=320 in a vocabulary of 320"),
        (LLADA | {"n_heads": 5, "n_kv_heads": 5}, "5 heads of 12 do not make up 64"),
        # A mixture of experts has the same model_type; and what LLaDA's code takes for nothing.
        ({"model_type": "llada", "num_experts": 64}, "missing d_model"),
        ({"model_type": "llada", "num_experts": 64}, "num_experts=64"),
        ({"model_type": "llada"}, "block_type='sequential'; layer_norm_type='default'"),
        ({"jaxreward": {"denoiser": DENOISER | {"steps": 8}}}, "nothing else; it is {'mask'"),
        ({"jaxreward": {"denoiser": {"mask": "full"}}}, "must hold mask, block, predict_offset"),
        ({"jaxreward": {"denoiser": True}}, "nothing else; it is True"),
        ({"jaxreward": {"denoiser": DENOISER | {"mask": "causal"}}}, "mask must be full or block"),
        ({"jaxreward": {"denoiser": DENOISER | {"mask_id": True}}}, "whole numbers"),
        ({"jaxreward": {"denoiser": DENOISER | {"mask_id": 300}}}, "denoiser: mask_id=300"),
        ({"jaxreward": {"denoiser": DENOISER | {"mask": "block"}}}, "does not go with block=0"),
        ({"jaxreward": {"denoiser": DENOISER | {"predict_offset": 2}}}, "0 or 1; received 2"),
        ({"jaxreward": {"denoiser": DENOISER}, "model_type": "gemma2"}, "windowed layers need"),
    ],
)
def test_hf_config_refuses_by_name(change, name):
    """Catches a checkpoint that loads but means something else."""
    with pytest.raises(ValueError) as error:
        families.hf_config(change if "llada" in change.values() else RAW | change)
    assert name in str(error.value)


def test_hf_config_names_every_problem_at_once():
    """Catches errors handed out one at a time."""
    bad = RAW | {"attention_bias": True, "hidden_act": "gelu"}
    del bad["hidden_size"], bad["vocab_size"]
    with pytest.raises(ValueError) as error:
        families.hf_config(bad)
    for name in ("hidden_act", "attention_bias", "missing vocab_size", "missing hidden_size"):
        assert name in str(error.value)


def test_hf_config_defaults_are_those_of_llama():
    """Catches a default that differs from transformers' LlamaConfig: files may omit them."""
    cfg = families.hf_config(RAW | {"sliding_window": None, "rope_scaling": None})
    assert (cfg.kv_heads, cfg.head_dim, cfg.norm_eps) == (4, 16, 1e-6)
    assert (cfg.rope_theta, cfg.tied, cfg.max_len) == (10000.0, False, 2048)


def test_config_of_llada():
    """Catches tables of vocab_size rows, other key heads or another MLP than LLaDA's code has."""
    cfg = families.hf_config(LLADA)
    assert (cfg.vocab, cfg.width, cfg.depth, cfg.heads, cfg.kv_heads) == (320, 64, 3, 4, 2)
    assert (cfg.head_dim, cfg.mlp, cfg.norm_eps, cfg.rope_theta) == (16, 96, 1e-5, 5e5)
    assert (cfg.tied, cfg.bias, cfg.max_len, cfg.mask_id) == (False, False, 4096, 310)
    assert (cfg.mask, cfg.block, cfg.predict_offset) == ("full", 0, 0)
    of = lambda **change: families.hf_config(LLADA | change)
    assert of(embedding_size=None, mask_token_id=7).vocab == 300
    assert of(n_kv_heads=None).kv_heads == 4
    assert of(n_kv_heads=None, multi_query_attention=True).kv_heads == 1
    assert of(mlp_hidden_size=None).mlp == 256
    assert of(include_qkv_bias=True).bias and of(weight_tying=True).tied
    assert of(mask_token_id=None).mask_id == -1
    # What its code needs comes back: the same fields, and no other value.
    back = families.to_hf_config(families.hf_config(LLADA | {"vocab_size": 320}))
    held = {k: back[k] for k in LLADA.keys() - {"mlp_ratio"}}
    assert held == {k: v for k, v in LLADA.items() if k in held} | {"vocab_size": 320}
    assert "hidden_size" not in back and back["residual_dropout"] == 0


def test_config_of_dream():
    """Catches a window that Dream's files mention and do not use, and a mask token that is lost."""
    cfg = families.hf_config(DREAM | {"sliding_window": 4096, "use_sliding_window": False})
    assert (cfg.mask, cfg.predict_offset, cfg.mask_id, cfg.bias) == ("full", 1, 7, True)
    assert (cfg.windowed, cfg.max_len) == ((), 32768)
    large = {"vocab_size": 152064, "num_attention_heads": 32}
    bare = families.hf_config(RAW | {"model_type": "Dream"} | large)
    assert (bare.kv_heads, bare.mask_id) == (32, 151666)
    raw = families.to_hf_config(cfg)
    assert raw["architectures"] == ["DreamModel"] and raw["mask_token_id"] == 7
    assert "jaxreward" not in raw


@pytest.mark.parametrize("kind", ["llama", "qwen2", "Dream", "llada"])
def test_a_denoiser_that_its_family_does_not_name(kind):
    """Catches a denoiser that is read back as the causal model it began as, or as another."""
    cfg = families.hf_config(LLADA if kind == "llada" else DREAM | {"model_type": kind})
    if cfg.mask == "causal":
        cfg = families.as_denoiser(cfg, mask_id=7, mask="block", block=4, predict_offset=0)
    else:
        cfg = dataclasses.replace(cfg, mask="block", block=4, predict_offset=0)
    raw = families.to_hf_config(cfg)
    assert raw["jaxreward"]["denoiser"] == {
        "mask": "block",
        "block": 4,
        "predict_offset": 0,
        "mask_id": cfg.mask_id,
    }
    assert raw["model_type"] == kind and families.hf_config(raw) == cfg
    bare = dataclasses.replace(cfg, mask="full", block=0, mask_id=-1)
    assert families.hf_config(families.to_hf_config(bare)) == bare


def test_as_denoiser():
    """Catches a recipe that drops the shift, and starts that cannot be meant."""
    cfg = families.hf_config(RAW)
    made = families.as_denoiser(cfg, mask_id=299)
    changed = dict(mask="full", block=0, predict_offset=1, mask_id=299)
    assert made == dataclasses.replace(cfg, **changed)
    for change, name in (
        (dict(mask_id=300), "mask_id=300 is no token of a vocabulary of 300"),
        (dict(mask_id=-1), "mask_id=-1 is no token"),
        (dict(mask_id=7, mask="causal"), "mask='full', or 'block'"),
        (dict(mask_id=7, mask="block"), "does not go with block=0"),
        (dict(mask_id=7, predict_offset=2), "predict_offset is 0 or 1; received 2"),
    ):
        with pytest.raises(ValueError, match=name):
            families.as_denoiser(cfg, **change)
    with pytest.raises(ValueError, match="a denoiser already: mask='full'"):
        families.as_denoiser(made, mask_id=7)
    with pytest.raises(ValueError, match="2 of 3 layers have a sliding window"):
        families.as_denoiser(families.hf_config(RAW | {"model_type": "gemma2"}), mask_id=7)


@pytest.mark.parametrize("change", [dict(mask="causal"), dict(head_dim=12)])
def test_what_a_denoisers_checkpoint_cannot_hold(change):
    """Catches an export that LLaDA's or Dream's own code would read as another model."""
    for raw in (LLADA, DREAM):
        cfg = dataclasses.replace(families.hf_config(raw), **change)
        with pytest.raises(ValueError, match="is a denoiser with heads that make up its width"):
            families.to_hf_config(cfg)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("mistral", dict(window=4096, windowed=(True,) * 3, kv_heads=8)),
        ("qwen2", dict(bias=True, windowed=())),
        ("qwen3", dict(qk_norm=True, head_dim=128, bias=False)),
        ("gemma2", dict(windowed=(True, False, True), attn_softcap=50.0, logit_softcap=30.0)),
        ("gemma3_text", dict(windowed=(True,) * 3, rope_theta=1e6, window_theta=1e4)),
    ],
)
def test_defaults_of_the_other_families(kind, want):
    """Catches a default that differs from transformers': published files leave fields out."""
    heads = 8 if kind == "mistral" else 4
    cfg = families.hf_config(RAW | {"model_type": kind, "num_attention_heads": heads})
    assert {k: getattr(cfg, k) for k in want} == want
    if kind.startswith("gemma"):
        assert (cfg.tied, cfg.head_dim, cfg.query_scalar, cfg.act) == (True, 256, 256, "gelu_tanh")


def test_which_layers_have_a_window():
    """Catches a pattern off by one layer, and a window that the file switches off."""
    deep = RAW | {"num_hidden_layers": 8}
    flags = lambda **kw: families.hf_config(deep | kw).windowed
    assert flags(model_type="gemma3_text") == (True,) * 5 + (False,) + (True,) * 2
    assert flags(model_type="gemma3_text", sliding_window_pattern=2) == (True, False) * 4
    assert flags(model_type="gemma2", sliding_window=None) == ()
    assert flags(model_type="mistral", sliding_window=None, num_key_value_heads=4) == ()
    qwen = dict(model_type="qwen2", sliding_window=64, max_window_layers=6)
    assert flags(**qwen) == ()
    assert flags(**qwen, use_sliding_window=True) == (False,) * 6 + (True,) * 2
    kinds = ["full_attention"] + ["sliding_attention"] * 7
    assert flags(model_type="gemma2", layer_types=kinds) == (False,) + (True,) * 7


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5),
        # transformers reads rope_parameters first.
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}}, 7e5),
        ({"rope_theta": 5e5, "rope_parameters": None}, 5e5),
    ],
)
def test_both_spellings_of_the_rotary_base(change, theta):
    """Catches a silent fall back to 10000 on one of the two spellings."""
    assert families.hf_config(RAW | change).rope_theta == theta


def test_both_spellings_of_scaling():
    """Catches stretched frequencies that one of the spellings loses."""
    want = Scaling("llama3", 8.0, 1.0, 4.0, 512)
    old = families.hf_config(RAW | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = families.hf_config(RAW | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    assert old == new and old.rope_scaling == want and old.rope_theta == 5e5
    older = families.hf_config(RAW | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert older.rope_scaling == Scaling("linear", 4.0)
    both = {"sliding_attention": {"rope_theta": 9.0}, "full_attention": {"rope_theta": 99.0}}
    cfg = families.hf_config(RAW | {"model_type": "gemma3_text", "rope_parameters": both})
    assert (cfg.rope_theta, cfg.window_theta) == (99.0, 9.0)
    cfg = families.hf_config(
        RAW | {"model_type": "gemma3_text", "rope_theta": 99.0, "rope_local_base_freq": 9.0}
    )
    assert (cfg.rope_theta, cfg.window_theta) == (99.0, 9.0)


def shaped(kind):
    """A tiny config of a family with everything that sets it apart."""
    family = families.FAMILIES[kind]
    more = dict(family.fixed)
    if family.pattern in ("gemma2", "gemma3", "upper"):
        more |= dict(window=4, windowed=(True, False))
    if family.pattern == "all":
        more |= dict(window=4, windowed=(True, True))
    if kind == "gemma2":
        more |= dict(attn_softcap=5.0, logit_softcap=3.0)
    if kind.startswith("gemma"):
        more |= dict(query_scalar=20.0)
    if kind == "gemma3_text":
        more |= dict(window_theta=300.0, rope_scaling=Scaling("linear", 8.0))
    if kind == "llama":
        more |= dict(rope_scaling=Scaling("llama3", 8.0, 1.0, 4.0, 512))
    if "mask" in family.fixed:
        more |= dict(mask_id=7, width=48)
    if kind == "llada":
        more |= dict(bias=True)
    return tiny_config(
        family=kind, rope_theta=12345.0, norm_eps=3e-6, head_dim=12, max_len=77, **more
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_hf_config_round_trip(kind, tied):
    """Catches a field that to_hf_config forgets or misnames."""
    cfg = dataclasses.replace(shaped(kind), tied=tied)
    assert families.hf_config(families.to_hf_config(cfg)) == cfg


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_hf_table_covers_every_leaf_and_inverts(kind, tied):
    """Catches a leaf that is neither loaded nor exported, and a lossy layout change."""
    cfg = dataclasses.replace(shaped(kind), tied=tied)
    params = sp.init(decoder.specs(cfg), jax.random.key(0))
    flat = {path: np.asarray(x) for path, x in trees.flatten(params).items()}
    table = families.hf_table(cfg)
    assert sorted(e.ours for e in table) == sorted(flat)
    assert len({e.theirs for e in table}) == len(table)
    for entry in table:
        x = flat[entry.ours]
        x = x[1] if entry.layered else x
        theirs = entry.to(x)
        np.testing.assert_array_equal(entry.back(theirs), x)
        if "o_proj" in entry.theirs or "attn_out" in entry.theirs:
            # Torch keeps [out, in]; row d of theirs reads heads one after another.
            np.testing.assert_array_equal(theirs[5], x[:, :, 5].reshape(-1))
        if "q_proj.weight" in entry.theirs:
            np.testing.assert_array_equal(theirs[12 + 3], x[:, 1, 3])
        if "q_proj.bias" in entry.theirs:
            np.testing.assert_array_equal(theirs[12 + 3], x[1, 3])
