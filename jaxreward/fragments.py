"""Sections of configs with their defaults, plain dicts: what `presets` hands to config files."""


def decoder(
    head,
    *,
    train="top",
    top_layers=6,
    outputs=None,
    output_weights=(),
    head_hidden=0,
    head_dropout=0.0,
    value=None,
):
    """One entry of `models`: a decoder and its head.

    Args:
      head: "lm", a language model; "scalar", a reward; "scores", a number for each of `outputs`;
        "classes", one of `outputs`.
      train: "all", "lora", "top" (the last `top_layers` and the head) or "head".
      top_layers: Upper layers that are trained ("top") or adapted ("lora"; 0 = every layer).
      outputs, output_weights: Names of a head's numbers, and what each weighs in the reward; ()
        takes the default of the head (`models.heads.reward`).
      head_hidden, head_dropout: Width of a hidden layer of a reward's head (0: linear), and the
        share of its inputs that training drops.
      value: Whether a policy ("lm") has a value head beside its own; None where no recipe asks.
    """
    model = {
        "family": "decoder",
        "init": "hf:models/smollm2",
        "head": head,
        "train": train,
        "top_layers": top_layers,
        "lora_rank": 0,
        "lora_alpha": 16.0,
        "lora_targets": ".*/(q|k|v|o|gate|up|down)/kernel",
    }
    if head != "lm":
        model |= {"head_hidden": head_hidden, "head_dropout": float(head_dropout)}
    if value is not None:
        model["value"] = value
    if outputs is not None:
        model |= {"outputs": tuple(outputs), "output_weights": tuple(output_weights)}
    return model


def denoiser(*, train="all", top_layers=0):
    """One entry of `models`: a masked diffusion model.

    A causal checkpoint becomes the start of one with `from_causal=True`, `mask_token` (the text of
    a token of the vocabulary that no text has), and `block` positions a block (0 = attention over
    the whole text). For a denoiser's checkpoint these stay as they are here: it says so itself.
    """
    model = decoder("lm", train=train, top_layers=top_layers)
    return {**model, "from_causal": False, "mask_token": "", "block": 0}


def noise(*, mean="sequence", eps=1e-3, stratified=True, samples=4):
    """The section `noise` of recipes that train denoisers.

    `mean` is "sequence" (each answer counts the same: LLaDA's SFT) or "token" (each token does: its
    pre-training, and d1). A text is masked with the probability (1 - eps) t + eps; `stratified`
    spreads the times t of a row's texts evenly. Evaluations average over `samples` times.
    """
    return {"mean": mean, "eps": float(eps), "stratified": stratified, "samples": samples}


def rows(**changes):
    """The section `data` of recipes that read a file and pack it.

    `path` and `eval_path` are files (without the second, `eval_fraction` of the prompts is held
    out); `corpus` names a function of `data.corpora` that makes our rows of others, with keywords
    behind the name, such as "helpsteer3.pairs" or "pku_saferlhf.pairs,which=safer"; `template` is
    auto, chat or plain; `max_len` counts the tokens of a prompt with one answer; `row_len` 0 is
    chosen from the data; `batch` and `eval_batch` count rows, each of which packs several texts;
    `on_bad` is error or skip.
    """
    return {
        "path": "",
        "corpus": "",
        "eval_path": "",
        "template": "auto",
        "max_len": 1024,
        "row_len": 0,
        "batch": 8,
        "eval_fraction": 0.05,
        "eval_batch": 8,
        "on_bad": "error",
        **changes,
    }


def prompts(**changes):
    """The section `data` of recipes that sample: as `rows`, but `max_len` counts the tokens of a
    prompt alone, `row_len` 0 takes a prompt with as many answers as fit, and an update runs
    `batch` rows at a time, as often as its answers need."""
    section = rows(max_len=512)
    del section["eval_batch"]
    return {**section, **changes}


def rollouts(
    *,
    prompts,
    answers,
    max_new,
    outcome,
    updates=1,
    epochs=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    slots=0,
    cache="",
    reduction="token",
    filter="none",
    mask_truncated=False,
    overlong=0,
    whiten=False,
    importance="none",
    importance_cap=2.0,
    reward_kl=0.0,
    workers=2,
    timeout=10.0,
    offsets=False,
    show=2,
    ahead=0,
    devices=0,
    replay=0,
    replay_path="",
):
    """How the answers of a round are sampled, graded and used.

    Args:
      prompts, answers: Of a round, and to each prompt. max_new: Most tokens of an answer.
      outcome: The part of a reward that says whether an answer is right, "<reward>/<part>".
      updates: Minibatches of a round, a divisor of `prompts`. epochs: Times each is used.
      temperature, top_k, top_p, min_p: Of sampling; the losses use the temperature, too.
      slots: Answers decoded side by side; 0 = all. cache: Dtype of keys and values, "" = compute.
      reduction: "token", "sequence", "sequence_sum", "fixed" (over `max_new`) or "group", as
        `objectives.policy.reduction`.
      filter: Which groups count: "none" (all), "outcome" (outcomes differ) or "shaped" (something
        is right, and rewards differ).
      mask_truncated: Leave out answers that were cut off at `max_new`.
      overlong: Last tokens before `max_new` over which rewards fall by 1; 0 = none.
      whiten: Advantages over all tokens of the round.
      importance, importance_cap: `objectives.policy.importance_weights` between sampler and
        trainer: "none", "token", "sequence" or "mean".
      reward_kl: Coefficient of the divergence from the initial policy in the rewards.
      workers, timeout: Processes of the rewards (0 = none, in this one), seconds for one call.
      offsets: Tell rewards the characters of each token.
      show: Prompts a round whose answers are written to answers/.
      ahead: 1 samples a round from the weights before the last round's updates, so that sampling
        and updates can overlap. devices: The last devices, that only sample; 0 = all do both.
      replay, replay_path: New prompts to one older prompt, and the file of those; 0 = none.
    """
    return {
        "prompts": prompts,
        "answers": answers,
        "max_new": max_new,
        "outcome": outcome,
        "updates": updates,
        "epochs": epochs,
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "min_p": float(min_p),
        "slots": slots,
        "cache": cache,
        "reduction": reduction,
        "filter": filter,
        "mask_truncated": mask_truncated,
        "overlong": overlong,
        "whiten": whiten,
        "importance": importance,
        "importance_cap": float(importance_cap),
        "reward_kl": float(reward_kl),
        "workers": workers,
        "timeout": float(timeout),
        "offsets": offsets,
        "show": show,
        "ahead": ahead,
        "devices": devices,
        "replay": replay,
        "replay_path": replay_path,
    }


def denoised(
    *,
    prompts,
    answers,
    max_new,
    steps,
    outcome,
    block=0,
    order="confidence",
    pace="even",
    tempered=False,
    temperature=0.25,
    logp_temperature=1.0,
    top_k=0,
    top_p=1.0,
    guidance=0.0,
    ends="free",
    threshold=0.0,
    cache="none",
    estimator="steps",
    every=2,
    groups=1,
    prompt_mask=0.0,
    updates=1,
    epochs=1,
    reduction="sequence_sum",
    importance="none",
    importance_cap=2.0,
    workers=2,
    timeout=10.0,
    show=2,
):
    """The section `rollouts` of a denoiser's recipe.

    Args:
      prompts, answers, outcome, updates, epochs, reduction, importance, importance_cap, workers,
        timeout, show, top_k, top_p: As `rollouts`; a row of the means is one denoising step.
      max_new: Positions of an answer. steps: In which they are filled in.
      block, order, pace, tempered, guidance, ends, threshold, cache: As
        `sampling.denoise.Schedule`.
      temperature: Of sampling. logp_temperature: Of the log-probabilities that are learnt from.
      estimator: "steps", log-probabilities of what each step committed, given the canvas before it
        (MRO); "masked", of whole answers that are masked (diffu-GRPO).
      every: Steps of a group, whose reward they share. groups: How many of a trajectory's groups
        are learnt from, drawn anew each round; 0 = all.
      prompt_mask: For "masked": probability with which a prompt's token is hidden.
    """
    return {
        "prompts": prompts,
        "answers": answers,
        "max_new": max_new,
        "steps": steps,
        "block": block,
        "order": order,
        "pace": pace,
        "tempered": tempered,
        "temperature": float(temperature),
        "logp_temperature": float(logp_temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "guidance": float(guidance),
        "ends": ends,
        "threshold": float(threshold),
        "cache": cache,
        "estimator": estimator,
        "every": every,
        "groups": groups,
        "prompt_mask": float(prompt_mask),
        "outcome": outcome,
        "updates": updates,
        "epochs": epochs,
        "reduction": reduction,
        "importance": importance,
        "importance_cap": float(importance_cap),
        "workers": workers,
        "timeout": float(timeout),
        "show": show,
    }


def intra(
    *,
    verification=0.0,
    fluency=0.0,
    confidence=0.0,
    samples=1,
    log=False,
    cap=100.0,
    scale=100.0,
    mode="endpoint",
    shaping=False,
):
    """What MRO's rewards of drafts weigh, and how they become rewards of step groups.

    `verification`, `fluency` and `confidence` (how likely the tokens were that were committed so
    far) are weights; `samples` tokens of a draft are verified, by
    probability or by its `log`; `cap` and `scale` are the fluency's C and F, read by
    `models.perplexity`. `mode` "endpoint" measures the last draft of a group, "sum" all of them.
    `shaping` adds the difference that a group made to the quality of drafts, in place of the
    quality of the final answer to the last group.
    """
    return {
        "verification": float(verification),
        "fluency": float(fluency),
        "confidence": float(confidence),
        "samples": samples,
        "log": log,
        "cap": float(cap),
        "scale": float(scale),
        "mode": mode,
        "shaping": shaping,
    }


def search(*, width=0, every=2, labels="vote", answer="puzzles.extract"):
    """Test-time search: `width` continuations of `every` steps, of which the best goes on.

    `width` is that of training; evaluations have their own. `labels` is what final answers are
    held to in evaluations: "vote", what most candidates answer (read by the function `answer` of a
    text); "gold", the reference; "none". In training it is the reference.
    """
    return {"width": width, "every": every, "labels": labels, "answer": answer}


def mesh(*, data=-1, fsdp=1, context=1, expert=1, tensor=1):
    """The device mesh, axis by axis; -1 takes the devices that are left (plain data parallel)."""
    return {"data": data, "fsdp": fsdp, "context": context, "expert": expert, "tensor": tensor}


def adamw(
    *,
    lr,
    schedule="cosine",
    warmup=0.03,
    clip=1.0,
    b1=0.9,
    b2=0.999,
    decay=0.01,
    decay_mask=".*/kernel",
    freeze="",
    groups=None,
):
    """AdamW. `warmup` is a fraction of the steps; decay acts on the paths `decay_mask` matches.

    `freeze` is a regular expression: parameters whose whole path matches are not trained. `groups`
    multiplies learning rates: {"head": {"match": "score/.*", "lr": 10.0}}.

    The numbers are made floats here, since an override is parsed by the type of the field and
    `lr=1` would turn 1e-3 away.
    """
    return {
        "name": "adamw",
        "lr": float(lr),
        "schedule": schedule,
        "warmup": float(warmup),
        "clip": float(clip),
        "b1": float(b1),
        "b2": float(b2),
        "decay": float(decay),
        "decay_mask": decay_mask,
        "freeze": freeze,
        "groups": groups or {},
    }


def train(
    *,
    steps=0,
    epochs=1,
    microbatches=1,
    log_every=10,
    save_every=200,
    eval_every=200,
    keep=2,
    compute="float32",
    remat="cheap",
    ema=0.0,
    max_skipped=3,
    tensorboard=False,
    wandb="",
    profile_from=0,
    profile_steps=0,
):
    """The training loop. `steps` above 0 wins over `epochs`; `keep` counts checkpoints.

    `remat` is "cheap", "full" or "none" (see `models.decoder.Config`). With `ema` above 0 a moving
    average of the parameters, of that decay, is evaluated, scored with and exported. A step with a
    number that is not finite is skipped; `max_skipped` of them in a row end the run.

    `tensorboard` also writes event files, `wandb` names a project of Weights & Biases ("" for
    none), and `profile_steps` steps from `profile_from` on are traced (see `train.tracking`).
    """
    return {
        "steps": steps,
        "epochs": epochs,
        "microbatches": microbatches,
        "log_every": log_every,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep": keep,
        "compute": compute,
        "remat": remat,
        "ema": ema,
        "max_skipped": max_skipped,
        "tensorboard": tensorboard,
        "wandb": wandb,
        "profile_from": profile_from,
        "profile_steps": profile_steps,
    }
