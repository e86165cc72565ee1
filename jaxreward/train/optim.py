"""Schedule and optimizer from the `optim` section of a config."""

from typing import Any

import jax
import optax

from jaxreward.core import trees

PyTree = Any
SCHEDULES = ("constant", "linear", "cosine")


def schedule(optim, steps: int) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then constant, or linear or cosine to 0.

    Args:
      optim: Fields `lr`, `schedule` and `warmup` (a fraction of `steps` in [0, 1)).
      steps: Length of the whole run.

    Raises:
      ValueError: on an unknown schedule or a warm-up outside [0, 1).
    """
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"optim.schedule={optim.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
        )
    if not 0 <= optim.warmup < 1:
        raise ValueError(f"optim.warmup is a fraction in [0, 1); received {optim.warmup}")
    warm = round(optim.warmup * steps)
    rest = max(steps - warm, 1)
    after = {
        "constant": lambda: optax.constant_schedule(optim.lr),
        "linear": lambda: optax.linear_schedule(optim.lr, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(optim.lr, rest),
    }[optim.schedule]()
    if not warm:
        return after
    # The first step already learns: rate lr / warm at step 0 and lr at step warm - 1.
    up = lambda step: optim.lr * (step + 1) / warm
    return optax.join_schedules([up, after], [warm])


def make(optim, steps: int) -> optax.GradientTransformation:
    """The optax chain: AdamW or SGD with decoupled decay on the leaves that `decay_mask` matches.

    Clipping by global norm belongs to the training step, which logs the norm it clips.

    Raises:
      ValueError: on an unknown optimizer name.
    """
    rate = schedule(optim, steps)

    def mask(params: PyTree) -> PyTree:
        if not optim.decay_mask:
            return jax.tree.map(lambda _: False, params)
        return trees.matching(params, optim.decay_mask)

    if optim.name == "adamw":
        return optax.adamw(rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.decay, mask=mask)
    if optim.name == "sgd":
        return optax.chain(optax.add_decayed_weights(optim.decay, mask), optax.sgd(rate))
    raise ValueError(f"optim.name={optim.name!r} is unknown; use adamw or sgd")
