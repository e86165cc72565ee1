"""Records what TRL's own code gives for policies trained straight from preferences.

Run in an environment of its own; nothing of jaxreward is imported:

    python3.11 -m venv /tmp/trl_venv && /tmp/trl_venv/bin/pip install torch==2.13.0 trl==1.16.0
    /tmp/trl_venv/bin/python tests/goldens/record_trl_direct.py tests/goldens/trl_direct.json

`_compute_loss` of the installed DPOTrainer and KTOTrainer and `get_batch_loss_metrics` of the
experimental CPOTrainer and ORPOTrainer are called as they are, on a trainer that has only the
fields they read, and a model that returns given log-probs of tokens. No formula of a loss is
written here. Pairs come one a batch, so that a mean over the batch is the loss of the pair. A
prompt is one token, which is never predicted: ORPO's trainer counts prompts. Inputs are float64
with values that float32 holds exactly; ORPO's trainer itself turns to float32.
"""

import collections
import json
import pathlib
import sys
import types

import torch
import transformers
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

# Log-probs of the tokens of (chosen, rejected): equal and unequal lengths, likely and unlikely.
PAIRS = [
    ([-1.0, -2.0], [-1.5, -1.5]),
    ([-0.125, -0.25, -0.5, -0.0625], [-3.0]),
    ([-6.0], [-0.5, -0.75, -1.25]),
    ([-2.5, -0.5, -4.0], [-0.25, -0.03125, -0.5, -1.0, -0.125]),
    ([-0.03125], [-8.0, -7.0]),
]
# Of whole answers by the reference: as the policy, and to either side.
REFERENCE = [(-3.0, -3.0), (-2.0, -2.5), (-5.5, -2.0), (-7.0, -4.0), (-1.0, -30.0)]
# KTO's answers: log-prob of each, of the reference, and whether it is desirable.
ANSWERS = [[-3.0, -2.0], [-1.5, -1.5], [-0.5, -4.25], [-2.25, -0.75]]
ANSWERS_REFERENCE = [-4.0, -3.5, -2.0, -3.0]
DESIRABLE = [True, False, True, False]
# Answers to the prompts of others, and the reference's: a positive estimate, and one cut at 0.
OTHERS = [[-6.0], [-4.0], [-7.5], [-5.0]]
OTHERS_REFERENCE = {"above": [-7.0, -4.5, -9.0, -6.0], "below": [-5.0, -4.0, -6.0, -5.5]}


def trainer(kind, **fields):
    """A trainer of the class `kind` that was never set up, on one process."""
    made = object.__new__(kind)
    same = lambda x: x
    defaults = dict(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            gather=same, gather_for_metrics=same, device=torch.device("cpu")
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        label_smoothing=0.0,
    )
    made.__dict__.update({**defaults, **fields})
    return made


def leaves(*answers):
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in answers]


def padded(answers):
    """[n, longest] with zeros behind, and where there is a token."""
    longest = max(map(len, answers))
    rows = [torch.cat([x, x.new_zeros(longest - len(x))]) for x in answers]
    mask = torch.tensor([[i < len(x) for i in range(longest)] for x in answers])
    return torch.stack(rows), mask


def fused(per_token):
    """What a model with a fused head returns."""
    zeros = torch.zeros_like(per_token)
    return types.SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def of_tokens(answers):
    """The gradient to an answer's log-prob: that to any of its tokens, and the same for all."""
    found = []
    for x in answers:
        assert torch.allclose(x.grad, x.grad[:1], rtol=1e-5, atol=1e-9), x.grad
        found.append(x.grad[0].item())
    return found


def dpo(pair, reference, kind, beta):
    """DPOTrainer's loss of one pair."""
    answers = leaves(*pair)
    per_token, mask = padded(answers)
    completion = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], dim=1)
    made = trainer(
        DPOTrainer,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
    )
    inputs = {
        "input_ids": torch.zeros(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape),
        "completion_mask": completion.long(),
        "ref_chosen_logps": torch.tensor(reference[:1], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor(reference[1:], dtype=torch.float64),
    }
    loss = DPOTrainer._compute_loss(made, lambda **_: fused(per_token), inputs, False)
    loss.backward()
    return loss.item(), *of_tokens(answers)


def without_reference(kind, pair, **fields):
    """The loss of one pair by CPOTrainer or ORPOTrainer, from logits over two tokens whose first
    has the given log-prob."""
    answers = leaves(*pair)
    per_token, mask = padded(answers)
    per_token = torch.where(mask, per_token, -1.0)
    logits = torch.stack([per_token, torch.log(-torch.expm1(per_token))], dim=-1)
    # The state of the last token predicts nothing.
    logits = torch.cat([logits, torch.zeros(2, 1, 2)], dim=1)
    batch = {}
    for i, name in enumerate(("chosen", "rejected")):
        live = torch.cat([torch.ones(1, dtype=torch.bool), mask[i]])[None]
        answer = live & (torch.arange(live.shape[1]) > 0)
        batch[f"{name}_input_ids"] = torch.zeros(live.shape, dtype=torch.long)
        batch[f"{name}_attention_mask"] = live.long()
        batch[f"{name}_labels"] = torch.where(answer, 0, -100)
    made = trainer(kind, pad_token_id=0, padding_value=0, alpha=0.0, **fields)
    model = lambda *_, **__: types.SimpleNamespace(logits=logits)
    loss, _ = kind.get_batch_loss_metrics(made, model, batch)
    loss.backward()
    return loss.item(), *of_tokens(answers)


def kto(others, **fields):
    """KTOTrainer's loss of the four answers together."""
    answers, other = leaves(*ANSWERS), leaves(*OTHERS)
    per_token, mask = padded(answers)
    other_token, other_mask = padded(other)
    completion = torch.cat([torch.zeros(4, 1, dtype=torch.bool), mask], dim=1)
    other_completion = torch.cat([torch.zeros(4, 1, dtype=torch.bool), other_mask], dim=1)

    def model(input_ids, **_):
        return fused(other_token if bool((input_ids == 1).all()) else per_token)

    made = trainer(
        KTOTrainer, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **fields
    )
    inputs = {
        "input_ids": torch.zeros(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape),
        "completion_mask": completion.long(),
        "KL_input_ids": torch.ones(other_completion.shape, dtype=torch.long),
        "KL_attention_mask": torch.ones(other_completion.shape),
        "KL_completion_mask": other_completion.long(),
        "label": torch.tensor(DESIRABLE),
        "ref_logps": torch.tensor(ANSWERS_REFERENCE, dtype=torch.float64),
        "ref_KL_logps": torch.tensor(OTHERS_REFERENCE[others], dtype=torch.float64),
    }
    loss = KTOTrainer._compute_loss(made, model, inputs, False)
    loss.backward()
    assert all(x.grad is None for x in other)
    return {
        "loss": loss.item(),
        "kl": made._metrics["train"]["kl"][-1],
        "gradient": of_tokens(answers),
    }


def main(path):
    cases, unpaired = [], []

    def singly(name, loss, **settings):
        rows = [loss(pair, ref) for pair, ref in zip(PAIRS, REFERENCE, strict=True)]
        columns = dict(zip(("loss", "chosen", "rejected"), map(list, zip(*rows, strict=True))))
        cases.append({"name": name, **settings, **columns})

    for beta in (0.125, 1.0):
        for kind in ("sigmoid", "hinge", "ipo"):
            singly(kind, lambda pair, ref: dpo(pair, ref, kind, beta), beta=beta)
        for smoothing in (0.0, 0.25):
            fields = dict(beta=beta, label_smoothing=smoothing, cpo_alpha=0.0)
            make = lambda pair, _: without_reference(
                CPOTrainer, pair, loss_type="sigmoid", **fields
            )
            singly("cpo", make, beta=beta, smoothing=smoothing)
        make = lambda pair, _: without_reference(ORPOTrainer, pair, beta=beta)
        singly("orpo", make, beta=beta)
    singly("nll", lambda pair, ref: dpo(pair, ref, "sft", 1.0))
    fields = dict(beta=0.125, cpo_alpha=0.5, loss_type="sigmoid")
    singly(
        "cpo nll",
        lambda pair, _: without_reference(CPOTrainer, pair, **fields),
        beta=0.125,
        alpha=0.5,
    )
    for beta, gamma in ((2.0, 1.0), (2.5, 0.25)):
        fields = dict(beta=beta, simpo_gamma=gamma, loss_type="simpo", cpo_alpha=0.0)
        make = lambda pair, _: without_reference(CPOTrainer, pair, **fields)
        singly("simpo", make, beta=beta, gamma=gamma)
    for others in OTHERS_REFERENCE:
        for beta, good, bad in ((0.125, 1.0, 1.0), (0.5, 1.0, 1.5)):
            weights = dict(desirable_weight=good, undesirable_weight=bad)
            made = kto(others, beta=beta, **weights)
            unpaired.append({"name": f"kto, kl {others}", "beta": beta, **weights, **made})
    recorded = {
        "made by": "tests/goldens/record_trl_direct.py",
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {
            "pairs": PAIRS,
            "reference": REFERENCE,
            "answers": ANSWERS,
            "answers reference": ANSWERS_REFERENCE,
            "desirable": DESIRABLE,
            "others": OTHERS,
            "others reference": OTHERS_REFERENCE,
        },
        "cases": cases,
        "unpaired": unpaired,
    }
    pathlib.Path(path).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
