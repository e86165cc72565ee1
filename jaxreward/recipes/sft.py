"""Language models from completions: supervised fine-tuning.

source -> chat template -> tokens -> packed rows -> one forward -> states before supervised tokens
-> cross-entropy in slices of the vocabulary -> one division by the supervised tokens -> step.

What this loop does that a textbook one does not: only the states that predict a supervised token
meet the language head, and never all of the vocabulary at once; a batch's mean is over its tokens,
whatever row, microbatch or device they are in.

With a section `noise` the model is a denoiser: see `recipes.denoisers`.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import keywords, resolve
from jaxreward.core.types import Rows
from jaxreward.data import conversations, pipeline, tokenize
from jaxreward.evals import likelihood, scorer
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.objectives import supervised
from jaxreward.parallel import hosts, rules
from jaxreward.recipes import denoisers
from jaxreward.train import session


def make_loss(
    plan: trainable.Plan, losses, where: rules.Rules | None = None, *, size: int | None = None
):
    """(loss, weights, coef) for `make_train_step`, from `config.losses`.

    Every entry has `fn` (a function of states, head matrix and `supervised.Scored` that gives one
    number a supervised token, resolved in `objectives`), `coef`, and further keywords of the
    function. The model's soft cap on logits is passed as `softcap`.

    Args:
      plan, losses, where: The model, the config's section, mesh and layouts.
      size: Most supervised tokens of a row; None takes the row's length.
    """
    fns, coef = {}, {}
    for name, entry in losses.items():
        kw = keywords(entry, "coef")
        fns[name] = resolve("objectives", entry["fn"], softcap=plan.cfg.logit_softcap, **kw)
        coef[name] = float(entry["coef"])

    def scored(rows: Rows):
        return supervised.scored(
            rows.tokens,
            rows.loss_mask,
            rows.segments,
            rows.trunk,
            size=size,
            predict_offset=plan.cfg.predict_offset,
        )

    def loss(params, frozen, rows: Rows, keys, extra):
        del keys
        at = scored(rows)
        states = trainable.states(plan, params, frozen, rows, rules=where)
        head = trainable.head_matrix(plan, params, frozen, rules=where)
        totals, metrics = {}, {}
        for name, fn in fns.items():
            each = fn(states, head, at)
            totals[name] = jnp.sum(jnp.where(at.mask, each, 0.0))
            if fn.func is supervised.cross_entropy:
                metrics["perplexity"] = m.Perplexity.of(each, at.mask)
        return totals, metrics, extra

    def weights(rows: Rows):
        return dict.fromkeys(fns, jnp.sum(scored(rows).mask, dtype=jnp.float32))

    return loss, weights, coef


def _made(count, seed):
    return [
        {"id": pair["id"], "prompt": pair["prompt"], "completion": pair["chosen"]}
        for pair in testing.synthetic_pairs(count, seed=seed)
    ]


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts), as `session.load_data`."""
    train, held, facts = session.load_data(
        config,
        tokenizer,
        read=conversations.read,
        made=_made,
        encode=conversations.encode,
        what="conversation",
    )
    if not facts["data"]["tokens"]:
        raise ValueError(
            f"data.path={config.data.path!r} holds no token to learn; see data.template"
        )
    return train, held, facts


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and data and makes state, step and batches. Trains nothing.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    workdir = Path(workdir)
    model = config.models.policy
    noise = "noise" in config
    with hosts.writer_first("initial model"):
        folder = export.init_folder(model.init, workdir, denoiser=noise)
    tokenizer = tokenize.load_tokenizer(folder)
    where = rules.on_mesh(dict(config.mesh))
    train, held, facts = load_data(config, tokenizer)
    cfg, weights, _ = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    if noise:
        cfg = denoisers.of_model(cfg, model, tokenizer)
        padded = dict(canvas=config.data.canvas, padding=config.data.padding)
        train, held = (denoisers.flat(x, end=tokenizer.eos_id, **padded) for x in (train, held))
    elif cfg.mask != "causal":
        raise ValueError(
            f"models.policy.init={model.init!r} is a denoiser, and this config's losses are of "
            "causal models; use diffusion/sft, or another config with a section noise"
        )
    plan = trainable.make_plan(cfg, model, language=True)
    source_hash = load.content_hash(folder)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(plan, weights, jax.random.fold_in(key, 1), rules=where)
    del weights
    length = config.data.row_len or scorer.row_len(train)

    def losses(packed):
        size = min(length, pipeline.most_supervised(train, packed))
        if noise:
            return denoisers.make_loss(plan, config, where, size=size)
        return make_loss(plan, config.losses, where, size=size)

    if noise:
        predict = denoisers.make_predict(plan, config, rules=where)
    else:
        predict = likelihood.make_predict(plan, rules=where, batch=config.data.eval_batch)

    return session.assemble(
        config,
        plan=plan,
        params=params,
        frozen=frozen,
        counts={"trained": tr.count(params), "frozen": tr.count(frozen)},
        train=train,
        held=held,
        facts=facts,
        length=length,
        losses=losses,
        predict=predict,
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
