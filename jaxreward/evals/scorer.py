"""Scores of answers: trees in, one number per answer out, in the order given.

Packing, batching and padding happen here; a score depends on its text alone.
"""

import bisect
import collections
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreward.core import masked
from jaxreward.core.types import PairRows
from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree
from jaxreward.models import heads, trainable
from jaxreward.parallel import hosts
from jaxreward.parallel.rules import Rules

log = logging.getLogger(__name__)
PyTree = Any
FIELDS = (
    "tokens",
    "mask",
    "loss_mask",
    "positions",
    "segments",
    "trunk",
    "ends",
    "pairs",
    "margin",
    "weight",
    "scores",
)
# Batches that are not waited for yet: a device computes one while the next is laid out. A CPU runs
# two side by side, since XLA does much of a forward pass on one core.
_AHEAD, _SIDE_BY_SIDE = 1, 2
SOMETIMES = ("features", "targets", "answer_weight", "ref_logps")


def pair_rows(batch: dict, rules: Rules | None = None) -> PairRows:
    """A batch of the data pipeline as PairRows on the devices."""
    arrays = {name: batch[name] for name in FIELDS}
    arrays |= {name: batch[name] for name in SOMETIMES if name in batch}
    return PairRows(**hosts.to_global(arrays, rules))


def row_len(trees: list[Tree], *, least: int = 0) -> int:
    """A row length for these trees: the longest fits, and a typical row holds several."""
    sizes = [tree.size for tree in trees]
    return pipeline.suggest_row_len([max(sizes), min(2 * int(np.mean(sizes)), 2048), least])


def outputs(
    plan: trainable.Plan, params: PyTree, frozen: PyTree, rows: PairRows, *, rules=None, keys=None
) -> jax.Array:
    """What the head says of the answers of each row, float32[B, K, C].

    Args:
      plan, params, frozen, rows, rules: The model and its rows.
      keys: One key a row, for the head's dropout in training; None drops nothing.
    """
    states = trainable.states(plan, params, frozen, rows, rules=rules)
    ends = masked.pick(states, rows.ends)
    return heads.outputs(params["score"], ends, keys=keys, dropout=plan.head.dropout)


def rewards(
    plan: trainable.Plan, params: PyTree, frozen: PyTree, rows: PairRows, *, rules=None
) -> jax.Array:
    """One reward an answer, float32[B, K], as `heads.reward` makes it of the outputs; only those
    with `ends` >= 0 mean anything."""
    return heads.reward(plan.head, outputs(plan, params, frozen, rows, rules=rules))


def at_ends(
    plan: trainable.Plan, params: PyTree, frozen: PyTree, rows: PairRows, *, rules=None
) -> jax.Array:
    """State at the last token of each answer, [B, K, D]; 0 where there is none.

    As in `outputs`, but the last layer computes nothing else. It is a block of its own to compile,
    which pays where nothing but the ends is read.
    """
    return trainable.states(plan, params, frozen, rows, rules=rules, ends=rows.ends)


def packed(trees: list[Tree]) -> dict[int, list[list[int]]]:
    """{row length: rows, each a list of indices of trees}: few slots stay empty, few rows are long.

    From the longest tree on, each goes into the row that it fills best, and where it fits into none
    opens one: of 256 slots if all trees are that short, else of 1024, 4096, twice that and so on.
    So a long tree lengthens few other rows, and each length is one more program to compile.
    """
    rows: list[tuple[int, list[int]]] = []
    rooms: list[tuple[int, int]] = []  # what is left of which row, sorted
    short = max((tree.size for tree in trees), default=0) <= 256
    for i in sorted(range(len(trees)), key=lambda i: -trees[i].size):
        size = trees[i].size
        at = bisect.bisect_left(rooms, (size, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = 256 if short else 1024, len(rows)
            while room < size:
                room *= 4 if room < 4096 else 2
            rows.append((room, []))
        rows[row][1].append(i)
        if room > size:
            bisect.insort(rooms, (room - size, row))
    found: dict[int, list[list[int]]] = {}
    for length, members in rows:
        found.setdefault(length, []).append(members)
    return found


def _rows_at_once(batch, length, rules):
    # Memory grows with the tokens that run together: fewer rows where they are long. On a CPU what
    # 2048 tokens leave behind still lies in its cache.
    most = 1 << 11 if jax.default_backend() == "cpu" else 1 << 14
    ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"] if rules else 1
    fitting = max(1, min(batch, most // length))
    return ways * max(1, fitting // ways)


def make_predict(
    plan: trainable.Plan, *, rules: Rules | None = None, batch: int = 8
) -> Callable[[PyTree, PyTree, list[Tree]], list[np.ndarray]]:
    """A function (params, frozen, trees) -> rewards, one float32[answers] per tree.

    Rows and compilations as `over_trees` says.
    """

    def score_rows(params, frozen, rows):
        values = heads.outputs(params["score"], at_ends(plan, params, frozen, rows, rules=rules))
        return heads.reward(plan.head, values)

    return over_trees(score_rows, rules=rules, batch=batch)


def make_predict_outputs(
    plan: trainable.Plan, *, rules: Rules | None = None, batch: int = 8
) -> Callable[[PyTree, PyTree, list[Tree]], list[np.ndarray]]:
    """As `make_predict`, but all outputs of the head: one float32[answers, C] per tree."""

    def score_rows(params, frozen, rows):
        return heads.outputs(params["score"], at_ends(plan, params, frozen, rows, rules=rules))

    return over_trees(score_rows, len(plan.head.outputs), rules=rules, batch=batch)


def over_trees(
    measure: Callable[[PyTree, PyTree, PairRows], jax.Array],
    *shape: int,
    rules: Rules | None = None,
    batch: int = 8,
) -> Callable[[PyTree, PyTree, list[Tree]], list[np.ndarray]]:
    """A function (params, frozen, trees) -> what `measure` says of the answers of each tree.

    Compiled once per row length (see `packed`); at most `batch` rows run at a time, fewer when
    rows are long, and on a mesh a multiple of the devices that share a batch.

    Args:
      measure: (params, frozen, rows) -> float32[B, K, *shape], one entry an answer.
      *shape: Of an entry; nothing for a number.
      rules, batch: Mesh and layouts, and rows at a time.

    Returns:
      A function; one float32[answers, *shape] a tree, in the order given.
    """
    measure = jax.jit(measure, out_shardings=hosts.whole(rules))
    alone = rules is None or rules.mesh.size == 1
    workers = _SIDE_BY_SIDE if alone and jax.default_backend() == "cpu" else 0

    def predict(params, frozen, trees):
        with ThreadPoolExecutor(workers) if workers else contextlib.nullcontext() as pool:
            return run(params, frozen, trees, pool)

    def run(params, frozen, trees, pool):
        out = [np.full((len(tree.answers), *shape), np.nan, np.float32) for tree in trees]
        running = collections.deque()
        wait = lambda *given: np.asarray(measure(*given))
        for length, rows in packed(trees).items():
            # Powers of two: the next trees most likely find the program that these had compiled.
            answers, pairs = (1 << (n - 1).bit_length() for n in pipeline.widths(trees, rows))
            batches = pipeline.batches(
                trees,
                row_len=length,
                batch=_rows_at_once(batch, length, rules),
                seed=0,
                epochs=1,
                shuffle=False,
                answers_per_row=answers,
                pairs_per_row=pairs,
                plan=rows,
            )
            for n, raw in enumerate(batches):
                given = params, frozen, _share(raw, rules)
                # The first of a length compiles, which two at once would do twice.
                found = pool.submit(wait, *given) if pool and n else measure(*given)
                running.append((raw["index"], found))
                if len(running) > _AHEAD + workers:
                    _scatter(out, *running.popleft())
        while running:
            _scatter(out, *running.popleft())
        return out

    return predict


def _share(raw, rules):
    """A batch that every process has in full, on the devices: each gives the rows it holds."""
    mine = hosts.rows(rules, len(raw["mask"]))
    if len(mine) < len(raw["mask"]):
        raw = {name: x[mine] for name, x in raw.items()}
    return pair_rows(raw, rules)


def _scatter(out, index, values):
    # index [B, K, 2] names the (tree, answer) of every slot of values [B, K].
    values = np.asarray(values.result() if isinstance(values, Future) else values)
    for b, k in np.argwhere(index[..., 0] >= 0):
        tree, answer = index[b, k]
        out[tree][answer] = values[b, k]


def fingerprint(trees: list[Tree], *also: Any) -> str:
    """Names what is computed from these trees, by their tokens and what else it depends on.

    Args:
      trees: Their tokens, and which of them are supervised.
      *also: Such as the content hash of the weights and the dtype.

    Returns:
      16 hex digits.
    """
    digest = hashlib.sha256(" ".join(map(str, also)).encode())
    for tree in trees:
        for part in (tree.prompt, *tree.answers, *tree.loss):
            digest.update(np.asarray(len(part), np.int64).tobytes() + part.tobytes())
    return digest.hexdigest()[:16]


def kept(path: str | Path, shape: tuple, dtype: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives, read from `path` if an earlier start left it there, else made and written.

    Either all processes make it or none does, since each may have a part in it; the file appears
    whole or not at all. One that is damaged or of another shape is said and made again.

    Args:
      path: A .npy file, whose name says what is in it (`fingerprint`).
      shape, dtype: Of the array. NumPy's files know bfloat16 by its bytes only.
      make: Called without arguments.
    """
    path, found = Path(path), None
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False).view(dtype)
        except (ValueError, EOFError):  # cut short, or of another dtype
            found = None
        if found is None or found.shape != shape:
            log.warning("%s does not fit the data and is computed again", path)
            found = None
    if hosts.all_true(found is not None):
        return found
    found = make()
    if hosts.is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, found, allow_pickle=False)
        os.replace(partial, path)
    return found


def cache_features(
    plan: trainable.Plan,
    frozen: PyTree,
    trees: list[Tree],
    *,
    rules: Rules | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[np.ndarray]]:
    """What the frozen lower layers make of every tree, computed once.

    Args:
      plan: With `plan.cut` > 0.
      frozen: Holds the lower layers.
      trees: Without features.
      rules, batch: Mesh, and rows at a time.
      progress: Called with (batches done, batches in all).

    Returns:
      For each tree the list [prompt [Tp, D], answer 0 [T0, D], ...] in the compute dtype, as
      `Tree.features` takes it.
    """
    if not trees:
        return []
    forward = jax.jit(
        lambda frozen, rows: trainable.features(plan, frozen, rows, rules=rules),
        out_shardings=hosts.whole(rules),
    )
    out: list[list[np.ndarray] | None] = [None] * len(trees)
    length = row_len(trees)
    packed = pipeline.pack(trees, row_len=length)
    total = pipeline.steps_per_epoch(len(packed), batch=batch)
    batches = pipeline.batches(
        trees, row_len=length, batch=batch, seed=0, epochs=1, shuffle=False, plan=packed
    )
    for done, raw in enumerate(batches):
        states = np.asarray(forward(frozen, _share(raw, rules)))
        rows = packed[done * batch : (done + 1) * batch]
        for b, members in enumerate(rows):
            slot = 0
            for i in members:
                parts = [len(trees[i].prompt), *(len(a) for a in trees[i].answers)]
                ends = slot + np.cumsum(parts)
                # Copies: a view would keep the padding of the whole batch alive.
                out[i] = [states[b, e - n : e].copy() for n, e in zip(parts, ends)]
                slot = int(ends[-1])
        if progress is not None:
            progress(done + 1, total)
    return out
