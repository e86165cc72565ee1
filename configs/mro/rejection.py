"""MRO's rejection sampling: trajectories found by a search are imitated, two steps at a time.

Data: as mro/rl.

Command:
    jaxreward train --config mro/rejection --workdir runs/mro_rs \\
        --config.models.policy.init=hf:models/llada --config.data.path=countdown.jsonl \\
        --config.models.perplexity.init=hf:models/smollm2

Cost: not measured.
Expected: not measured.
Vary: search.width is k (2 and 4 in the paper); advantages.least=-1 imitates wrong answers too.
Smoke: --config mro/rejection:smoke takes a random toy denoiser and small sums.

Reference: Wang et al. 2025, "MRO", arXiv:2510.21473. Of the paper: a search over step groups whose
rewards count the reference's answer, loss -1/L of what the steps of a segment committed, segments
of two consecutive steps drawn at random, k of 2 or 4, learning rate 2e-6, temperature 0.25. The
paper searches a data set once and then fine-tunes; here each round is searched with the weights of
that round. Not in the text that we could read, and so ours: groups of 32 steps in the search (the
paper's number for test time), wrong answers left out, prompts a round, and the optimizer.
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
    c.data = presets.prompts(max_len=512, batch=16)
    c.rollouts = presets.denoised(
        prompts=16,
        answers=1,
        max_new=256,
        steps=128,
        block=64,
        outcome="quality/accuracy",
        temperature=0.25,
        every=2,
        groups=1,
        reduction="fixed",
    )
    c.intra = presets.intra(verification=1.0, fluency=1.0)
    c.search = presets.search(width=4, every=32)
    c.rewards = dict(
        quality=dict(fn="puzzles.quality", weights=dict(reward=1.0), check="puzzles.countdown"),
    )
    c.advantages = dict(fn="steps.imitation", least=0.0)
    c.losses = dict(policy=dict(fn="policy.reinforce", coef=1.0))
    c.optim = presets.adamw(lr=2e-6, schedule="constant", warmup=0.0, clip=1.0, decay=0.0)
    c.mesh = presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=1, log_every=1, save_every=50, eval_every=50, compute="bfloat16", remat="full"
    )
    c.evals = dict(heldout=dict(fn="sampled.denoised", n=1, temperature=0.0))
    return presets.smoke(c, arg)
