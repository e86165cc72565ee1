"""APR-style RL of a reasoning policy: right answers lose for what they go on checking afterwards.

Data: JSON lines (or Parquet) with `prompt` and `answer`, the reference, and optionally `id`.
Without an `eval_path`, `eval_fraction` of the prompts is held out. The policy must think first and
close its thinking with </think>, as DeepSeek-R1's distilled models do.

The reward needs the extra `real`.

Command:
    jaxreward train --config apr/math --workdir runs/apr \\
        --config.models.policy.init=hf:models/r1_distill_1p5b --config.data.path=problems.jsonl
    jaxreward train --config apr/math:laptop --workdir runs/apr \\
        --config.models.policy.init=hf:models/base --config.data.path=problems.jsonl
    jaxreward export --model runs/apr --out models/apr

Cost: not measured.
Expected: not measured; the paper's numbers are not known to us.
Vary: rewards.apr.kind=tokens does not reward a longer way to the answer, which "ratio" does;
    rewards.apr.anchor=first; rewards.apr.lam from 0 (accuracy alone) to below 1.
Smoke: --config apr/math:smoke takes a random toy model and small sums.

Reference: Chang et al. 2026, "APR", arXiv:2602.00760. Of it only the abstract is known to us: find
where the answer first stabilises, penalise what follows, train with an algorithm that suits length
penalties. Everything else is inferred (docs/papers/apr.md): the form and strength of the penalty,
and the algorithm, which is DLER's, arXiv:2510.15110: rewards less the mean of their group, whitened
over all tokens, clip 0.2 and 0.28, mean over tokens, KL 5e-4, 512 prompts x 16, 4000 new tokens,
learning rate 1e-6. The same settings serve 1.5B and 7B. `:laptop` changes init, sizes, precision
and mesh only.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the words laptop and smoke."""
    laptop = presets.parse_arg(arg, laptop=False)["laptop"]
    c = presets.base(arg, laptop=False)
    c.recipe = "online_rl"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.models.policy.init = "hf:models/base" if laptop else "hf:models/r1_distill_1p5b"
    c.data = presets.prompts(max_len=256 if laptop else 1024, on_bad="skip")
    c.rollouts = presets.rollouts(
        prompts=8 if laptop else 512,
        answers=8 if laptop else 16,
        max_new=256 if laptop else 4000,
        updates=1 if laptop else 8,
        outcome="apr/accuracy",
        filter="shaped",  # all-right groups count as long as their tails differ
        offsets=True,
    )
    c.rewards = dict(
        apr=dict(
            fn="anchor.apr",
            weights=dict(reward=1.0),
            kind="ratio",
            lam=0.5,
            grace=16 if laptop else 64,
            anchor="stable",
        )
    )
    c.advantages = dict(fn="advantage.reinforce_pp")
    c.losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.2, clip_high=0.28, dual=10.0),
        kl=dict(fn="policy.kl", coef=5e-4, kind="k3"),
    )
    c.optim = presets.adamw(
        lr=1e-6,
        schedule="constant",
        warmup=0.0,
        clip=1.0,
        decay=0.01,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh() if laptop else presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=1,
        log_every=1,
        save_every=20,
        eval_every=20,
        compute="float32" if laptop else "bfloat16",
        remat="cheap" if laptop else "full",
    )
    c.evals = dict(heldout=dict(fn="sampled.answers", n=1, temperature=0.0))
    return presets.smoke(c, arg)
