"""A Bradley-Terry reward model: a chat model with a scalar head, fitted to preference pairs.

Data: JSON lines with `prompt`, `chosen` and `rejected`, and optionally `id`, `margin`, `weight`,
`subset`, and `chosen_score` with `rejected_score`. Without an `eval_path`, `eval_fraction` of the
pairs is held out.

Losses: `preference.bradley_terry`, `log_exp`, `soft_label`, `hinge`, `margin_regression`,
`absolute_regression` and `centring`; a config of your own may name several, each with a `coef`.

Command:
    jaxreward import --from smollm2 --out models/smollm2
    jaxreward train --config reward_model/bradley_terry --workdir runs/bt \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=pairs.jsonl

Cost: not measured.
Expected: not measured; held-out accuracy depends on the data.
Smoke: --config reward_model/bradley_terry:smoke takes a random toy model and generated pairs.

Reference: Ouyang et al. 2022, "Training language models to follow instructions with human
feedback", section 3.5, one pair a prompt instead of all pairs of a ranking.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "preference"
    c.models = dict(policy=presets.decoder("scalar", train="top", top_layers=6))
    # cache_frozen: run the frozen layers once, and train from what they gave
    c.data = presets.rows(form="pairs", cache_frozen=True)
    # margin: none | data (the rows' own) | scores (chosen_score - rejected_score of the rows)
    c.losses = dict(bt=dict(fn="preference.bradley_terry", coef=1.0, margin="none"))
    c.optim = presets.adamw(lr=1e-4, schedule="cosine", warmup=0.03, clip=1.0, decay=0.01)
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, save_every=200, eval_every=200, compute="float32")
    c.evals = dict(heldout=dict(fn="pairwise.accuracy"))
    return presets.smoke(c, arg)
