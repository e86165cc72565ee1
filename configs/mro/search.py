"""MRO's test-time scaling: a denoiser as it is, with and without a search. Nothing is trained.

Data: as mro/rl; what is measured is `data.eval_path`, or `eval_fraction` of `data.path`.

Command:
    jaxreward train --config mro/search --workdir runs/mro_tts \\
        --config.models.policy.init=hf:models/llada --config.data.path=countdown.jsonl \\
        --config.models.perplexity.init=hf:models/smollm2

The numbers are printed and stand in evaluation.json of the workdir.

Cost: not measured. A search of width k runs the model k times as often, and once more a draft.
Expected: not measured.
Vary: evals.search.width is k; search.labels=none leaves final answers out of the search's rewards.
Smoke: --config mro/search:smoke takes a random toy denoiser and small sums.

Reference: Wang et al. 2025, "MRO", arXiv:2510.21473. Of the paper: groups of 32 steps, k = 4,
temperature 0.25, steps half of the length, answers held to the majority of the candidates. Ours:
equal weights of the rewards; among equal candidates the first.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "diffusion_rl"
    c.models = dict(
        policy=presets.denoiser(), perplexity=dict(family="decoder", init="hf:models/smollm2")
    )
    c.models.policy.init = "hf:models/llada"
    c.data = presets.prompts(max_len=512, batch=16, eval_fraction=0.5)
    c.rollouts = presets.denoised(
        prompts=16,
        answers=1,
        max_new=256,
        steps=128,
        block=64,
        outcome="quality/accuracy",
        temperature=0.25,
    )
    c.intra = presets.intra(verification=1.0, fluency=1.0)
    c.search = presets.search(every=32)
    c.rewards = dict(
        quality=dict(fn="puzzles.quality", weights=dict(reward=1.0), check="puzzles.countdown"),
    )
    c.advantages = dict(fn="steps.advantages", baseline="none", scale="none", total=False)
    c.losses = dict(policy=dict(fn="policy.reinforce", coef=1.0))
    c.optim = presets.adamw(lr=2e-6, schedule="constant", warmup=0.0, clip=1.0, decay=0.0)
    c.mesh = presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(epochs=0, compute="bfloat16")
    c.evals = dict(
        plain=dict(fn="sampled.denoised", n=1, temperature=0.25),
        search=dict(fn="sampled.denoised", n=1, temperature=0.25, width=4),
    )
    return presets.smoke(c, arg)
