"""The quickstart's reward model: is this answer of SmolLM2-135M to a sum or a product right?

The top layers and a scalar head are trained on pairs of a right and a wrong answer to one problem;
the layers below run once. Everything else is as in reward_model/bradley_terry.

Command:
    bash launch/quickstart.sh      makes the data first; its training phase is the same as
    jaxreward train --config quickstart/arithmetic --workdir runs/quickstart/run \\
        --config.data.path=runs/quickstart/pairs.jsonl

Cost: 1 to 2 minutes of training on two cores (see README.md for the machine and date).
Expected: see README.md, which quotes the quickstart's own output.
Smoke: --config quickstart/arithmetic:smoke takes a random toy model and generated pairs.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    presets.parse_arg(arg)
    c = presets.load("reward_model/bradley_terry")
    c.unlock()
    c.models.policy.init = "hf:runs/quickstart/smollm2"
    c.models.policy.top_layers = 3
    c.data.path = "runs/quickstart/pairs.jsonl"
    c.data.max_len = 256
    c.data.batch = 8
    c.data.eval_fraction = 0.1
    c.optim.lr = 3e-4
    c.optim.decay = 0.1
    c.train.epochs = 6
    c.train.log_every = 5
    c.train.eval_every = 20
    c.train.save_every = 40
    return presets.smoke(c, arg)
