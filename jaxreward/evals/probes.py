"""Linear probes on states that were computed once: all tasks, seeds and settings in one program.

A task is an index into the states and a label for each entry, padded with label -1 to the length of
the longest, so that tasks on the same texts share their states. Two ways to fit:

    `fit_paper`   one epoch of AdamW on the states as they are, as MRMBench's code does
    `fit_strong`  regularised logistic regression on standardised states, until it has converged
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from jaxreward.core import masked
from jaxreward.core.types import Array

LRS = (5e-5, 2e-5, 1e-5)
L2 = (1e-3, 1e-2, 1e-1, 1.0)
BATCH = 128
STEPS = 1000
TOLERANCE = 1e-4


class Probe(NamedTuple):
    """A linear map from states to logits, h w + b.

    Attributes:
      w: float32[..., D, K]; K = 1 for one logit, which is that of class 1 of two.
      b: float32[..., K].
    """

    w: Array
    b: Array


def logits(probe: Probe, h: Float[Array, "N D"]) -> Float[Array, "N K"]:
    """h w + b in float32."""
    product = jnp.matmul(h.astype(jnp.float32), probe.w, precision=jax.lax.Precision.HIGHEST)
    return product + probe.b


def two_logits(values: np.ndarray) -> np.ndarray:
    """Logits of classes: a single logit z becomes (0, z), which decides the same."""
    if values.shape[-1] > 1:
        return values
    return np.concatenate([np.zeros_like(values), values], axis=-1)


def cross_entropy(values: Float[Array, "N K"], labels: Int[Array, " N"]) -> Float[Array, " N"]:
    """-log p(label) of each entry, 0 where the label is -1.

    One logit z: log(1 + exp(z)) - y z, the binary cross-entropy of sigmoid(z). Several: softmax.
    """
    values, y = values.astype(jnp.float32), jnp.maximum(labels, 0)
    if values.shape[-1] == 1:
        z = values[:, 0]
        each = jax.nn.softplus(z) - y * z
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(values, y)
    return jnp.where(labels >= 0, each, 0.0)


def _mean(values, labels):
    return masked.mean(cross_entropy(values, labels), labels >= 0)


def _over(fit):
    """fit(states, task, seed, setting) over tasks [T], seeds [T, S] and settings [L]."""
    settings = jax.vmap(fit, (None, None, None, 0))
    return jax.vmap(jax.vmap(settings, (None, None, 0, None)), (None, 0, 0, None))


@functools.partial(jax.jit, static_argnames=("outputs", "batch"))
def fit_paper(
    states: Float[Array, "M D"],
    index: Int[Array, "T N"],
    labels: Int[Array, "T N"],
    keys: Array,
    lrs: Float[Array, " L"],
    *,
    outputs: int,
    batch: int = BATCH,
) -> tuple[Probe, Array]:
    """One epoch of AdamW from a random start, without bias, on the states as they are.

    betas (0.9, 0.95), weight decay 0.1, gradients clipped to norm 1, and a learning rate that falls
    over the ceil(n / batch) steps of the task's n entries, step s having
    :math:`\\eta (1 + \\cos(\\pi s / S)) / 2`. Shorter tasks stop when they are through.

    Args:
      states: One row a text.
      index: Row of each entry of a task. labels: Its class, -1 where there is none.
      keys: Typed PRNG keys [T, S], one for each task and seed: of the start and the order.
      lrs: First learning rates.
      outputs: Logits: 1 for two classes (sigmoid), else the number of classes.
      batch: Entries a step.

    Returns:
      (Probe with w[T, S, L, D, K] and b = 0, loss of each step [T, S, L, steps], 0 after the last).

    References: wangclnlp/MRMBench, `task1_discriminant_rm_deepspeed_cate_2.py` and its script: one
      logit at the easy level (the paper's text is said to have a softmax at both), and three at the
      hard one, init of `torch.nn.Linear`. Deviations: float32 on cached states for bfloat16;
      every step has `batch` different entries, where that code's two processes draw the same ones;
      what is measured is the probe after the last step.
    """
    size = index.shape[1]
    steps = -(-size // batch)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.95),
        optax.add_decayed_weights(0.1),
    )

    def fit(states, task, key, lr):
        index, labels = task
        start, order_key = jax.random.split(key)
        bound = states.shape[1] ** -0.5
        w = jax.random.uniform(start, (states.shape[1], outputs), minval=-bound, maxval=bound)
        known = labels >= 0
        # Random order, those without a label last.
        drawn = jax.random.uniform(order_key, (size,))
        order = jnp.argsort(jnp.where(known, drawn, 2.0))
        order = jnp.pad(order, (0, steps * batch - size)).reshape(steps, batch)
        live = jnp.arange(steps * batch).reshape(steps, batch) < jnp.sum(known)
        total = jnp.maximum(jnp.sum(live.any(axis=1)), 1)

        def step(carry, now):
            w, state, s = carry
            rows, live = now
            y = jnp.where(live, labels[rows], -1)
            h = states[index[rows]]
            loss, slope = jax.value_and_grad(
                lambda w: _mean(logits(Probe(w, jnp.zeros(outputs)), h), y)
            )(w)
            update, next_state = tx.update(slope, state, w)
            rate = lr * 0.5 * (1 + jnp.cos(jnp.pi * s / total))
            keep = live.any()
            pick = lambda new, old: jnp.where(keep, new, old)
            w = pick(w - rate * update, w)
            return (w, jax.tree.map(pick, next_state, state), s + 1), loss

        (w, _, _), losses = jax.lax.scan(step, (w, tx.init(w), 0), (order, live))
        return Probe(w, jnp.zeros(outputs)), losses

    return _over(fit)(states, (index, labels), keys, lrs)


def _second_moments(states, index, labels):
    """(mean, spread, eigenvalues, eigenvectors) of a task's entries, standardised for the last."""
    count = jnp.zeros(len(states)).at[index].add(labels >= 0)
    share = (count / jnp.maximum(jnp.sum(count), 1))[:, None]
    mean = jnp.sum(states * share, axis=0)
    variance = jnp.sum(jnp.square(states - mean) * share, axis=0)
    spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
    z = (states - mean) / spread * jnp.sqrt(share)
    values, vectors = jnp.linalg.eigh(jnp.matmul(z.T, z, precision=jax.lax.Precision.HIGHEST))
    return mean, spread, jnp.maximum(values, 0.0), vectors


@functools.partial(jax.jit, static_argnames=("outputs", "steps"))
def fit_strong(
    states: Float[Array, "M D"],
    index: Int[Array, "T N"],
    labels: Int[Array, "T N"],
    part: Bool[Array, "T S N"],
    l2: Float[Array, " L"],
    *,
    outputs: int,
    steps: int = STEPS,
) -> tuple[Probe, Array]:
    """Regularised logistic regression until it has converged.

    .. math:: \\min_{w, b} \\frac1n \\sum_i -\\log p(y_i | h_i w + b) + \\frac\\lambda2 |w|^2

    over the entries in `part`. The problem is convex, so nothing but the part differs by seed. Each
    task's states are standardised by the mean and spread of its entries with labels; the probe that
    comes back takes them as they were given.

    Accelerated gradient steps in the metric of a bound on the curvature, A/4 for one logit and A/2
    for several, A being the second moments of the task; with it no step size is searched for.

    Args:
      states, index, labels: As `fit_paper`.
      part: Entries that are fitted, for each task and seed.
      l2: The lambdas, above 0. outputs: As `fit_paper`. steps: At most.

    Returns:
      (Probe with w[T, S, L, D, K], what is left [T, S, L]: :math:`\\sqrt{g^T P g}` of the last
      gradient g with the inverse P of the bound. Above `TOLERANCE` it has not converged).

    References: Böhning 1992, "Multinomial logistic regression algorithm" (the bound); O'Donoghue
      and Candès 2015, "Adaptive restart for accelerated gradient schemes".
    """
    moments = jax.lax.map(lambda task: _second_moments(states, *task), (index, labels))
    high = jax.lax.Precision.HIGHEST

    def fit(states, task, part, l2):
        (mean, spread, values, vectors), index, labels = task
        y = jnp.where(part & (labels >= 0), labels, -1)
        # The part's second moments are at most so many times those of all entries.
        ratio = jnp.sum(labels >= 0) / jnp.maximum(jnp.sum(y >= 0), 1)
        bound = (0.25 if outputs == 1 else 0.5) * ratio

        def given(probe):
            w = probe.w / spread[:, None]
            return Probe(w, probe.b - jnp.matmul(mean, w, precision=high))

        def objective(probe):
            # One product over all states, which vmap makes one matrix product for all probes.
            each = logits(given(probe), states)[index]
            return _mean(each, y) + 0.5 * l2 * jnp.sum(jnp.square(probe.w))

        def scaled(slope):
            inner = jnp.matmul(vectors.T, slope.w, precision=high)
            inner = inner / (bound * values + l2)[:, None]
            return Probe(jnp.matmul(vectors, inner, precision=high), slope.b / bound)

        def dot(a, b):
            return jnp.sum(a.w * b.w) + jnp.sum(a.b * b.b)

        def step(carry):
            at, ahead, t, _, s = carry
            slope = jax.grad(objective)(ahead)
            move = scaled(slope)
            new = jax.tree.map(jnp.subtract, ahead, move)
            went = jax.tree.map(jnp.subtract, new, at)
            t = jnp.where(dot(slope, went) > 0, 1.0, t)  # uphill: start the momentum anew
            t_next = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
            ahead = jax.tree.map(lambda x, d: x + (t - 1) / t_next * d, new, went)
            return new, ahead, t_next, jnp.sqrt(jnp.maximum(dot(slope, move), 0.0)), s + 1

        going = lambda carry: (carry[4] < steps) & (carry[3] > TOLERANCE)
        start = Probe(jnp.zeros((states.shape[1], outputs)), jnp.zeros(outputs))
        carry = start, start, jnp.float32(1.0), jnp.float32(jnp.inf), 0
        probe, _, _, left, _ = jax.lax.while_loop(going, step, carry)
        return given(probe), left

    return _over(fit)(states, (moments, index, labels), part, l2)


def padded(rows: list[np.ndarray], fill: int) -> np.ndarray:
    """Rows of different lengths as one int32[T, N], filled up with `fill`."""
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for t, row in enumerate(rows):
        out[t, : len(row)] = row
    return out
