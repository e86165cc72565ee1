"""MSRL's first text stage (1a): a judge learns its form from rationales on preference pairs.

Data: HelpSteer3-Preference, whose annotators' feedback is the rationale; ties and pairs without a
rationale are skipped and counted. GRAM-R² has rationales as well: data.corpus=judged.completions,
source=gram.pairs. Without an `eval_path`, `eval_fraction` of the requests is held out.

Command:
    jaxreward train --config msrl/rationale_sft --workdir runs/judge_sft \\
        --config.models.policy.init=hf:models/qwen3 --config.data.path=preference/train.jsonl.gz
    jaxreward train --config msrl/rationale_sft:laptop --workdir runs/judge_sft \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=preference/train.jsonl.gz
    jaxreward export --model runs/judge_sft --out models/judge_sft

Cost: not measured.
Expected: not measured; afterwards most answers should keep the form.
Smoke: --config msrl/rationale_sft:smoke takes a random toy model and generated completions.

Reference: Wang et al. 2026, "MSRL", arXiv:2603.25108, stage 1. By the released scripts: learning
rate 1e-5, 3 epochs, warm-up 0.05, batch 128, 4096 tokens, bfloat16, all weights of the language
model. What they do not set, and their framework's defaults decide: cosine, decay 0.1, b2 0.95.
Deviations: the model is a language model and not InternVL3.5; `batch` counts packed rows, so an
update sees 128 conversations or more (rows that hold two take batch=64); the words of the prompt
are ours, as the paper's are not public. `:laptop` changes init, sizes, precision and mesh only.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the words laptop and smoke."""
    laptop = presets.parse_arg(arg, laptop=False)["laptop"]
    c = presets.base(arg, laptop=False)
    c.recipe = "sft"
    c.models = dict(policy=presets.decoder("lm", train="all", top_layers=0))
    c.models.policy.init = "hf:models/smollm2" if laptop else "hf:models/qwen3"
    c.data = presets.rows(
        corpus="judged.completions,source=helpsteer3.pairs",
        max_len=1024 if laptop else 4096,
        row_len=1024 if laptop else 4096,
        batch=16 if laptop else 128,
        on_bad="skip",
    )
    c.losses = dict(ce=dict(fn="supervised.cross_entropy", coef=1.0))
    c.optim = presets.adamw(
        lr=1e-5,
        schedule="cosine",
        warmup=0.05,
        clip=1.0,
        b2=0.95,
        decay=0.1,
        decay_mask=".*/kernel(/[ab])?",  # with adapters there is nothing else to decay
    )
    c.mesh = presets.mesh() if laptop else presets.mesh(data=1, fsdp=-1)
    c.train = presets.train(
        epochs=3,
        microbatches=8 if laptop else 16,
        save_every=200,
        eval_every=200,
        compute="float32" if laptop else "bfloat16",
        remat="cheap" if laptop else "full",
    )
    c.evals = dict(heldout=dict(fn="likelihood.perplexity"))
    return presets.smoke(c, arg)
