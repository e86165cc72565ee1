"""APR in miniature: a small model that reads bytes unlearns to check what it already knows.

Data: problems of the tiny world (`data.corpora.overthinking`), with `prompt`, `answer`, `subset`;
docs/papers/miniature/apr.py makes them, and the model that overthinks.

Command:
    python docs/papers/miniature/apr.py --work runs/apr_miniature

Cost: docs/papers/apr.md says what the runs took.
Expected: the same page has what was expected before they were made, and what came.
Vary: rewards.apr.lam; rewards.apr.anchor=first.
Smoke: --config apr/miniature:smoke takes a random toy model and small sums.

Reference: none; the paper, Chang et al. 2026, "APR", arXiv:2602.00760, trains no such model. As
`apr/math`, but for sizes, the learning rate, the reward's form ("tokens") and what is kept of it.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "online_rl"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.models.policy.init = "hf:models/overthinks"
    c.data = presets.prompts(max_len=32, row_len=256, batch=8, template="plain")
    c.rollouts = presets.rollouts(
        prompts=16,
        answers=8,
        max_new=208,
        slots=32,
        outcome="apr/accuracy",
        filter="shaped",
        offsets=True,
        workers=0,
        show=1,
    )
    c.rewards = dict(
        apr=dict(
            fn="anchor.apr",
            weights=dict(reward=1.0),
            kind="tokens",
            lam=0.5,
            reference=96,
            grace=0,
            min_tokens=1,
            anchor="stable",
        )
    )
    c.advantages = dict(fn="advantage.reinforce_pp")
    c.losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.2, clip_high=0.28, dual=10.0),
    )
    c.optim = presets.adamw(
        lr=3e-4,
        schedule="constant",
        warmup=0.1,
        clip=1.0,
        decay=0.0,
        decay_mask=".*/kernel(/[ab])?",
    )
    c.mesh = presets.mesh()
    c.train = presets.train(steps=30, log_every=1, save_every=30, eval_every=0, compute="float32")
    c.evals = dict(heldout=dict(fn="overthinking.sampled", reward="apr", n=4, temperature=1.0))
    return presets.smoke(c, arg)
