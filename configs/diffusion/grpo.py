"""diffu-GRPO of d1: whole answers of a masked diffusion model, by their rewards.

Data: as mro/rl, or GSM8K (data.corpus=gsm8k.prompts,form=tags). Answers have the form
<reasoning>...</reasoning><answer>...</answer>.

Command:
    jaxreward train --config diffusion/grpo --workdir runs/diffu_grpo \\
        --config.models.policy.init=hf:models/llada --config.data.path=gsm8k.jsonl \\
        --config.data.corpus=gsm8k.prompts,form=tags,think=reasoning

Cost: not measured.
Expected: not measured.
Vary: rewards.task.fn=puzzles.countdown (rollouts.epochs=8), puzzles.sudoku or puzzles.math.
Smoke: --config diffusion/grpo:smoke takes a random toy denoiser and small sums.

Reference: Zhao et al. 2025, "d1", arXiv:2504.12216, and its released code. Of these: 6 answers to a
prompt, learning rate 3e-6, b2 0.99, decay 0.1, clip of gradients 0.2, KL (k3) 0.04, clip 0.5 on
both sides, 12 updates with each sample under new masks, prompts hidden with probability 0.15,
answers of 256 in 128 steps and blocks of 32, temperature 0.9, advantages without a division, LoRA
of rank 128 and alpha 64. Deviations: the reference stays the initial model (there it follows every
64 steps); prompts a round are ours; the mean is over the tokens of the batch.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "diffusion_rl"
    c.models = dict(policy=presets.denoiser(train="lora"))
    c.models.policy.update(init="hf:models/llada", lora_rank=128, lora_alpha=64.0)
    c.data = presets.prompts(max_len=256, batch=8)
    c.rollouts = presets.denoised(
        prompts=8,
        answers=6,
        max_new=256,
        steps=128,
        block=32,
        outcome="task/accuracy",
        temperature=0.9,
        estimator="masked",
        prompt_mask=0.15,
        epochs=12,
        reduction="token",
    )
    c.intra = presets.intra()
    c.search = presets.search()
    c.rewards = dict(task=dict(fn="puzzles.gsm8k", weights=dict(reward=1.0)))
    c.advantages = dict(fn="advantage.group_relative", scale="none")
    c.losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.5, clip_high=0.5),
        kl=dict(fn="policy.kl", coef=0.04, kind="k3"),
    )
    c.optim = presets.adamw(
        lr=3e-6,
        schedule="constant",
        warmup=0.0,
        clip=0.2,
        b2=0.99,
        decay=0.1,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=1, log_every=1, save_every=12, eval_every=120, compute="bfloat16", remat="full"
    )
    c.evals = dict(heldout=dict(fn="sampled.denoised", n=1, temperature=0.0))
    return presets.smoke(c, arg)
