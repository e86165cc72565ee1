"""MRO's reinforcement learning of a masked diffusion model: rewards of drafts and of the answer.

Data: JSON lines with `prompt` and what the check reads: for Countdown `numbers` and `target`
(data.corpora.countdown makes and reads them), for Sudoku `puzzle` and `solution`, for mathematics
`answer`. Answers have the form <think>...</think><answer>...</answer>.

Command:
    jaxreward train --config mro/rl --workdir runs/mro \\
        --config.models.policy.init=hf:models/llada --config.data.path=countdown.jsonl \\
        --config.models.perplexity.init=hf:models/smollm2
    jaxreward export --model runs/mro --out models/mro

Cost: not measured.
Expected: not measured.
Vary: rewards.quality.check=puzzles.sudoku or puzzles.final for other tasks; intra.fluency=0 and
    intra.verification=0 leave rewards out (docs/papers/mro.md has the paper's ablation);
    rollouts.every is w; intra.shaping=true is the variant with differences of quality;
    losses.policy.fn=policy.clipped with rollouts.updates above 1 reuses samples;
    advantages.baseline=batch with advantages.scale=batch is REINFORCE++'s. `:laptop` is
    SmolLM2-135M as the start of a denoiser.
Smoke: --config mro/rl:smoke takes a random toy denoiser and small sums.

Reference: Wang et al. 2025, "MRO", arXiv:2510.21473 (NeurIPS 2025). Of the paper: REINFORCE on
sampled step groups without baseline, KL or clip, w = 2, learning rate 2e-6, temperature 0.25, steps
half of the length, one verified token a draft, C = F = 100, evaluation every 50 steps, blocks of 64
for Countdown, Sudoku and MATH500 (8 for GSM8K). Not in the text that we could read, and so ours:
prompts and answers a round, AdamW without decay, equal weights of the rewards, what is measured
at a group's end only (`intra.mode`), and the perplexity model, which secondary notes call GPT-2
small; any causal model that we load serves.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the words laptop and smoke."""
    laptop = presets.parse_arg(arg, laptop=False)["laptop"]
    c = presets.base(arg, laptop=False)
    c.recipe = "diffusion_rl"
    c.models = dict(
        policy=presets.denoiser(), perplexity=dict(family="decoder", init="hf:models/smollm2")
    )
    c.models.policy.init = "hf:models/smollm2" if laptop else "hf:models/llada"
    if laptop:
        c.models.policy.update(from_causal=True, mask_token="<jupyter_text>")
    c.data = presets.prompts(max_len=128 if laptop else 512, batch=4 if laptop else 16)
    c.rollouts = presets.denoised(
        prompts=4 if laptop else 16,
        answers=4,
        max_new=64 if laptop else 256,
        steps=32 if laptop else 128,
        block=64,
        outcome="quality/accuracy",
        temperature=0.25,
        every=2,
        groups=1,
    )
    c.intra = presets.intra(verification=1.0, fluency=1.0)
    c.search = presets.search()
    c.rewards = dict(
        quality=dict(fn="puzzles.quality", weights=dict(reward=1.0), check="puzzles.countdown"),
    )
    c.advantages = dict(fn="steps.advantages", baseline="none", scale="none", total=False)
    c.losses = dict(
        policy=dict(fn="policy.reinforce", coef=1.0),
        kl=dict(fn="policy.kl", coef=0.0, kind="k3"),  # 0: no reference is kept
    )
    c.optim = presets.adamw(lr=2e-6, schedule="constant", warmup=0.0, clip=1.0, decay=0.0)
    c.mesh = presets.mesh() if laptop else presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=1,
        log_every=1,
        save_every=50,
        eval_every=50,
        compute="float32" if laptop else "bfloat16",
        remat="cheap" if laptop else "full",
    )
    c.evals = dict(heldout=dict(fn="sampled.denoised", n=1, temperature=0.0))
    return presets.smoke(c, arg)
