"""Answers to prompts from a language model, in resumable chunks."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.data import sources, stop, tokenize
from jaxreward.diffusion import trajectory
from jaxreward.hub import load
from jaxreward.parallel import rules
from jaxreward.sampling import autoregressive, choose, denoise
from jaxreward.train import writers

# Batches of prompts that one call of the sampler takes: what has ended makes room for the next
# prompt at once, and all of a call is written to disk together.
AHEAD = 4


def run(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    n: int = 4,
    temperature: float = 0.8,
    max_new: int = 64,
    seed: int = 0,
    batch: int = 64,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_strings: Sequence[str] = (),
    steps: int = 0,
    block: int = 0,
    threshold: float = 0.0,
) -> None:
    """Samples `n` answers to every prompt of a JSONL file.

    Each output line is the prompt's record with `answers`: a list of {"text", "tokens" (count),
    "logp" (sum of log-probabilities under the untempered, unfiltered model), "finished"}. An answer
    depends on its prompt, its number and the seed, not on the batch it was computed in.
    Interrupted, the same command goes on after the prompts that are on disk.

    With stop strings an answer ends with the token that completes one of them. Its text is what
    comes before the string, `tokens` and `logp` are of everything that was sampled, and `stop` is
    the string, or null.

    Args:
      model: Hugging Face folder of a language model.
      input: JSONL with `prompt` (text or messages). output: JSONL; "-" is standard output.
      n: Answers per prompt. temperature: 0 = greedy. max_new: Most tokens of an answer.
      seed: Of the sampling. batch: Answers computed together.
      top_k, top_p, min_p: As in `choose.Filtered`; by default nothing is left out.
      stop_strings: Texts that end an answer, besides the model's end tokens.
      steps, block, threshold: Of a denoiser, as `sampling.denoise.Schedule`; steps 0 = `max_new`.
        Its answers are `max_new` positions, cut at the first end token; `logp` is of the tokens
        before it, each given what stood there when it was committed.

    Raises:
      ValueError, FileNotFoundError: saying what does not fit.
    """
    if n < 1 or max_new < 1 or batch < 1:
        raise ValueError(f"n, max_new and batch must be positive; received {n}, {max_new}, {batch}")
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings must be a list of texts; received {stop_strings!r}")
    how = choose.make(temperature, top_k, top_p, min_p)
    records = sources.read_prompts(input)
    settings = {
        "model": load.content_hash(model),
        "n": n,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop_strings": list(stop_strings),
        "max_new": max_new,
        "denoising": [steps, block, threshold],
        "seed": seed,
        "prompts": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest(),
    }
    partial = None if str(output) == "-" else Path(f"{output}.partial")
    done = _resume(partial, settings)
    if len(done) < len(records):
        kw = dict(steps=steps or max_new, block=block, threshold=threshold)
        kw |= dict(n=n, max_new=max_new, seed=seed, batch=batch, strings=list(stop_strings))
        _sample(model, records, done, partial, how, **kw)
    sources.write_jsonl(output, done)
    if partial is not None:
        partial.unlink(missing_ok=True)


def _resume(partial, settings) -> list[dict]:
    """Finished records of an interrupted run with the same settings; begins the file otherwise."""
    if partial is None:
        return []
    lines = []
    if partial.is_file():
        for line in partial.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    if lines and lines[0] == settings:
        print(f"{partial}: going on after {len(lines) - 1} prompts", file=sys.stderr)
    else:
        if len(lines) > 1:
            print(f"{partial}: made with other settings; starting again", file=sys.stderr)
        lines = [settings]
    partial.parent.mkdir(parents=True, exist_ok=True)
    fresh = partial.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(fresh, partial)
    return lines[1:]


def _sample(
    model, records, done, partial, how, *, n, max_new, seed, batch, strings, steps, block, threshold
):
    where = rules.on_mesh()
    tokenizer = tokenize.load_tokenizer(model)
    cfg, params, _ = load.load(model, rules=where)
    if not cfg.tied and "head" not in params:
        raise ValueError(
            f"{model} has no language head (lm_head.weight): it is a reward model, and its "
            "untied head is gone. Give the folder of a language model"
        )
    encoded = [tokenize.encode_conversation(tokenizer, r["prompt"]).tokens for r in records]
    longest = max(map(len, encoded))
    if longest + max_new > cfg.max_len:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new is {max_new}: together more than "
            f"the model's {cfg.max_len}. Shorten the prompts or lower max_new"
        )
    if not tokenizer.eos_ids:
        raise ValueError(f"{model} names no end-of-sequence token; answers would never end")
    # One prompt length and one number of prompts for all calls: one compiled program.
    length = -(-longest // 16) * 16
    lanes = max(1, batch // n)
    calls = -(-len(records) // (AHEAD * lanes))
    rows = -(-len(records) // (calls * lanes)) * lanes
    ends = jnp.asarray(sorted(tokenizer.eos_ids), jnp.int32)
    if cfg.mask == "causal":
        if (steps, block, threshold) != (max_new, 0, 0.0):
            raise ValueError(f"{model} is no denoiser: steps, block and threshold do not apply")
        draw = functools.partial(
            autoregressive.sample,
            max_new=max_new,
            choose=how,
            stop=ends,
            matcher=jnp.asarray(stop.matcher(tokenizer, strings, cfg.vocab)) if strings else None,
            rules=where,
            samples=n,
            slots=lanes * n,
            share=n,
        )
    else:
        if strings:
            raise ValueError("a denoiser fills in whole answers; stop strings do not end them")
        schedule = denoise.Schedule(max_new, steps, block, choose=how, threshold=threshold)
        draw = functools.partial(_filled, schedule=schedule, ends=ends, n=n, rules=where)
        rows = min(rows, lanes)
    fold = jax.random.fold_in
    number = jax.jit(jax.vmap(lambda i, j: fold(fold(jax.random.key(seed), i), j)))
    progress = writers.Progress(len(records), start=len(done), label="sample")
    while len(done) < len(records):
        first = len(done)
        part = encoded[first : first + rows]
        tokens, mask = autoregressive.padded(part, rows=rows, length=length)
        keys = number(np.repeat(np.arange(first, first + rows), n), np.tile(np.arange(n), rows))
        got = draw(params, cfg, tokens, mask, keys)
        got = jax.tree.map(np.asarray, got)
        for row in range(len(part)):
            answers = [
                _answer(tokenizer, got, i, len(ends), strings)
                for i in range(row * n, (row + 1) * n)
            ]
            record = records[first + row]
            done.append(
                {
                    **{k: v for k, v in record.items() if k != "extra"},
                    **record.get("extra", {}),
                    "answers": answers,
                }
            )
        if partial is not None:
            with partial.open("a") as file:
                file.writelines(json.dumps(r) + "\n" for r in done[first:])
                file.flush()
                os.fsync(file.fileno())
        progress.update(len(done))
    progress.close()


def _filled(params, cfg, tokens, mask, keys, *, schedule, ends, n, rules):
    """A denoiser's answers in the form of the other sampler's."""
    tokens, mask = (np.repeat(x, n, axis=0) for x in (tokens, mask))
    # A row that holds no prompt is filled in like any other, behind one token.
    mask[~mask.any(axis=1), -1] = True
    canvas = denoise.sample(params, cfg, tokens, mask, keys, schedule=schedule, rules=rules)
    P = tokens.shape[1]
    length, ended = trajectory.answer_length(canvas, P, ends)
    inside = jnp.arange(schedule.length) < length[:, None]
    return autoregressive.Completion(
        tokens=canvas.tokens[:, P:],
        length=length,
        reason=jnp.where(ended, 0, -1),
        logps=jnp.where(inside, canvas.logps[:, P:], 0.0),
        full_logps=jnp.where(inside, canvas.full_logps[:, P:], 0.0),
        steps=canvas.step,
        slots=len(tokens),
    )


def _answer(tokenizer, got, i, ends, strings):
    ids = got.tokens[i, : got.length[i]].tolist()
    answer = {
        "text": tokenizer.decode(ids),
        "tokens": len(ids),
        "logp": float(got.full_logps[i].sum()),
        "finished": bool(got.finished[i]),
    }
    if strings:
        said = int(got.reason[i]) - ends
        answer["stop"] = strings[said] if said >= 0 else None
        if said >= 0:
            answer["text"] = answer["text"].partition(strings[said])[0]
    return answer
