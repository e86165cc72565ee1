"""Fine-tuning of denoisers: the loss is the formula, whatever the row; what is refused, and why."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import cli, presets, testing
from jaxreward.core.types import Rows
from jaxreward.data import tokenize
from jaxreward.diffusion import process
from jaxreward.evals import scorer
from jaxreward.hub import export, load
from jaxreward.models import decoder, trainable
from jaxreward.parallel import specs as sp
from jaxreward.recipes import denoisers, evaluate, online_rl, preference, sft
from jaxreward.sampling import autoregressive, choose

CFG = testing.tiny_config(vocab=40, depth=1, mask="full", mask_id=39, predict_offset=0)
PLAN = trainable.Plan(CFG, head=None)
CONFIG = presets.load("diffusion/sft:smoke")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return {
        "model": jax.tree.map(
            lambda p: jnp.asarray(
                np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.2, p.shape), jnp.float32
            ),
            decoder.specs(CFG),
            is_leaf=lambda x: isinstance(x, sp.Param),
        )
    }


def rows_of(*texts, width=14):
    """One row: texts of (prompt tokens, answer tokens), each a segment."""
    out = {k: np.zeros((1, width), np.int32) for k in ("tokens", "segments", "positions")}
    loss, at = np.zeros((1, width), bool), 0
    for i, (prompt, answer) in enumerate(texts):
        span = slice(at, at + len(prompt) + len(answer))
        out["tokens"][0, span] = [*prompt, *answer]
        out["segments"][0, span] = i + 1
        out["positions"][0, span] = np.arange(span.stop - at)
        loss[0, at + len(prompt) : span.stop] = True
        at = span.stop
    return Rows(
        out["tokens"],
        out["segments"] > 0,
        loss,
        out["positions"][..., None],
        out["segments"],
        np.zeros_like(out["segments"]),
    )


TEXTS = ([1, 2], [3, 4, 5]), ([6], [7, 8, 9, 10, 11])


@functools.cache
def _compiled(offset, mean):
    plan = dataclasses.replace(PLAN, cfg=dataclasses.replace(CFG, predict_offset=offset))
    config = CONFIG.copy_and_resolve_references().unlock()
    config.noise.mean = mean
    loss, weights, _ = denoisers.make_loss(plan, config)
    return jax.jit(lambda params, rows, keys: loss(params, {}, rows, keys, {})[0]), weights


@pytest.mark.parametrize("offset, mean", [(0, "sequence"), (1, "token")])
def test_the_loss_is_the_formula(params, offset, mean):
    """One text at a time, all logits, in NumPy: masked tokens over p, over the answer's length."""
    loss, weights = _compiled(offset, mean)
    rows, keys = rows_of(*TEXTS), jax.random.split(jax.random.key(5), 1)
    noise = CONFIG.noise
    noisy = process.corrupt(
        keys, rows.tokens, rows.loss_mask, rows.segments, 39, eps=noise.eps, stratified=True
    )
    assert 0 < np.asarray(noisy.masked).sum() < 8
    want, at = 0.0, 0
    for prompt, answer in TEXTS:
        n = len(prompt) + len(answer)
        own = slice(at, at + n)
        alone = rows_of((prompt, answer)).replace(
            tokens=np.pad(np.asarray(noisy.tokens)[:, own], ((0, 0), (0, 14 - n)))
        )
        hidden = trainable.states(PLAN, params, {}, alone)
        logits = np.asarray(hidden @ decoder.head_matrix(params["model"], CFG), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in range(len(prompt), n):
            if noisy.masked[0, at + i]:
                each = -logp[i - offset, rows.tokens[0, at + i]] / noisy.rate[0, at + i]
                want += each / (len(answer) if mean == "sequence" else 1)
        at += n
    np.testing.assert_allclose(loss(params, rows, keys)["elbo"], want, rtol=2e-5)
    assert float(weights(rows)["elbo"]) == (2 if mean == "sequence" else 8)


def test_rows_add_up(params):
    """A row draws its masks by its own key: a batch is the sum of its rows, however it is cut."""
    loss, _ = _compiled(0, "sequence")
    rows = [rows_of(*TEXTS), rows_of(TEXTS[1])]
    both = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    keys = jax.random.split(jax.random.key(0), 2)
    apart = sum(loss(params, row, keys[i : i + 1])["elbo"] for i, row in enumerate(rows))
    np.testing.assert_allclose(loss(params, both, keys)["elbo"], apart, rtol=1e-5)


def test_nothing_to_mask_is_nothing(params):
    """Catches a NaN, and a gradient, from a batch of prompts alone."""
    loss, _ = _compiled(0, "sequence")
    rows = rows_of(*TEXTS).replace(loss_mask=np.zeros((1, 14), bool))
    keys = jax.random.split(jax.random.key(0), 1)
    value, grads = jax.value_and_grad(lambda p: loss(p, rows, keys)["elbo"])(params)
    assert value == 0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


TREE = tokenize.Tree(
    "a", np.array([1, 2], np.int32), [np.array([3, 9], np.int32)], [np.ones(2, bool)]
)


@pytest.mark.parametrize("padding, learnt", [("noised", [1, 1, 1, 1]), ("seen", [1, 1, 0, 0])])
def test_ends_that_fill_a_canvas(padding, learnt):
    """Whether they are learnt decides when a model stops: it is said, and never assumed."""
    (tree,) = denoisers.flat([TREE], end=9, canvas=4, padding=padding)
    assert len(tree.prompt) == 0
    assert tree.answers[0].tolist() == [1, 2, 3, 9, 9, 9]
    assert tree.loss[0].tolist() == [False, False, *map(bool, learnt)]


def test_a_text_is_one_segment_and_longer_answers_stay():
    (tree,) = denoisers.flat([TREE], end=9)
    assert tree.answers[0].tolist() == [1, 2, 3, 9]
    (tree,) = denoisers.flat([TREE], end=9, canvas=1, padding="noised")
    assert tree.answers[0].tolist() == [1, 2, 3, 9]
    for kw in (dict(canvas=4), dict(padding="seen"), dict(padding="half", canvas=4)):
        with pytest.raises(ValueError, match=r"data\.padding"):
            denoisers.flat([TREE], end=9, **kw)


def test_evaluation_bounds_each_answer(params):
    """The mean over its times, by hand; the same every time; tokens counted without the prompt."""
    config = CONFIG.copy_and_resolve_references().unlock()
    config.noise.samples = 3
    predict = denoisers.make_predict(PLAN, config)
    trees = denoisers.flat([TREE], end=9)
    ((bound, count),) = predict(params, {}, trees)[0]
    assert count == 2
    assert predict(params, {}, trees)[0][0, 0] == bound
    assert scorer.row_len(trees) > 0
    rows = rows_of(([1, 2], [3, 9]), width=256)
    rows = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), rows)
    start, want = jax.random.uniform(jax.random.key(1)), 0.0
    for j in range(3):
        p = (1 - 1e-3) * ((start + j / 3) % 1.0) + 1e-3
        size = config.data.eval_batch
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), j), size)
        full = jax.tree.map(lambda x: np.concatenate([x[:1], *[x[1:]] * (size - 1)]), rows)
        rate = jnp.full(full.tokens.shape, p)
        noisy = process.corrupt(keys, full.tokens, full.loss_mask, full.segments, 39, rate=rate)
        hidden = trainable.states(PLAN, params, {}, full.replace(tokens=noisy.tokens))[0, :4]
        logp = jax.nn.log_softmax(hidden @ decoder.head_matrix(params["model"], CFG))
        for i in (2, 3):
            if noisy.masked[0, i]:
                want += float(logp[i, full.tokens[0, i]] / p) / 3
    np.testing.assert_allclose(bound, want, rtol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return export.write_tiny(folder / "causal"), export.write_tiny(folder / "mask", denoiser=True)


def wanted(folder, **changes):
    return presets.load(
        "diffusion/sft:smoke",
        [
            f"models.policy.init=hf:{folder}",
            *(f"models.policy.{k}={v}" for k, v in changes.items()),
        ],
    )


def test_what_is_no_denoiser_is_refused_by_name(folders, tmp_path):
    """A causal checkpoint is made one only where the config says so; a mask has one use."""
    causal, masked = folders
    for folder, changes, message in (
        (causal, {}, r"is a causal language model.*from_causal=true"),
        (causal, dict(from_causal="true"), r"needs models\.policy\.mask_token"),
        (causal, dict(from_causal="true", mask_token="<nope>"), "is no token of"),
        (causal, dict(from_causal="true", mask_token="<|im_end|>"), "also stands for padding"),
        (masked, dict(from_causal="true", mask_token="<|mask|>"), "is a denoiser already"),
        (masked, dict(mask_token="<|im_end|>"), "the checkpoint's mask is 259"),
    ):
        with pytest.raises(ValueError, match=message):
            sft.build(wanted(folder, **changes), tmp_path)
    chat = presets.load("sft/chat:smoke", [f"models.policy.init=hf:{masked}"])
    with pytest.raises(ValueError, match="is a denoiser, and this config's losses"):
        sft.build(chat, tmp_path)


def test_a_causal_checkpoint_becomes_the_start_of_one(folders, tmp_path):
    """The shift stays, the mask token is the one that was named, blocks are blocks."""
    config = wanted(folders[0], from_causal="true", mask_token="<|endoftext|>", block=8)
    cfg = sft.build(config, tmp_path).plan.cfg
    assert (cfg.mask, cfg.block, cfg.mask_id, cfg.predict_offset) == ("block", 8, 0, 1)


def test_losses_say_what_they_need():
    config = CONFIG.copy_and_resolve_references().unlock()
    config.losses.elbo.fn = "supervised.cross_entropy"
    with pytest.raises(ValueError, match="is no loss of a denoiser"):
        denoisers.make_loss(PLAN, config)
    config.losses.elbo.fn = "denoising.weighted"
    with pytest.raises(ValueError, match=r"denoising\.weighted takes p"):
        denoisers.make_loss(PLAN, config)


def test_recipes_of_causal_models_refuse_a_denoiser(folders, tmp_path):
    """Catches an answer that never sees its prompt: shared prompts are invisible to a denoiser."""
    init = f"models.policy.init=hf:{folders[1]}"
    with pytest.raises(ValueError, match=r"its recipe is diffusion_rl"):
        online_rl.build(presets.load("online_rl/math:smoke", [init]), tmp_path)
    with pytest.raises(ValueError, match="a head on answers needs a causal model"):
        preference.build(presets.load("reward_model/bradley_terry:smoke", [init]), tmp_path)
    with pytest.raises(ValueError, match="does not write token by token"):
        autoregressive.sample(
            {},
            CFG,
            np.ones((1, 16), np.int32),
            np.ones((1, 16), bool),
            jax.random.split(jax.random.key(0), 1),
            max_new=2,
            choose=choose.Greedy(),
            stop=np.array([-1]),
        )


@pytest.mark.slow
def test_what_began_causal_is_exported_as_a_denoiser(folders, tmp_path):
    """Two steps through the command line, on a mesh, exported: mask, shift and mask token are in
    its config.json, and the next run needs not be told of them."""
    flags = {
        "models.policy.init": f"hf:{folders[0]}",
        "models.policy.from_causal": "true",
        "models.policy.mask_token": "<|endoftext|>",
        "train.steps": 2,
        "mesh.data": 2,
        "mesh.fsdp": 2,
    }
    args = ["train", "--config", "diffusion/sft:smoke", "--workdir", str(tmp_path / "run")]
    assert cli.main([*args, *(f"--config.{k}={v}" for k, v in flags.items())]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/heldout/perplexity" in line for line in lines)
    out = evaluate.export(tmp_path / "run", tmp_path / "model")
    cfg, weights, _ = load.load(out)
    assert (cfg.mask, cfg.mask_id, cfg.predict_offset) == ("full", 0, 1)
    assert "diffusion" in (out / "README.md").read_text()
    before = load.load(folders[0])[1]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), weights, before)
    assert max(jax.tree.leaves(moved)) > 0
    assert sft.build(wanted(out), tmp_path / "next").plan.cfg.mask_id == 0
