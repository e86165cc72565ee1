"""How likely a denoiser finds given answers: a bound for every row of a file, with its error.

A masked diffusion model has no log-probability that one pass would give. What it has is a lower
bound, the mean over random masks of the answer, and here that mean is taken over a given number of
them: `denoising.log_likelihood` over whole data sets, for ranking and multiple choice.
"""

import functools
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets
from jaxreward.core.types import Rows
from jaxreward.data import sources, tokenize
from jaxreward.diffusion import process
from jaxreward.hub import load
from jaxreward.models import families, trainable
from jaxreward.objectives import denoising, supervised
from jaxreward.parallel import hosts, rules
from jaxreward.recipes import denoisers, evaluate
from jaxreward.train import checkpoint, session, writers

PyTree = Any
# Slots that run together at most, as in `evals.scorer`: fewer rows where they are long.
ROOM = 1 << 14


class Text(NamedTuple):
    """A prompt and its answer as one text.

    Attributes:
      name: Decides, with the seed, which masks are drawn.
      tokens: int32[n]. maskable: True at the tokens of the answer, bool[n].
    """

    name: str
    tokens: np.ndarray
    maskable: np.ndarray


def score(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    samples: int = 128,
    guidance: float = 0.0,
    seed: int = 0,
    template: str = "auto",
    batch: int = 8,
    corpus: str = "",
) -> None:
    """Adds a bound of log p(answer | prompt) under a denoiser to every line of a JSONL file.

    .. math:: \\frac1N \\sum_{b<N} \\frac{L}{l_b} \\sum_{i \\; masked} \\log p(x_i \\mid x_{l_b})

    Fields: `logp`, the bound in nats; `logp_error`, its standard error as if masks were independent
    (how many tokens they hide is spread evenly, so the true one is smaller, most of all of short
    answers), null where there is one mask only; `logp_tokens`, L, the tokens of the answer with its
    end token. With chosen and rejected each has its own, `chosen_logp` and so on. Lines keep their
    order and their other fields. "-" is standard input or output; nothing but records goes to
    standard output.

    A line's numbers depend on its text, its `id` (else the number of the line) and the seed; not
    on the batch or the lines around it. Nothing is cut.

    Args:
      model: Folder of a denoiser, or the workdir of its run.
      input, output: JSONL with a prompt and an answer, or chosen and rejected, as
        `sources.read_answers` takes them.
      samples: N, masks of each answer. How many tokens they hide is spread evenly over 1 to L.
      guidance: s of unconditional + (s + 1) (conditional - unconditional), of the logits, where the
        former has its prompt masked, as in sampling. 0 = none; else it is the guided model's bound.
      seed: Of the masks.
      template, corpus: As `evaluate.score`. batch: Rows that run at a time.

    Raises:
      ValueError, FileNotFoundError: naming the model, the setting or the line that does not fit,
        before anything is written.

    References: LLaDA, arXiv:2502.09992, and its code (128 masks; guidance in likelihoods too).
    Deviation: the end token is part of an answer, as it is in training; there it is left out.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples (--likelihood) must be a positive integer; received {samples!r}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number; received {guidance}")
    records = sources.read_answers(input, corpus=session.corpus({"corpus": corpus}))
    where = rules.on_mesh()
    plan, params, frozen, tokenizer, template, known = _loaded(Path(model), template, where)
    if guidance and plan.cfg.logit_softcap:
        raise ValueError(f"{model} has a soft cap on its logits; guidance needs logits without one")
    texts = list(_texts(records, tokenizer, template, plan.cfg.predict_offset, input))
    over = sum(len(text.tokens) > known for text in texts)
    if over:
        print(
            f"{over} of {len(texts)} prompts with their answers take more than the {known} tokens "
            "that the model knows; they are scored whole",
            file=sys.stderr,
        )
    kw = dict(samples=samples, guidance=guidance, seed=seed, rules=where, batch=batch)
    found = iter(make_estimates(plan, **kw)(params, frozen, texts))
    out, text = [], iter(texts)
    for record in records:
        row = dict(record["row"])
        for name in record["names"]:
            front = f"{name}_" if len(record["names"]) == 2 else ""
            each, tokens = next(found), int(next(text).maskable.sum())
            error = float(each.std(ddof=1) / math.sqrt(samples)) if samples > 1 else None
            values = {"logp": float(each.mean()), "logp_error": error, "logp_tokens": tokens}
            row |= {f"{front}{k}": v for k, v in values.items()}
        out.append(row)
    if hosts.is_writer():
        sources.write_jsonl(output, out)


def refuse(model: str | Path) -> None:
    """That a reward model's scores are not asked of a denoiser.

    Raises:
      ValueError: if the workdir or folder is a denoiser's, naming what it can give instead.
    """
    model = Path(model)
    if checkpoint.is_workdir(model):
        run = presets.read(model / "config.json")
        found = "from_causal" in run.get("models", {}).get("policy", {})
    else:
        found = (model / "config.json").is_file() and _config(model).mask != "causal"
    if found:
        raise ValueError(
            f"{model} is a denoiser, which has no head that scores answers; --likelihood N gives a "
            "bound of the log-likelihood of each from N masks, such as 128"
        )


def _config(folder):
    return families.hf_config(load.read_config(folder))


def _loaded(model, template, where):
    """(plan, params, frozen, tokenizer, template, tokens that the model knows) of a denoiser."""
    if checkpoint.is_workdir(model):
        plan, params, frozen, folder, recorded, most = evaluate.from_workdir(model, where)
        cfg = plan.cfg
    else:
        cfg, folder, recorded = _config(model), model, evaluate.recorded_template(model)
        most = (load.read_config(model).get("jaxreward") or {}).get("max_len")
    if cfg.mask == "causal":
        raise ValueError(
            f"{model} is a causal model, and --likelihood N estimates what only a denoiser needs "
            "masks for; leave it out to have a reward model score, or give a denoiser's folder"
        )
    tokenizer = tokenize.load_tokenizer(folder)
    denoisers.check_mask(cfg, tokenizer)
    if not checkpoint.is_workdir(model):
        cfg, weights, _ = load.load(model, rules=where)
        plan = trainable.Plan(cfg, head=None)
        params, frozen = trainable.split(plan, weights)
    chosen = tokenize.chosen_template(tokenizer, recorded if template == "auto" else template)
    return plan, params, frozen, tokenizer, chosen, min(most or cfg.max_len, cfg.max_len)


def _texts(records, tokenizer, template, offset, input) -> Iterator[Text]:
    for record in records:
        for i, answer in enumerate(record["answers"]):
            at = f"{input}: record {record['id']!r}"
            try:
                whole = tokenize.encode_conversation(
                    tokenizer, record["prompt"], answer, template=template
                )
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
            if not any(whole.loss_mask):
                raise ValueError(
                    f"{at}: field {record['names'][i]}: an answer without tokens has no likelihood"
                )
            if offset and whole.loss_mask[0]:
                raise ValueError(
                    f"{at}: this model predicts a token from the one before it: give it a prompt"
                )
            tokens = np.asarray(whole.tokens, np.int32)
            yield Text(f"{record['id']} {i}", tokens, np.asarray(whole.loss_mask, bool))


def make_estimates(
    plan: trainable.Plan,
    *,
    samples: int,
    guidance: float = 0.0,
    seed: int = 0,
    rules: rules.Rules | None = None,
    batch: int = 8,
) -> Callable[[PyTree, PyTree, list[Text]], list[np.ndarray]]:
    """A function (params, frozen, texts) -> float64[samples] for each text, one estimate a mask.

    A row holds one masked text. Compiled once per row length (`slots`); masks that come up several
    times for a text run once, so a short answer takes fewer passes than samples.

    Args:
      plan: A denoiser.
      samples, guidance, seed: As `score`.
      rules, batch: Mesh and layouts, and rows at a time.
    """
    cfg, key = plan.cfg, jax.random.key(seed)

    @functools.partial(jax.jit, out_shardings=hosts.whole(rules), static_argnames="most")
    def measure(params, frozen, given, most):
        tokens, masked = given["tokens"], given["masked"]
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        real = place < given["size"][:, None]
        segments, none = real.astype(jnp.int32), jnp.zeros_like(tokens)
        at = supervised.scored(
            tokens, masked, segments, none, size=most, predict_offset=cfg.predict_offset
        )

        def states(seen):
            rows = Rows(seen, real, masked, place[..., None], segments, none)
            whole = trainable.states(plan, params, frozen, rows, rules=rules)
            return jnp.take_along_axis(whole, at.source[..., None], axis=1)

        seen = jnp.where(masked, cfg.mask_id, tokens)
        found = states(seen)
        if guidance:
            # The head is linear, so logits are mixed where their states are.
            bare = states(jnp.where(place < given["prompt"][:, None], cfg.mask_id, seen))
            bare, full = bare.astype(jnp.float32), found.astype(jnp.float32)
            found = (bare + (guidance + 1) * (full - bare)).astype(found.dtype)
        head = trainable.head_matrix(plan, params, frozen, rules=rules)
        logps, _ = supervised.token_logps(found, head, at.target, softcap=cfg.logit_softcap)
        return denoising.log_likelihood(logps, at.mask, masked.sum(axis=1), given["length"])

    def copies(texts, members, T, found):
        """(text, number of the mask, mask) of what has to run, and the place for it in `found`."""
        for i in members:
            room = np.zeros(T, bool)
            room[: len(texts[i].maskable)] = texts[i].maskable
            drawn = np.asarray(_masks(key, _number(texts[i].name), room, samples=samples))
            masks, again = np.unique(drawn, axis=0, return_inverse=True)
            found[i] = np.zeros(len(masks)), again.reshape(-1)
            for k, mask in enumerate(masks):
                yield i, k, mask

    def estimates(params, frozen, texts):
        found, ways = {}, 1
        if rules is not None:
            ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"]
        progress = writers.Progress(len(texts), label="likelihood", shows=hosts.is_writer())
        shown, every = 0, -(-len(texts) // 20)
        for T, members in _buckets(texts).items():
            most = min(T, slots(max(int(texts[i].maskable.sum()) for i in members)))
            B = ways * max(1, min(batch, ROOM // T) // ways)
            todo = copies(texts, members, T, found)
            while some := list(itertools.islice(todo, B)):
                given = _laid_out([(texts[i], mask) for i, _, mask in some], B, T)
                mine = hosts.rows(rules, B)
                given = hosts.to_global({k: x[mine] for k, x in given.items()}, rules)
                values = np.asarray(measure(params, frozen, given, most))
                for (i, k, _), value in zip(some, values):
                    found[i][0][k] = value
                if len(found) - shown >= every:
                    shown = len(found)
                    progress.update(shown)
        progress.close()
        return [found[i][0][found[i][1]] for i in range(len(texts))]

    return estimates


@functools.partial(jax.jit, static_argnames="samples")
def _masks(key, number, maskable, *, samples):
    """The masks of one text, bool[samples, T]."""
    of_counts, of_masks = jax.random.split(jax.random.fold_in(key, number))
    counts = process.stratified_counts(of_counts, samples, maskable.sum())
    wide = jnp.broadcast_to(maskable, (samples, len(maskable)))
    tokens = jnp.zeros(wide.shape, jnp.int32)  # which of them are hidden does not depend on them
    keys = jax.random.split(of_masks, samples)
    return process.corrupt_exactly(keys, tokens, wide, 0, counts).masked


def slots(size: int) -> int:
    """The row length of a text: powers of two from 32 on, and what lies half-way between them.

    Its own length alone decides, so that what is drawn for a text is the same in any company.
    """
    whole = max(32, 1 << (size - 1).bit_length())
    return whole * 3 // 4 if whole > 32 and size <= whole * 3 // 4 else whole


def _buckets(texts):
    found: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        found.setdefault(slots(len(text.tokens)), []).append(i)
    return dict(sorted(found.items()))


def _number(name):
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return np.uint32(int.from_bytes(digest[:4]))


def _laid_out(some, B, T):
    """Texts with their masks as the rows of a batch; what is missing of it is empty rows."""
    given = {"tokens": np.zeros((B, T), np.int32), "masked": np.zeros((B, T), bool)}
    given |= {name: np.zeros(B, np.int32) for name in ("size", "prompt", "length")}
    for b, (text, mask) in enumerate(some):
        given["tokens"][b, : len(text.tokens)] = text.tokens
        given["masked"][b] = mask
        given["size"][b] = len(text.tokens)
        given["prompt"][b] = text.maskable.argmax()
        given["length"][b] = text.maskable.sum()
    return given
