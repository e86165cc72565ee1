"""Supervised fine-tuning: a language model learns the assistant's side of conversations.

Data: JSON lines (or Parquet) with `messages`, or with `prompt` and `completion`, and optionally
`id`. Only the assistant's tokens are learnt, with the end token of each of its turns. Without an
`eval_path`, `eval_fraction` of the prompts is held out.

Command:
    jaxreward import --from smollm2 --out models/smollm2
    jaxreward train --config sft/chat --workdir runs/sft \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=chats.jsonl
    jaxreward export --model runs/sft --out models/sft

Cost: not measured.
Expected: not measured; held-out perplexity depends on the data.
Smoke: --config sft/chat:smoke takes a random toy model and generated completions.

Reference: Ouyang et al. 2022, "Training language models to follow instructions with human
feedback", section 3.5. Deviation: the mean is over the supervised tokens of a batch, not over
conversations, and prompts are not learnt.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "sft"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.data = presets.rows()
    c.losses = dict(ce=dict(fn="supervised.cross_entropy", coef=1.0))
    c.optim = presets.adamw(
        lr=1e-5,
        schedule="cosine",
        warmup=0.03,
        clip=1.0,
        decay=0.01,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=1, save_every=200, eval_every=200, compute="float32")
    c.evals = dict(heldout=dict(fn="likelihood.perplexity"))
    return presets.smoke(c, arg)
