"""MSRL's second text stage (1b): GRPO of a judge on preference pairs, by their labels alone.

Data: GRAM-R²'s pairs; any other of docs/data.md by its name, such as
data.corpus=judged.prompts,source=helpsteer3.pairs. Which answer is A is drawn pair by pair. Without
an `eval_path`, `eval_fraction` of the requests is held out, in one order each; for both orders
write the file of the evaluation as docs/papers/msrl.md shows. Longer prompts than max_len are
skipped.

Command:
    jaxreward train --config msrl/text_grpo --workdir runs/judge \\
        --config.models.policy.init=hf:models/judge_sft --config.data.path=gram.jsonl
    jaxreward train --config msrl/text_grpo:laptop --workdir runs/judge \\
        --config.models.policy.init=hf:models/judge_sft --config.data.path=gram.jsonl
    jaxreward export --model runs/judge --out models/judge

Cost: not measured.
Expected: not measured. The paper's numbers are of image and video benchmarks after all stages.
Vary: evals.heldout.n=16 with evals.heldout.temperature=1.0 votes; advantages.scale=std is the
    common variant, with larger steps on prompts that are nearly solved; losses.kl.coef above 0.
Smoke: --config msrl/text_grpo:smoke takes a random toy model and small sums with a letter.

Reference: Wang et al. 2026, "MSRL", arXiv:2603.25108, stage 1. By the released scripts: learning
rate 1e-6, 1 epoch, no warm-up, 128 answers an update = 16 prompts x 8, one update a round, rewards
accuracy 1 and format 0.2, advantages without a division, clip 0.2 and 0.28, no KL term (the paper
prints one), means by answer, temperature 1, 1024 new tokens, 4096 in all, bfloat16, all weights of
the language model. What they do not set, and their framework's defaults decide: cosine, decay 0.1,
b2 0.95. Deviations: those defaults would also sample with top-p 0.9 and top-k 50, which the losses
do not know of, so both are off; the form is read strictly (`rewards/verdict.py`); the model is a
language model and not InternVL3.5. The paper's 128 may count prompts. `:laptop` changes init,
sizes, precision and mesh only.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the words laptop and smoke."""
    laptop = presets.parse_arg(arg, laptop=False)["laptop"]
    c = presets.base(arg, laptop=False)
    c.recipe = "online_rl"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.models.policy.init = "hf:models/judge_sft"
    c.data = presets.prompts(
        corpus="judged.prompts,source=gram.pairs",
        max_len=768 if laptop else 3072,
        batch=1 if laptop else 8,
        eval_fraction=0.05 if laptop else 0.001,
        on_bad="skip",
    )
    c.rollouts = presets.rollouts(
        prompts=4 if laptop else 16,
        answers=8,
        max_new=256 if laptop else 1024,
        outcome="judge/accuracy",
        reduction="sequence",
        filter="none",
    )
    c.rewards = dict(
        judge=dict(fn="verdict.agreement", weights=dict(accuracy=1.0, format=0.2)),
    )
    c.advantages = dict(fn="advantage.group_relative", scale="none")
    c.losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.2, clip_high=0.28),
        kl=dict(fn="policy.kl", coef=0.0, kind="k3"),  # 0: no reference is kept
    )
    c.optim = presets.adamw(
        lr=1e-6,
        schedule="cosine",
        warmup=0.0,
        clip=1.0,
        b2=0.95,
        decay=0.1,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh() if laptop else presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=1,
        log_every=1,
        save_every=20 if laptop else 200,
        eval_every=20 if laptop else 200,
        compute="float32" if laptop else "bfloat16",
        remat="cheap" if laptop else "full",
    )
    c.evals = dict(heldout=dict(fn="judges.both_orders", reward="judge", n=1, temperature=0.0))
    return presets.smoke(c, arg)
