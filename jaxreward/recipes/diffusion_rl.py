"""Denoisers from rewards on what they fill in: MRO's RL and rejection sampling, and diffu-GRPO.

prompts -> canvases -> rewards of drafts and of final answers -> advantages of step groups -> rows
of single steps -> updates; a round is all of this once (`steps`).

What this loop does that a textbook one does not: a trajectory is kept as its last canvas and the
step at which each token came, and earlier canvases are rebuilt; drafts are measured only where a
step group ends; the losses are the policy's of `online_rl`, on rows of steps in place of answers.

Rejection sampling is the same loop with a search (`search.width`), whose winners are imitated
(`steps.imitation`).

A run may be saved between rounds only.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import resolve
from jaxreward.data import prompts, tokenize
from jaxreward.data.corpora import countdown
from jaxreward.evals import likelihood, sampled
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.parallel import mesh, rules
from jaxreward.recipes import credit, denoisers, evaluate, online_rl
from jaxreward.recipes.steps import Canvases, Steps
from jaxreward.sampling import search
from jaxreward.train import session, writers

PyTree = Any


def perplexity_of(model, workdir: Path, *, batch: int = 8):
    """A function of texts: the mean negative log-likelihood a token under a causal model, f32[N].

    A text without tokens gets infinity: there is nothing fluent in it.

    Args:
      model: Has `init`. workdir: For init="tiny". batch: Rows that run at a time.

    Raises:
      ValueError: if the model is not causal.
    """
    folder = export.init_folder(model.init, workdir)
    tokenizer = tokenize.load_tokenizer(folder)
    cfg, weights, _ = load.load(folder)
    if cfg.mask != "causal":
        raise ValueError(
            f"models.perplexity.init={model.init!r} is a denoiser; fluency needs a causal model"
        )
    plan = trainable.Plan(cfg, head=None)
    params, frozen = trainable.split(plan, weights)
    predict = likelihood.make_predict(plan, batch=batch)

    def measure(texts):
        # The first token has nothing before it; a beginning makes it count as any other.
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        ids = [np.array(start + list(tokenizer.ids(text)), np.int32) for text in texts]
        found = np.full(len(texts), np.inf, np.float32)
        known = [i for i, row in enumerate(ids) if len(row) > 1]
        empty = np.zeros(0, np.int32)
        made = [tokenize.Tree(str(i), empty, [ids[i]], [np.arange(len(ids[i])) > 0]) for i in known]
        if made:
            logp, count = np.concatenate(predict(params, frozen, made)).T
            found[known] = -logp / count
        return found

    return measure


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training prompts, held-out prompts, facts), as `session.load_data`; "synthetic" are small
    problems of Countdown."""

    def made(count, seed):
        rows = countdown.problems(count, seed=seed, form="plain")
        return [{"id": row["id"], "prompt": row["prompt"], "extra": row} for row in rows]

    return session.load_data(
        config,
        tokenizer,
        read=prompts.read,
        made=made,
        encode=prompts.encode,
        what="prompt",
    )


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and prompts and makes state, step, sampler and rounds. Trains nothing.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    at = config.rollouts
    if jax.process_count() > 1:
        raise ValueError("diffusion_rl samples in one process; start it once, on all devices")
    if at.prompts % at.updates:
        raise ValueError(
            f"rollouts.updates={at.updates} must divide rollouts.prompts={at.prompts}: an update "
            "takes whole groups"
        )
    workdir = Path(workdir)
    model = config.models.policy
    folder = export.init_folder(model.init, workdir, denoiser=True)
    tokenizer = tokenize.load_tokenizer(folder)
    where = rules.on_mesh(dict(config.mesh))
    ways = where.mesh.shape["data"] * where.mesh.shape["fsdp"] if where else 1
    if config.data.batch % ways:
        raise ValueError(
            f"data.batch={config.data.batch} rows at a time do not divide over data x fsdp = "
            f"{ways} devices; set data.batch to a multiple"
        )
    train, held, facts = load_data(config, tokenizer)
    cfg, weights, _ = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    cfg = denoisers.of_model(cfg, model, tokenizer)
    plan = trainable.make_plan(cfg, model, language=True)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(plan, weights, jax.random.fold_in(key, 1), rules=where)
    del weights
    per_round = at.updates * at.epochs
    rounds_an_epoch = max(1, len(train) // at.prompts)
    # Both 0: the model is measured as it is.
    steps = (config.train.steps or config.train.epochs * rounds_an_epoch) * per_round
    state, step, schedule = session.stepper(
        config,
        plan=plan,
        params=params,
        key=key,
        where=where,
        steps=steps,
        losses=online_rl.make_loss(plan, config, where),
        microbatches=lambda rows: rows // config.data.batch,
    )
    grader = sampled.Grader(config, tokenizer)
    reader = config.models.get("perplexity")
    fluent = perplexity_of(reader, workdir / "reader") if config.intra.fluency and reader else None
    canvases = Canvases(config, plan, tokenizer, where, perplexity=fluent)
    rounds = Steps(
        config,
        canvases=canvases,
        grader=grader,
        records=train,
        plan=plan,
        frozen=frozen,
        start=params,
        where=where,
        reference=online_rl.needs(config, "ref_logps"),
        key=key,
        workdir=workdir,
    )

    def stepped(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        one = jnp.float32(1)
        more = {f"rollouts/{k}": m.Mean(jnp.float32(v), one) for k, v in rounds.metrics.items()}
        return state, metrics | more

    stepped.trace = step.trace  # for the loop, which counts the FLOPs of an update
    predict = make_predict(plan, config, canvases, grader, key)
    return session.Built(
        plan=plan,
        rules=where,
        tokenizer=tokenizer,
        folder=folder,
        state=state,
        frozen=frozen,
        step=stepped,
        batches=rounds,
        to_device=functools.partial(credit.to_rows, where=where),
        train=train,
        heldout=held,
        steps=steps,
        evaluate=session.evaluator(config, predict, frozen, held),
        schedule=schedule,
        meta=session.origin(config, folder, load.content_hash(folder), tokenizer),
        facts=facts
        | {
            "rows": {
                "canvas": canvases.length + at.max_new,
                "answers a round": at.prompts * at.answers,
            },
            "steps": {"a round": per_round, "total": steps},
            "parameters": {"trained": tr.count(params), "frozen": tr.count(frozen)},
            "mesh": mesh.describe(where.mesh) if where else "one device",
        },
        before=rounds.before,
        whole=rounds.whole,
    )


def _judged_by(at, grader):
    """What a search adds for final answers: (records, texts) -> f32[texts], or None.

    Raises:
      ValueError: for unknown `labels`.
    """
    if at.labels not in ("gold", "vote", "none"):
        raise ValueError(f"search.labels must be gold, vote or none; received {at.labels!r}")
    if at.labels == "none":
        return None
    split = lambda records, texts: np.array(texts, object).reshape(len(records), -1).tolist()
    if at.labels == "gold":
        return lambda records, texts: grader.of_texts(records, split(records, texts)).reward.ravel()
    read = resolve("rewards", at.answer)

    def voted(records, texts):
        answers = [[read(text) for text in row] for row in split(records, texts)]
        labels = search.pseudo_labels(answers)
        agree = lambda row, label: [label is not None and a == label for a in row]
        return np.array([agree(*x) for x in zip(answers, labels)], np.float32).ravel()

    return voted


def make_predict(plan: trainable.Plan, config, canvases: Canvases, grader, key: jax.Array):
    """(params, frozen, prompts, n, temperature, steps, width) -> `evals.sampled.Answered`.

    The same prompts get the same keys every time, so that two evaluations differ by weights alone.
    With `width` above 0 each answer is searched for (`sampling.search`), by the rewards of drafts
    and, as `config.search.labels` says, by the answer that most candidates give ("vote"), by the
    reference ("gold"), or by neither ("none").
    """
    join = jax.jit(lambda params, frozen: trainable.join(plan, params, frozen)[0])
    quality = _judged_by(config.search, grader)

    def predict(params, frozen, asked, n, temperature, steps=0, width=0):
        joined = join(params, frozen)
        every = config.search.every if width else 0
        schedule = canvases.schedule(temperature=temperature, steps=steps, every=every)
        together = max(1, config.rollouts.prompts * config.rollouts.answers // n)
        together = min(together, len(asked))
        groups, passes = [], []
        for i in range(0, len(asked), together):
            some = asked[i : i + together]
            some = some + [some[0]] * (together - len(some))  # one shape, hence one program
            own = jax.random.fold_in(jax.random.fold_in(key, 3), i)
            canvas = canvases.fill(joined, some, n, own, schedule, width=width, quality=quality)
            groups += canvases.groups(canvas, some, n)
            passes.append(int(canvas.step))
        groups = groups[: len(asked)]
        grades, _ = grader(asked, groups)
        of = lambda get, dtype: np.array([[get(a) for a in group] for group in groups], dtype)
        parts = {**grades.parts, "passes": np.full(grades.reward.shape, np.mean(passes))}
        return sampled.Answered(
            outcome=grades.outcome,
            reward=grades.reward,
            length=of(lambda a: len(a.tokens), np.float32),
            finished=of(lambda a: a.finished, bool),
            parts=parts,
        )

    return predict


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on after the newest saved round. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir; beside that,
    answers/ holds what was sampled for the first prompts of each round. With train.epochs=0 and
    train.steps=0 nothing is trained, and evaluation.json has what `config.evals` measured.
    """
    workdir = session.enter(workdir, config.train)
    presets.save(config, workdir / "config.json")
    built = build(config, workdir)
    with contextlib.closing(built.batches):
        if built.steps:
            session.run(built, workdir, config.train)
        else:
            found = built.evaluate(built.state)
            evaluate.write_json(workdir / "evaluation.json", found)
            writers.say("\n".join(f"{name:<40} {value:.4g}" for name, value in found.items()))
    return workdir
