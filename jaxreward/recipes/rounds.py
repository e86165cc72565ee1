"""Rounds of online RL: which prompts, whose weights answer them, and what becomes of the answers.

prompts (new and replayed) -> engine -> grades -> `credit` -> minibatches

With `rollouts.ahead=1` a round is sampled from the weights before the last round's updates, so that
sampling and updates can overlap:

    ahead=0    sample 0 | update 0 | sample 1 | update 1 | ...
    ahead=1    sample 0 | sample 1 | sample 2 | ...            on the sampler's devices
                        | update 0 | update 1 | ...            on the trainer's
"""

import time
from typing import Any

import jax
import numpy as np

from jaxreward.data import judges
from jaxreward.data import rollouts as rollout_data
from jaxreward.evals import sampled
from jaxreward.models import trainable
from jaxreward.recipes.credit import Credit

PyTree = Any


class Rounds:
    """Minibatches of sampled answers, without end; between rounds its state is one number.

    `before` must be called with the training state before each `next`.
    """

    def __init__(
        self,
        config,
        *,
        engine,
        grader,
        records,
        replayed=(),
        credit: Credit,
        plan,
        frozen,
        key,
        workdir,
        rounds: int | None = None,
    ):
        """
        Args:
          config: Its sections `rollouts`, `data` and the seed are read. `data.batch` rows run at a
            time.
          engine: A `sampling.rollouts.Rollouts`.
          grader: (records, groups) -> (Grades, texts).
          records: Prompts, from `data.prompts.encode`. replayed: More, of an earlier stage, that
            are mixed in as `rollouts.replay` says.
          credit: Of the same config.
          plan, frozen: The model that the engine is given.
          key: Of the run.
          workdir: Where answers are shown, in answers/.
          rounds: Of the run; none is sampled ahead beyond. None = without end.
        """
        self._config, self._at = config, config.rollouts
        self._engine, self._grader, self._credit = engine, grader, credit
        self._records, self._replayed = records, list(replayed)
        self._frozen, self._workdir = frozen, workdir
        self._key = jax.random.fold_in(key, 2)
        self._join = jax.jit(lambda params, frozen: trainable.join(plan, params, frozen)[0])
        self._round, self._rounds, self._queue, self._state = 0, rounds, [], None
        self._ahead = self._at.get("ahead", 0)
        self._asked = -1  # the newest round whose answers the engine was asked for
        self.length = config.data.row_len or rollout_data.row_len(
            max_prompt=config.data.max_len, max_new=self._at.max_new, answers=self._at.answers
        )
        self.metrics: dict[str, Any] = {}

    def close(self) -> None:
        """Ends the processes of the rewards."""
        self._grader.close()

    def whole(self) -> bool:
        """True between rounds."""
        return not self._queue

    @property
    def first(self) -> bool:
        """True after the first minibatch of a round was taken, until the second is."""
        return len(self._queue) == self._at.updates * self._at.epochs - 1

    def get_state(self) -> dict:
        """Position, as plain JSON values."""
        return {"round": self._round}

    def set_state(self, state: dict) -> None:
        """Goes on after that many rounds."""
        self._round, self._queue, self._asked = state["round"], [], state["round"] - 1

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

    def prompts(self, number: int) -> list[dict]:
        """The prompts of a round: each epoch all of them once, in an order of its own."""
        ratio = (self._at.replay, 1) if self._replayed else (1, 0)
        indices, old = judges.replay_indices(
            number,
            new=len(self._records),
            old=len(self._replayed),
            batch=self._at.prompts,
            seed=self._config.seed,
            ratio=ratio,
        )
        return [(self._replayed if o else self._records)[i] for i, o in zip(indices, old)]

    def _ask(self, number, params, version):
        """Starts sampling a round."""
        self._engine.publish(self._join(params, self._frozen), version)
        ids = [record["ids"] for record in self.prompts(number)]
        self._engine.submit(ids, self._at.answers, jax.random.fold_in(self._key, number))
        self._asked = number

    def _sampled(self) -> list[dict]:
        at, number, params = self._at, self._round, self._state.params
        clock = [time.monotonic()]
        if self._asked < number:
            # After a resume the weights of the round before are in the checkpoint.
            behind = self._ahead and number > 0
            old = self._state.extra["sampler"] if behind else params
            self._ask(number, old, number - bool(behind))
        groups = self._engine.collect()
        clock.append(time.monotonic())
        if self._ahead and number + 1 != self._rounds:
            self._ask(number + 1, params, number)
        records = self.prompts(number)
        grades, said = self._grader(records, groups)
        clock.append(time.monotonic())
        batches, efficiency = rollout_data.minibatches(
            groups,
            count=at.updates,
            row_len=self.length,
            answers_per_row=2 * at.answers,
            multiple=self._config.data.batch,
        )
        rewards, terms = self._credit.shaped(grades, groups)
        batches, kept = self._credit(params, batches, grades, rewards, groups)
        clock.append(time.monotonic())
        sampled.write_answers(
            self._workdir, number, records, groups, grades, rewards, said, show=at.show
        )
        lengths = [len(answer.tokens) for group in groups for answer in group]
        versions = np.concatenate([answer.version for group in groups for answer in group])
        times = np.diff(clock)
        self.metrics = {
            "reward": rewards.mean(),
            "outcome": grades.outcome.mean(),
            **{f"part/{name}": values.mean() for name, values in grades.parts.items()},
            **{f"shaping/{name}": values.mean() for name, values in terms.items()},
            "failed": grades.failed.mean(),
            "length": np.mean(lengths),
            "length_max": np.max(lengths),
            "truncated": np.mean([not a.finished for group in groups for a in group]),
            "useful": self._engine.utilisation,
            "efficiency": efficiency,
            "lag": number - versions.mean(),
            "sampled_per_second": sum(lengths) / max(times[0], 1e-9),
            **{f"seconds/{n}": s for n, s in zip(("sample", "reward", "prepare"), times)},
            **kept,
        }
        self.metrics = {k: float(v) for k, v in self.metrics.items() if np.isfinite(v)}
        order = np.random.default_rng([self._config.seed, 1, number])
        return [batches[b] for _ in range(at.epochs) for b in order.permutation(at.updates)]
