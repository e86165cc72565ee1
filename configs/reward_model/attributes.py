"""A reward model of several aspects: one number for each attribute of an answer, by regression.

Data: JSON lines (or Parquet) with `prompt`, `completion` and `scores`, a number for each attribute
(null where it is not known), and optionally `id`, `weight` and `subset`. Rows of HelpSteer2 become
these with `data.corpus=helpsteer2.points` (its five attributes are the default outputs). Without an
`eval_path`, `eval_fraction` of the prompts is held out.

The reward by which answers are compared is the sum of the attributes by `output_weights`, by
default their mean. In HelpSteer2 complexity and verbosity are not merits, so weigh them 0.

Command:
    jaxreward import --from smollm2 --out models/smollm2
    jaxreward train --config reward_model/attributes --workdir runs/attributes \\
        --config.models.policy.init=hf:models/smollm2 \\
        --config.data.path=helpsteer2.jsonl --config.data.corpus=helpsteer2.points

Cost: not measured.
Expected: not measured; held-out correlations depend on the data.
Smoke: --config reward_model/attributes:smoke takes a random toy model and generated answers.

Reference: Wang et al. 2024, "HelpSteer2: Open-source dataset for training top-performing reward
models", arXiv:2406.08673, the regression reward model. Deviation: top layers only by default.
"""

from jaxreward import presets

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "preference"
    c.models = dict(
        policy=presets.decoder(
            "scores",
            train="top",
            top_layers=6,
            outputs=ATTRIBUTES,
            output_weights=(0.4, 0.4, 0.2, 0.0, 0.0),
        )
    )
    # cache_frozen: run the frozen layers once, and train from what they gave
    c.data = presets.rows(form="points", cache_frozen=True)
    c.losses = dict(regression=dict(fn="pointwise.regression", coef=1.0))
    c.optim = presets.adamw(lr=1e-4, schedule="cosine", warmup=0.03, clip=1.0, decay=0.01)
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, save_every=200, eval_every=200, compute="float32")
    c.evals = dict(heldout=dict(fn="pointwise.scores", outputs=ATTRIBUTES))
    return presets.smoke(c, arg)
