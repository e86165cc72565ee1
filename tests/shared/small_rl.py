"""Online RL at test size: small sums, answered by the tiny model and rewarded for vowels."""

import json

import numpy as np

from jaxreward import presets
from jaxreward.core.types import Trajectory


def small(tiny_folder, *overrides, losses=None, advantage=None):
    """A config; whole sections may be put in place."""
    made = presets.load(
        "online_rl/math:smoke",
        [
            f"models.policy.init=hf:{tiny_folder}",
            "data.batch=4",
            "optim.lr=1e-2",
            "train.eval_every=0",
            "train.save_every=2",
            "rollouts.answers=4",
            "rollouts.workers=0",
            "rollouts.filter=none",
            "rollouts.outcome=vowels/some",
            *overrides,
        ],
    )
    made.unlock()
    made.rewards = dict(vowels=dict(fn="jaxreward.testing:vowels", weights=dict(share=1.0)))
    if losses is not None:
        made.losses = losses
    if advantage is not None:
        made.advantages = advantage
    return made.lock()


def lines(workdir, part="train/loss"):
    """The lines of metrics.jsonl that have a value of that name."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if part in line]


def answer(tokens, finished=True):
    """An answer of so many tokens, or of these."""
    ids = np.arange(tokens) + 100 if isinstance(tokens, int) else np.asarray(tokens)
    return Trajectory(
        prompt=np.arange(3, dtype=np.int32),
        tokens=ids.astype(np.int32),
        logps=np.zeros(len(ids), np.float32),
        written=np.ones(len(ids), bool),
        version=np.zeros(len(ids), np.int32),
        finished=finished,
    )


GROUPS = [[answer(2), answer(3)], [answer(4), answer(1)], [answer(2), answer(2, finished=False)]]
