"""Policies from rewards on their own answers.

prompts -> rollouts (G answers each) -> rewards of the texts -> advantages -> packed rows (prompt
once) -> updates -> new weights to the sampler; a round is all of this once.

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
import inspect
import time
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
from jaxreward.data import rollouts as rollout_data
from jaxreward.data import sources, tokenize
from jaxreward.evals import sampled
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.objectives import advantage, policy, supervised
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.sampling import choose, rollouts
from jaxreward.train import session

PyTree = Any


def _taken(fn, known):
    """The arguments among `known` that a resolved function has and its config does not bind."""
    parameters = inspect.signature(fn.func).parameters.values()
    free = [p for p in parameters if p.name not in fn.keywords]
    lacking = [p.name for p in free if p.default is p.empty and p.name not in known]
    if lacking:
        raise ValueError(
            f"{fn.func.__module__}.{fn.func.__name__} takes {', '.join(lacking)}, which online_rl "
            f"does not know; it knows {', '.join(sorted(known))}"
        )
    return [p.name for p in free if p.name in known]


# What losses may ask for, by the names of their parameters.
_OF_LOSSES = {
    "logps",
    "old_logps",
    "ref_logps",
    "sampler_logps",
    "advantages",
    "entropy",
    "answer",
    "mask",
    "num_answers",
}
_OF_ADVANTAGES = {"rewards", "group", "num_groups", "answer", "penalty"}


def _losses(config):
    """{name: (function, names of what it takes)} of `config.losses`; coefficient 0 leaves out."""
    made = {}
    for name, entry in config.losses.items():
        if float(entry["coef"]):
            fn = resolve("objectives", entry["fn"], **keywords(entry, "coef"))
            made[name] = fn, _taken(fn, _OF_LOSSES)
    return made


def _needs(config) -> tuple[bool, bool]:
    """(whether old log-probs must be computed before the updates, whether there is a reference)."""
    at = config.rollouts
    asked = {name for _, taken in _losses(config).values() for name in taken}
    reference = "ref_logps" in asked or at.reward_kl > 0
    return at.updates * at.epochs > 1 or at.reward_kl > 0, reference


def make_measure(plan: trainable.Plan, config, where: rules.Rules | None = None):
    """The jitted (params, frozen, rows) -> (log-probs, entropy), float32[B, S] both."""
    return jax.jit(functools.partial(_measure, plan, config.rollouts.temperature, where))


def _measure(plan, temperature, where, params, frozen, rows: RolloutRows):
    states = trainable.states(plan, params, frozen, rows, rules=where)
    picked = jnp.take_along_axis(states, rows.source[..., None], axis=1)
    return supervised.token_logps(
        picked,
        trainable.head_matrix(plan, params, frozen, rules=where),
        rows.target,
        temperature=temperature or 1.0,
        softcap=plan.cfg.logit_softcap,
    )


def make_loss(plan: trainable.Plan, config, where: rules.Rules | None = None):
    """(loss, weights, coef) for `make_train_step`, from `config.losses` and `config.rollouts`.

    Every entry of losses has `fn` (resolved in `objectives`), `coef` (0 leaves it out) and further
    keywords. A function is given what its parameters are called after: logps, old_logps,
    ref_logps, sampler_logps, advantages, entropy, answer, mask, num_answers; and returns one number
    a token. Losses of advantages are multiplied by `policy.importance_weights` where
    `rollouts.importance` says so. All are averaged as `rollouts.reduction` says.

    Raises:
      ValueError, KeyError: naming the entry and what does not fit.
    """
    at = config.rollouts
    entries = _losses(config)
    if not entries:
        raise ValueError("config.losses names no loss with a coefficient other than 0")
    none = np.full((1, 1), -1, np.int32)
    _reduction(at, none, none)  # an unknown mode is told now, and not after the first round
    coef = {name: float(config.losses[name]["coef"]) for name in entries}
    clips = {}
    for fn, _ in entries.values():
        clips |= {k: v for k, v in fn.keywords.items() if k in ("clip_low", "clip_high", "dual")}

    def loss(params, frozen, rows: RolloutRows, keys, extra):
        del keys
        logps, entropy = _measure(plan, at.temperature, where, params, frozen, rows)
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
        return totals, metrics, extra

    def weights(rows: RolloutRows):
        return dict.fromkeys(entries, _reduction(at, rows.answer, rows.group).denominator)

    return loss, weights, coef


def _reduction(at, answer, group):
    # Groups are numbered over the round, which is all that a batch of it can hold.
    return policy.reduction(
        answer,
        num_answers=group.shape[1],
        mode=at.reduction,
        length=at.max_new,
        group=group,
        num_groups=at.prompts,
    )


class Rounds:
    """Minibatches of sampled answers, without end; between rounds its state is one number.

    `before` must be called with the training state before each `next`.
    """

    def __init__(
        self, config, *, engine, grader, records, plan, frozen, start, key, where, workdir
    ):
        """
        Args:
          config: Its sections `rollouts`, `advantages`, `data` and the seed are read. `data.batch`
            rows run at a time.
          engine: A `sampling.rollouts.Rollouts`.
          grader: (records, groups) -> (Grades, texts).
          records: Prompts, from `data.prompts.encode`.
          plan, frozen, start: Model; `start` are the initial trained parameters, for the reference.
          key: Of the run. where: Mesh and layouts, or None.
          workdir: Where answers are shown, in answers/.
        """
        self._config, self._at = config, config.rollouts
        self._engine, self._grader, self._records = engine, grader, records
        self._plan, self._frozen, self._where = plan, frozen, where
        self._key, self._workdir = jax.random.fold_in(key, 2), workdir
        self._old, self._reference = _needs(config)
        self._measure = make_measure(plan, config, where) if self._old or self._reference else None
        self._start = start if self._reference else None
        self._join = jax.jit(lambda params, frozen: trainable.join(plan, params, frozen)[0])
        self._round, self._queue, self._params = 0, [], None
        self.length = config.data.row_len or rollout_data.row_len(
            max_prompt=config.data.max_len, max_new=self._at.max_new, answers=self._at.answers
        )
        self.metrics: dict[str, Any] = {}
        kw = keywords(config.advantages)
        self._advantage = resolve("objectives", config.advantages["fn"], **kw)
        self._taken = _taken(self._advantage, _OF_ADVANTAGES)

    def close(self) -> None:
        """Ends the processes of the rewards."""
        self._grader.close()

    def whole(self) -> bool:
        """True between rounds."""
        return not self._queue

    def get_state(self) -> dict:
        """Position, as plain JSON values."""
        return {"round": self._round}

    def set_state(self, state: dict) -> None:
        """Goes on after that many rounds."""
        self._round, self._queue = state["round"], []

    def before(self, state) -> None:
        """Takes the weights that the next round is sampled from."""
        self._params = state.params

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if not self._queue:
            self._queue = self._sampled()
            self._round += 1
        return self._queue.pop(0)

    def _prompts(self) -> list[dict]:
        """The prompts of a round: each epoch all of them once, in an order of its own."""
        P, N = self._at.prompts, len(self._records)
        seen = range(self._round * P, (self._round + 1) * P)
        orders = {
            epoch: np.random.default_rng([self._config.seed, epoch]).permutation(N)
            for epoch in {i // N for i in seen}
        }
        return [self._records[orders[i // N][i % N]] for i in seen]

    def _sampled(self) -> list[dict]:
        at, number = self._at, self._round
        clock = [time.monotonic()]
        records = self._prompts()
        self._engine.publish(self._join(self._params, self._frozen), number)
        key = jax.random.fold_in(self._key, number)
        self._engine.submit([record["ids"] for record in records], at.answers, key)
        groups = self._engine.collect()
        clock.append(time.monotonic())
        grades, said = self._grader(records, groups)
        clock.append(time.monotonic())
        batches, efficiency = rollout_data.minibatches(
            groups,
            count=at.updates,
            row_len=self.length,
            answers_per_row=2 * at.answers,
            multiple=self._config.data.batch,
        )
        rewards = shaped(at, grades, groups)
        batches, kept = self.with_advantages(batches, grades, rewards, groups)
        clock.append(time.monotonic())
        self._note(records, groups, grades, rewards, said)
        sampled = sum(len(answer.tokens) for group in groups for answer in group)
        lengths = [len(answer.tokens) for group in groups for answer in group]
        times = np.diff(clock)
        self.metrics = {
            "reward": rewards.mean(),
            "outcome": grades.outcome.mean(),
            **{f"part/{name}": values.mean() for name, values in grades.parts.items()},
            "failed": grades.failed.mean(),
            "length": np.mean(lengths),
            "length_max": np.max(lengths),
            "truncated": np.mean([not a.finished for group in groups for a in group]),
            "useful": self._engine.utilisation,
            "efficiency": efficiency,
            "sampled_per_second": sampled / max(times[0], 1e-9),
            **{f"seconds/{n}": s for n, s in zip(("sample", "reward", "prepare"), times)},
            **kept,
        }
        self.metrics = {k: float(v) for k, v in self.metrics.items() if np.isfinite(v)}
        order = np.random.default_rng([self._config.seed, 1, number])
        return [batches[b] for _ in range(at.epochs) for b in order.permutation(at.updates)]

    def with_advantages(self, batches, grades, rewards, groups):
        """The minibatches with what the losses need, and how many groups were kept.

        Args:
          batches: From `data.rollouts.minibatches`; changed in place.
          grades: Of the answers. rewards: As `shaped` makes them, [P, G].
          groups: The answers.
        """
        at = self._at
        rows = [self.rows(batch) for batch in batches]
        joined = {k: np.concatenate([b[k] for b in batches]) for k in ("answer", "group", "member")}
        group, member = joined["group"], joined["member"]
        of = lambda x: np.where(group >= 0, x[group, member], 0.0).astype(np.float32)
        keep = group >= 0
        kept, counted = advantage.keep_groups(
            of(grades.outcome),
            group,
            num_groups=at.prompts,
            shaped=of(rewards) if at.filter == "shaped" else None,
        )
        if at.filter != "none":
            keep &= np.asarray(kept)
        if at.mask_truncated:
            finished = np.array([[a.finished for a in g] for g in groups])
            keep &= of(finished) > 0
        answer = np.asarray(advantage.keep_answers(joined["answer"], keep))
        old = ref = None
        if self._old:
            old = [self._measure(self._params, self._frozen, row)[0] for row in rows]
        if self._reference:
            ref = [self._measure(self._start, self._frozen, row)[0] for row in rows]
        penalty = None
        if at.reward_kl > 0:
            over = policy.kl(
                jnp.concatenate(old), jnp.concatenate(ref), kind="k1", mask=answer >= 0
            )
            penalty = at.reward_kl * over
        known = {
            "rewards": of(rewards),
            "group": np.where(keep, group, -1),
            "num_groups": at.prompts,
            "answer": answer,
            "penalty": penalty,
        }
        each = self._advantage(**{key: known[key] for key in self._taken})
        if each.shape == group.shape:
            each = advantage.token_advantages(each, answer)
        if at.whiten:
            each = advantage.whiten(each, answer >= 0)
        each = np.asarray(each)
        size = len(batches[0]["answer"])
        for b, batch in enumerate(batches):
            part = slice(b * size, (b + 1) * size)
            batch["answer"], batch["advantages"] = answer[part], each[part]
            batch["weight"] = np.asarray(_reduction(at, answer[part], group[part]).weight)
            if old is not None:
                batch["old_logps"] = np.asarray(old[b])
            if ref is not None:
                batch["ref_logps"] = np.asarray(ref[b])
        return batches, {k: v.result() for k, v in counted.items()}

    def rows(self, batch: dict) -> RolloutRows:
        """A minibatch on the devices."""
        zeros = np.zeros(batch["answer"].shape, np.float32)
        arrays = {"advantages": zeros, "weight": zeros, **batch}
        names = {f.name for f in dataclasses.fields(RolloutRows)}
        arrays = {k: v for k, v in arrays.items() if k in names}
        return RolloutRows(**hosts.to_global(arrays, self._where))

    def _note(self, records, groups, grades, shaped, said):
        """The answers of a round to its first prompts, for people."""
        if not hosts.is_writer() or not self._at.show:
            return
        folder = Path(self._workdir) / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "round": self._round,
                "id": records[p]["id"],
                "prompt": records[p]["prompt"],
                "answer": said[p][i],
                "reward": float(shaped[p, i]),
                "parts": {name: float(values[p, i]) for name, values in grades.parts.items()},
                "tokens": len(answer.tokens),
                "finished": answer.finished,
            }
            for p in range(min(self._at.show, len(records)))
            for i, answer in enumerate(groups[p])
        ]
        sources.write_jsonl(folder / f"{self._round:06d}.jsonl", lines)


def shaped(at, grades: sampled.Grades, groups) -> np.ndarray:
    """Rewards with what the length of an answer does to them, [P, G]."""
    if not at.overlong:
        return grades.reward
    lengths = np.array([[len(answer.tokens) for answer in group] for group in groups], np.int32)
    penalty = advantage.overlong_penalty(lengths, longest=at.max_new, cache=at.overlong)
    return grades.reward + np.asarray(penalty)


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


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and prompts and makes state, step, sampler and rounds. Trains nothing.

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
    )
    grader = sampled.Grader(config, tokenizer)
    rounds = Rounds(
        config,
        engine=make_engine(plan, config, tokenizer, where),
        grader=grader,
        records=train,
        plan=plan,
        frozen=frozen,
        start=params,
        key=key,
        where=where,
        workdir=workdir,
    )

    def stepped(state, frozen, batch):
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
        to_device=rounds.rows,
        train=train,
        heldout=held,
        steps=steps,
        evaluate=session.evaluator(
            config, make_predict(plan, config, tokenizer, where, grader, key), frozen, held
        ),
        schedule=schedule,
        meta=session.origin(config, folder, load.content_hash(folder), tokenizer),
        facts=facts
        | {
            "rows": {"length": rounds.length, "answers a round": at.prompts * at.answers},
            "steps": {"a round": per_round, "total": steps},
            "parameters": {"trained": tr.count(params), "frozen": tr.count(frozen)},
            "mesh": mesh.describe(where.mesh) if where else "one device",
        },
        before=rounds.before,
        whole=rounds.whole,
    )


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


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on after the newest saved round. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir; beside that,
    answers/ holds what was sampled for the first prompts of each round.
    """
    workdir = session.enter(workdir, config.train)
    presets.save(config, workdir / "config.json")
    built = build(config, workdir)
    with contextlib.closing(built.batches):
        session.run(built, workdir, config.train)
    return workdir
