"""Sampled answers to packed rows, in NumPy.

A group, that is, the answers to one prompt, becomes trees that share the prompt; a minibatch is
whole groups, packed into rows of one length. All minibatches of a round have equally many rows, and
their number is a power of two times the rows that run at a time: so few shapes are ever compiled.
"""

import math

import numpy as np

from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree


def row_len(*, max_prompt, max_new, answers, most=4096, multiple=64):
    """A row length for groups: a whole one if that takes at most `most` slots, else as many answers
    of the longest kind as fit into that, and at least one.

    Args:
      max_prompt, max_new: Most tokens of a prompt and of an answer.
      answers: Of a group.
      most: Slots beyond which a group is cut.
      multiple: Row lengths are multiples of this.
    """
    fitting = max(1, min(answers, (most - max_prompt) // max_new))
    return pipeline.suggest_row_len([max_prompt + fitting * max_new], multiple=multiple)


def trees(groups, *, row_len):
    """Trees of groups of answers; a group that is longer than a row becomes several.

    Args:
      groups: list of lists of trajectories (`core.types.Trajectory`), each to one prompt.
      row_len: Slots of a row.

    Returns:
      (trees, where): the trees, and for each the (group, answer) of its answers.

    Raises:
      ValueError: naming an answer that with its prompt exceeds a row.
    """
    made, where = [], []
    for g, group in enumerate(groups):
        prompt, room, members = group[0].prompt, row_len, []
        for i, answer in enumerate(group):
            size = len(answer.tokens)
            if len(prompt) + size > row_len:
                raise ValueError(
                    f"prompt and answer {i} of group {g} take {len(prompt) + size} tokens, more "
                    f"than a row of {row_len}; raise data.row_len or lower rollouts.max_new"
                )
            if members and size > room:
                where.append(members)
                room, members = row_len, []
            if not members:
                room -= len(prompt)
            members.append((g, i))
            room -= size
        where.append(members)
    for members in where:
        answers = [groups[g][i] for g, i in members]
        made.append(
            Tree(
                id=str(members[0][0]),
                prompt=np.asarray(answers[0].prompt, np.int32),
                answers=[np.asarray(a.tokens, np.int32) for a in answers],
                loss=[np.asarray(a.written, np.bool_) for a in answers],
            )
        )
    return made, where


def minibatches(groups, *, count, row_len, answers_per_row, multiple):
    """The answers of a round as `count` minibatches of rows of equal shape.

    Groups are dealt out in the order given, group g to minibatch g % count.

    Args:
      groups: As `trees`; their number is a multiple of `count`.
      count: Minibatches.
      row_len: Slots of a row. answers_per_row: K.
      multiple: The rows of a minibatch are this times a power of two; what is missing is padding.

    Returns:
      (batches, efficiency): for each minibatch the arrays of `RolloutRows` that are known from
      sampling, as dict of tokens, mask, loss_mask, positions, segments, trunk; source, target,
      answer i32[R, S] and sampler_logps f32[R, S] of the tokens that the model wrote; index
      i32[R, S] (of the token in its answer) and version i32[R, S]; group i32[R, K] (its number) and
      member i32[R, K] (of the answer in its group; both -1 = none). S is the same for all, an
      eighth of the row or a multiple of it. And the share of all slots that hold tokens.

    Raises:
      ValueError: if the groups do not divide, or as `trees` and `pipeline.pack`.
    """
    if not groups or len(groups) % count:
        raise ValueError(
            f"{len(groups)} prompts of a round do not split into {count} minibatches; set "
            "rollouts.updates to a divisor of rollouts.prompts"
        )
    plans = []
    for b in range(count):
        ours, where = trees(groups[b::count], row_len=row_len)
        where = [[(b + count * g, i) for g, i in members] for members in where]
        plan = pipeline.pack(ours, row_len=row_len, answers_per_row=answers_per_row)
        plans.append((ours, where, plan))
    most = max(len(plan) for _, _, plan in plans)
    rows = multiple * (1 << math.ceil(math.log2(math.ceil(most / multiple))))
    kw = dict(rows=rows, row_len=row_len, answers_per_row=answers_per_row)
    batches = [_batch(groups, *plan, **kw) for plan in plans]
    part = math.ceil(row_len / 8)
    longest = max(int((batch["answer"] >= 0).sum(axis=1).max()) for batch in batches)
    size = min(row_len, part * max(1, math.ceil(longest / part)))
    for batch in batches:
        batch |= {name: batch[name][:, :size] for name in _SCORED}
    used = sum(int(batch["mask"].sum()) for batch in batches)
    return batches, used / (count * rows * row_len)


_KEPT = ("tokens", "mask", "loss_mask", "positions", "segments", "trunk")
_SCORED = ("source", "target", "answer", "index", "version", "sampler_logps")


def _batch(groups, ours, where, plan, *, rows, row_len, answers_per_row):
    made = []
    for members in plan + [[]] * (rows - len(plan)):
        row = pipeline.materialise(
            ours, members, row_len=row_len, answers_per_row=answers_per_row, pairs_per_row=1
        )
        out = {name: row[name] for name in _KEPT}
        out |= {name: np.zeros(row_len, np.int32) for name in _SCORED}
        out["sampler_logps"] = np.zeros(row_len, np.float32)
        out["answer"] -= 1
        out |= {name: np.full(answers_per_row, -1, np.int32) for name in ("group", "member")}
        at = 0
        for k, (tree, j) in enumerate(row["index"]):
            if tree < 0:
                continue
            g, i = where[tree][j]
            answer = groups[g][i]
            out["group"][k], out["member"][k] = g, i
            end = row["ends"][k] + 1
            slots = np.arange(end - len(answer.tokens), end)
            before = slots - 1
            # The first token follows the prompt, wherever in the row that ends.
            before[0] = np.flatnonzero(row["segments"] == row["trunk"][slots[0]])[-1]
            written = np.asarray(answer.written, np.bool_)
            span = slice(at, at + int(written.sum()))
            out["source"][span] = before[written]
            out["target"][span] = answer.tokens[written]
            out["answer"][span] = k
            out["index"][span] = np.flatnonzero(written)
            out["version"][span] = answer.version[written]
            out["sampler_logps"][span] = answer.logps[written]
            at = span.stop
        made.append(out)
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def step_rows(canvas, which, *, mask_id, predict_offset, rows, size=None):
    """Denoising steps as rows: the canvas before a step, and what the step committed.

    Args:
      canvas: dict of NumPy arrays [N, T] of `diffusion.trajectory.Canvas`: tokens, segments, given,
        reveal, full_logps.
      which: (row of the canvas, step) of each row to make.
      mask_id, predict_offset: Of the denoiser.
      rows: Rows to make; what is missing is padding. size: Tokens a row, S; None takes the most.

    Returns:
      dict of arrays of `RolloutRows`, with index i32[R, S], the place of a token in the canvas, and
      of i32[R], the row of the canvas (-1 = padding). One answer a row, number 0.

    Raises:
      ValueError: if there are more rows or tokens than fit.
    """
    of, step = np.array(which, np.int64).reshape(-1, 2).T
    at = {name: values[of] for name, values in canvas.items()}
    done = at["given"] | ((at["reveal"] >= 0) & (at["reveal"] < step[:, None]))
    seen = np.where(done, at["tokens"], mask_id)
    return _canvas_rows(at, of, seen, at["reveal"] == step[:, None], predict_offset, rows, size)


def masked_rows(canvas, which, learnt, *, mask_id, predict_offset, share, seed, rows, size=None):
    """Answers as rows of which nothing is seen, behind prompts of which a part is hidden.

    The estimate of log-probabilities of diffu-GRPO (d1, arXiv:2504.12216): one pass of the model.

    Args:
      canvas: As `step_rows`.
      which: Rows of the canvas to make rows of.
      learnt: bool[N, T]: tokens that count, those of an answer up to its end.
      mask_id, predict_offset, rows, size: As `step_rows`.
      share: Probability with which a prompt's token is hidden.
      seed: Of what is hidden, drawn for all rows of the canvas: the same seed hides the same of a
        row, whatever `which` is.

    Returns:
      As `step_rows`.
    """
    of = np.array(which, np.int64).reshape(-1)
    hidden = np.random.default_rng(seed).random(canvas["tokens"].shape) < share
    at = {name: values[of] for name, values in canvas.items()}
    hide = ~at["given"] | (hidden[of] & (at["segments"] > 0))
    seen = np.where(hide, mask_id, at["tokens"])
    return _canvas_rows(at, of, seen, learnt[of], predict_offset, rows, size)


def _canvas_rows(at, of, seen, learnt, predict_offset, rows, size):
    R, T = seen.shape
    most = int(learnt.sum(axis=1).max(initial=1))
    size = most if size is None else size
    if rows < R or size < most:
        raise ValueError(f"{R} rows of up to {most} tokens do not fit into {rows} rows of {size}")
    order = np.argsort(~learnt, axis=1, kind="stable")[:, :size]
    there = np.take_along_axis(learnt, order, axis=1)
    pick = lambda x: np.where(there, np.take_along_axis(x, order, axis=1), 0)
    segments = at["segments"]
    made = {
        "tokens": seen.astype(np.int32),
        "mask": segments > 0,
        "loss_mask": learnt,
        "positions": np.maximum(np.cumsum(segments > 0, axis=1) - 1, 0)[..., None],
        "segments": segments,
        "trunk": np.zeros((R, T)),
        "source": np.where(there, np.maximum(order - predict_offset, 0), 0),
        "target": pick(at["tokens"]),
        "answer": np.where(there, 0, -1),
        "index": np.where(there, order, 0),
        "sampler_logps": pick(at["full_logps"]),
        "of": of,
    }
    blank = {"answer": -1, "of": -1}
    grown = {}
    for name, values in made.items():
        kind = values.dtype if values.dtype in (np.bool_, np.float32) else np.int32
        more = np.full((rows - R, *values.shape[1:]), blank.get(name, 0), kind)
        grown[name] = np.concatenate([values.astype(kind), more])
    return grown
