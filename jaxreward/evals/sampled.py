"""Answers of a policy, graded by text rewards: in training, and on held-out prompts."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxreward.core.resolve import keywords, resolve
from jaxreward.data import sources
from jaxreward.data.tokenize import Tokenizer
from jaxreward.evals import pairwise
from jaxreward.parallel import hosts
from jaxreward.rewards import anchor
from jaxreward.rewards.workers import Workers
from jaxreward.sampling import rollouts


@dataclasses.dataclass(frozen=True)
class Grades:
    """Rewards of a round, [P, G] each.

    Attributes:
      reward: What advantages are made of: the weighted sum of the parts.
      outcome: The part that says whether the answer is right, before any shaping.
      parts: Every part of every reward, by "<reward>/<part>".
      failed: Where a reward gave nothing, and 0 was taken.
      failures: {"<reward>: <reason>": count}.
    """

    reward: np.ndarray
    outcome: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray
    failures: dict[str, int]


class Grader:
    """The text rewards of `config.rewards`, in processes of their own.

    Every entry has `fn` (resolved in `rewards`), `weights` ({part: weight}; parts without one are
    logged and do not count) and further keywords of the function. An entry with `model` in place of
    `fn` is a reward model, whose one part is "score". `rollouts.outcome` names the part that says
    whether an answer is right, "<entry>/<part>".

    An answer is decoded without special tokens. A record's own fields reach the rewards, with
    `truncated` (the answer reached the longest length) and, with `rollouts.offsets`, the characters
    of each token (`anchor.token_spans`).
    """

    def __init__(self, config, tokenizer: Tokenizer, *, scorers: Mapping[str, Callable] = {}):
        """
        Args:
          config: Its sections `rewards` and `rollouts` are read.
          tokenizer: Of the policy.
          scorers: {entry: (prompts, groups of answers) -> f32[P, G]} of the entries with `model`.
        """
        at = config.rollouts
        if not config.rewards:
            raise ValueError("config.rewards names no reward")
        fns = {
            name: resolve("rewards", entry["fn"], **keywords(entry, "weights"))
            for name, entry in config.rewards.items()
            if name not in scorers
        }
        self._scorers = scorers
        self._weights = {name: dict(entry["weights"]) for name, entry in config.rewards.items()}
        self._outcome, self._at, self._tokenizer = at.outcome, at, tokenizer
        self._workers = Workers(fns, workers=at.workers if fns else 0, timeout=at.timeout)

    def __call__(self, records: list[dict], groups: list[list]) -> tuple[Grades, list[list[str]]]:
        """(grades, texts) of the answers to each record's prompt."""
        said = rollouts.texts(groups, self._tokenizer.decode)
        more = [[{"truncated": not answer.finished} for answer in group] for group in groups]
        if self._at.get("offsets", False):
            decode = self._tokenizer.decode
            for facts, group in zip(more, groups):
                for fact, answer in zip(facts, group):
                    spans = anchor.token_spans(answer.tokens, decode)
                    fact["offsets"] = [list(span) for span in spans]
        return self.of_texts(records, said, more), said

    def of_texts(
        self,
        records: list[dict],
        said: list[list[str]],
        more: list[list[dict]] | None = None,
    ) -> Grades:
        """Grades of texts [P][G]; `more` is what a record says of each text beside its own."""
        samples = []
        for p, (record, texts) in enumerate(zip(records, said, strict=True)):
            for i, text in enumerate(texts):
                fact = more[p][i] if more else {"truncated": False}
                samples.append((record["prompt"], text, {**record["record"], **fact}))
        graded = self._workers.grade(samples)
        shape = (len(said), len(said[0]))
        parts, failures = {}, {}
        reward, failed = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for name, found in graded.items():
            failed |= ~found.ok.reshape(shape)
            failures |= {f"{name}: {reason}": n for reason, n in found.failures.items()}
            unknown = set(self._weights[name]) - set(found.parts)
            if unknown and found.parts:
                raise ValueError(
                    f"rewards.{name}.weights names {', '.join(sorted(unknown))}; the reward gives "
                    f"{', '.join(found.parts)}"
                )
            for k, part in enumerate(found.parts):
                values = found.values[:, k].reshape(shape)
                parts[f"{name}/{part}"] = values
                reward += self._weights[name].get(part, 0.0) * values
        for name, scores in self._scorers.items():
            values = scores([record["prompt"] for record in records], said)
            lost = ~np.isfinite(values)
            failed |= lost
            if lost.any():
                failures[f"{name}: no finite score"] = int(lost.sum())
                warnings.warn(
                    f"reward {name!r} gave no finite score to {lost.sum():,} of {lost.size:,} "
                    "answers, which count as failed, with reward 0",
                    stacklevel=2,
                )
            parts[f"{name}/score"] = values = np.where(lost, 0.0, values)
            reward += self._weights[name].get("score", 0.0) * values
        if self._outcome not in parts:
            if parts:
                raise ValueError(
                    f"rollouts.outcome is {self._outcome!r}; the rewards give {', '.join(parts)}"
                )
            parts[self._outcome] = np.zeros(shape, np.float32)
        return Grades(reward, parts[self._outcome], parts, failed, failures)

    def close(self):
        """Ends the worker processes."""
        self._workers.close()


def write_answers(workdir, number, records, groups, grades: Grades, rewards, said, *, show: int):
    """The answers of a round to its first prompts, for people: answers/<number>.jsonl.

    Args:
      workdir: Of the run. number: Of the round.
      records, groups, said: Prompts, their answers, and these as text. grades: Of the answers.
      rewards: What each answer is worth with shaping, [P, G].
      show: Prompts whose answers are written; 0 writes nothing.
    """
    if not hosts.is_writer() or not show:
        return
    folder = Path(workdir) / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "round": number,
            "id": records[p]["id"],
            "prompt": records[p]["prompt"],
            "answer": said[p][i],
            "reward": float(rewards[p, i]),
            "parts": {name: float(values[p, i]) for name, values in grades.parts.items()},
            "tokens": len(answer.tokens),
            "finished": answer.finished,
        }
        for p in range(min(show, len(records)))
        for i, answer in enumerate(groups[p])
    ]
    sources.write_jsonl(folder / f"{number:06d}.jsonl", lines)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Graded answers to P prompts, n to each; all arrays [P, n].

    Attributes:
      outcome: Whether the answer is right, or how good it is. reward: What training maximises.
      length: Tokens. finished: False where it was cut off.
      parts: Every part of every reward, by name.
    """

    outcome: np.ndarray
    reward: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    parts: dict[str, np.ndarray]


def answers(
    predict: Callable[..., Answered],
    prompts: list[Any],
    *,
    n: int = 1,
    temperature: float = 0.0,
    samples: int = 2000,
) -> Iterator[tuple[str, float]]:
    """Yields "outcome" (mean over prompts of the mean over their answers: pass@1 where it is 0 or
    1), "outcome_low" and "outcome_high" (95 % interval, prompts resampled), "best" (of the n), the
    means "reward", "length", "finished" and "part/<name>", and "prompts".

    Args:
      predict: (prompts, n, temperature) -> Answered.
      prompts: Held out.
      n: Answers to each. temperature: Of sampling; 0 is greedy, for which n must be 1.
      samples: Of the bootstrap.

    Raises:
      ValueError: for several greedy answers, which are all the same.
    """
    if n > 1 and temperature == 0:
        raise ValueError(f"evals: {n} greedy answers to a prompt are one; set temperature above 0")
    found = predict(prompts, n, temperature)
    each = found.outcome.mean(axis=1)
    mean, low, high = pairwise.bootstrap(each, np.arange(len(each)), samples=samples)
    yield "outcome", mean
    yield "outcome_low", low
    yield "outcome_high", high
    yield "best", float(found.outcome.max(axis=1).mean())
    for name in ("reward", "length", "finished"):
        yield name, float(getattr(found, name).mean())
    for name, values in found.parts.items():
        yield f"part/{name}", float(values.mean())
    yield "prompts", float(len(each))


def denoised(
    predict: Callable[..., Answered],
    prompts: list[Any],
    *,
    n: int = 1,
    temperature: float = 0.0,
    steps: int = 0,
    width: int = 0,
    samples: int = 2000,
) -> Iterator[tuple[str, float]]:
    """As `answers`, of a denoiser; "part/passes" is the number of its forward passes.

    Args:
      predict: (prompts, n, temperature, steps=..., width=...) -> Answered.
      prompts, n, temperature, samples: As `answers`. A search draws, so it may have n > 1 at any
        temperature above 0 only.
      steps: Denoising steps; 0 = the run's. width: Continuations that a search chooses among
        (`sampling.search`); 0 = no search.

    Raises:
      ValueError: as `answers`, or for a search at temperature 0, whose continuations are all equal.
    """
    if width > 1 and temperature == 0:
        raise ValueError(
            f"evals: {width} greedy continuations are one; set temperature above 0 for a search"
        )
    how = functools.partial(predict, steps=steps, width=width)
    yield from answers(how, prompts, n=n, temperature=temperature, samples=samples)
