"""Rotary positions, the visibility rule, and attention in tiles.

Visibility is decided by segments and one order: a token sees the tokens of its own segment, and of
its trunk (the prompt it shares with other answers), whose order is not greater than its own. Equal
text therefore gets equal states whether it stands alone, is padded, packed beside others, or hangs
from a shared prompt. A sliding window narrows this by positions in the text, not by places in the
row, and so means the same in all of these.

Attention never holds the scores of a whole row. It walks over tiles of queries and keys, skips the
tiles in which nothing is visible, and keeps only its result and the log-normaliser; its backward
pass, written by hand, computes each tile's scores again (Dao et al. 2022, FlashAttention, in plain
XLA). The same code runs on CPU, GPU and TPU.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array

MASKS = ("causal", "full", "block")
# Rows of queries and keys in a tile. Smaller tiles skip more and stay in a CPU's cache; a GPU wants
# fewer, larger ones (measured on an H100: benchmarks/gpu.py).
CHUNK, WIDE = 128, 512
# Up to this many scores a row and head, everything is one tile (decoding, short rows).
SMALL = 128 * 128
# A hidden score, and the largest score of a query that sees nothing: the former vanishes beside
# the latter, which keeps such a query free of NaN without a second mask.
_HIDDEN, _FLOOR = -1e30, -1e29


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a checkpoint stretched its rotary frequencies for longer texts.

    Attributes:
      kind: "linear" (all frequencies divided by `factor`) or "llama3" (only the slow ones, with a
        ramp between; Llama 3.1, as `rope_type: llama3` in transformers).
      factor: By how much.
      low, high: For "llama3": turns within `original` positions below which a frequency is divided,
        and above which it stays.
      original: For "llama3": positions of the first training.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Radians a position of each pair of a head, float32[head_dim / 2].

    .. math:: \\omega_i = \\theta^{-2 i / H}

    "llama3" with :math:`n_i = L \\omega_i / 2\\pi` turns within the L original positions:

    .. math:: \\omega_i \\left(\\frac{1 - s_i}{factor} + s_i\\right), \\quad
        s_i = \\mathrm{clip}\\left(\\frac{n_i - low}{high - low}, 0, 1\\right)
    """
    half = head_dim // 2
    omega = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is not None and scaling.kind == "linear":
        omega = omega / scaling.factor
    elif scaling is not None:
        turns = scaling.original * omega / (2 * np.pi)
        keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        omega = omega * ((1 - keep) / scaling.factor + keep)
    return omega.astype(np.float32)


def angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: Scaling | None = None
):
    """Sine and cosine of the rotary angles (RoPE), float32[B, T, 1, head_dim / 2] each."""
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    return jnp.sin(angle), jnp.cos(angle)


def rotary(x: Float[Array, "B T N H"], turn: tuple):
    """Rotates the two halves of each head by `turn` = (sine, cosine) (RoPE, half-split form).

    The rotation is float32; the result has the dtype of `x`.
    """
    sin, cos = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@struct.dataclass
class Sight:
    """What the queries of a batch may see, as vectors: the square mask is never made.

    Attributes:
      segments, trunk: Of the queries, int32[B, T]; 0 = padding, 0 = no trunk.
      order: Of the queries, int32[B, T].
      key_segments, key_order: Of the keys, int32[B, S]; segment 0 = empty.
      place, key_place: Positions in the text of queries and keys, int32[B, T] and int32[B, S], for
        a sliding window; None without one.
      reach: A key is visible from fewer than this many positions on, int32[], or None.
      tiles: True where a query chunk sees anything of a key chunk, bool[T / C, S / C], or None
        when there is one tile.
      sizes: Queries and keys in a tile.
      below: True when no query chunk sees a key chunk after its own.
    """

    segments: Any
    trunk: Any
    order: Any
    key_segments: Any
    key_order: Any
    place: Any
    key_place: Any
    reach: Any
    tiles: Any
    sizes: tuple[int, int] = struct.field(pytree_node=False)
    below: bool = struct.field(pytree_node=False)


def visible(queries, keys, reach=None, *, keys_first=False) -> Bool[Array, "B X Y"]:
    """The rule: same segment or its trunk, no greater order, within reach, neither side padding.

    Args:
      queries: (segments, trunk, order, place). keys: (segments, order, place); as in `Sight`.
      reach: As in `Sight`; without it the places are not read.
      keys_first: Return [B, S, T], not [B, T, S].
    """
    q, k = (1, 2) if keys_first else (2, 1)
    query, shared, last = (jnp.expand_dims(x, q) for x in queries[:3])
    key, at = (jnp.expand_dims(x, k) for x in keys[:2])
    see = ((query == key) | (shared == key)) & (query > 0) & (key > 0) & (at <= last)
    if reach is None:
        return see
    return see & (jnp.expand_dims(queries[3], q) - jnp.expand_dims(keys[2], k) < reach)


def sight(
    segments: Int[Array, "B T"],
    trunk: Int[Array, "B T"],
    key_segments: Int[Array, "B S"] | None = None,
    *,
    offset: Int[Array, ""] | int = 0,
    mask: str = "causal",
    positions: Int[Array, "B T"] | None = None,
    block: int = 0,
    window: int = 0,
    key_positions: Int[Array, "B S"] | None = None,
) -> Sight:
    """What each query may see, computed once for all layers.

    Args:
      segments: Segment of each query, 0 = padding.
      trunk: Segment whose tokens a query may also see, 0 = none. Ignored unless `mask` is causal:
        the prompt of a denoiser sees its answer, and so cannot be shared.
      key_segments: Segment of each slot of a cache, 0 = empty; None when the keys are the queries.
      offset: Slot of query 0 in the cache.
      mask: "causal"; "full" (a denoiser: the whole segment is visible); or "block" (block
        diffusion: a token sees its own block of positions and the blocks before it).
      positions: Position of each query in its text, for "block" and for a window.
      block: Positions in a block, for "block".
      window: A token sees itself and window - 1 positions before it; 0 = no limit. Causal only.
      key_positions: Position of each slot of a cache, for a window.

    Raises:
      ValueError: on an unknown mask; "block" without positions, with block < 1, or with a cache; a
        window without positions or with another mask than "causal".
    """
    if mask not in MASKS:
        raise ValueError(f"unknown attention mask {mask!r}; use one of {', '.join(MASKS)}")
    B, T = segments.shape
    itself = key_segments is None
    if window and (mask != "causal" or positions is None or (key_positions is None) != itself):
        raise ValueError(
            "a sliding window needs mask='causal' and the positions of queries and keys; "
            f"received mask={mask!r}, positions {'missing' if positions is None else 'given'}, "
            f"key_positions {'missing' if key_positions is None else 'given'}"
        )
    key_segments = segments if itself else key_segments
    S = key_segments.shape[1]
    if mask == "causal":
        order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) + offset, (B, T))
        key_order = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    elif mask == "full":
        trunk = jnp.zeros_like(segments)
        order, key_order = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    else:
        if positions is None or block < 1 or not itself:
            raise ValueError(
                f"mask='block' needs positions, block >= 1 and no cache; received block={block}, "
                f"positions {'missing' if positions is None else 'given'}, "
                f"{'no cache' if itself else 'a cache'}"
            )
        trunk = jnp.zeros_like(segments)
        order = key_order = positions // block
    sizes, one = _sizes(T, S)
    place = key_place = reach = None
    if window:
        place, key_place = positions, positions if itself else key_positions
        reach = jnp.asarray(window, jnp.int32)
    queries, keys = (segments, trunk, order, place), (key_segments, key_order, key_place)
    return _sight(queries, keys, reach, sizes, one, itself and mask == "causal" and not one)


def shared_sight(
    positions: Int[Array, "B T"],
    prompts: Bool[Array, "P S"],
    prompt_positions: Int[Array, "P S"],
    window: int = 0,
) -> Sight:
    """What B = P * G rows see of P shared prompts, for the `trunk` of `attend`.

    Args:
      positions: Of the rows' tokens in their texts. Padding is taken for a token here: nobody reads
        what it gets.
      prompts: True at a token of the prompt. prompt_positions: Of these tokens.
      window: As in `sight`; 0 = every token of the prompt is seen.
    """
    P, S = prompts.shape
    T = positions.size // P
    sizes, one = _sizes(T, S)
    ones, zeros = jnp.ones((P, T), jnp.int32), jnp.zeros((P, T), jnp.int32)
    place, at, reach = None, None, None
    if window:
        place, at = positions.reshape(P, T), prompt_positions
        reach = jnp.asarray(window, jnp.int32)
    own = prompts.astype(jnp.int32)
    return _sight((ones, zeros, zeros, place), (own, 0 * own, at), reach, sizes, one, below=False)


def _sizes(T, S):
    """Queries and keys in a tile, and whether one tile is all."""
    edge, most = (CHUNK, SMALL) if jax.default_backend() == "cpu" else (WIDE, WIDE * WIDE)
    one = most >= T * S
    return (T, S) if one else (min(T, edge), min(S, edge)), one


def _sight(queries, keys, reach, sizes, one, below):
    queries = tuple(_padded(x, sizes[0]) for x in queries)
    keys = tuple(_padded(x, sizes[1]) for x in keys)
    tiles = None if one else _tiles(queries, keys, reach, sizes)
    *query, place = queries
    *key, key_place = keys
    return Sight(*query, *key, place, key_place, reach, tiles, sizes, below)


def either(local: Bool[Array, ""], windowed: Sight, whole: Sight) -> Sight:
    """The first if `local`, else the second: for layers of two kinds in one scan.

    Both are of the same queries and keys and differ in reach alone, so nothing is copied.
    """
    far = jnp.iinfo(jnp.int32).max
    tiles = windowed.tiles
    if tiles is not None:
        tiles = jnp.where(local, windowed.tiles, whole.tiles)
    return windowed.replace(reach=jnp.where(local, windowed.reach, far), tiles=tiles)


def _padded(x, multiple):
    return None if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


def _tiles(queries, keys, reach, sizes):
    cut = lambda x: x.reshape(x.shape[0], -1, sizes[0]).swapaxes(0, 1)

    def one(chunk):
        see = visible(chunk, keys, reach).any((0, 1))
        return see.reshape(-1, sizes[1]).any(axis=1)

    return jax.lax.map(one, jax.tree.map(cut, queries))


def _pairs(see: Sight):
    """Query and key chunk of every tile that may hold something, as two int32 vectors."""
    n, m = see.tiles.shape
    pairs = [(i, j) for i in range(n) for j in range(i + 1 if see.below else m)]
    return tuple(jnp.array(x, jnp.int32) for x in np.array(pairs).T)


def _bias(see: Sight, i, j, **order):
    """What is added to the scores of one tile, float32[B, C, S]: 0, or enough to vanish."""
    C, S = see.sizes
    query = tuple(_slice(x, i, C) for x in (see.segments, see.trunk, see.order, see.place))
    key = tuple(_slice(x, j, S) for x in (see.key_segments, see.key_order, see.key_place))
    return jnp.where(visible(query, key, see.reach, **order), 0.0, _HIDDEN)


def _slice(x, i, size):
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _cut_queries(x, K, C):
    # [B, T, N, *] to [n, B, K, G * C, *]: heads that share a key head become rows of queries.
    B, T, N, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(B, -1, C, K, N // K, *rest), (1, 3, 4, 2), (0, 2, 3, 4))
    return x.reshape(x.shape[0], B, K, (N // K) * C, *rest)


def _join_queries(x, like):
    # The inverse of `_cut_queries`; `like` gives [B, T, N].
    B, T, N = like
    n, _, K, GC, *rest = x.shape
    x = x.reshape(n, B, K, N // K, GC * K // N, *rest)
    x = jnp.moveaxis(x, (0, 2, 3, 4), (1, 3, 4, 2))
    return x.reshape(B, -1, N, *rest)[:, :T]


def _cut_keys(x, S):
    # [B, K, S, H] to [m, B, K, C, H].
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % S), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, S, x.shape[3]), 2, 0)


def _join_keys(x, length):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :length]


def _over_tiles(see: Sight, operands, tile, by_query, by_key=()):
    """Runs `tile(operands(i, j), a, b)` over all tiles in which something is visible.

    `a` and `b` are the slices of the accumulators that belong to the query chunk and to the key
    chunk; the tile returns their new values. The operands are worked out outside the branch, and
    so once: fused into the tile, slices and comparisons would be redone for every score and head.
    """
    at = lambda tree, i: jax.tree.map(lambda x: _pick(x, i), tree)
    put = lambda tree, new, i: jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new
    )
    if see.tiles is None:
        new = tile(operands(0, 0), at(by_query, 0), at(by_key, 0))
        return tuple(jax.tree.map(lambda x: x[None], c) for c in new)

    def body(carry, pair):
        i, j = pair
        old = at(carry[0], i), at(carry[1], j)
        run = lambda given: tile(given[0], *given[1])
        new = jax.lax.cond(see.tiles[i, j], run, lambda g: g[1], (operands(i, j), old))
        return (put(carry[0], new[0], i), put(carry[1], new[1], j)), None

    return jax.lax.scan(body, (by_query, by_key), _pairs(see))[0]


# Letters of the products: b row, k key head, x folded query, s key, h head dimension.
# HIGHEST: float32 operands are multiplied in float32 on GPU and TPU too; bfloat16 ones as ever.
_times = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
)


def _pick(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, 0, False)


def _tied(q, see: Sight):
    # Without this tie JAX sees that the masks of all tiles are the same in every layer, moves them
    # out of the scan over layers, and so keeps the square matrix that the tiles avoid.
    return jax.lax.optimization_barrier((q, see))


def _forward(q, k, v, see: Sight, scale, softcap):
    q, see = _tied(q, see)
    B, T, N, _ = q.shape
    K = k.shape[1]
    qs, ks, vs = _cut_queries(q, K, see.sizes[0]), *(_cut_keys(x, see.sizes[1]) for x in (k, v))

    def operands(i, j):
        return _pick(qs, i), _pick(ks, j), _pick(vs, j), _bias(see, i, j)

    def tile(given, old, _):
        qi, kj, vj, bias = given
        top, norm, mixed = old
        scores = _times("bkxh,bksh->bkxs", qi, kj) * scale
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        grouped = scores.reshape(*scores.shape[:2], N // K, -1, scores.shape[3])
        scores = (grouped + bias[:, None, None]).reshape(scores.shape)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(top - highest)
        add = _times("bkxs,bksh->bkxh", weights.astype(v.dtype), vj)
        norm = shrink * norm + jnp.sum(weights, axis=-1)
        return (highest, norm, shrink[..., None] * mixed + add), ()

    zeros = jnp.zeros(qs.shape[:-1], jnp.float32)
    start = (zeros + _FLOOR, zeros, jnp.zeros(qs.shape, jnp.float32))
    (top, norm, mixed), _ = _over_tiles(see, operands, tile, start)
    norm = jnp.where(norm == 0, 1.0, norm)
    out = _join_queries((mixed / norm[..., None]).astype(q.dtype), (B, T, N))
    return out, _join_queries(top + jnp.log(norm), (B, T, N))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    see: Sight,
    scale: float,
    softcap: float = 0.0,
):
    """Softmax attention over one set of keys, and its log-normaliser.

    Both results may be differentiated, so parts over different sets of keys can be merged.

    Args:
      q, k, v, see: As in `attend`.
      scale: Of the products. softcap: c of c * tanh(score / c) before the softmax, 0 = none.

    Returns:
      (out [B,T,N,H] in the dtype of q, lse float32[B,T,N]). A query that sees nothing gets 0 and
      a log-normaliser of -1e29.
    """
    return _forward(q, k, v, see, scale, softcap)


def _attend_fwd(q, k, v, see, scale, softcap):
    out, lse = _forward(q, k, v, see, scale, softcap)
    return (out, lse), (q, k, v, out, lse, see)


def _attend_bwd(scale, softcap, kept, cotangents):
    q, k, v, out, lse, see = kept
    q, see = _tied(q, see)
    d_out, d_lse = cotangents
    B, T, N, _ = q.shape
    K, S = k.shape[1:3]
    # d score = weight * (d weight - delta), with the slope of the log-normaliser taken in.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    qs, ds, lses, deltas = (_cut_queries(x, K, see.sizes[0]) for x in (q, d_out, lse, delta))
    ks, vs = (_cut_keys(x, see.sizes[1]) for x in (k, v))

    # Scores are held keys first: every product below then reads the large operand as it lies.
    def operands(i, j):
        query = tuple(_pick(x, i) for x in (qs, ds, lses, deltas))
        return *query, _pick(ks, j), _pick(vs, j), _bias(see, i, j, keys_first=True)

    def tile(given, dq, old):
        qi, di, top, mean, kj, vj, bias = given
        dk, dv = old
        # Elementwise work with the heads of a group apart, as the bias is the same for all.
        apart = lambda x: x.reshape(*x.shape[:-1], N // K, -1)
        scores = apart(_times("bksh,bkxh->bksx", kj, qi)) * scale
        if softcap:
            bent = jnp.tanh(scores / softcap)
            scores = softcap * bent
        weights = jnp.exp(scores + bias[:, None, :, None] - apart(top)[:, :, None])
        slope = weights * (apart(_times("bksh,bkxh->bksx", vj, di)) - apart(mean)[:, :, None])
        if softcap:
            slope = slope * (1 - bent * bent)
        together = lambda x: x.reshape(*x.shape[:-2], -1).astype(q.dtype)
        slope, weights = together(slope), together(weights)
        return dq + _times("bksh,bksx->bkhx", kj, slope), (
            dk + _times("bksx,bkxh->bksh", slope, qi),
            dv + _times("bksx,bkxh->bksh", weights, di),
        )

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    dq, (dk, dv) = _over_tiles(
        see, operands, tile, zeros(qs.swapaxes(3, 4)), (zeros(ks), zeros(vs))
    )
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), see)
    return (
        _join_queries((scale * dq).swapaxes(3, 4).astype(q.dtype), (B, T, N)),
        _join_keys((scale * dk).astype(k.dtype), S),
        _join_keys(dv.astype(v.dtype), S),
        nothing,
    )


attend_part.defvjp(_attend_fwd, _attend_bwd)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    see: Sight,
    *,
    trunk: tuple | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Softmax attention over the visible keys; a query that sees nothing gets 0.

    Keys and values come head by head, and query heads that share one are folded into its rows, so
    keys and values are never repeated. Scores and softmax are float32.

    Args:
      q, k, v: Queries, keys, values.
      see: From `sight`.
      trunk: Keys and values that G = B / P consecutive rows share, and what is seen of them:
        (k [P,K,S',H], v [P,K,S',H], from `shared_sight`). They are read once per P, not per B, and
        merged with the rows' own part by their log-sum-exp.
      scale: Of the products; default 1 / sqrt(H).
      softcap: Scores become softcap * tanh(score / softcap) (Gemma 2); 0 = they stay.
    """
    B, T, N, H = q.shape
    scale = 1 / math.sqrt(H) if scale is None else scale
    own, lse = attend_part(q, k, v, see, scale, softcap)
    if trunk is None:
        return own
    trunk_k, trunk_v, trunk_see = trunk
    P = trunk_k.shape[0]
    together = q.reshape(P, (B // P) * T, N, H)
    shared, shared_lse = attend_part(together, trunk_k, trunk_v, trunk_see, scale, softcap)
    shared, shared_lse = shared.reshape(q.shape), shared_lse.reshape(lse.shape)
    highest = jax.lax.stop_gradient(jnp.maximum(lse, shared_lse))
    a, b = jnp.exp(lse - highest), jnp.exp(shared_lse - highest)
    share = (a / (a + b))[..., None]
    return (share * own.astype(jnp.float32) + (1 - share) * shared.astype(jnp.float32)).astype(
        q.dtype
    )
