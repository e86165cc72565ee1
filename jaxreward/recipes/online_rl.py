"""Policies from rewards on their own answers.

prompts -> rollouts (G answers each) -> rewards of the texts -> advantages -> packed rows (prompt
once) -> updates -> new weights to the sampler; a round is all of this once (`rounds`, `credit`).

What this loop does that a textbook one does not: a group's answers share one computation of their
prompt, in sampling and in the update; rewards run in processes of their own; the log-probabilities
of the old policy are the trainer's, not the sampler's, and where a round is one update they are
those of the update itself; every mean over tokens or answers is taken over the whole minibatch,
whatever row, microbatch or device they are in. docs/policy_objectives.md says which paper is which
setting.

A run may be saved between rounds only, so that its answers need not be stored: resumed, it samples
the same answers from the same weights.
"""

import contextlib
import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import RolloutRows
from jaxreward.data import prompts as prompt_data
from jaxreward.data import tokenize
from jaxreward.evals import sampled
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.objectives import policy
from jaxreward.parallel import mesh, rules
from jaxreward.recipes import credit, evaluate
from jaxreward.recipes.rounds import Rounds
from jaxreward.sampling import choose, rollouts
from jaxreward.train import session

PyTree = Any

# What losses may ask for, by the names of their parameters.
_OF_LOSSES = {
    "logps",
    "old_logps",
    "ref_logps",
    "sampler_logps",
    "advantages",
    "entropy",
    "values",
    "old_values",
    "returns",
    "answer",
    "mask",
    "num_answers",
}


def _losses(config):
    """{name: (function, names of what it takes)} of `config.losses`; coefficient 0 leaves out."""
    made = {}
    for name, entry in config.losses.items():
        if float(entry["coef"]):
            fn = resolve("objectives", entry["fn"], **keywords(entry, "coef"))
            made[name] = fn, credit.takes(fn, _OF_LOSSES)
    return made


def needs(config, what: str) -> bool:
    """Whether a loss of the config takes an argument of that name."""
    return any(what in taken for _, taken in _losses(config).values())


def make_loss(plan: trainable.Plan, config, where: rules.Rules | None = None):
    """(loss, weights, coef) for `make_train_step`, from `config.losses` and `config.rollouts`.

    Every entry of losses has `fn` (resolved in `objectives`), `coef` (0 leaves it out) and further
    keywords. A function is given what its parameters are called after: logps, old_logps,
    ref_logps, sampler_logps, advantages, entropy, answer, mask, num_answers, and with a value head
    values, old_values and returns; and returns one number a token. Losses of advantages are
    multiplied by `policy.importance_weights` where `rollouts.importance` says so. All are averaged
    as `rollouts.reduction` says.

    Raises:
      ValueError, KeyError: naming the entry and what does not fit.
    """
    at = config.rollouts
    entries = _losses(config)
    if not entries:
        raise ValueError("config.losses names no loss with a coefficient other than 0")
    if not plan.value and needs(config, "values"):
        raise ValueError(
            "a loss takes values; set models.policy.value=true, which gives the model a value head"
        )
    none = np.full((1, 1), -1, np.int32)
    credit.reduction(at, none, none)  # an unknown mode is told now, and not after the first round
    coef = {name: float(config.losses[name]["coef"]) for name in entries}
    clips = {}
    for fn, _ in entries.values():
        clips |= {k: v for k, v in fn.keywords.items() if k in ("clip_low", "clip_high", "dual")}

    def loss(params, frozen, rows: RolloutRows, keys, extra):
        del keys
        logps, entropy, values = credit.measure(
            plan, credit.temperature(at), where, params, frozen, rows
        )
        mask = rows.answer >= 0
        old = rows.old_logps
        old = jax.lax.stop_gradient(logps) if old is None else old
        known = {
            "logps": logps,
            "old_logps": old,
            "ref_logps": rows.ref_logps,
            "sampler_logps": rows.sampler_logps,
            "advantages": rows.advantages,
            "entropy": entropy,
            "values": values,
            "old_values": rows.old_values,
            "returns": rows.returns,
            "answer": rows.answer,
            "mask": mask,
            "num_answers": rows.group.shape[1],
        }
        totals = {}
        for name, (fn, taken) in entries.items():
            each = fn(**{key: known[key] for key in taken})
            if "advantages" in taken and at.importance != "none":
                each = each * policy.importance_weights(
                    old,
                    rows.sampler_logps,
                    rows.answer,
                    num_answers=rows.group.shape[1],
                    level=at.importance,
                    cap=at.importance_cap,
                )
            totals[name] = jnp.sum(jnp.where(mask, each * rows.weight, 0.0))
        metrics = policy.report(
            logps, old, rows.advantages, mask=mask, sampler_logps=rows.sampler_logps, **clips
        )
        metrics["entropy"] = m.Mean.of(jax.lax.stop_gradient(entropy), mask)
        if rows.ref_logps is not None:
            apart = policy.kl(jax.lax.stop_gradient(logps), rows.ref_logps, mask=mask)
            metrics["reference_kl"] = m.Mean.of(apart, mask)
        if rows.returns is not None:
            values = jax.lax.stop_gradient(values)
            metrics["value"] = m.Mean.of(values, mask)
            metrics["value_error"] = m.Mean.of(jnp.square(values - rows.returns), mask)
        return totals, metrics, extra

    def weights(rows: RolloutRows):
        return dict.fromkeys(entries, credit.reduction(at, rows.answer, rows.group).denominator)

    return loss, weights, coef


def make_engine(
    plan: trainable.Plan, config, tokenizer, where, *, temperature: float | None = None
) -> rollouts.Engine:
    """The sampler of a run, in this process; at another temperature than the run's, if given."""
    at = config.rollouts
    temperature = at.temperature if temperature is None else temperature
    return rollouts.Engine(
        plan.cfg,
        max_prompt=config.data.max_len,
        max_new=at.max_new,
        choose=choose.make(temperature, top_k=at.top_k, top_p=at.top_p, min_p=at.min_p),
        stop=tokenizer.eos_ids,
        rules=where,
        slots=at.slots or None,
        cache_dtype=at.cache or None,
    )


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training prompts, held-out prompts, facts), as `session.load_data`."""
    return session.load_data(
        config,
        tokenizer,
        read=prompt_data.read,
        made=lambda count, seed: testing.synthetic_problems(count, seed=seed),
        encode=prompt_data.encode,
        what="prompt",
    )


def load_replayed(config, tokenizer) -> tuple[list, dict]:
    """(prompts of an earlier stage that `rollouts.replay` mixes in, facts); nothing without it.

    Raises:
      ValueError: if of ratio and file one is missing; and as `load_data`.
    """
    at = config.rollouts
    path, ratio = at.get("replay_path", ""), at.get("replay", 0)
    if bool(path) != bool(ratio):
        raise ValueError(
            "rollouts.replay_path (a file of older prompts) and rollouts.replay (new ones to one "
            f"of them) go together; received {path!r} and {ratio}"
        )
    if not path:
        return [], {}
    older = config.copy_and_resolve_references().unlock()
    older.data.update(path=path, eval_path="", eval_fraction=0.0)
    old, _, facts = load_data(older, tokenizer)
    return old, {"replayed": facts["data"]}


def meshes(config) -> tuple[rules.Rules | None, rules.Rules | None]:
    """(mesh and layouts of the updates, those of the sampler): the same, unless
    `rollouts.devices` gives the sampler devices of its own, the last ones.

    Raises:
      ValueError: if no device is left for the updates.
    """
    own = config.rollouts.get("devices", 0)
    if not own:
        where = rules.on_mesh(dict(config.mesh))
        return where, where
    devices = jax.devices()
    if not 0 < own < len(devices):
        raise ValueError(
            f"rollouts.devices={own} sample, and of the {len(devices)} devices some must be left "
            "for the updates; lower it, or set 0 to share all of them"
        )
    updates = mesh.make_mesh(dict(config.mesh), devices=devices[:-own])
    sampler = mesh.make_mesh({"data": -1}, devices=devices[-own:])
    # A sampler alone on its device still has a mesh, which says which device that is.
    return rules.Rules(updates) if updates.size > 1 else None, rules.Rules(sampler)


def _ahead(config) -> bool:
    """Whether rounds are sampled one ahead; says what that does not do here."""
    at = config.rollouts
    if at.get("ahead", 0) not in (0, 1):
        raise ValueError(
            "rollouts.ahead must be 0 or 1: answers are sampled by the weights of this round or "
            f"of the one before; received {at.ahead}"
        )
    if not at.get("ahead", 0):
        return False
    if at.importance == "none":
        warnings.warn(
            "rollouts.ahead=1 with rollouts.importance=none: answers come from older weights, and "
            "nothing in the loss makes up for it; set rollouts.importance=token",
            stacklevel=3,
        )
    if not at.get("devices", 0):
        warnings.warn(
            "rollouts.ahead=1 without rollouts.devices: sampling and updates share their devices, "
            "so this changes the order of the work and not the time that it takes",
            stacklevel=3,
        )
    return True


def _scorers(config) -> dict:
    """{name: (prompts, groups of answers) -> scores} of the rewards that are reward models."""
    made = {}
    for name, entry in config.rewards.items():
        if not entry.get("model"):
            continue
        if entry.get("fn"):
            raise ValueError(f"rewards.{name} has both fn and model; it is one or the other")
        made[name] = evaluate.scorer_of(entry["model"], batch=entry.get("batch", 8))
    return made


def build(config, workdir: str | Path, *, engine: rollouts.Rollouts | None = None) -> session.Built:
    """Reads model and prompts and makes state, step, sampler and rounds. Trains nothing.

    Args:
      config: Of a run. workdir: Where it leaves answers.
      engine: Where answers come from; None is our sampler, as the config describes it.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    at = config.rollouts
    if jax.process_count() > 1:
        raise ValueError(
            "online_rl samples in one process; start it once, on all devices of a host"
        )
    if at.filter not in ("none", "outcome", "shaped"):
        raise ValueError(f"rollouts.filter must be none, outcome or shaped; received {at.filter!r}")
    if at.prompts % at.updates:
        raise ValueError(
            f"rollouts.updates={at.updates} must divide rollouts.prompts={at.prompts}: an update "
            "takes whole groups"
        )
    workdir = Path(workdir)
    model = config.models.policy
    folder = export.init_folder(model.init, workdir)
    tokenizer = tokenize.load_tokenizer(folder)
    where, sampler = meshes(config)
    ahead = _ahead(config)
    ways = where.mesh.shape["data"] * where.mesh.shape["fsdp"] if where else 1
    if config.data.batch % ways:
        raise ValueError(
            f"data.batch={config.data.batch} rows at a time do not divide over data x fsdp = "
            f"{ways} devices; set data.batch to a multiple"
        )
    train, held, facts = load_data(config, tokenizer)
    old, more = load_replayed(config, tokenizer)
    cfg, weights, _ = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    if cfg.mask != "causal":
        raise ValueError(
            f"models.policy.init={model.init!r} is a denoiser; its recipe is diffusion_rl (mro/rl)"
        )
    plan = trainable.make_plan(cfg, model, language=True)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(plan, weights, jax.random.fold_in(key, 1), rules=where)
    del weights
    per_round = at.updates * at.epochs
    rounds_an_epoch = max(1, len(train) // at.prompts)
    steps = (config.train.steps or config.train.epochs * rounds_an_epoch) * per_round
    state, step, schedule = session.stepper(
        config,
        plan=plan,
        params=params,
        key=key,
        where=where,
        steps=steps,
        losses=make_loss(plan, config, where),
        microbatches=lambda rows: rows // config.data.batch,
        copies=["sampler"] if ahead else [],
    )
    grader = sampled.Grader(config, tokenizer, scorers=_scorers(config))
    rounds = Rounds(
        config,
        engine=engine or make_engine(plan, config, tokenizer, sampler),
        grader=grader,
        records=train,
        replayed=old,
        credit=credit.Credit(
            config,
            plan=plan,
            frozen=frozen,
            start=params,
            where=where,
            reference=needs(config, "ref_logps"),
        ),
        plan=plan,
        frozen=frozen,
        key=key,
        workdir=workdir,
        rounds=steps // per_round,
    )
    copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))

    def stepped(state, frozen, batch):
        if ahead and rounds.first:
            # Of the weights that the next round is being sampled from, for a resume.
            state = state.replace(extra={**state.extra, "sampler": copied(state.params)})
        state, metrics = step(state, frozen, batch)
        one = jnp.float32(1)
        more = {f"rollouts/{k}": m.Mean(jnp.float32(v), one) for k, v in rounds.metrics.items()}
        return state, metrics | more

    stepped.trace = step.trace  # for the loop, which counts the FLOPs of an update

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
        evaluate=session.evaluator(
            config, make_predict(plan, config, tokenizer, where, grader, key), frozen, held
        ),
        schedule=schedule,
        meta=session.origin(config, folder, load.content_hash(folder), tokenizer),
        facts=facts
        | more
        | {
            "rows": {"length": rounds.length, "answers a round": at.prompts * at.answers},
            "steps": {"a round": per_round, "total": steps},
            "parameters": {"trained": tr.count(params), "frozen": tr.count(frozen)},
            "mesh": _described(where, sampler),
        },
        before=rounds.before,
        whole=rounds.whole,
    )


def _described(where, sampler):
    of = lambda r: mesh.describe(r.mesh) if r else "one device"
    return of(where) if sampler is where else f"{of(where)}; sampler {of(sampler)}"


def make_predict(
    plan: trainable.Plan, config, tokenizer, where, grader: sampled.Grader, key: jax.Array
):
    """(params, frozen, prompts, n, temperature) -> `evals.sampled.Answered`.

    The same prompts get the same keys every time, so that two evaluations differ by weights alone.
    """
    engine_at = functools.cache(
        lambda temperature: make_engine(plan, config, tokenizer, where, temperature=temperature)
    )
    join = jax.jit(lambda params, frozen: trainable.join(plan, params, frozen)[0])

    def predict(params, frozen, prompts, n, temperature):
        engine = engine_at(temperature)
        engine.publish(join(params, frozen), 0)
        together = max(1, config.rollouts.prompts * config.rollouts.answers // n)
        groups = []
        for i in range(0, len(prompts), together):
            ids = [prompt["ids"] for prompt in prompts[i : i + together]]
            engine.submit(ids, n, jax.random.fold_in(jax.random.fold_in(key, 3), i))
            groups += engine.collect()
        grades, _ = grader(prompts, groups)
        of = lambda get, dtype: np.array([[get(a) for a in group] for group in groups], dtype)
        return sampled.Answered(
            outcome=grades.outcome,
            reward=grades.reward,
            length=of(lambda a: len(a.tokens), np.float32),
            finished=of(lambda a: a.finished, bool),
            parts=grades.parts,
        )

    return predict


def run(config, workdir: str | Path, *, engine: rollouts.Rollouts | None = None) -> Path:
    """Trains, or goes on after the newest saved round. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir; beside that,
    answers/ holds what was sampled for the first prompts of each round. `engine` as in `build`.
    """
    workdir = session.enter(workdir, config.train)
    presets.save(config, workdir / "config.json")
    built = build(config, workdir, engine=engine)
    with contextlib.closing(built.batches):
        session.run(built, workdir, config.train)
    return workdir
