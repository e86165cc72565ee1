"""Where answers to learn from come from: three calls, with our sampler behind them here.

    publish(params, version)      new weights, by number
    submit(prompts, answers, key) asks for answers
    collect()                     the answers to the oldest submit, a list of groups

Nothing above this file assumes that sampling happens in this process, on these devices, or with the
weights of this very step: a trajectory says which weights wrote each of its tokens. An engine that
lives elsewhere is an object with these three methods.
"""

import collections
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core.types import Trajectory
from jaxreward.models import decoder
from jaxreward.parallel import specs
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import autoregressive

PyTree = Any


class Rollouts(Protocol):
    """What the online recipes ask of a source of answers.

    Attributes:
      utilisation: Share of what was decoded for the last `collect` that became tokens of answers,
        NaN where that is not known. Only logged.
    """

    utilisation: float

    def publish(self, params: PyTree, version: int) -> None:
        """Takes weights, a whole decoder's tree. The caller may donate its buffers right after."""

    def submit(self, prompts: Sequence[np.ndarray], answers: int, key: jax.Array) -> None:
        """Asks for `answers` answers to each prompt (token ids, int32[T])."""

    def collect(self) -> list[list[Trajectory]]:
        """The answers to the oldest submit that was not collected, a list a prompt, in order."""


class Engine:
    """Rollouts by our own sampler, in this process.

    The tokens of a round depend on weights, prompts and key alone: not on slots, mesh or the other
    prompts. Sampling starts at `submit` (JAX runs it in the background) and is waited for in
    `collect`.
    """

    def __init__(
        self,
        cfg: decoder.Config,
        *,
        max_prompt: int,
        max_new: int,
        choose: Any,
        stop: Collection[int],
        matcher: np.ndarray | None = None,
        rules: Rules | None = None,
        slots: int | None = None,
        cache_dtype: str | None = None,
    ):
        """
        Args:
          cfg: The model.
          max_prompt: Most tokens of a prompt; all prompts are padded to the next power of two.
            Their number is not, as every row is decoded until the last answer ends: a round has a
            row for each prompt, and as many more as it takes to divide over the devices.
          max_new: Most tokens of an answer.
          choose, stop, matcher, rules, slots, cache_dtype: As `autoregressive.sample`.
        """
        self._cfg, self._rules = cfg, rules
        self._max_prompt = max_prompt
        self._length = max(16, 1 << (max_prompt - 1).bit_length())
        self._ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"] if rules else 1
        self._settings = dict(
            max_new=max_new,
            choose=choose,
            stop=jnp.asarray(sorted(stop) or [-1], jnp.int32),
            matcher=None if matcher is None else jnp.asarray(matcher),
            rules=rules,
            slots=slots,
            cache_dtype=cache_dtype,
        )
        self._params: PyTree = None
        self._version = -1
        self._waiting: collections.deque[tuple] = collections.deque()
        self._copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
        self.utilisation = float("nan")

    def publish(self, params: PyTree, version: int) -> None:
        """Copies the weights, onto this engine's devices if they are elsewhere: the step that
        follows gives its own buffers away."""
        self._version = version
        devices = jax.tree.leaves(params)[0].sharding.device_set
        if self._rules is None or devices == set(self._rules.mesh.devices.flat):
            self._params = self._copy(params)
        else:
            here = specs.shardings(decoder.specs(self._cfg), self._rules)
            self._params = jax.device_put(params, here)

    def submit(self, prompts: Sequence[np.ndarray], answers: int, key: jax.Array) -> None:
        """Starts sampling. One program is compiled for each number of prompts and of answers.

        Raises:
          ValueError: before the first `publish`, or for a prompt longer than `max_prompt`.
        """
        if self._params is None:
            raise ValueError("submit needs weights; publish them first")
        longest = max(map(len, prompts))
        if longest > self._max_prompt:
            raise ValueError(
                f"a prompt takes {longest} tokens, more than the {self._max_prompt} of this engine"
            )
        rows = -(-len(prompts) // self._ways) * self._ways
        tokens, mask = autoregressive.padded(prompts, rows=rows, length=self._length)
        keys = jax.random.split(key, len(tokens) * answers)
        settings = dict(self._settings)
        if settings["slots"] is not None:
            settings["slots"] = min(settings["slots"], len(keys))
        out = autoregressive.sample(
            self._params, self._cfg, tokens, mask, keys, samples=answers, **settings
        )
        self._waiting.append((list(prompts), answers, self._version, out))

    def collect(self) -> list[list[Trajectory]]:
        """Waits for the answers to the oldest submit.

        Raises:
          ValueError: if nothing was submitted.
        """
        if not self._waiting:
            raise ValueError("collect has nothing to wait for; submit prompts first")
        prompts, answers, version, out = self._waiting.popleft()
        tokens, lengths, finished, logps, useful = jax.device_get(
            (out.tokens, out.length, out.finished, out.logps, out.utilisation)
        )
        self.utilisation = float(useful)

        def one(p, row):
            n = int(lengths[row])
            return Trajectory(
                prompt=np.asarray(prompts[p], np.int32),
                tokens=tokens[row, :n],
                logps=logps[row, :n],
                written=np.ones(n, np.bool_),
                version=np.full(n, version, np.int32),
                finished=bool(finished[row]),
            )

        return [[one(p, p * answers + i) for i in range(answers)] for p in range(len(prompts))]


def texts(groups: list[list[Trajectory]], decode: Callable[[np.ndarray], str]) -> list[list[str]]:
    """The answers of a round as text, tool output included.

    Args:
      groups: From `collect`.
      decode: Token ids -> text, without special tokens.
    """
    return [[decode(answer.tokens) for answer in group] for group in groups]
