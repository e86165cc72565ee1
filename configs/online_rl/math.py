"""GRPO on problems with a final answer that can be checked, such as GSM8K.

Data: JSON lines (or Parquet) with `prompt` and `answer`, the reference: bare, or a worked solution
that ends in "#### 18" or a box; and optionally `id`. Without an `eval_path`, `eval_fraction` of the
prompts is held out.

The reward needs the extra `real`.

Command:
    jaxreward train --config online_rl/math --workdir runs/grpo \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=problems.jsonl
    jaxreward export --model runs/grpo --out models/grpo

Cost: not measured.
Expected: not measured.
Vary: docs/policy_objectives.md has the settings of DAPO, Dr. GRPO, GSPO, RLOO, REINFORCE++, DLER.
    `:ppo` is PPO with a value head on the policy's states. `:one_step_off` samples a round while
    the last one is learnt from; give the sampler devices with rollouts.devices.
Smoke: --config online_rl/math:smoke takes a random toy model and small sums.

Reference: Shao et al. 2024, "DeepSeekMath: Pushing the limits of mathematical reasoning in open
language models", arXiv:2402.03300, section 4.1. Deviations: the mean is over the tokens of the
batch (DAPO's), and one update is made of each round. `:ppo` is Schulman et al. 2017,
arXiv:1707.06347, with the divergence in the reward, arXiv:1909.08593; a value head that shares the
policy's states, its coefficient and two passes over a round are ours.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the words ppo, one_step_off and smoke."""
    words = presets.parse_arg(arg, ppo=False, one_step_off=False)
    c = presets.base(arg, ppo=False, one_step_off=False)
    c.recipe = "online_rl"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0, value=False))
    c.data = presets.prompts(max_len=512)
    c.rollouts = presets.rollouts(
        prompts=16, answers=8, max_new=512, outcome="answer/accuracy", filter="outcome"
    )
    c.rewards = dict(
        answer=dict(fn="math_answer.grade", weights=dict(accuracy=1.0, format=0.1)),
    )
    c.advantages = dict(fn="advantage.group_relative", scale="std")
    c.losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.2, clip_high=0.28),
        kl=dict(fn="policy.kl", coef=0.0, kind="k3"),  # 0: no reference is kept
    )
    c.optim = presets.adamw(
        lr=1e-6,
        schedule="constant",
        warmup=0.0,
        clip=1.0,
        decay=0.01,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    if words["one_step_off"]:
        c.rollouts.update(ahead=1, importance="token")
    if words["ppo"]:
        c.models.policy.value = True
        c.rollouts.update(filter="none", updates=2, epochs=2, whiten=True, reward_kl=0.05)
        c.advantages = dict(fn="advantage.ppo", gamma=1.0, lam=0.95)
        c.losses.policy.clip_high = 0.2
        c.losses.value = dict(fn="policy.value_loss", coef=0.1, clip=0.2)
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, log_every=1, save_every=20, eval_every=20, compute="float32")
    c.evals = dict(heldout=dict(fn="sampled.answers", n=1, temperature=0.0))
    return presets.smoke(c, arg)
