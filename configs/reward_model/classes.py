"""A classifier of answers: one of several classes for each, by cross-entropy.

Data: JSON lines (or Parquet) with `prompt`, `completion` and `label`, a class by name or index (of
two classes also false and true), and optionally `id`, `weight` and `subset`. Rows of PKU-SafeRLHF
become these with `data.corpus=pku_saferlhf.points`, for which the default classes are. Without an
`eval_path`, `eval_fraction` of the prompts is held out.

The reward by which answers are compared is the expected class, counted from 0: of two classes the
probability of the second. `output_weights` gives the classes other values.

Command:
    jaxreward import --from smollm2 --out models/smollm2
    jaxreward train --config reward_model/classes --workdir runs/safety \\
        --config.models.policy.init=hf:models/smollm2 \\
        --config.data.path=saferlhf.jsonl --config.data.corpus=pku_saferlhf.points

Cost: not measured.
Expected: not measured; held-out accuracy depends on the data.
Smoke: --config reward_model/classes:smoke takes a random toy model and generated answers.

Reference: Dai et al. 2023, "Safe RLHF: Safe reinforcement learning from human feedback",
arXiv:2310.12773. Deviation: only the classification of single answers; its cost model also learns
from pairs.
"""

from jaxreward import presets

CLASSES = ("unsafe", "safe")


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "preference"
    c.models = dict(policy=presets.decoder("classes", train="top", top_layers=6, outputs=CLASSES))
    # cache_frozen: run the frozen layers once, and train from what they gave
    c.data = presets.rows(form="points", cache_frozen=True)
    c.losses = dict(ce=dict(fn="pointwise.cross_entropy", coef=1.0))
    c.optim = presets.adamw(lr=1e-4, schedule="cosine", warmup=0.03, clip=1.0, decay=0.01)
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, save_every=200, eval_every=200, compute="float32")
    c.evals = dict(heldout=dict(fn="pointwise.classes", outputs=CLASSES))
    return presets.smoke(c, arg)
