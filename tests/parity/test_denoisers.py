"""Denoisers are transformers' Llama and Qwen2 under full attention: states of each layer, logits.

transformers has no class for LLaDA or Dream, and their own code is not run here. What they compute
is a known model without the causal mask, so that model is the reference; of LLaDA the folder, with
its tensor names and config.json, is written by hand.
"""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest

from jaxreward.core.types import Rows
from jaxreward.hub import load
from jaxreward.models import decoder, families

pytestmark = pytest.mark.parity

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=3e-5,
    initializer_range=0.2,  # attention and rotation must matter
    pad_token_id=0,
)
LENGTHS = (9, 4, 6)
# By the names of Llama's tensors. From modeling_llada.py: x = silu(ff_proj(x)) * up_proj(x), then
# ff_out; attn_out after attention.
LLADA_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
    **{
        f"model.layers.{i}.{theirs}.weight": f"model.transformer.blocks.{i}.{name}.weight"
        for i in range(2)
        for theirs, name in (
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "q_proj"),
            ("self_attn.k_proj", "k_proj"),
            ("self_attn.v_proj", "v_proj"),
            ("self_attn.o_proj", "attn_out"),
            ("post_attention_layernorm", "ff_norm"),
            ("mlp.gate_proj", "ff_proj"),
            ("mlp.up_proj", "up_proj"),
            ("mlp.down_proj", "ff_out"),
        )
    },
}
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": 97,
    "layer_norm_type": "rms",
    "mask_token_id": 96,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "rms_norm_eps": 3e-5,
    "rope": True,
    "rope_theta": 500.0,
    "vocab_size": 90,
    "weight_tying": False,
}


def write_llada(folder, model):
    from safetensors.torch import save_file

    state = model.state_dict()
    assert state.keys() == LLADA_NAMES.keys()
    folder.mkdir()
    renamed = {LLADA_NAMES[name]: x.contiguous() for name, x in state.items()}
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLADA))


def write_dream(folder, model):
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 96}
    # As the published files have them: a base beside no scaling, a window that is not used.
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"rope_theta": 500.0, "rope_scaling": None, "sliding_window": 4}
    raw |= {"use_sliding_window": False, "use_mrope": False}
    (folder / "config.json").write_text(json.dumps(raw))


def write_begun_as_llama(folder, model):
    """A causal checkpoint, made a denoiser."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    cfg = families.as_denoiser(families.hf_config(raw), mask_id=96)
    raw["jaxreward"] = families.to_hf_config(cfg)["jaxreward"]
    (folder / "config.json").write_text(json.dumps(raw))


KINDS = {
    "llada": ("llama", write_llada, 0),
    "Dream": ("qwen2", write_dream, 1),
    "begun as llama": ("llama", write_begun_as_llama, 1),
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, require, tmp_path_factory):
    """A random torch model, and what we load from the folder of the denoiser with its weights."""
    require("torch")
    import torch
    import transformers

    kind, write, offset = KINDS[request.param]
    config = transformers.AutoConfig.for_model(
        kind,
        **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(0.3 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("denoiser") / "model"
    write(folder, model)
    cfg, params, _ = load.load(folder)
    assert (cfg.mask, cfg.predict_offset, cfg.mask_id) == ("full", offset, 96)
    # LLaDA's code counts positions from the first column, padding and all.
    return types.SimpleNamespace(torch=model, cfg=cfg, params=params, counted=kind == "qwen2")


def batch_of(side):
    """Rows of three texts with masked positions, padded to one length on one side."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, flag, n in zip(tokens, mask, LENGTHS):
        at = slice(max(LENGTHS) - n, None) if side == "left" else slice(0, n)
        row[at], flag[at] = np.where(rng.random(n) < 0.3, 96, rng.integers(3, 96, n)), True
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    segments = mask.astype(np.int32)
    return Rows(tokens, mask, mask, positions[..., None], segments, np.zeros_like(segments))


def torch_forward(pair, batch, *, full=True):
    """Their states and logits; with `full` every token sees all that is no padding."""
    import torch

    ids = torch.tensor(batch.tokens, dtype=torch.long)
    seen = torch.tensor(batch.mask)
    bias = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    bias = bias.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    places = torch.tensor(batch.positions[..., 0], dtype=torch.long) if pair.counted else None
    with torch.no_grad():
        return pair.torch(
            input_ids=ids,
            attention_mask=bias if full else seen.long(),
            position_ids=places,
            output_hidden_states=True,
        )


@functools.partial(jax.jit, static_argnames="cfg")
def states(params, cfg, batch):
    return decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, batch),
        positions=batch.positions,
        segments=batch.segments,
        trunk=batch.trunk,
    ).states


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_of_every_layer_and_logits(pair, side):
    """Catches a misplaced tensor, a causal mask, and padding that is seen or moves positions."""
    batch = batch_of(side)
    theirs = torch_forward(pair, batch)
    for depth in range(1, pair.cfg.depth + 1):
        cfg = dataclasses.replace(pair.cfg, depth=depth, has_norm=depth == pair.cfg.depth)
        params = {**pair.params, "layers": jax.tree.map(lambda x: x[:depth], pair.params["layers"])}
        got = states(params, cfg, batch)
        want = theirs.hidden_states[depth].numpy()
        np.testing.assert_allclose(
            np.asarray(got)[batch.mask], want[batch.mask], atol=3e-5, err_msg=f"layer {depth}"
        )
    got = decoder.logits(got, decoder.head_matrix(pair.params, pair.cfg), pair.cfg)
    want = theirs.logits.numpy()[batch.mask]
    np.testing.assert_allclose(np.asarray(got)[batch.mask], want, atol=3e-5)
    # The mask is what makes the difference, and not by little.
    causal = torch_forward(pair, batch, full=False).logits.numpy()[batch.mask]
    assert np.abs(causal - want).max() > 0.5
