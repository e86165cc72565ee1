"""Direct preference optimisation: a chat model learns which of two answers is preferred, without a
reward model.

Data: JSON lines with `prompt`, `chosen` and `rejected`, and optionally `id`, `weight`, `subset`.
Without an `eval_path`, `eval_fraction` of the prompts is held out. With `:kto,unpaired`: `prompt`,
`answer` and `label`, true or false.

Command:
    jaxreward import --from smollm2 --out models/smollm2
    jaxreward train --config direct/dpo --workdir runs/dpo \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=pairs.jsonl
    jaxreward export --model runs/dpo --out models/dpo

Cost: not measured. The reference is the initial model; it runs once, before the first step.
Expected: not measured; held-out accuracy of the implicit reward depends on the data.
Vary: `:ipo`, `:hinge`, `:simpo`, `:orpo`, `:cpo` and `:kto` put another loss in place of DPO's;
    simpo, orpo and cpo need no reference. docs/direct.md compares them.
    losses.policy.smoothing above 0 is conservative DPO, losses.lm.coef above 0 adds the likelihood
    of the chosen answer (as iterative RPO does).
Smoke: --config direct/dpo:smoke takes a random toy model and generated pairs.

Reference: Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a
reward model", arXiv:2305.18290, beta 0.1. Others: IPO arXiv:2310.12036, SLiC-HF's hinge
arXiv:2305.10425, SimPO arXiv:2405.14734, ORPO arXiv:2403.07691, CPO arXiv:2401.08417, KTO
arXiv:2402.01306. Their beta, gamma and coefficients are commonly quoted ones; IPO's and the hinge's
are defaults of TRL, as is the learning rate of all. The rest of the schedule is ours.
"""

from jaxreward import presets

_WORDS = ("ipo", "hinge", "simpo", "orpo", "cpo", "kto")


def get_config(arg=""):
    """The config; `arg` knows the words ipo, hinge, simpo, orpo, cpo, kto, unpaired and smoke."""
    switches = dict.fromkeys((*_WORDS, "unpaired"), False)
    words = presets.parse_arg(arg, **switches)
    loss, *more = [word for word in _WORDS if words[word]] or ["dpo"]
    if more or (words["unpaired"] and loss != "kto"):
        raise ValueError(
            f"direct/dpo:{arg}: one of {', '.join(_WORDS)} at a time, and unpaired with kto only"
        )
    c = presets.base(arg, **switches)
    c.recipe = "direct"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.data = presets.rows(form="points" if words["unpaired"] else "pairs")
    c.losses = dict(
        policy=dict(fn=f"direct.{loss}", coef=1.0),
        lm=dict(fn="direct.nll", coef=0.0),  # 0: none
    )
    if loss in ("dpo", "cpo"):
        c.losses.policy.update(beta=0.1, smoothing=0.0)
    if loss in ("ipo", "hinge"):
        c.losses.policy.update(beta=0.1)
    if loss == "simpo":
        c.losses.policy.update(beta=2.0, gamma=1.0)
    if loss == "kto":
        c.losses.policy.update(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    if loss == "orpo":
        c.losses.policy.coef = 0.1
    if loss in ("orpo", "cpo"):
        c.losses.lm.coef = 1.0
    c.optim = presets.adamw(
        lr=1e-6,
        schedule="cosine",
        warmup=0.1,
        clip=1.0,
        decay=0.0,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, save_every=200, eval_every=200, compute="float32")
    fn = "pointwise.scores" if words["unpaired"] else "pairwise.accuracy"
    c.evals = dict(heldout=dict(fn=fn))  # of the implicit reward
    return presets.smoke(c, arg)
