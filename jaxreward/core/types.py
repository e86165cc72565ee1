"""Batch types. All are frozen pytrees with `.replace` and `.validate()`.

Letters: B rows, T slots, D width, R rotary axes, K answers in a row, N pairs in a row,
S denoising steps. A *row* is a packed sequence: it may hold several prompts, and several
answers to each. Attention inside a row is decided by `segments` and `trunk` alone.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray
PyTree = Any


@struct.dataclass
class Media:
    """Images or audio of the rows they travel with.

    Attributes:
      patches: Features of patches or audio frames, float[B, P, ...].
      segments: Which media item a patch belongs to, int32[B, P]; 0 = padding.
      slot: Index into P of the patch that a token slot stands for, int32[B, T]; -1 = none.
    """

    patches: Array
    segments: Int[Array, "B P"]
    slot: Int[Array, "B T"]


@struct.dataclass
class Rows:
    """Packed token rows.

    Attributes:
      tokens: Token ids, int32[B, T].
      mask: True where a slot holds a token, bool[B, T].
      loss_mask: True where a token is supervised (answer tokens and their EOS), bool[B, T].
      positions: Rotary positions, int32[B, T, R]; R = 1, or 3 for M-RoPE.
      segments: Segment id of a slot, int32[B, T]; 0 = padding. A token attends inside its segment.
      trunk: Segment this token may also attend to (its shared prompt), int32[B, T]; 0 = none.
      media: Row-local media or None.
      features: Inputs of the first trained layer, float[B, T, D], computed once by the frozen
        layers below it; None when the whole model runs.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    positions: Int[Array, "B T R"]
    segments: Int[Array, "B T"]
    trunk: Int[Array, "B T"]
    media: Media | None = None
    features: Float[Array, "B T D"] | None = None

    def validate(self):
        """Checks shapes and dtypes, and values when they are concrete. Returns self.

        Raises:
          ValueError: naming the field, what it must be and what it is.
        """
        _rows(self)
        return self


@struct.dataclass
class PairRows(Rows):
    """Rows whose answers are compared in pairs.

    Also serves sets of more than two answers: any pairs over the K answers of a row.

    Attributes:
      ends: Slot of the last token of each answer, int32[B, K]; -1 = no such answer.
      pairs: (chosen, rejected) as indices into K, int32[B, N, 2]; -1, -1 = no such pair.
      margin: Margin demanded of a pair, float32[B, N].
      weight: Weight of a pair, float32[B, N]; 0 where there is no pair.
      scores: What somebody else gave the two answers of a pair, float32[B, N, 2], chosen first; 0
        where there is no pair, NaN where a pair has none. None where nobody asks for them.
      targets: What the C outputs for an answer should be, float32[B, K, C]; NaN where it is not
        known. None where the data have no such numbers.
      answer_weight: Weight of an answer's targets, float32[B, K]; 0 where there are none. None
        with `targets`.
      ref_logps: Log-probability of each answer by a reference policy, float32[B, K]; 0 where there
        is no answer. None without a reference.
    """

    ends: Int[Array, "B K"] = None
    pairs: Int[Array, "B N 2"] = None
    margin: Float[Array, "B N"] = None
    weight: Float[Array, "B N"] = None
    scores: Float[Array, "B N 2"] | None = None
    targets: Float[Array, "B K C"] | None = None
    answer_weight: Float[Array, "B K"] | None = None
    ref_logps: Float[Array, "B K"] | None = None

    def validate(self):
        """As `Rows.validate`, and that ends and pairs point at something real."""
        _rows(self)
        B, T = self.tokens.shape
        for name, rank, kind in (
            ("ends", 2, np.integer),
            ("pairs", 3, np.integer),
            ("margin", 2, np.floating),
            ("weight", 2, np.floating),
        ):
            value = getattr(self, name)
            if value is None or value.ndim != rank or value.shape[0] != B:
                raise ValueError(
                    f"PairRows.{name} must have {rank} dimensions and {B} rows; "
                    f"received {None if value is None else value.shape}"
                )
            if not jax.numpy.issubdtype(value.dtype, kind):
                raise ValueError(f"PairRows.{name} must be {kind.__name__}; received {value.dtype}")
        if self.pairs.shape[2] != 2:
            raise ValueError(
                f"PairRows.pairs must end in (chosen, rejected); received {self.pairs.shape}"
            )
        if self.margin.shape != self.pairs.shape[:2] or self.weight.shape != self.pairs.shape[:2]:
            raise ValueError(
                f"PairRows.margin {self.margin.shape} and weight {self.weight.shape} must have "
                f"the shape of pairs without its last axis, {self.pairs.shape[:2]}"
            )
        if self.scores is not None and self.scores.shape != self.pairs.shape:
            raise ValueError(
                f"PairRows.scores {self.scores.shape} must have the shape of pairs, "
                f"{self.pairs.shape}"
            )
        if (self.targets is None) != (self.answer_weight is None) or (
            self.targets is not None
            and not self.targets.shape[:2] == self.answer_weight.shape == self.ends.shape
        ):
            shapes = [None if x is None else x.shape for x in (self.targets, self.answer_weight)]
            raise ValueError(
                f"PairRows.targets and answer_weight must both be None, or [B, K, C] and [B, K] "
                f"with ends {self.ends.shape}; received {shapes[0]} and {shapes[1]}"
            )
        if self.ref_logps is not None and self.ref_logps.shape != self.ends.shape:
            raise ValueError(
                f"PairRows.ref_logps {self.ref_logps.shape} must have the shape of ends, "
                f"{self.ends.shape}"
            )
        if not _concrete(self.ends, self.pairs, self.weight):
            return self
        ends, pairs, weight = (np.asarray(x) for x in (self.ends, self.pairs, self.weight))
        K = ends.shape[1]
        if (ends >= T).any() or (ends < -1).any():
            raise ValueError(
                f"PairRows.ends must lie in -1..{T - 1}; received {ends.min()}..{ends.max()}"
            )
        if (pairs >= K).any() or (pairs < -1).any():
            raise ValueError(
                f"PairRows.pairs must lie in -1..{K - 1}; received {pairs.min()}..{pairs.max()}"
            )
        live = weight != 0
        picked = np.take_along_axis(ends[:, None, :], np.maximum(pairs, 0), axis=2)
        if (live[..., None] & ((pairs < 0) | (picked < 0))).any():
            raise ValueError(
                "PairRows.weight is non-zero for a pair that names a missing answer; "
                "give absent pairs weight 0"
            )
        return self


@struct.dataclass
class RolloutRows(Rows):
    """Rows of sampled answers, and what a policy's losses ask for of the S tokens a row that are
    trained on. They stand in the order of the row; -1 in `answer` fills up.

    Attributes:
      source: Slot of the state that predicts the token, int32[B, S].
      target: The token, int32[B, S].
      answer: Which answer of its row the token belongs to, int32[B, S]; -1 = no token, or one of
        an answer that was taken out.
      group: The prompt of each answer, counted over all rows of a round, int32[B, K]; -1 = none.
      sampler_logps: Log-probabilities that the sampler reported, float32[B, S].
      advantages: float32[B, S].
      weight: Of each token in the mean over the batch, float32[B, S].
      old_logps: By the trainer's forward pass when the answers were sampled, float32[B, S]; None
        where each answer is used for one update, before which nothing has changed.
      ref_logps: Of the reference, float32[B, S]; None without one.
      old_values, returns: Of the value head when the answers were sampled, and what it is to learn,
        float32[B, S]; None without one.
    """

    source: Int[Array, "B S"] = None
    target: Int[Array, "B S"] = None
    answer: Int[Array, "B S"] = None
    group: Int[Array, "B K"] = None
    sampler_logps: Float[Array, "B S"] = None
    advantages: Float[Array, "B S"] = None
    weight: Float[Array, "B S"] = None
    old_logps: Float[Array, "B S"] | None = None
    ref_logps: Float[Array, "B S"] | None = None
    old_values: Float[Array, "B S"] | None = None
    returns: Float[Array, "B S"] | None = None

    def validate(self):
        """As `Rows.validate`, and that tokens belong to answers that are there."""
        _rows(self)
        B, T = self.tokens.shape
        shape = None if self.answer is None else self.answer.shape
        for name in ("source", "target", "answer"):
            _scored(self, name, shape, np.integer)
        optional = ("old_logps", "ref_logps", "old_values", "returns")
        for name in ("sampler_logps", "advantages", "weight", *optional):
            if getattr(self, name) is not None or name not in optional:
                _scored(self, name, shape, np.floating)
        if self.group is None or self.group.ndim != 2 or len(self.group) != B:
            came = None if self.group is None else list(self.group.shape)
            raise ValueError(f"RolloutRows.group must be [{B}, K]; received {came}")
        if not _concrete(self.answer, self.group, self.source):
            return self
        answer, K = np.asarray(self.answer), self.group.shape[1]
        if (answer < -1).any() or (answer >= K).any():
            raise ValueError(
                f"RolloutRows.answer must lie in -1..{K - 1}; received "
                f"{answer.min()}..{answer.max()}"
            )
        of = np.take_along_axis(np.asarray(self.group), np.maximum(answer, 0), axis=1)
        if ((answer >= 0) & (of < 0)).any():
            raise ValueError("RolloutRows.answer names an answer whose group is -1")
        source = np.asarray(self.source)
        seen = np.take_along_axis(np.asarray(self.mask), np.clip(source, 0, T - 1), axis=1)
        if ((answer >= 0) & ((source < 0) | (source >= T) | ~seen)).any():
            raise ValueError("RolloutRows.source points at a slot without a token")
        return self


def _scored(rows, name, shape, kind):
    value = getattr(rows, name)
    B = rows.tokens.shape[0]
    fits = value is not None and value.ndim == 2 and value.shape == shape and len(value) == B
    if not fits or not np.issubdtype(value.dtype, kind):
        came = None if value is None else f"{value.dtype}{list(value.shape)}"
        raise ValueError(
            f"RolloutRows.{name} must be {kind.__name__}[{B}, S] with one S; received {came}"
        )


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled answer, on the host.

    Attributes:
      prompt: Token ids, int32[Tp].
      tokens: Token ids after it, int32[T], its end token included. At least one.
      logps: Log-probability of each under the distribution it was drawn from, float32[T]; 0 where
        the model did not write it.
      written: True where the model wrote the token, bool[T]; False for the output of a tool.
      version: Which weights wrote each token, int32[T].
      finished: False if it was cut off at the longest length.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    logps: np.ndarray
    written: np.ndarray
    version: np.ndarray
    finished: bool


def _concrete(*arrays):
    return not any(isinstance(a, jax.core.Tracer | jax.ShapeDtypeStruct) for a in arrays)


def _rows(rows):
    if rows.tokens.ndim != 2:
        raise ValueError(f"Rows.tokens must be [B, T]; received {list(rows.tokens.shape)}")
    B, T = rows.tokens.shape
    want = {
        "tokens": ((B, T), np.integer),
        "mask": ((B, T), np.bool_),
        "loss_mask": ((B, T), np.bool_),
        "segments": ((B, T), np.integer),
        "trunk": ((B, T), np.integer),
    }
    for name, (shape, kind) in want.items():
        value = getattr(rows, name)
        if value.shape != shape or not np.issubdtype(value.dtype, kind):
            raise ValueError(
                f"Rows.{name} must be {kind.__name__}{list(shape)}; "
                f"received {value.dtype}{list(value.shape)}"
            )
    if rows.positions.shape not in ((B, T, 1), (B, T, 3)):
        raise ValueError(
            f"Rows.positions must be [{B}, {T}, R] with R = 1 or 3; "
            f"received {list(rows.positions.shape)}"
        )
    if rows.features is not None and rows.features.shape[:2] != (B, T):
        raise ValueError(
            f"Rows.features must be [{B}, {T}, D]; received {list(rows.features.shape)}"
        )
    if not _concrete(rows.mask, rows.segments, rows.loss_mask):
        return
    mask, segments = np.asarray(rows.mask), np.asarray(rows.segments)
    if ((segments != 0) != mask).any():
        raise ValueError("Rows.segments must be 0 exactly where Rows.mask is False")
    if (np.asarray(rows.loss_mask) & ~mask).any():
        raise ValueError("Rows.loss_mask is True on padding; supervise real tokens only")


@struct.dataclass
class TrainState:
    """What a training step updates and a checkpoint holds.

    Attributes:
      step: Steps taken, int32[].
      params: What the optimizer updates: full weights, top layers, or adapters.
      opt_state: State of the optax chain.
      extra: Averages and other non-gradient state (EMA, queues); {} when unused.
      key: Typed PRNG key. Never changes: the step folds `step` into it.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    extra: PyTree
    key: PyTree
