"""What the recipes of denoisers share: which model it is, its rows, its loss under noise.

A denoiser's prompt sees its answer, so prompts are not shared: a text is one segment, prompt and
answer, of which the answer can be masked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core import metrics as m
from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import Rows
from jaxreward.data.tokenize import Tokenizer, Tree
from jaxreward.diffusion import process
from jaxreward.evals import scorer
from jaxreward.models import decoder, families, trainable
from jaxreward.objectives import denoising, supervised
from jaxreward.parallel import rules

PyTree = Any
PADDING = ("none", "noised", "seen")


def of_model(cfg: decoder.Config, model, tokenizer: Tokenizer) -> decoder.Config:
    """The denoiser that one entry of a config's `models` asks for.

    Args:
      cfg: Of the checkpoint. model: Has `from_causal`, `mask_token` and `block`.
      tokenizer: Of the checkpoint.

    Raises:
      ValueError: if the checkpoint is causal and the config does not say that this is meant, if it
        is a denoiser already and the config wants to make one of it, or if the mask token is none
        or has another use.
    """
    named = model.mask_token
    if cfg.mask == "causal" and not model.from_causal:
        raise ValueError(
            f"models.policy.init={model.init!r} is a causal language model, and this recipe trains "
            "a denoiser. To make one of it (as Dream was made) set models.policy.from_causal=true "
            "and models.policy.mask_token to a token that no text has"
        )
    if cfg.mask != "causal" and model.from_causal:
        raise ValueError(
            f"models.policy.init={model.init!r} is a denoiser already; set "
            "models.policy.from_causal=false"
        )
    if cfg.mask == "causal":
        if not named:
            raise ValueError(
                "models.policy.from_causal=true needs models.policy.mask_token, the text of a "
                "token of the vocabulary that no text has"
            )
        kind = dict(mask="block", block=model.block) if model.block else dict(mask="full")
        cfg = families.as_denoiser(cfg, mask_id=_id_of(named, tokenizer), **kind)
    elif named and _id_of(named, tokenizer) != cfg.mask_id:
        raise ValueError(
            f"models.policy.mask_token={named!r} is token {_id_of(named, tokenizer)}, and the "
            f"checkpoint's mask is {cfg.mask_id}; leave mask_token empty"
        )
    check_mask(cfg, tokenizer)
    return cfg


def check_mask(cfg: decoder.Config, tokenizer: Tokenizer) -> None:
    """That the mask token is used for nothing else.

    Raises:
      ValueError: naming the other use.
    """
    uses = {"padding": tokenizer.pad_id, "the beginning of a text": tokenizer.bos_id}
    found = [use for use, at in uses.items() if at == cfg.mask_id]
    found += ["the end of an answer"] * (cfg.mask_id in tokenizer.eos_ids)
    if cfg.mask_id < 0 or found:
        what = f"also stands for {' and '.join(found)}" if found else "is none"
        raise ValueError(
            f"the mask token {cfg.mask_id} {what}: what is masked could not be told from it; give "
            "the model a mask token of its own"
        )


def _id_of(text, tokenizer):
    found = tokenizer.backend.token_to_id(text)
    if found is None:
        raise ValueError(f"models.policy.mask_token={text!r} is no token of {tokenizer.folder}")
    return found


def flat(
    trees: list[Tree], *, end: int | None, canvas: int = 0, padding: str = "none"
) -> list[Tree]:
    """Trees of one answer as texts that the whole of is one segment.

    Args:
      trees: From `data.conversations.encode`.
      end: Token that pads an answer, as LLaDA's SFT does it. canvas: Slots of an answer with its
        padding; 0 = no padding, and longer answers stay as they are.
      padding: What becomes of it. "none": there is none. "noised": it is masked and learnt like
        any token (LLaDA). "seen": it is never masked, and not learnt.

    Raises:
      ValueError: for another `padding`, or one without a canvas or an end token.
    """
    if padding not in PADDING:
        raise ValueError(f"data.padding must be {', '.join(PADDING)}; received {padding!r}")
    if (padding != "none") != (canvas > 0) or (canvas and end is None):
        raise ValueError(
            f"data.padding={padding!r} and data.canvas={canvas} go together (the slots of an "
            "answer, filled up with the tokenizer's end token, which it must have)"
        )
    made = []
    for tree in trees:
        (answer,), (loss,) = tree.answers, tree.loss
        more = max(0, canvas - len(answer))
        fill = np.full(more, end if more else 0, np.int32)
        none = np.zeros(len(tree.prompt), bool)
        whole = np.concatenate([tree.prompt, answer, fill]).astype(np.int32)
        learnt = np.concatenate([none, loss, np.full(more, padding == "noised")])
        empty = np.zeros(0, np.int32)
        made.append(dataclasses.replace(tree, prompt=empty, answers=[whole], loss=[learnt]))
    return made


def _masked_logps(plan, params, frozen, rows: Rows, noisy: process.Corrupted, size, where):
    """(log-probs of the masked tokens, where they are), [B, S] each."""
    at = supervised.scored(
        rows.tokens,
        noisy.masked,
        rows.segments,
        rows.trunk,
        size=size,
        predict_offset=plan.cfg.predict_offset,
    )
    states = trainable.states(plan, params, frozen, rows.replace(tokens=noisy.tokens), rules=where)
    picked = jnp.take_along_axis(states, at.source[..., None], axis=1)
    logps, _ = supervised.token_logps(
        picked,
        trainable.head_matrix(plan, params, frozen, rules=where),
        at.target,
        softcap=plan.cfg.logit_softcap,
    )
    return logps, at


def make_loss(
    plan: trainable.Plan,
    config,
    where: rules.Rules | None = None,
    *,
    size: int | None = None,
):
    """(loss, weights, coef) for `make_train_step`: cross-entropy of masked tokens under noise.

    Every entry of `config.losses` has `fn` and `coef`. The function, of `objectives.denoising`, is
    `elbo` or `weighted`, whose weights are Dream's `process.context_weights` (keyword p). Means
    are as `config.noise.mean` says: "sequence" or "token" (`denoising.shares`).

    Args:
      plan: A denoiser. config: Its sections `losses` and `noise` are read.
      where: Mesh and layouts. size: Most maskable tokens of a row; None takes the row's length.

    Raises:
      ValueError: for a model that is no denoiser, or an unknown mean or function.
    """
    noise = config.noise
    denoising.weight(jnp.zeros((1, 1), bool), jnp.zeros((1, 1), jnp.int32), noise.mean)
    fns, coef = {}, {}
    for name, entry in config.losses.items():
        kw = keywords(entry, "coef")
        context = kw.pop("p", None)
        fn = resolve("objectives", entry["fn"], **kw)
        if fn.func not in (denoising.elbo, denoising.weighted):
            raise ValueError(
                f"losses.{name}.fn={entry['fn']!r} is no loss of a denoiser; use denoising.elbo or "
                "denoising.weighted"
            )
        if (context is None) != (fn.func is denoising.elbo):
            raise ValueError(
                f"losses.{name}: denoising.weighted takes p, how fast the weight of context falls, "
                "in (0, 1); denoising.elbo does not"
            )
        fns[name], coef[name] = (fn, context), float(entry["coef"])

    def loss(params, frozen, rows: Rows, keys, extra):
        noisy = process.corrupt(
            keys,
            rows.tokens,
            rows.loss_mask,
            rows.segments,
            plan.cfg.mask_id,
            eps=noise.eps,
            stratified=noise.stratified,
        )
        logps, at = _masked_logps(plan, params, frozen, rows, noisy, size, where)
        of = lambda x: jnp.take_along_axis(x, at.slot, axis=1)
        share = of(denoising.shares(rows.loss_mask, rows.segments, noise.mean))
        totals = {}
        for name, (fn, context) in fns.items():
            if context is None:
                each = fn(logps, at.mask, of(noisy.rate))
            else:
                clean = (rows.segments > 0) & ~noisy.masked
                weights = process.context_weights(clean, rows.segments, context)
                each = fn(logps, at.mask, of(weights))
            totals[name] = jnp.sum(jnp.where(at.mask, each * share, 0.0))
        metrics = {"masked": m.Mean.of(noisy.masked.astype(jnp.float32), rows.loss_mask)}
        metrics["masked_logp"] = m.Mean.of(jax.lax.stop_gradient(logps), at.mask)
        return totals, metrics, extra

    def weights(rows: Rows):
        whole = denoising.weight(rows.loss_mask, rows.segments, noise.mean)
        return dict.fromkeys(fns, whole)

    return loss, weights, coef


def make_predict(
    plan: trainable.Plan, config, *, rules: rules.Rules | None = None
) -> Callable[[PyTree, PyTree, list[Tree]], list[np.ndarray]]:
    """A function (params, frozen, trees) -> one float32[answers, 2] a tree: (bound, tokens).

    The bound is the negative of `denoising.elbo`, summed over an answer and averaged over
    `config.noise.samples` times that lie evenly between 0 and 1, the same at every evaluation
    of the same texts on the same kind of device and mesh:

    .. math:: \\frac1n \\sum_{j<n} \\frac{1}{p_j} \\sum_{i \\; masked} \\log p(x_i \\mid x_{t_j}),
        \\quad t_j = (u + j / n) \\bmod 1

    So perplexities are upper bounds, and those of two models differ by the models alone.
    """
    samples, eps = config.noise.samples, config.noise.eps

    def one(params, frozen, rows, j):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), j), len(rows.tokens))
        start = jax.random.uniform(jax.random.key(1))
        t = (start + j / samples) % 1.0
        rate = jnp.full(rows.tokens.shape, (1 - eps) * t + eps)
        noisy = process.corrupt(
            keys, rows.tokens, rows.loss_mask, rows.segments, plan.cfg.mask_id, rate=rate
        )
        logps, at = _masked_logps(plan, params, frozen, rows, noisy, None, rules)
        rate = jnp.take_along_axis(noisy.rate, at.slot, axis=1)
        return denoising.elbo(logps, at.mask, rate), at

    def measure(params, frozen, rows):
        def add(total, j):
            each, at = one(params, frozen, rows, j)
            of = jnp.take_along_axis(rows.segments, at.slot, axis=1)
            own = (of[:, None] == _segments(rows)[:, :, None]) & at.mask[:, None]
            return total - jnp.sum(jnp.where(own, each[:, None], 0.0), axis=2), None

        zeros = jnp.zeros(rows.ends.shape, jnp.float32)
        total, _ = jax.lax.scan(add, zeros, jnp.arange(samples))
        own = (rows.segments[:, None] == _segments(rows)[:, :, None]) & rows.loss_mask[:, None]
        return jnp.stack([total / samples, own.sum(axis=2).astype(jnp.float32)], axis=-1)

    return scorer.over_trees(measure, 2, rules=rules, batch=config.data.eval_batch)


def _segments(rows):
    """Segment of each answer of a row, [B, K]; -1 where there is none."""
    found = jnp.take_along_axis(rows.segments, jnp.maximum(rows.ends, 0), axis=1)
    return jnp.where(rows.ends >= 0, found, -1)
