"""Records what TRL's own online RL code gives, values and gradients, for tests/objectives.

Run in an environment of its own; nothing of jaxreward is imported:

    python3.11 -m venv /tmp/trl_venv && /tmp/trl_venv/bin/pip install torch==2.13.0 trl==1.16.0
    /tmp/trl_venv/bin/python tests/goldens/record_trl_policy.py tests/goldens/trl_policy.json

`_compute_loss` and `_generate_and_score_completions` of the installed GRPOTrainer and RLOOTrainer
are called as they are, on a stand-in for the trainer (a namespace with the fields that they read).
Its model returns given log-probs, its sampler given lengths, its reward functions given numbers. No
formula is written here. Inputs are float64 with values that float32 holds exactly.

This release has no PPO trainer: GAE, value loss and whitening are not recorded.
"""

import collections
import json
import math
import pathlib
import sys
import types

import torch
import transformers
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

# Six answers of 5, 3, 1, 4, 2 and 5 tokens. Steps away from the old policy cross every clip.
LENGTHS = [5, 3, 1, 4, 2, 5]
OLD = [
    [-1.0, -2.5, -0.25, -3.0, -0.5],
    [-0.75, -1.5, -4.0, -1.0, -1.0],
    [-2.0, -1.0, -1.0, -1.0, -1.0],
    [-0.125, -6.0, -2.25, -1.75, -1.0],
    [-1.25, -0.5, -1.0, -1.0, -1.0],
    [-3.5, -0.625, -1.125, -2.0, -5.0],
]
STEP = [
    [0.125, -0.5, 0.25, 0.1875, -0.125],
    [0.5, -0.25, 0.0625, 9.0, 9.0],
    [0.21875, 9.0, 9.0, 9.0, 9.0],
    [-0.0625, 2.0, -1.0, 0.375, 9.0],
    [-0.3125, 0.15625, 9.0, 9.0, 9.0],
    [1.5, 0.03125, -0.1875, -0.75, 0.28125],
]
REFERENCE = [
    [-0.5, 0.25, 0.0, -1.0, 0.125],
    [0.75, -0.375, 1.25, 9.0, 9.0],
    [-0.0625, 9.0, 9.0, 9.0, 9.0],
    [0.5, -2.0, 0.0, 0.25, 9.0],
    [0.375, 0.0, 9.0, 9.0, 9.0],
    [-0.25, 0.875, -0.125, 0.0, 0.5],
]
DRAWN = [
    [0.0, 0.25, -0.125, -1.0, 0.0],
    [-0.5, 0.0625, 0.0, 9.0, 9.0],
    [1.25, 9.0, 9.0, 9.0, 9.0],
    [0.0, 0.5, -0.75, 0.25, 9.0],
    [-0.03125, 0.0, 9.0, 9.0, 9.0],
    [2.0, -0.25, 0.0, 0.375, -0.0625],
]
ADVANTAGES = [1.0, -1.5, 0.5, -0.75, 2.0, 0.0]
# Two rewards of eight answers to two prompts: mixed, and all equal in one reward; one answer lacks
# the second, and one lacks both.
NAN = math.nan
REWARDS = [[1, 0.5], [0, 0.25], [0, 2], [1, -1.5], [1, 0.125], [1, NAN], [1, 3], [NAN, NAN]]


def added(a, b):
    return [[x + y for x, y in zip(p, q)] for p, q in zip(a, b)]


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def stand_in(**fields):
    """What the methods read of a trainer on one process."""
    same = lambda x, **_: x
    common = dict(
        model=types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=types.SimpleNamespace(
            gather=same,
            gather_for_metrics=same,
            reduce=same,
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
    )
    return types.SimpleNamespace(**{**common, **fields})


def batch(lengths, width):
    """Prompts of one token and answers of the given lengths, as padded tensors."""
    n = len(lengths)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    return {
        "prompt_ids": torch.ones(n, 1, dtype=torch.long),
        "prompt_mask": torch.ones(n, 1, dtype=torch.long),
        "completion_ids": torch.ones(n, width, dtype=torch.long),
        "completion_mask": mask.long(),
    }


def loss_case(trainer_class, fields, inputs, lengths=LENGTHS):
    """(loss, gradient to the log-probs) of `_compute_loss`."""
    logps = tensor(added(OLD, STEP)).requires_grad_()
    fields = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            logps,
            torch.zeros_like(logps),
            None,
        ),
        **fields,
    }
    given = {**batch(lengths, 5), "advantages": tensor(ADVANTAGES), **inputs}
    loss = trainer_class._compute_loss(stand_in(**fields), None, given)
    loss.backward()
    return {"loss": loss.item(), "gradient": logps.grad.tolist()}


def grpo_loss(
    loss_type,
    level="token",
    clip=(0.2, 0.2),
    delta=None,
    beta=0.0,
    drawn=None,
    lengths=LENGTHS,
):
    fields = dict(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        beta=beta,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=drawn is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=8,
        _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(
            delta=delta, use_bias_correction_kl=False, steps_per_generation=1
        ),
    )
    inputs = {
        "old_per_token_logps": tensor(OLD),
        "ref_per_token_logps": tensor(added(OLD, REFERENCE)),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
    }
    if drawn is not None:
        inputs["importance_sampling_ratio"] = tensor(drawn)
    return loss_case(GRPOTrainer, fields, inputs, lengths)


def rloo_loss(clip):
    mask = batch(LENGTHS, 5)["completion_mask"]
    fields = dict(epsilon_low=clip[0], epsilon_high=clip[1])
    return loss_case(RLOOTrainer, fields, {"old_logps": (tensor(OLD) * mask).sum(1)})


def scored(trainer_class, rewards, generations, lengths=None, drawn=None, **fields):
    """What `_generate_and_score_completions` makes of given samples and rewards."""
    n = len(rewards)
    lengths = lengths or [1] * n
    rewards = tensor(rewards)
    ids = [[1] * length for length in lengths]
    old = tensor([row[: max(lengths)] for row in OLD[:n]] if n <= len(OLD) else [[0.0]] * n)
    reference = tensor([row[: max(lengths)] for row in added(OLD, REFERENCE)[:n]])
    logps = drawn and [row[:length] for row, length in zip(added(OLD, drawn), lengths)]
    names = [f"reward{k}" for k in range(rewards.shape[1])]
    # The reference is asked after the old policy.
    answers = iter([old, reference])
    base = dict(
        args=types.SimpleNamespace(
            per_device_train_batch_size=n,
            steps_per_generation=1,
            # Not aligned, so that the old policy is asked.
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        num_iterations=2,
        environment_factories=None,
        environments=None,
        tools=None,
        _is_vlm=False,
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        pad_token_id=0,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        use_vllm=drawn is not None,
        vllm_importance_sampling_correction=True,
        ref_model=object(),
        num_generations=generations,
        reward_weights=torch.ones(rewards.shape[1], dtype=torch.float64),
        reward_funcs=names,
        reward_func_names=names,
        reward_clip_range=None,
        normalize_advantages=False,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        log_multimodal=False,
        _logs=collections.defaultdict(list, rewards=collections.defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _calculate_rewards=lambda *_: rewards,
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(answers), None, None),
        _generate=lambda _: (
            ([[1]] * n, ids, None, [""] * n, logps or None, {}, None, None)
            if trainer_class is GRPOTrainer
            else ([[1]] * n, ids, [""] * n)
        ),
    )
    trainer = stand_in(**{**base, **fields})
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * n)


def main(path):
    losses, advantages, ratios = [], [], []

    def loss(make, **settings):
        losses.append({"trainer": make.__name__[:4], **settings, **make(**settings)})

    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo"):
        for level in ("token", "sequence"):
            loss(grpo_loss, loss_type=loss_type, level=level)
            loss(
                grpo_loss, loss_type=loss_type, level=level, clip=(0.2, 0.28), delta=2.0, beta=0.125
            )
    loss(grpo_loss, loss_type="grpo", level="sequence", clip=(3e-4, 4e-4))
    loss(grpo_loss, loss_type="dapo", clip=(0.2, 0.28), delta=10.0, beta=5e-4)
    # An answer that is masked altogether: TRL counts it.
    loss(grpo_loss, loss_type="grpo", lengths=[5, 0, 1, 4, 2, 5])
    for clip in ((0.2, 0.2), (0.1, 0.4)):
        loss(rloo_loss, clip=clip)

    def advantage(name, *args, **settings):
        made = scored(*args, **settings)["advantages"]
        advantages.append({"name": name, **settings, "advantages": made.tolist()})

    first = [[row[0]] for row in REWARDS]
    for name, rewards in (("one", first), ("two", REWARDS)):
        for scale in ("group", "batch", "none"):
            advantage(f"grpo {name}", GRPOTrainer, rewards, 4, scale_rewards=scale)
        advantage(
            f"gdpo {name}",
            GRPOTrainer,
            rewards,
            4,
            multi_objective_aggregation="normalize_then_sum",
        )
        advantage(f"rloo {name}", RLOOTrainer, rewards, 4)
        advantage(f"rloo {name}", RLOOTrainer, rewards, 4, normalize_advantages=True)
    same = [[0.1]] * 3 + [[1e6]] * 3
    for scale in ("group", "batch"):
        advantage("grpo same", GRPOTrainer, same, 3, scale_rewards=scale)
    advantage("rloo kl", RLOOTrainer, first[:6], 3, lengths=LENGTHS, beta=0.25)

    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        for low, cap in ((None, 2.0), (0.5, 3.0)):
            made = scored(
                GRPOTrainer,
                first[:6],
                3,
                lengths=LENGTHS,
                drawn=DRAWN,
                vllm_importance_sampling_mode=mode,
                vllm_importance_sampling_clip_min=low,
                vllm_importance_sampling_clip_max=cap,
            )["importance_sampling_ratio"]
            ratios.append({"mode": mode, "low": low or 0.0, "cap": cap, "weights": made.tolist()})
            if low is None:
                loss(grpo_loss, loss_type="dapo", drawn=made.tolist())
    recorded = {
        "made by": "tests/goldens/record_trl_policy.py",
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {
            "lengths": LENGTHS,
            "logps": added(OLD, STEP),
            "old": OLD,
            "reference": added(OLD, REFERENCE),
            "sampler": added(OLD, DRAWN),
            "advantages": ADVANTAGES,
            "rewards": [[None if math.isnan(x) else x for x in row] for row in REWARDS],
        },
        "losses": losses,
        "advantages": advantages,
        "ratios": ratios,
    }
    pathlib.Path(path).write_text(
        json.dumps(recorded, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1])
