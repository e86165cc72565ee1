"""A policy learns to answer from completions, and then from rewards on its own answers.

Data: of each stage as its own config says: conversations for sft/chat, problems with `prompt` and
`answer` for online_rl/math.

Command:
    jaxreward train --config staged/sft_then_rl --workdir runs/x \\
        --config.stages.1_sft.overrides='("models.policy.init=hf:models/smollm2",
            "data.path=chats.jsonl")' \\
        --config.stages.2_rl.overrides='("data.path=problems.jsonl",)'
    jaxreward export --model runs/x/2_rl --out models/policy

Cost: not measured.
Expected: not measured.
Smoke: --config staged/sft_then_rl:smoke runs both stages' smoke variants, a random toy model first.

Reference: none of its own; see those of the two configs. Ouyang et al. 2022, "Training language
models to follow instructions with human feedback", is where this order is from.
"""

from ml_collections import ConfigDict

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke, which reaches every stage."""
    words = ":smoke" if presets.parse_arg(arg)["smoke"] else ""
    stage = lambda name, *overrides: dict(config=name + words, overrides=overrides)
    return ConfigDict(
        dict(
            seed=0,
            recipe="staged",
            stages={
                "1_sft": stage("sft/chat"),
                "2_rl": stage("online_rl/math"),
            },
        )
    )
