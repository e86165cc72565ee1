"""Reward models from preference pairs, or from answers with labels of their own.

source -> chat template -> tokens -> packed rows (prompt once) -> one forward -> head at the last
token of each answer -> pairs, or single answers -> named losses -> one division -> step.

What this loop does that a textbook one does not: pairs about one prompt share its computation,
frozen lower layers run once for the whole data set (`data.cache_frozen`), and every loss is
divided by a weight counted on the whole batch.
"""

import dataclasses
import functools
import inspect
import logging
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
from jaxreward.core.types import PairRows
from jaxreward.data import pairs as pair_data
from jaxreward.data import points, sources, tokenize
from jaxreward.evals import scorer
from jaxreward.hub import export, load
from jaxreward.models import heads, trainable
from jaxreward.parallel import hosts, rules
from jaxreward.train import session, writers

log = logging.getLogger(__name__)
PyTree = Any


# Keywords of losses that a config fills with words, and what the words stand for.
_FILLED = {
    "margin": {
        "data": lambda rows: rows.margin,
        "scores": lambda rows: rows.scores[..., 0] - rows.scores[..., 1],
    },
    "probability": {
        "scores": lambda rows: jax.nn.sigmoid(rows.scores[..., 0] - rows.scores[..., 1]),
    },
    "chosen_score": {"data": lambda rows: rows.scores[..., 0]},
    "rejected_score": {"data": lambda rows: rows.scores[..., 1]},
}


def _of_answers(fn) -> bool:
    """Whether a loss is of single answers, by the names of its first two parameters."""
    return list(inspect.signature(fn.func).parameters)[:2] == ["outputs", "targets"]


def _entry(name, entry):
    """(function with its constants, {keyword: word}) of one entry of `config.losses`."""
    kw = keywords(entry, "coef")
    words = {}
    for key in _FILLED.keys() & kw.keys():
        value = kw.pop(key)
        if value in (None, "", "none"):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            kw[key] = float(value)
        elif value in _FILLED[key]:
            words[key] = value
        else:
            known = ", ".join(map(repr, _FILLED[key]))
            raise ValueError(
                f"losses.{name}.{key} must be {known}, 'none' or a number; received {value!r}"
            )
    # The keywords are checked here, and filled from the batch later.
    fn = resolve("objectives", entry["fn"], **kw, **dict.fromkeys(words))
    for key, parameter in inspect.signature(fn.func).parameters.items():
        if key in fn.keywords or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if key in ("chosen_score", "rejected_score"):
            words[key] = "data"  # there is nothing else that they could be
        elif parameter.default is parameter.empty:
            known = f" ({', '.join(map(repr, _FILLED[key]))})" if key in _FILLED else ""
            raise ValueError(f"losses.{name} needs {key}{known}: {entry['fn']} has no default")
    return fn, words


def make_loss(plan: trainable.Plan, losses, where: rules.Rules | None = None):
    """(loss, weights, coef) for `make_train_step`, from `config.losses`.

    Every entry has `fn` (resolved in `objectives`), `coef`, and further keywords of the function.
    A function of (outputs, targets) is of single answers: its value is summed over the targets that
    are known, and divided by their weight. Any other is of the rewards (chosen, rejected) of
    pairs. Some of its keywords may be words instead of numbers:

        margin="data"          the pairs' own margins
        margin="scores"        chosen_score - rejected_score of the data
        probability="scores"   sigmoid(chosen_score - rejected_score)
        chosen_score="data", rejected_score="data"    also where a function asks for them unsaid
        "none"                 the function's default

    Raises:
      ValueError, KeyError: naming the entry and the keyword that does not fit.
    """
    entries = {name: _entry(name, entry) for name, entry in losses.items()}
    coef = {name: float(entry["coef"]) for name, entry in losses.items()}
    answers = {name: _of_answers(fn) for name, (fn, _) in entries.items()}

    def loss(params, frozen, rows: PairRows, keys, extra):
        outputs = scorer.outputs(plan, params, frozen, rows, rules=where, keys=keys)
        rewards = heads.reward(plan.head, outputs)
        pick = jnp.maximum(rows.pairs, 0)
        chosen = jnp.take_along_axis(rewards, pick[..., 0], axis=1)
        rejected = jnp.take_along_axis(rewards, pick[..., 1], axis=1)
        if rows.scores is not None:
            # A NaN of a pair that does not count would come back through the gradient.
            live = rows.weight[..., None] != 0
            rows = rows.replace(scores=jnp.where(live, rows.scores, 0.0))
        totals = {}
        for name, (fn, words) in entries.items():
            if answers[name]:
                weight, targets = _known(rows)
                each = fn(outputs, targets)
            else:
                weight = rows.weight
                filled = {key: _FILLED[key][word](rows) for key, word in words.items()}
                each = fn(chosen, rejected, **filled)
            totals[name] = jnp.sum(jnp.where(weight != 0, each * weight, 0.0))
        metrics = {"reward": m.Mean.of(rewards, rows.ends >= 0)}
        if not all(answers.values()):
            gap = chosen - rejected
            metrics["accuracy"] = m.Mean.of(0.5 * (1 + jnp.sign(gap)), rows.weight)
            metrics["margin"] = m.Mean.of(gap, rows.weight)
        elif plan.head.kind == "classes":
            right = jnp.argmax(outputs, axis=-1) == rows.targets[..., 0]
            metrics["accuracy"] = m.Mean.of(right.astype(jnp.float32), rows.answer_weight)
        return totals, metrics, extra

    def weights(rows: PairRows):
        known = jnp.sum(_known(rows)[0]) if any(answers.values()) else 0.0
        return {name: known if answers[name] else jnp.sum(rows.weight) for name in entries}

    return loss, weights, coef


def _known(rows: PairRows):
    """(weight, targets) of single answers, [B,K,C]: where a target is not known both are 0."""
    known = ~jnp.isnan(rows.targets)
    weight = jnp.where(known, rows.answer_weight[..., None], 0.0)
    return weight, jnp.where(weight != 0, rows.targets, 0.0)


def check_needs(losses, trees: list[tokenize.Tree]) -> None:
    """Makes sure that the data carry what `config.losses` takes from them.

    A pair without a margin has margin 0, so only data without any margin are refused.

    Raises:
      ValueError: naming the loss, the field, and a prompt whose pair lacks it.
    """
    for name, entry in losses.items():
        fn, words = _entry(name, entry)
        form = "points" if _of_answers(fn) else "pairs"
        if not any(tree.targets if form == "points" else tree.pairs for tree in trees):
            other = "pairs" if form == "points" else "points"
            raise ValueError(
                f"losses.{name}: {entry['fn']} is a loss of {form}, and the data were read as "
                f"{other} (data.form); name a loss of {other}, or set data.form={form}"
            )
        for key, word in words.items():
            if (key, word) == ("margin", "data"):
                if not any(margin for tree in trees for margin in tree.margin):
                    raise ValueError(
                        f"losses.{name}.margin is 'data', and no pair of the data has a margin; "
                        "give the rows a `margin`, or set it to 'none'"
                    )
                continue
            for tree in trees:
                scored = tree.scores or [None] * len(tree.pairs)
                lacks = [w != 0 and s is None for w, s in zip(tree.weight, scored, strict=True)]
                if any(lacks):
                    raise ValueError(
                        f"losses.{name}.{key} is {word!r}, which takes `chosen_score` and "
                        f"`rejected_score` of every row; a pair of {tree.id!r} has none"
                    )


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts), as `session.load_data`.

    `data.form` is "pairs", or "points" for single answers with labels or scores.
    """
    form = config.data.get("form", "pairs")  # absent in runs of older versions
    if form not in ("pairs", "points"):
        raise ValueError(f"data.form must be 'pairs' or 'points'; received {form!r}")
    if form == "pairs":
        return session.load_data(
            config,
            tokenizer,
            read=sources.read_pairs,
            made=lambda count, seed: testing.synthetic_pairs(count, seed=seed),
            encode=pair_data.encode_pairs,
            what="training pair",
        )
    head = trainable.make_head(config.models.policy)
    kw = dict(kind=head.kind, outputs=head.outputs)
    return session.load_data(
        config,
        tokenizer,
        read=points.read,
        made=lambda count, seed: testing.synthetic_points(count, seed=seed, **kw),
        encode=functools.partial(points.encode, **kw),
        what="labelled answer",
    )


def _cached(plan, frozen, train, held, source_hash, config, workdir, where):
    """The trees with `features`, computed or read back from the workdir."""
    every = [*train, *held]
    lengths = [len(part) for tree in every for part in (tree.prompt, *tree.answers)]
    name = scorer.fingerprint(every, source_hash, plan.cut, plan.cfg.compute)

    def make():
        began = time.monotonic()
        progress = None

        def show(done, total):
            nonlocal progress
            progress = progress or writers.Progress(
                total, label="frozen layers", shows=hosts.is_writer()
            )
            if done == total or done % max(total // 10, 1) == 0:
                progress.update(done)

        made = scorer.cache_features(
            plan, frozen, every, rules=where, batch=config.data.eval_batch, progress=show
        )
        progress.close()
        log.info("frozen layers ran once in %s", writers.duration(time.monotonic() - began))
        return np.concatenate([np.asarray(x) for parts in made for x in parts])

    flat = scorer.kept(
        Path(workdir) / "features" / f"{name}.npy",
        (sum(lengths), plan.cfg.width),
        plan.cfg.compute,
        make,
    )
    cuts = np.split(flat, np.cumsum(lengths)[:-1])
    out, at = [], 0
    for tree in every:
        n = 1 + len(tree.answers)
        out.append(dataclasses.replace(tree, features=cuts[at : at + n]))
        at += n
    return out[: len(train)], out[len(train) :]


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and data and makes state, step and batches. Trains nothing.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    workdir = Path(workdir)
    model = config.models.policy
    with hosts.writer_first("initial model"):
        folder = export.init_folder(model.init, workdir)
    tokenizer = tokenize.load_tokenizer(folder)
    where = rules.on_mesh(dict(config.mesh))
    train, held, facts = load_data(config, tokenizer)
    check_needs(config.losses, train)
    cfg, weights, score = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    plan = trainable.make_plan(cfg, model, language=False)
    source_hash = load.content_hash(folder)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(
        plan, weights, jax.random.fold_in(key, 1), score=score, rules=where
    )
    del weights
    counts = {"trained": tr.count(params), "frozen": tr.count(frozen)}
    if plan.cut and config.data.cache_frozen:
        train, held = _cached(plan, frozen, train, held, source_hash, config, workdir, where)
        # Their output is what the step needs; the weights below the cut would only take memory.
        frozen = {"policy": {k: v for k, v in frozen["policy"].items() if k != "lower"}}
    return session.assemble(
        config,
        plan=plan,
        params=params,
        frozen=frozen,
        counts=counts,
        train=train,
        held=held,
        facts=facts,
        length=config.data.row_len or scorer.row_len(train),
        losses=lambda packed: make_loss(plan, config.losses, where),
        predict=(
            scorer.make_predict_outputs
            if config.data.get("form") == "points"
            else scorer.make_predict
        )(plan, rules=where, batch=config.data.eval_batch),
        to_device=functools.partial(scorer.pair_rows, rules=where),
        tokenizer=tokenizer,
        folder=folder,
        source_hash=source_hash,
        key=key,
        where=where,
    )


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on where the workdir's newest checkpoint stands. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir.
    """
    workdir = session.enter(workdir, config.train)
    if hosts.is_writer():
        presets.save(config, workdir / "config.json")
    session.run(build(config, workdir), workdir, config.train)
    return workdir
