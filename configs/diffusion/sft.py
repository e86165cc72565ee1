"""Supervised fine-tuning of a masked diffusion model: it learns to fill in masked answers.

Data: as sft/chat. An answer of another length than a sampler's canvas has to end by itself: with
`data.canvas` slots an answer is filled up with end tokens, which `data.padding` says to learn
("noised", as LLaDA does; the end then comes early and often) or only to show ("seen").

Command:
    jaxreward train --config diffusion/sft --workdir runs/denoiser \\
        --config.models.policy.init=hf:models/llada --config.data.path=chats.jsonl
    jaxreward train --config diffusion/sft --workdir runs/denoiser \\
        --config.models.policy.init=hf:models/smollm2 --config.data.path=chats.jsonl \\
        --config.models.policy.from_causal=true --config.models.policy.mask_token='<jupyter_text>'
    jaxreward export --model runs/denoiser --out models/denoiser

Cost: not measured.
Expected: not measured. Perplexities are upper bounds, and not those of a causal model.
Vary: noise.mean=token is d1's normalisation; losses.elbo.fn=denoising.weighted with losses.elbo.p
    is Dream's weight by context; models.policy.block=32 makes a block-diffusion model.
Smoke: --config diffusion/sft:smoke takes a random toy denoiser and generated completions.

Reference: Nie et al. 2025, "Large Language Diffusion Models" (LLaDA), arXiv:2502.09992, section 2.3
and its released code: loss 1/p of the masked tokens of the answer, mean over its length and then
over answers, eps 1e-3. Learning rate, decay and epochs are the paper's as we know them, not read
again. Deviations: the times of a row's texts are spread evenly (`noise.stratified`); warm-up is a
fraction of the steps; answers are not filled up with end tokens unless a canvas is given.
"""

from jaxreward import presets


def get_config(arg=""):
    """The config; `arg` knows the word smoke."""
    c = presets.base(arg)
    c.recipe = "sft"
    c.models = dict(policy=presets.denoiser())
    c.data = presets.rows(canvas=0, padding="none")
    c.noise = presets.noise()
    c.losses = dict(elbo=dict(fn="denoising.elbo", coef=1.0))
    c.optim = presets.adamw(lr=2.5e-5, schedule="cosine", warmup=0.03, clip=1.0, decay=0.1)
    c.mesh = presets.mesh()
    c.train = presets.train(epochs=3, save_every=200, eval_every=200, compute="float32")
    c.evals = dict(heldout=dict(fn="likelihood.perplexity"))
    return presets.smoke(c, arg)
