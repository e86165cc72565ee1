"""From the rewards of a round to what the losses ask for of each token.

texts graded -> shaping -> groups and answers left out -> old and reference log-probs (and values)
-> advantages -> a process term on single tokens -> weights of the reduction

What a config names here are functions of arrays, which are given what their parameters are called
after; `takes` says how.
"""

import dataclasses
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import Array, RolloutRows
from jaxreward.evals import sampled
from jaxreward.models import heads, trainable
from jaxreward.objectives import advantage, policy, supervised
from jaxreward.parallel import hosts, rules

PyTree = Any
# What advantages may ask for, by the names of their parameters.
_OF_ADVANTAGES = {"rewards", "group", "num_groups", "answer", "penalty", "values"}
# What shaping and process terms may: of all answers of a round, N = prompts x answers.
_OF_ANSWERS = {"correct", "rewards", "length", "group", "groups"}


def takes(fn, known: Collection[str]) -> list[str]:
    """The arguments among `known` that a resolved function has and its config does not bind.

    Raises:
      ValueError: if it needs one that is neither bound nor known.
    """
    parameters = inspect.signature(fn.func).parameters.values()
    free = [p for p in parameters if p.name not in fn.keywords]
    lacking = [p.name for p in free if p.default is p.empty and p.name not in known]
    if lacking:
        raise ValueError(
            f"{fn.func.__module__}.{fn.func.__name__} takes {', '.join(lacking)}, which online_rl "
            f"does not know; it knows {', '.join(sorted(known))}"
        )
    return [p.name for p in free if p.name in known]


class Measured(NamedTuple):
    """What the trained model says of the tokens of rows, float32[B, S] each.

    Attributes:
      logps: At the temperature of sampling. entropy: Of the whole distribution there.
      values: Of the value head, before the token was chosen; None without one.
    """

    logps: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    values: Float[Array, "B S"] | None


def measure(plan: trainable.Plan, temperature, where, params, frozen, rows: RolloutRows):
    """`Measured` of rows, in one forward pass."""
    states = trainable.states(plan, params, frozen, rows, rules=where)
    picked = jnp.take_along_axis(states, rows.source[..., None], axis=1)
    logps, entropy = supervised.token_logps(
        picked,
        trainable.head_matrix(plan, params, frozen, rules=where),
        rows.target,
        temperature=temperature or 1.0,
        softcap=plan.cfg.logit_softcap,
    )
    values = heads.scalar(params["value"], picked) if plan.value else None
    return Measured(logps, entropy, values)


def temperature(at) -> float:
    """Of the log-probabilities that are learnt from: that of sampling, unless the section has
    `logp_temperature`, as denoisers do."""
    return at.get("logp_temperature", at.temperature)


def make_measure(plan: trainable.Plan, config, where: rules.Rules | None = None):
    """The jitted (params, frozen, rows) -> `Measured`."""
    return jax.jit(functools.partial(measure, plan, temperature(config.rollouts), where))


def reduction(at, answer, group) -> policy.Reduction:
    """`policy.reduction` as `config.rollouts` asks for it."""
    # Groups are numbered over the round, which is all that a batch of it can hold.
    return policy.reduction(
        answer,
        num_answers=group.shape[1],
        mode=at.reduction,
        length=at.max_new,
        group=group,
        num_groups=at.prompts,
    )


def to_rows(batch: Mapping, where: rules.Rules | None) -> RolloutRows:
    """A minibatch on the devices."""
    zeros = np.zeros(batch["answer"].shape, np.float32)
    arrays = {"advantages": zeros, "weight": zeros, **batch}
    names = {f.name for f in dataclasses.fields(RolloutRows)}
    arrays = {k: v for k, v in arrays.items() if k in names}
    return RolloutRows(**hosts.to_global(arrays, where))


class _Terms:
    """The entries of a section whose functions are given arrays about all answers of a round.

    A keyword that is the name of a part of a reward ("apr/tau") stands for its values.
    """

    def __init__(self, config, section, extra=()):
        self._section, self.terms = section, {}
        for name, entry in (config.get(section) or {}).items():
            if not float(entry["coef"]):
                continue
            fn = resolve("rewards", entry["fn"], **keywords(entry, "coef"))
            self.terms[name] = float(entry["coef"]), fn, takes(fn, _OF_ANSWERS | set(extra))

    def __call__(self, grades, lengths, rewards, **more):
        """{name: coefficient x what the function makes of the round}."""
        P, G = rewards.shape
        known = {
            "correct": grades.outcome.ravel(),
            "rewards": rewards.ravel(),
            "length": lengths.ravel().astype(np.float32),
            "group": np.repeat(np.arange(P), G),
            "groups": P,
            **more,
        }
        made = {}
        for name, (coef, fn, taken) in self.terms.items():
            bound = {}
            for key, value in fn.keywords.items():
                if isinstance(value, str) and "/" in value:
                    if value not in grades.parts:
                        raise ValueError(
                            f"config.{self._section}.{name}.{key} names {value!r}; the rewards "
                            f"give {', '.join(grades.parts)}"
                        )
                    bound[key] = grades.parts[value].ravel()
            made[name] = coef * np.asarray(fn(**{k: known[k] for k in taken}, **bound), np.float32)
        return made


class Credit:
    """What each token of a round's minibatches is to learn, by one config.

    `needs_old` says whether log-probabilities are taken before the updates: where a round is one
    update, the old policy is the policy itself.
    """

    def __init__(self, config, *, plan, frozen, start, where, reference: bool):
        """
        Args:
          config: Its sections `rollouts`, `advantages`, `shaping` and `process` are read.
          plan, frozen: Model, and what of it is not trained. start: The initial trained parameters.
          where: Mesh and layouts, or None.
          reference: Whether a loss asks for the log-probabilities of the initial policy.

        Raises:
          ValueError, KeyError: naming what in the config does not fit.
        """
        self._at = at = config.rollouts
        self._frozen, self._where = frozen, where
        kw = keywords(config.advantages)
        self._advantage = resolve("objectives", config.advantages["fn"], **kw)
        self._taken = takes(self._advantage, _OF_ADVANTAGES)
        self._values = "values" in self._taken
        if self._values != plan.value:
            name = config.advantages["fn"]
            raise ValueError(
                f"advantages.fn={name} and models.policy.value={plan.value} do not belong "
                f"together: a value head is read by advantages that take values, such as "
                "advantage.ppo, and by nothing else"
            )
        reference = reference or at.reward_kl > 0
        self.needs_old = at.updates * at.epochs > 1 or at.reward_kl > 0
        wanted = self.needs_old or reference or self._values
        self._measure = make_measure(plan, config, where) if wanted else None
        self._start = start if reference else None
        self._assign = jax.jit(self._assigned, static_argnames="count")
        self._shaping = _Terms(config, "shaping")
        self._process = _Terms(config, "process", extra=("slots",))
        if self._process.terms and not at.offsets:
            raise ValueError(
                "config.process puts terms on single tokens, which rewards must be told of; set "
                "rollouts.offsets=true"
            )

    def shaped(self, grades: sampled.Grades, groups) -> tuple[np.ndarray, dict]:
        """(rewards f32[P, G] with shaping and what length does to them, {name: term f32[P, G]})."""
        at = self._at
        lengths = _lengths(groups)
        terms = self._shaping(grades, lengths, grades.reward)
        terms = {name: value.reshape(lengths.shape) for name, value in terms.items()}
        if at.overlong:
            penalty = advantage.overlong_penalty(lengths, longest=at.max_new, cache=at.overlong)
            terms["overlong"] = np.asarray(penalty)
        return sum(terms.values(), grades.reward), terms

    def __call__(self, params, batches, grades: sampled.Grades, rewards, groups):
        """The minibatches with what the losses need, and how many groups were kept.

        Args:
          params: The trained parameters, before the round's updates.
          batches: From `data.rollouts.minibatches`; changed in place.
          grades: Of the answers. rewards: As `shaped` makes them, [P, G].
          groups: The answers.
        """
        at = self._at
        rows = [to_rows(batch, self._where) for batch in batches]
        joined = {
            k: np.concatenate([b[k] for b in batches])
            for k in ("answer", "group", "member", "index")
        }
        old = ref = None
        if self.needs_old or self._values:
            old = [self._measure(params, self._frozen, row) for row in rows]
        if self._start is not None:
            ref = [self._measure(self._start, self._frozen, row).logps for row in rows]
        whole = lambda parts: np.concatenate([np.asarray(x) for x in parts])
        made = self._assign(
            {k: joined[k] for k in ("answer", "group", "member")},
            rewards,
            grades.outcome,
            np.array([[a.finished for a in g] for g in groups]),
            whole(x.logps for x in old) if at.reward_kl > 0 else None,
            whole(ref) if at.reward_kl > 0 else None,
            whole(x.values for x in old) if self._values else None,
            count=len(batches),
        )
        answer, each, returns, weight, counted = jax.device_get(made)
        for term in self._of_tokens(grades, rewards, groups):
            owner = np.maximum(answer, 0)
            whose = [np.take_along_axis(joined[k], owner, axis=1) for k in ("group", "member")]
            each = each + np.where(answer >= 0, term[*whose, joined["index"]], 0.0)
        size = len(batches[0]["answer"])
        for b, batch in enumerate(batches):
            part = slice(b * size, (b + 1) * size)
            batch["answer"], batch["advantages"] = answer[part], each[part]
            batch["weight"] = weight[part]
            if self.needs_old:
                batch["old_logps"] = np.asarray(old[b].logps)
            if ref is not None:
                batch["ref_logps"] = np.asarray(ref[b])
            if self._values:
                batch["old_values"] = np.asarray(old[b].values)
                batch["returns"] = returns[part]
        return batches, {k: v.result() for k, v in counted.items()}

    def _assigned(self, places, rewards, outcome, finished, old, ref, values, count):
        """(answer, advantages, returns or None, weights, counts of groups) of all rows of a round.

        Args:
          places: answer [R, S], group and member [R, K] of all rows.
          rewards, outcome, finished: Of the answers, [P, G].
          old, ref: Log-probabilities for the penalty, or None. values: Or None; [R, S] all.
          count: Minibatches that the rows make.
        """
        at = self._at
        answer, group, member = places["answer"], places["group"], places["member"]
        of = lambda x: jnp.where(group >= 0, x[group, member], 0.0).astype(jnp.float32)
        keep, shaped = group >= 0, of(rewards)
        kept, counted = advantage.keep_groups(
            of(outcome),
            group,
            num_groups=at.prompts,
            shaped=shaped if at.filter == "shaped" else None,
        )
        if at.filter != "none":
            keep &= kept
        if at.mask_truncated:
            keep &= of(finished) > 0
        answer = advantage.keep_answers(answer, keep)
        penalty = None
        if old is not None:
            penalty = at.reward_kl * policy.kl(old, ref, kind="k1", mask=answer >= 0)
        known = {
            "rewards": shaped,
            "group": jnp.where(keep, group, -1),
            "num_groups": at.prompts,
            "answer": answer,
            "penalty": penalty,
            "values": values,
        }
        each = self._advantage(**{key: known[key] for key in self._taken})
        each, returns = each if self._values else (each, None)
        if each.shape == group.shape:
            each = advantage.token_advantages(each, answer)
        if at.whiten:
            each = advantage.whiten(each, answer >= 0)
        parts = zip(jnp.split(answer, count), jnp.split(group, count))
        weight = jnp.concatenate([reduction(at, *part).weight for part in parts])
        return answer, each, returns, weight, counted

    def _of_tokens(self, grades, rewards, groups):
        """The process terms, float32[P, G, longest answer] each."""
        lengths = _lengths(groups)
        slots = int(lengths.max())
        made = self._process(grades, lengths, rewards, slots=slots)
        return [term.reshape(*rewards.shape, slots) for term in made.values()]


def _lengths(groups):
    return np.array([[len(answer.tokens) for answer in group] for group in groups], np.int32)
