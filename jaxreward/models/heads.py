"""Heads over hidden states: a reward, scores of several aspects, or classes; linear or with one
hidden layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxreward.core.types import Array
from jaxreward.parallel.specs import Param

PyTree = Any
KINDS = ("scalar", "scores", "classes")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a head gives for one answer. Hashable.

    Attributes:
      kind: "scalar", a reward; "scores", one number for each of several aspects; "classes", one
        logit for each of several classes that exclude each other.
      outputs: Names of the numbers; one for "scalar", two or more for "classes".
      weights: Of each output in the reward (see `reward`); () takes the default of the kind.
      hidden: Width of a hidden layer, or 0 for a linear head.
      dropout: Share of the head's inputs that training drops; 0 for none.
    """

    kind: str = "scalar"
    outputs: tuple[str, ...] = ("score",)
    weights: tuple[float, ...] = ()
    hidden: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown head {self.kind!r}; use one of {', '.join(KINDS)}")
        n = len(self.outputs)
        wrong = {
            "scalar": n != 1 and "exactly one",
            "scores": n < 1 and "at least one",
            "classes": n < 2 and "at least two",
        }[self.kind]
        if wrong:
            raise ValueError(
                f"a head of kind {self.kind!r} has {wrong} output; received outputs={self.outputs}"
            )
        if len(set(self.outputs)) < n:
            raise ValueError(f"a head's outputs must have different names; received {self.outputs}")
        if self.weights and (len(self.weights) != n or self.kind == "scalar"):
            raise ValueError(
                f"output weights: a number for each of the outputs {self.outputs}, and none for "
                f"a scalar head; received {self.weights}"
            )
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"a head needs hidden >= 0 and 0 <= dropout < 1; received hidden={self.hidden} "
                f"and dropout={self.dropout}"
            )


SCALAR = Config()


def scalar_specs(width: int, *, scores: int = 1, scale: float | None = None) -> PyTree:
    """One bias-free linear map from a state to `scores` numbers, as `*ForSequenceClassification`.

    Args:
      width: Size of a state.
      scores: Numbers per answer; 1 for a scalar reward.
      scale: Standard deviation of the initial weights; default 1 / sqrt(width + 1), so that new
        scores are of order one.
    """
    scale = (width + 1) ** -0.5 if scale is None else scale
    return {"kernel": Param((width, scores), ("embed", "scores"), scale=scale)}


def specs(cfg: Config, width: int) -> PyTree:
    """Leaves of a head: {kernel} when linear, else {hidden: {kernel, bias}, out: {kernel, bias}}.

    .. math:: o = W_2 \\max(0, W_1 h + b_1) + b_2

    Args:
      cfg: The head. width: Size of a state.

    References: RM-Distiller, arXiv:2601.14032, released code: hidden 1024, dropout 0.1, one output.
      Deviation: initial weights are normal with variance 1 / fan-in (2 / fan-in before the ReLU)
      and biases 0, where the code has torch's uniform ones.
    """
    if not cfg.hidden:
        return scalar_specs(width, scores=len(cfg.outputs))
    return {
        "hidden": {
            "kernel": Param((width, cfg.hidden), ("embed", None), scale=(2 / width) ** 0.5),
            "bias": Param((cfg.hidden,), (None,), init="zeros"),
        },
        "out": {
            "kernel": Param(
                (cfg.hidden, len(cfg.outputs)), (None, "scores"), scale=cfg.hidden**-0.5
            ),
            "bias": Param((len(cfg.outputs),), ("scores",), init="zeros"),
        },
    }


def _linear(params, x):
    kernel = params["kernel"].astype(jnp.float32)
    out = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return out + params["bias"].astype(jnp.float32) if "bias" in params else out


def scalar(params: PyTree, states: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Rewards of states by a linear head, float32; the last axis is dropped for one score.

    .. math:: r = h^\\top w

    The product is taken in float32 whatever the dtype of the states: rewards are compared to each
    other, and bfloat16 keeps only three digits of them.
    """
    out = _linear(params, states)
    return out[..., 0] if out.shape[-1] == 1 else out


def outputs(
    params: PyTree,
    states: Float[Array, "B K D"],
    *,
    keys: Array | None = None,
    dropout: float = 0.0,
) -> Float[Array, "B K C"]:
    """What a head of either shape says of the states at the ends of answers, float32.

    Args:
      params: Tree of `specs`.
      states: One state an answer.
      keys: One typed PRNG key a row for dropout, [B], or None where nothing is dropped.
      dropout: Share of a state's numbers that is set to 0; the others are divided by what is kept.
    """
    x = states.astype(jnp.float32)
    if keys is not None and dropout > 0:
        draw = lambda key: jax.random.bernoulli(key, 1 - dropout, x.shape[1:])
        x = jnp.where(jax.vmap(draw)(keys), x / (1 - dropout), 0.0)
    if "hidden" in params:
        return _linear(params["out"], jax.nn.relu(_linear(params["hidden"], x)))
    return _linear(params, x)


def reward(cfg: Config, values: Float[Array, "... C"]) -> Float[Array, "..."]:
    """One number an answer, by which answers are compared.

    scalar: the output. scores: :math:`\\sum_k w_k o_k`, by default their mean. classes:
    :math:`\\sum_k w_k \\mathrm{softmax}(o)_k`, by default with w = 0, 1, 2, ..., the expected
    class.
    """
    values = values.astype(jnp.float32)
    if cfg.kind == "scalar":
        return values[..., 0]
    n = len(cfg.outputs)
    if cfg.kind == "classes":
        values = jax.nn.softmax(values, axis=-1)
    default = range(n) if cfg.kind == "classes" else [1 / n] * n
    weights = jnp.asarray(cfg.weights or tuple(default), jnp.float32)
    return jnp.sum(values * weights, axis=-1)
