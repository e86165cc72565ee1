"""Policies straight from preferences: DPO, IPO, SimPO, ORPO, CPO and their kin on pairs, and KTO
also on single answers that are good or bad.

source -> chat template -> tokens -> log-probs by the reference, once -> packed rows (prompt once)
-> one forward -> log-prob of each answer -> pairs, or answers -> named losses -> one division
-> step.

What this loop does that a textbook one does not: the answers to a prompt share its computation, and
so do all pairs about it; the reference is the initial model, whose log-probs are computed once for
the whole data set, kept in the workdir and travel with the answers, and not at all where no loss
asks for them; only the states before supervised tokens meet the language head.
"""

import dataclasses
import functools
import inspect
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.masked import safe_divide
from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import PairRows
from jaxreward.data import pairs as pair_data
from jaxreward.data import pipeline, points, sources, tokenize
from jaxreward.evals import likelihood, scorer
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.objectives import direct
from jaxreward.parallel import hosts, rules
from jaxreward.train import session, writers
from jaxreward.train.step import cut

log = logging.getLogger(__name__)
PyTree = Any

# What losses may ask for, by the names of their parameters: those of pairs, and of single answers.
_OF_PAIRS = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen",
    "ref_rejected",
    "chosen_len",
    "rejected_len",
)
_OF_ANSWERS = ("logps", "desirable", "ref_logps", "kl")


@dataclasses.dataclass(frozen=True)
class Losses:
    """`config.losses` as functions; an entry of coefficient 0 is left out.

    Attributes:
      fns: {name: function with its constants}. coef: {name: its coefficient}.
      takes: {name: names of what it is given}.
    """

    fns: dict
    coef: dict
    takes: dict

    def single(self, name: str) -> bool:
        """Whether a loss is of single answers, and not of pairs."""
        return "desirable" in self.takes[name]

    def needs(self, *what: str) -> bool:
        """Whether any loss asks for one of these."""
        return any(set(what) & set(taken) for taken in self.takes.values())

    @property
    def reference(self) -> bool:
        """Whether any loss compares the policy with a reference."""
        return self.needs("ref_chosen", "ref_rejected", "ref_logps", "kl")


def read_losses(losses) -> Losses:
    """`config.losses`: every entry has `fn` (resolved in `objectives`), `coef`, and further
    keywords of the function, which is given what its other parameters are called after.

    Pairs: chosen_logps, rejected_logps, ref_chosen, ref_rejected, chosen_len, rejected_len. Single
    answers: logps, desirable, ref_logps, kl. All log-probs are sums over an answer's tokens.

    Raises:
      ValueError, KeyError: naming the entry and what does not fit.
    """
    made = Losses({}, {}, {})
    for name, entry in losses.items():
        if not float(entry["coef"]):
            continue
        fn = resolve("objectives", entry["fn"], **keywords(entry, "coef"))
        free = [p for k, p in inspect.signature(fn.func).parameters.items() if k not in fn.keywords]
        known = _OF_ANSWERS if any(p.name == "desirable" for p in free) else _OF_PAIRS
        lacking = [p.name for p in free if p.default is p.empty and p.name not in known]
        if lacking:
            raise ValueError(
                f"losses.{name}: {entry['fn']} takes {', '.join(lacking)}, which this recipe does "
                f"not give; it gives {', '.join(_OF_PAIRS)} of pairs, or {', '.join(_OF_ANSWERS)} "
                "of single answers"
            )
        made.fns[name], made.coef[name] = fn, float(entry["coef"])
        made.takes[name] = [p.name for p in free if p.name in known]
    if not made.needs("rejected_logps", "desirable"):
        raise ValueError(
            "config.losses names no loss that compares answers with a coefficient other than 0; "
            "name one, such as direct.dpo, or use sft/chat"
        )
    return made


def _sides(rows, x):
    """What is said of answers, [B,K], as that of the chosen and of the rejected ones, [B,N]; 0
    where a pair does not count: what is not finite would come back through the gradient."""
    pick = jnp.maximum(rows.pairs, 0)
    side = lambda i: jnp.take_along_axis(x, pick[..., i], axis=1)
    return [jnp.where(rows.weight != 0, side(i), 0.0) for i in (0, 1)]


def _labelled(rows):
    """(a function of [B,K] -> of labelled answers, desirable, weight). Each side of a pair counts
    as an answer, once for every pair."""
    if rows.targets is not None:
        label = rows.targets[..., 0]
        weight = jnp.where(jnp.isnan(label), 0.0, rows.answer_weight)
        return lambda x: jnp.where(weight != 0, x, 0.0), label > 0.5, weight
    of = lambda x: jnp.stack(_sides(rows, x), axis=-1)
    weight = jnp.broadcast_to(rows.weight[..., None], rows.pairs.shape)
    return of, jnp.broadcast_to(jnp.array([True, False]), rows.pairs.shape), weight


def _strangers(rows):
    """Answers that are there, and neither in a pair nor labelled: those of another prompt."""
    if rows.targets is not None:
        ours = ~jnp.isnan(rows.targets[..., 0])
    else:
        K = rows.ends.shape[1]
        ours = jnp.any(rows.pairs[..., None] == jnp.arange(K), axis=(1, 2))
    return (rows.ends >= 0) & ~ours


def make_reward(losses: Losses):
    """A function (logps, count, ref_logps) -> implicit rewards, of arrays [B,K].

    It is the quantity that the first loss by name that compares answers looks at: minus the
    reference's log-probs if it takes them, a token if it takes lengths, times its beta.
    """
    names = sorted(n for n in losses.fns if {"rejected_logps", "desirable"} & {*losses.takes[n]})
    fn, taken = losses.fns[names[0]], losses.takes[names[0]]
    default = inspect.signature(fn.func).parameters.get("beta")
    beta = fn.keywords.get("beta", default.default if default else 1.0)
    against = bool({"ref_chosen", "ref_logps"} & {*taken})

    def reward(logps, count, ref_logps):
        return direct.implicit_reward(
            logps,
            ref_logps=ref_logps if against else None,
            length=count if "chosen_len" in taken else None,
            beta=beta,
        )

    return reward


def make_loss(
    plan: trainable.Plan,
    losses: Losses,
    where: rules.Rules | None = None,
    *,
    size: int | None = None,
):
    """(loss, weights, coef) for `make_train_step`.

    A loss of pairs is averaged over pairs and one of single answers over answers, by their weights,
    whatever row, microbatch or device they are in. What `kl` asks for is `frozen["kl"]`.

    Args:
      plan, where: The model, mesh and layouts.
      losses: From `read_losses`.
      size: Most supervised tokens of a row; None takes the row's length.
    """
    reward = make_reward(losses)

    def loss(params, frozen, rows: PairRows, keys, extra):
        del keys
        logps, count = likelihood.answer_logps(plan, params, frozen, rows, rules=where, size=size)
        of, desirable, weight = _labelled(rows)
        known = {"logps": of(logps), "desirable": desirable, "kl": frozen.get("kl")}
        known["chosen_logps"], known["rejected_logps"] = _sides(rows, logps)
        known["chosen_len"], known["rejected_len"] = _sides(rows, count)
        if rows.ref_logps is not None:
            known["ref_logps"] = of(rows.ref_logps)
            known["ref_chosen"], known["ref_rejected"] = _sides(rows, rows.ref_logps)
        totals = {}
        for name, fn in losses.fns.items():
            each = fn(**{key: known[key] for key in losses.takes[name]})
            w = weight if losses.single(name) else rows.weight
            totals[name] = jnp.sum(jnp.where(w != 0, each * w, 0.0))
        rewards = reward(logps, count, rows.ref_logps)
        metrics = {}
        for side, there in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"reward/{side}"] = m.Mean.of(of(rewards), jnp.where(there, weight, 0.0))
            metrics[f"logps/{side}"] = m.Mean.of(of(logps), jnp.where(there, weight, 0.0))
        if rows.targets is None:
            chosen, rejected = _sides(rows, rewards)
            metrics["accuracy"] = m.Mean.of(0.5 * (1 + jnp.sign(chosen - rejected)), rows.weight)
            metrics["margin"] = m.Mean.of(chosen - rejected, rows.weight)
        if known["kl"] is not None:
            metrics["kl"] = m.Mean(known["kl"], jnp.float32(1))
        return totals, metrics, extra

    def weights(rows: PairRows):
        single = jnp.sum(_labelled(rows)[2])
        return {n: single if losses.single(n) else jnp.sum(rows.weight) for n in losses.fns}

    return loss, weights, losses.coef


def _asked(tree: tokenize.Tree) -> tuple[int, tuple]:
    """(how much of its first answer is prompt, the whole prompt as tokens). A tree's prompt is what
    all its answers have in common, and may end before theirs do."""
    rest = int(np.argmax(tree.loss[0]))
    return rest, (*tree.prompt.tolist(), *tree.answers[0][:rest].tolist())


def with_strangers(trees: list[tokenize.Tree]) -> list[tokenize.Tree]:
    """Each tree with one more answer, that of the nearest other prompt before it (round the end,
    for the first): what KTO's estimate of the divergence is taken over.

    Raises:
      ValueError: if there is only one prompt.
    """
    asked = [_asked(tree) for tree in trees]
    if len({prompt for _, prompt in asked}) < 2:
        raise ValueError(
            "a loss takes kl, which is measured on answers to other prompts; the data have one "
            "prompt only. Give more, or set kl to a number in a config file"
        )
    out = []
    for i, (tree, (rest, prompt)) in enumerate(zip(trees, asked)):
        # Trees of one prompt stand side by side: large groups of answers are split.
        back = next(k for k in range(1, len(trees)) if asked[i - k][1] != prompt)
        other = trees[i - back]
        j = i % len(other.answers)
        first = int(np.argmax(other.loss[j]))  # of what the model would say
        answer = np.concatenate([tree.answers[0][:rest], other.answers[j][first:]])
        loss = np.concatenate([np.zeros(rest, bool), other.loss[j][first:]])
        more = {"targets": [*tree.targets, np.full(1, math.nan, np.float32)]}
        more["answer_weight"] = [*tree.answer_weight, 0.0]
        out.append(
            dataclasses.replace(
                tree,
                answers=[*tree.answers, answer.astype(tree.answers[0].dtype)],
                loss=[*tree.loss, loss],
                **(more if tree.targets else {}),
            )
        )
    return out


def with_kl(step, plan: trainable.Plan, where: rules.Rules | None, *, size: int, parts: int):
    """A training step that first measures `kl` on the whole batch, with the step's own weights.

    .. math:: z = \\max\\left(0, \\tfrac1n \\sum_{(x, y')} \\log\\frac{\\pi(y'|x)}{\\pi_0(y'|x)}
              \\right), \\quad y' \\text{ an answer to another prompt}

    It is a forward pass of its own, over the same `parts` of the batch as the step's, and so does
    not depend on how the batch is cut. The step finds it in `frozen["kl"]`.
    """

    def sums(params, frozen, rows):
        logps, _ = likelihood.answer_logps(plan, params, frozen, rows, rules=where, size=size)
        there = _strangers(rows)
        return jnp.sum(jnp.where(there, logps - rows.ref_logps, 0.0)), jnp.sum(there)

    def measured(state, frozen, rows):
        one = functools.partial(sums, state.params, frozen)
        total, count = jax.lax.map(one, cut(rows, parts))
        kl = jnp.maximum(safe_divide(jnp.sum(total), jnp.sum(count)), 0.0)
        return step(state, {**frozen, "kl": kl}, rows)

    return jax.jit(measured, donate_argnums=0)


def load_data(config, losses: Losses, tokenizer) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts), as `session.load_data`.

    `data.form` is "pairs", or "points" for single answers with a `label`, true (1) where good.

    Raises:
      ValueError: also if a loss is of pairs and the data are not, or a label is neither 0 nor 1.
    """
    form = config.data.form
    if form == "pairs":
        return session.load_data(
            config,
            tokenizer,
            read=sources.read_pairs,
            made=lambda count, seed: testing.synthetic_pairs(count, seed=seed),
            encode=pair_data.encode_pairs,
            what="training pair",
        )
    if form != "points":
        raise ValueError(f"data.form must be 'pairs' or 'points'; received {form!r}")
    for name, entry in losses.fns.items():
        if not losses.single(name):
            raise ValueError(
                f"losses.{name}: {entry.func.__name__} is a loss of pairs, and data.form is "
                "'points'; use direct.kto, or pairs"
            )
    train, held, facts = session.load_data(
        config,
        tokenizer,
        read=points.read,
        made=lambda count, seed: testing.synthetic_points(count, seed=seed),
        encode=points.encode,
        what="labelled answer",
    )
    for tree in (*train, *held):
        for label in tree.targets:
            if label[0] not in (0, 1):
                raise ValueError(
                    f"answer {tree.id!r}: label must be true or false (1 or 0) for a loss of "
                    f"desirable answers; received {label[0]:g}"
                )
    return train, held, facts


def _referred(plan, params, frozen, trees, source_hash, config, workdir, where):
    """The trees with `ref_logps`, by the weights as they are, or read back from the workdir."""

    def make():
        began = time.monotonic()
        predict = likelihood.make_predict(plan, rules=where, batch=config.data.eval_batch)
        found = np.concatenate(predict(params, frozen, trees))[:, 0]
        log.info("the reference ran once in %s", writers.duration(time.monotonic() - began))
        return found

    counts = [len(tree.answers) for tree in trees]
    name = scorer.fingerprint(trees, source_hash, plan.cfg.compute)
    path = Path(workdir) / "reference" / f"{name}.npy"
    flat = scorer.kept(path, (sum(counts),), "float32", make)
    parts = np.split(flat, np.cumsum(counts)[:-1])
    return [dataclasses.replace(t, ref_logps=x) for t, x in zip(trees, parts, strict=True)]


def make_predict(plan, losses: Losses, config, *, rules=None):
    """(params, frozen, trees) -> implicit rewards: float32[answers] a tree, or with
    `data.form=points` float32[answers, 1], as evaluators of each expect."""
    reward = make_reward(losses)
    shape = (1,) if config.data.form == "points" else ()

    def measure(params, frozen, rows):
        found = reward(
            *likelihood.answer_logps(plan, params, frozen, rows, rules=rules), rows.ref_logps
        )
        return found.reshape(*found.shape, *shape)

    return scorer.over_trees(measure, *shape, rules=rules, batch=config.data.eval_batch)


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and data, measures the reference, and makes state, step and batches. Trains
    nothing.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    workdir = Path(workdir)
    model = config.models.policy
    losses = read_losses(config.losses)
    with hosts.writer_first("initial model"):
        folder = export.init_folder(model.init, workdir)
    tokenizer = tokenize.load_tokenizer(folder)
    where = rules.on_mesh(dict(config.mesh))
    train, held, facts = load_data(config, losses, tokenizer)
    cfg, weights, score = load.load(folder, rules=where)
    if score is not None or cfg.mask != "causal":
        what = "a denoiser" if score is None else "a reward model (it has a score head)"
        raise ValueError(
            f"models.policy.init={model.init!r} is {what}; a policy that is trained from "
            "preferences is a causal language model"
        )
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    plan = trainable.make_plan(cfg, model, language=True)
    source_hash = load.content_hash(folder)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(plan, weights, jax.random.fold_in(key, 1), rules=where)
    del weights
    if losses.needs("kl"):
        train = with_strangers(train)
    if losses.reference:
        # The initial weights, and with new adapters, which start at 0, those without them.
        both = _referred(plan, params, frozen, [*train, *held], source_hash, config, workdir, where)
        train, held = both[: len(train)], both[len(train) :]
    length = config.data.row_len or scorer.row_len(train)
    size = 0

    def made(packed):
        nonlocal size
        size = min(length, pipeline.most_supervised(train, packed))
        return make_loss(plan, losses, where, size=size)

    built = session.assemble(
        config,
        plan=plan,
        params=params,
        frozen=frozen,
        counts={"trained": tr.count(params), "frozen": tr.count(frozen)},
        train=train,
        held=held,
        facts=facts,
        length=length,
        losses=made,
        predict=make_predict(plan, losses, config, rules=where),
        to_device=functools.partial(scorer.pair_rows, rules=where),
        tokenizer=tokenizer,
        folder=folder,
        source_hash=source_hash,
        key=key,
        where=where,
    )
    if losses.needs("kl"):
        built.step = with_kl(built.step, plan, where, size=size, parts=config.train.microbatches)
    return built


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on where the workdir's newest checkpoint stands. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir.
    """
    workdir = session.enter(workdir, config.train)
    if hosts.is_writer():
        presets.save(config, workdir / "config.json")
    session.run(build(config, workdir), workdir, config.train)
    return workdir
