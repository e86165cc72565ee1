"""Rounds of RL on a denoiser: what it filled in, what each step of that earned, rows to learn from.

prompts -> canvases (sampled or searched) -> final texts graded, drafts measured -> rewards of step
groups -> advantages -> rows, one a denoising step: the canvas before it, and what it committed

Or, with rollouts.estimator="masked", one row an answer: all of it masked and the prompt in part, as
diffu-GRPO estimates log-probabilities. Either way rows are `RolloutRows`, so that the losses are
those of `recipes.online_rl`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import Trajectory
from jaxreward.data import judges
from jaxreward.data import rollouts as rollout_data
from jaxreward.diffusion import trajectory
from jaxreward.evals import sampled
from jaxreward.models import trainable
from jaxreward.objectives import steps as step_advantages
from jaxreward.recipes import credit
from jaxreward.rewards import correlation
from jaxreward.sampling import autoregressive, choose, denoise, drafts, search

PyTree = Any
ESTIMATORS = ("steps", "masked")
_OF_CANVAS = ("tokens", "segments", "given", "reveal", "full_logps")


class Canvases:
    """Prompts filled in by a denoiser, as the sections `rollouts`, `search` and `intra` say.

    Sampling, search and evaluation go through here, so that all fill in alike.
    """

    def __init__(self, config, plan, tokenizer, where, *, perplexity: Callable | None = None):
        """
        Args:
          config: Of a run. plan: The denoiser. tokenizer: Its own. where: Mesh, or None.
          perplexity: Texts -> mean negative log-likelihood a token, for fluency.

        Raises:
          ValueError: if fluency has a weight and no model, or what the schedule does not take.
        """
        self._config, self._plan, self._tokenizer, self._where = config, plan, tokenizer, where
        self._perplexity = perplexity
        if config.intra.fluency and perplexity is None:
            raise ValueError(
                f"intra.fluency={config.intra.fluency} needs a causal model that reads drafts; set "
                "models.perplexity.init=hf:<folder>, or intra.fluency=0"
            )
        self.length = max(16, 1 << (config.data.max_len - 1).bit_length())
        self.ends = sorted(tokenizer.eos_ids)
        self._ways = where.mesh.shape["data"] * where.mesh.shape["fsdp"] if where else 1

    def schedule(self, *, temperature=None, steps=0, every=0) -> denoise.Schedule:
        """The config's; at another temperature, with other steps, with drafts, where given."""
        at = self._config.rollouts
        temperature = at.temperature if temperature is None else temperature
        return denoise.Schedule(
            at.max_new,
            steps or at.steps,
            at.block,
            at.order,
            at.pace,
            choose.make(temperature, top_k=at.top_k, top_p=at.top_p),
            tempered=at.tempered,
            guidance=at.guidance,
            ends=at.ends,
            end_ids=tuple(self.ends) if at.ends != "free" else (),
            threshold=at.threshold,
            cache=at.cache,
            every=every,
        )

    def fill(self, params, records, answers, key, schedule, *, width=0, quality=None):
        """Fills in `answers` canvases to each record's prompt.

        Args:
          params: Whole decoder. records: Prompts with ids. answers: To each. key: Of the round.
          schedule: From `schedule`. width: Continuations that a search chooses among; 0 = none.
          quality: For a search: (records, texts, equally many to each) -> f32[texts], which counts
            in the last step group; or None.
        """
        ids = [record["ids"] for record in records]
        tokens, mask = autoregressive.padded(ids, rows=len(ids), length=self.length)
        tokens, mask = (np.repeat(x, answers, axis=0) for x in (tokens, mask))
        more = -len(tokens) % self._ways  # copies of the first row, filled in and thrown away
        grown = lambda x: np.concatenate([x, np.repeat(x[:1], more, axis=0)])
        rows = grown(tokens), grown(mask), jax.random.split(key, len(tokens) + more)
        kw = dict(schedule=schedule, rules=self._where)
        if not width:
            canvas = denoise.sample(params, self._plan.cfg, *rows, **kw)
        else:

            def reward(at, group):
                found = self.weighted(self.measure(params, at, group, schedule.every, key))
                found = np.zeros(len(at.tokens), np.float32) + found
                last = (group + 1) * schedule.every == schedule.steps
                if quality is not None and last:
                    count = len(ids) * answers * width
                    found[:count] += quality(records, self.texts(at.drafts[group])[:count])
                return found

            found = search.search(
                params, self._plan.cfg, *rows, reward, every=schedule.every, width=width, **kw
            )
            canvas = found.canvas
        return canvas

    def texts(self, tokens) -> list[str]:
        """The answers of canvases [B, T], each up to its first end token."""
        rows = np.asarray(tokens)[:, self.length :]
        hits = np.isin(rows, self.ends)
        ends = np.where(hits.any(axis=1), hits.argmax(axis=1), rows.shape[1])
        return [self._tokenizer.decode(row[:end]) for row, end in zip(rows, ends)]

    def groups(self, canvas, records, answers) -> list[list[Trajectory]]:
        """Canvases as groups of answers, each up to and with its first end token."""
        stop = jnp.asarray(self.ends or [-1], jnp.int32)
        length, ended = trajectory.answer_length(canvas, self.length, stop)
        cut = (canvas.tokens[:, self.length :], canvas.logps[:, self.length :], length, ended)
        tokens, logps, length, ended = jax.device_get(cut)

        def one(p, row):
            n = int(length[row])
            return Trajectory(
                prompt=np.asarray(records[p]["ids"], np.int32),
                tokens=tokens[row, :n],
                logps=logps[row, :n],
                written=np.ones(n, np.bool_),
                version=np.zeros(n, np.int32),
                finished=bool(ended[row]),
            )

        return [[one(p, p * answers + i) for i in range(answers)] for p in range(len(records))]

    def measure(self, params, canvas, group, every, key) -> dict[str, np.ndarray]:
        """MRO's intra-sequence rewards of the drafts of a step group, unweighted, f32[B] each; and
        how sure the model was of what it has committed so far."""
        at, found = self._config.intra, {}
        draft = canvas.drafts[group]
        if at.verification:
            step = (group + 1) * every - 1  # which made the draft
            opened = trajectory.state_at(canvas, step, self._plan.cfg.mask_id)
            opened = ~canvas.given & (opened == self._plan.cfg.mask_id)
            own = jax.random.split(jax.random.fold_in(key, 1000 + group), len(draft))
            found["verification"] = drafts.verification(
                params,
                self._plan.cfg,
                draft,
                canvas.segments,
                opened,
                own,
                samples=at.samples,
                log=at.log,
                rules=self._where,
            )
        if at.fluency:
            nll = np.asarray(self._perplexity(self.texts(draft)), np.float32)
            found["fluency"] = correlation.fluency(nll, cap=at.cap, scale=at.scale)
        if at.confidence:
            done = ~canvas.given & (canvas.reveal >= 0) & (canvas.reveal < (group + 1) * every)
            sure = jnp.where(done, jnp.exp(canvas.full_logps), 0.0).sum(axis=1)
            found["confidence"] = sure / jnp.maximum(done.sum(axis=1), 1)
        return {name: np.asarray(value, np.float32) for name, value in found.items()}

    def weighted(self, found: dict) -> np.ndarray:
        """The sum of what `measure` found, by the weights of `config.intra`."""
        at = self._config.intra
        return sum(np.float32(at[name]) * value for name, value in found.items())


class Steps:
    """Minibatches of denoising steps, without end; between rounds its state is one number.

    The interface is that of `rounds.Rounds`: `before` must be called before each `next`.
    """

    def __init__(
        self,
        config,
        *,
        canvases: Canvases,
        grader,
        records,
        plan,
        frozen,
        start,
        where,
        reference: bool,
        key,
        workdir,
    ):
        """
        Args:
          config: Its sections `rollouts`, `intra`, `search`, `advantages`, `data` are read.
          canvases: Fills in. grader: (records, groups) -> (Grades, texts). records: Prompts.
          plan, frozen: The model. start: Its initial trained part. where: Mesh, or None.
          reference: Whether a loss asks for the log-probabilities of the initial model.
          key: Of the run. workdir: Where answers are shown, in answers/.

        Raises:
          ValueError: naming what in the config does not fit.
        """
        at = config.rollouts
        self._config, self._at, self._canvases, self._grader = config, at, canvases, grader
        self._records, self._plan, self._frozen = records, plan, frozen
        self._where, self._workdir = where, workdir
        self._key = jax.random.fold_in(key, 2)
        self._join = jax.jit(lambda params, frozen: trainable.join(plan, params, frozen)[0])
        self._needs_old = at.updates * at.epochs > 1
        self._measure = credit.make_measure(plan, config, where)
        self._start = start if reference else None
        self._advantage = resolve(
            "objectives", config.advantages["fn"], **keywords(config.advantages)
        )
        if at.estimator not in ESTIMATORS:
            raise ValueError(
                f"rollouts.estimator must be {' or '.join(ESTIMATORS)}; received {at.estimator!r}"
            )
        of_steps = self._advantage.func in (step_advantages.advantages, step_advantages.imitation)
        if of_steps != (at.estimator == "steps"):
            raise ValueError(
                f"rollouts.estimator={at.estimator!r} and advantages.fn="
                f"{config.advantages['fn']!r} do not go together: steps are given "
                "steps.advantages or steps.imitation, whole answers any other"
            )
        intra, searches = config.intra, config.search.width > 0
        imitates = self._advantage.func is step_advantages.imitation
        if searches and not imitates:
            raise ValueError(
                f"search.width={config.search.width} finds trajectories to imitate: set "
                "advantages.fn=steps.imitation, or search.width=0"
            )
        if at.importance != "none" and (at.estimator == "masked" or at.logp_temperature != 1):
            raise ValueError(
                f"rollouts.importance={at.importance!r} compares with what the sampler reports of "
                "steps at temperature 1: it needs rollouts.estimator=steps and "
                f"rollouts.logp_temperature=1; received {at.estimator} and {at.logp_temperature}"
            )
        # What is imitated needs no reward of its own.
        some = intra.verification or intra.fluency or intra.confidence
        self.measured = bool(some) and not imitates
        self.every = at.every if at.estimator == "steps" else 0
        if at.estimator == "masked" and (self.measured or searches):
            raise ValueError(
                "rollouts.estimator='masked' learns from whole answers: set the weights of intra "
                "and search.width to 0"
            )
        if self.every and at.threshold:
            raise ValueError(
                f"rollouts.threshold={at.threshold} makes trajectories of any number of steps, and "
                "rollouts.estimator='steps' learns from groups of rollouts.every of them: set it "
                "to 0"
            )
        if self.every and at.steps % self.every:
            raise ValueError(
                f"rollouts.every={self.every} must divide rollouts.steps={at.steps}: it is the "
                "steps of a group"
            )
        if intra.mode not in ("endpoint", "sum"):
            raise ValueError(f"intra.mode must be endpoint or sum; received {intra.mode!r}")
        if searches and at.steps % config.search.every:
            raise ValueError(
                f"search.every={config.search.every} must divide rollouts.steps={at.steps}"
            )
        self._round, self._queue, self._state = 0, [], None
        self.metrics: dict[str, float] = {}

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
        """Takes the training state of which the next round is made."""
        self._state = state

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if not self._queue:
            self._queue = self._sampled()
            self._round += 1
        return self._queue.pop(0)

    def _prompts(self, number):
        indices, _ = judges.replay_indices(
            number,
            new=len(self._records),
            old=0,
            batch=self._at.prompts,
            seed=self._config.seed,
            ratio=(1, 0),
        )
        return [self._records[i] for i in indices]

    def _quality(self, records, texts):
        """Rewards of texts, equally many to each prompt, f32[texts]."""
        each = len(texts) // len(records)
        said = [texts[i * each : (i + 1) * each] for i in range(len(records))]
        return self._grader.of_texts(records, said).reward.ravel()

    def _sampled(self) -> list[dict]:
        at, number = self._at, self._round
        params = self._state.params
        clock = [time.monotonic()]
        key = jax.random.fold_in(self._key, number)
        joined = self._join(params, self._frozen)
        records = self._prompts(number)
        intra, searching = self._config.intra, self._config.search.width
        step = 0
        if searching:
            step = self._config.search.every
        elif self.every and (self.measured or intra.shaping):
            step = 1 if intra.mode == "sum" else self.every
        schedule = self._canvases.schedule(every=step)
        canvas = self._canvases.fill(
            joined, records, at.answers, key, schedule, width=searching, quality=self._quality
        )
        count = len(records) * at.answers
        groups = self._canvases.groups(canvas, records, at.answers)
        clock.append(time.monotonic())
        grades, said = self._grader(records, groups)
        clock.append(time.monotonic())
        measured = {}
        if self.measured:
            points = [
                self._canvases.measure(joined, canvas, g, step, key)
                for g in range(at.steps // step)
            ]
            measured = {n: np.stack([p[n][:count] for p in points]) for n in points[0]}
        clock.append(time.monotonic())
        held = {n: np.asarray(getattr(canvas, n))[:count] for n in _OF_CANVAS}
        if at.estimator == "steps":
            made = self._of_steps(held, canvas, records, grades, measured, step)
        else:
            made = self._of_answers(held, groups, grades)
        batches = [batch for epoch in made for batch in self._finished(params, epoch)]
        clock.append(time.monotonic())
        sampled.write_answers(
            self._workdir, number, records, groups, grades, grades.reward, said, show=at.show
        )
        lengths = [len(answer.tokens) for group in groups for answer in group]
        times = np.diff(clock)
        found = {
            "reward": grades.reward.mean(),
            "outcome": grades.outcome.mean(),
            **{f"part/{name}": values.mean() for name, values in grades.parts.items()},
            **{f"intra/{name}": values.mean() for name, values in measured.items()},
            "failed": grades.failed.mean(),
            "length": np.mean(lengths),
            "ended": np.mean([a.finished for group in groups for a in group]),
            "passes": int(canvas.step),
            "tokens_a_pass": at.max_new / max(int(canvas.step), 1),
            "sampled_per_second": sum(lengths) / max(times[0], 1e-9),
            **{f"seconds/{n}": s for n, s in zip(("sample", "reward", "intra", "prepare"), times)},
        }
        self.metrics = {k: float(v) for k, v in found.items() if np.isfinite(v)}
        return batches

    def _of_steps(self, held, canvas, records, grades, measured, step):
        """Rows of each minibatch, once: the steps of some groups of every canvas."""
        at, intra = self._at, self._config.intra
        P, G = grades.reward.shape
        total = at.steps // self.every
        prompt = np.repeat(np.arange(P, dtype=np.int32), G)
        if self._advantage.func is step_advantages.imitation:
            each = np.asarray(self._advantage(jnp.asarray(grades.outcome.ravel()), groups=total))
        else:
            points = at.steps // step if step else total
            worth = self._canvases.weighted(measured) if measured else np.zeros((points, P * G))
            quality = grades.reward.ravel().astype(np.float32)
            if intra.shaping:
                earlier = [
                    self._quality(records, self._canvases.texts(canvas.drafts[g])[: P * G])
                    for g in range(points - 1)
                ]
                quality = np.stack([*earlier, quality]).astype(np.float32)
            rewards = correlation.step_rewards(
                np.asarray(worth, np.float32), quality, every=points // total, shaping=intra.shaping
            )
            each = np.asarray(
                self._advantage(jnp.asarray(rewards), jnp.asarray(prompt), num_groups=P)
            )
        rng = np.random.default_rng([self._config.seed, 3, self._round])
        picked = min(at.groups or total, total)
        chosen = [np.sort(rng.permutation(total)[:picked]) for _ in range(P * G)]
        made = []
        for b in range(at.updates):
            which = [
                (n, g * self.every + j)
                for n in range(P * G)
                if prompt[n] % at.updates == b
                for g in chosen[n]
                for j in range(self.every)
            ]
            batch = rollout_data.step_rows(
                held,
                which,
                mask_id=self._plan.cfg.mask_id,
                predict_offset=self._plan.cfg.predict_offset,
                rows=self._rows(len(which)),
                size=self._size(),
            )
            group_of = np.array([s // self.every for _, s in which])
            value = np.zeros(len(batch["of"]), np.float32)
            value[: len(which)] = each[group_of, [n for n, _ in which]]
            made.append(self._credited(batch, prompt, value))
        order = np.random.default_rng([self._config.seed, 1, self._round])
        return [[made[b] for b in order.permutation(at.updates)] for _ in range(at.epochs)]

    def _of_answers(self, held, groups, grades):
        """Rows of each minibatch and epoch: an answer each, under new masks in every epoch."""
        at = self._at
        P, G = grades.reward.shape
        prompt = np.repeat(np.arange(P, dtype=np.int32), G)
        each = np.asarray(
            self._advantage(
                jnp.asarray(grades.reward.reshape(1, -1)), jnp.asarray(prompt[None]), num_groups=P
            )
        ).ravel()
        start, lengths = self._canvases.length, [len(a.tokens) for g in groups for a in g]
        place = np.arange(held["tokens"].shape[1])
        learnt = (place >= start) & (place < start + np.array(lengths)[:, None])
        order = np.random.default_rng([self._config.seed, 1, self._round])
        epochs = []
        for e in range(at.epochs):
            made = []
            for b in order.permutation(at.updates):
                which = np.flatnonzero(prompt % at.updates == b)
                batch = rollout_data.masked_rows(
                    held,
                    which,
                    learnt,
                    mask_id=self._plan.cfg.mask_id,
                    predict_offset=self._plan.cfg.predict_offset,
                    share=at.prompt_mask,
                    seed=[self._config.seed, 4, self._round, e],
                    rows=self._rows(len(which)),
                    size=at.max_new,
                )
                value = np.where(batch["of"] >= 0, each[batch["of"]], 0.0).astype(np.float32)
                made.append(self._credited(batch, prompt, value))
            epochs.append(made)
        return epochs

    def _rows(self, count):
        """Rows of a minibatch: a multiple of those that run together."""
        return -(-count // self._config.data.batch) * self._config.data.batch

    def _size(self):
        """Most tokens that a step commits: the same in every round, hence one program."""
        at = self._at
        blocks = at.max_new // (at.block or at.max_new)
        if at.pace == "linear":
            return at.block or at.max_new
        return -(-(at.block or at.max_new) // (at.steps // blocks))

    def _credited(self, batch, prompt, value):
        """A minibatch with groups, advantages and weights."""
        of = batch.pop("of")
        there = of >= 0
        batch["group"] = np.where(there, prompt[of], -1).astype(np.int32)[:, None]
        batch["advantages"] = np.where(batch["answer"] >= 0, value[:, None], 0.0).astype(np.float32)
        found = credit.reduction(
            self._at, jnp.asarray(batch["answer"]), jnp.asarray(batch["group"])
        )
        batch["weight"] = np.asarray(found.weight)
        return batch

    def _finished(self, params, batches):
        """Minibatches with what old and initial policy say of their tokens, where it is needed."""
        for batch in batches:
            if self._needs_old or self._start is not None:
                rows = credit.to_rows(batch, self._where)
            if self._needs_old and "old_logps" not in batch:
                batch["old_logps"] = np.asarray(self._measure(params, self._frozen, rows).logps)
            if self._start is not None and "ref_logps" not in batch:
                found = self._measure(self._start, self._frozen, rows)
                batch["ref_logps"] = np.asarray(found.logps)
        return batches
