"""Records what TRL's own loss code gives, values and gradients, for tests/objectives.

Run in an environment of its own; nothing of jaxreward is imported:

    python3.11 -m venv /tmp/trl_venv && /tmp/trl_venv/bin/pip install torch==2.13.0 trl==1.16.0
    /tmp/trl_venv/bin/python tests/goldens/record_trl.py tests/goldens/trl.json

`RewardTrainer.compute_loss` and `DPOTrainer._compute_loss` of the installed release are called as
they are, on a stand-in for the trainer (a namespace with the fields that they read) and a model
that returns given numbers. No formula is written here. Inputs are float64 with values that float32
holds exactly.
"""

import collections
import json
import pathlib
import sys
import types

import torch
import transformers
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

# Ties, both signs, large gaps, and rewards far from 0.
CHOSEN = [0.0, 3.0, 1.0, -2.5, 0.25, 12.0, -30.0, 7.5, 40.0]
REJECTED = [0.0, 1.0, 3.0, -2.25, 0.25, 11.5, 10.0, -8.0, -20.0]
MARGIN = [0.0, 0.5, 1.0, 2.0, -1.0, 3.0, 0.25, 9.0, 4.0]


def stand_in(**fields):
    """What the two methods read of a trainer on one process."""
    same = lambda x: x
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            gather=same, gather_for_metrics=same, device=torch.device("cpu")
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def gradients(make, chosen, rejected):
    """(loss, gradient to chosen, gradient to rejected) as plain numbers."""
    chosen = torch.tensor(chosen, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(rejected, dtype=torch.float64, requires_grad=True)
    loss = make(chosen, rejected)
    loss.backward()
    return {"loss": loss.item(), "chosen": chosen.grad.tolist(), "rejected": rejected.grad.tolist()}


def reward_loss(margin=None, centre=None):
    """RewardTrainer's loss of given rewards."""

    def make(chosen, rejected):
        logits = torch.cat([chosen, rejected])[:, None]
        model = lambda **_: types.SimpleNamespace(logits=logits)
        trainer = stand_in(args=types.SimpleNamespace(center_rewards_coefficient=centre))
        inputs = {"attention_mask": torch.ones(len(logits), 1)}
        if margin is not None:
            inputs["margin"] = torch.tensor(margin, dtype=torch.float64)
        return RewardTrainer.compute_loss(trainer, model, inputs)

    return make


def dpo_loss(loss_type, beta, smoothing=0.0):
    """DPOTrainer's loss of given log-ratios: completions of one token, reference log-probs of 0."""

    def make(chosen, rejected):
        n = len(chosen)
        per_token = torch.cat([chosen, rejected])[:, None]
        zeros = torch.zeros(2 * n, 1)
        model = lambda **_: types.SimpleNamespace(
            log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )
        trainer = stand_in(
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=smoothing,
        )
        reference = torch.zeros(n, dtype=torch.float64)
        inputs = {
            "input_ids": torch.zeros(2 * n, 2, dtype=torch.long),
            "attention_mask": torch.ones(2 * n, 2),
            "completion_mask": torch.tensor([[0, 1]] * (2 * n)),
            "ref_chosen_logps": reference,
            "ref_rejected_logps": reference,
        }
        return DPOTrainer._compute_loss(trainer, model, inputs, False)

    return make


def main(path):
    cases = []

    def batch(name, loss, **settings):
        cases.append({"name": name, **settings, **gradients(loss, CHOSEN, REJECTED)})

    def singly(name, make, **settings):
        # One pair a batch: the mean over the batch is then the loss of the pair.
        rows = [gradients(make(i), [c], [r]) for i, (c, r) in enumerate(zip(CHOSEN, REJECTED))]
        flat = {k: [row[k][0] for row in rows] for k in ("chosen", "rejected")}
        cases.append({"name": name, **settings, "loss": [row["loss"] for row in rows], **flat})

    batch("reward", reward_loss())
    batch("reward margin", reward_loss(margin=MARGIN))
    for centre in (0.01, 0.5):
        batch("reward centred", reward_loss(centre=centre), centre=centre)
        batch("reward margin centred", reward_loss(MARGIN, centre), centre=centre)
    singly("reward singly", lambda i: reward_loss())
    singly("reward margin singly", lambda i: reward_loss(margin=[MARGIN[i]]))
    for beta in (0.125, 1.0):
        for kind in ("sigmoid", "hinge", "ipo", "sppo_hard"):
            singly(kind, lambda i: dpo_loss(kind, beta), beta=beta)
        for smoothing in (0.0, 0.125, 0.4):
            # `aot` sorts the batch first; a batch of one pair is sorted.
            made = dpo_loss("aot", beta, smoothing)
            singly("aot", lambda i: made, beta=beta, smoothing=smoothing)
    recorded = {
        "made by": "tests/goldens/record_trl.py",
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {"chosen": CHOSEN, "rejected": REJECTED, "margin": MARGIN},
        "cases": cases,
    }
    pathlib.Path(path).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
