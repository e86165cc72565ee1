"""Autoregressive sampling: prompts are run once, then one jitted loop decodes into refilled slots.

Prompts are padded on the left. Padding has segment 0 and is never attended to; positions count real
tokens only. What is where:

    pool    keys and values of all P prompts of a call, each run once for its G answers
    lanes   W slots lie in lanes of `share`. A lane works on one job, a prompt and `share` of its
            answers, which read one copy of the prompt's keys and values in place. When all of them
            have ended, the lane copies the next job's prompt from the pool
    ring    the answers' own keys and values. In step i every slot writes to place i mod max_new,
            however long its answer is; what a slot held before it was refilled is hidden

Where every prompt has a lane for all its answers, lanes are the pool itself, and nothing is copied.

Memory is that of pool, lanes and ring, and on a CPU a second copy of the layers, which the loop has
apart (`decoder.apart`) if they are large and the cache is of no smaller dtype. All shapes follow
from P, the padded length of the prompts, W, `share`, G and max_new, so those decide how often a
program is compiled; `padded` keeps the first two to powers of two.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int, Integer

from jaxreward.core.types import Array, Rows
from jaxreward.models import decoder
from jaxreward.parallel.rules import Rules

PyTree = Any
# Tokens of prompts in one pass of prefill, which bounds what it holds beside keys and values.
PREFILL = 8192


@struct.dataclass
class Completion:
    """Sampled answers. G answers per prompt, in order, make N = P * G rows.

    Attributes:
      tokens: int32[N, max_new]; `fill` after the end.
      length: Tokens of each answer, its end token included, int32[N]; 0 where there is no prompt.
      reason: What ended it: i < E for stop id i, E + j for stop string j, -1 if it reached max_new
        without an end, int32[N].
      logps: Log-probabilities under the distribution actually sampled from, float32[N, max_new].
      full_logps: The same under softmax(logits), float32[N, max_new].
      steps: Turns of the decode loop, int32[].
      slots: Answers decoded side by side.
    """

    tokens: Int[Array, "N T"]
    length: Int[Array, " N"]
    reason: Int[Array, " N"]
    logps: Float[Array, "N T"]
    full_logps: Float[Array, "N T"]
    steps: Int[Array, ""]
    slots: int = struct.field(pytree_node=False)

    @property
    def finished(self) -> Bool[Array, " N"]:
        """True if the answer reached a stop id or a stop string."""
        return self.reason >= 0

    @property
    def utilisation(self) -> Float[Array, ""]:
        """Tokens of answers over slots times steps: the part of the decoding that was of use."""
        return self.length.sum() / (self.steps * self.slots)


@struct.dataclass
class _Pool:
    """Prompts after prefill. `queue` is their order, those that hold no token last; of each group
    of devices its own, with `count` jobs to do."""

    cache: Any
    last: Any
    keys: Any
    queue: Any
    count: Any


@struct.dataclass
class _Slots:
    """Where each slot is: the row of its answer (N = none), the tokens of prompt and answer so far,
    the state of the matcher, its key, and whether it is at work."""

    row: Any
    prompt: Any
    count: Any
    match: Any
    keys: Any
    live: Any


def padded(
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    rows: int | None = None,
    length: int | None = None,
) -> tuple[Int[np.ndarray, "P T"], Bool[np.ndarray, "P T"]]:
    """Token ids and mask of prompts, padded on the left to `rows` by `length`.

    Unless given, both are the next power of two, the length at least 16: prompts of all sizes then
    share few compiled programs. Rows beyond the prompts hold nothing and cost no decoding.

    Raises:
      ValueError: if there is no prompt, one is empty, or they do not fit.
    """
    above = lambda n: 1 << (n - 1).bit_length()
    if not prompts or not min(map(len, prompts)):
        raise ValueError(f"expected prompts of at least one token; received {len(prompts)} prompts")
    longest = max(map(len, prompts))
    rows = above(len(prompts)) if rows is None else rows
    length = max(16, above(longest)) if length is None else length
    if len(prompts) > rows or longest > length:
        raise ValueError(
            f"{len(prompts)} prompts of up to {longest} tokens do not fit into {rows} x {length}"
        )
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, flag, prompt in zip(tokens, mask, prompts):
        row[length - len(prompt) :] = prompt
        flag[length - len(prompt) :] = True
    return tokens, mask


@functools.partial(
    jax.jit,
    static_argnames=(
        *("cfg", "max_new", "choose", "rules", "samples", "fill"),
        *("slots", "share", "cache_dtype"),
    ),
)
def sample(
    params: PyTree,
    cfg: decoder.Config,
    prompts: Int[Array, "P T"],
    mask: Bool[Array, "P T"],
    keys: Array,
    *,
    max_new: int,
    choose: Any,
    stop: Int[Array, " E"],
    matcher: Integer[Array, "S V"] | None = None,
    rules: Rules | None = None,
    samples: int = 1,
    fill: int = 0,
    slots: int | None = None,
    share: int | None = None,
    cache_dtype: str | None = None,
) -> Completion:
    """Samples `samples` answers to every prompt.

    An answer depends on its prompt and its key alone: not on the batch, the order, `slots`, `share`
    or the mesh. Shapes move the last digits of the logits, so that a draw may rarely fall on the
    other side of the border between two tokens; in one program (same shapes) it never does.

    Args:
      params: Weights of `decoder.specs(cfg)`, with embedding and head.
      cfg: The model.
      prompts: Token ids, padded on the left. A row without tokens gets no answer.
      mask: True where a slot holds a token.
      keys: One typed PRNG key an answer, [P * samples].
      max_new: Most tokens of an answer.
      choose: `choose.Greedy()`, `choose.Temperature(t)`, `choose.Filtered(...)`, or a hashable with
        their methods `logits` and `pick`.
      stop: Token ids that end an answer (all end-of-sequence ids of the model).
      matcher: Stop strings as `data.stop.matcher` makes them: row s, column v is the state after
        token v in state s, S + j where that completes string j. The answer ends with this token.
      rules: Mesh and layouts, or None. Slots are split as a batch is, and the prompts with them,
        where P and the number of lanes divide; key heads are split over `tensor`.
      samples: Answers per prompt, G.
      fill: Token id written after the end.
      slots: Answers decoded side by side, W; None = all P * G.
      share: Answers to one prompt that share a lane, a divisor of G and of W: they read its keys
        once, and wait for each other. None = G if all answers fit into W, else 1.
      cache_dtype: Of keys and values in memory; None = the compute dtype. "bfloat16" halves them
        and rounds what attention reads.

    Returns:
      A Completion of P * samples rows. Decoding stops as soon as every row has ended.

    Raises:
      ValueError: if `slots`, `share` and `samples` do not go together, the matcher was made for
        another vocabulary, or the model is a denoiser.
    """
    if cfg.mask != "causal":
        raise ValueError(
            f"a denoiser (mask={cfg.mask!r}) does not write token by token; use "
            "sampling.denoise.sample, or recipe diffusion_rl"
        )
    P, N = len(prompts), len(prompts) * samples
    slots, share = _layout(N, samples, slots, share)
    lanes = slots // share
    if matcher is not None and matcher.shape[1] != cfg.vocab:
        raise ValueError(
            f"the matcher knows {matcher.shape[1]} token ids and the model has {cfg.vocab}; make "
            f"it with vocab={cfg.vocab}"
        )
    groups, local = _grouped(rules, P, lanes)
    deal = lambda x: x.reshape(P // groups, groups, -1).swapaxes(0, 1).reshape(x.shape)
    prompts, mask, keys = map(deal, (prompts, mask, keys))
    cache, last = _prefill(params, cfg, prompts, mask, rules, groups, cache_dtype)
    # Of a smaller dtype, unrolled layers would all be in memory in both.
    apart = decoder.prefers_apart(cfg) and cache_dtype in (None, cfg.compute)
    params = decoder.apart(params) if apart else params
    jobs = mask.any(axis=1).reshape(groups, -1)
    pool = _Pool(
        cache,
        last,
        keys=keys,
        queue=jnp.argsort(~jobs, axis=1, stable=True).reshape(P).astype(jnp.int32),
        count=jobs.sum(axis=1, dtype=jnp.int32) * (samples // share),
    )
    in_place = lanes == P and share == samples
    taken = jnp.zeros(groups, jnp.int32)
    if in_place:
        trunk = pool.cache
        spread = lambda x: jnp.repeat(x, samples, axis=0)
        state, none = spread(pool.last), jnp.zeros(N, jnp.int32)
        row = jnp.tile(jnp.arange(N // groups, dtype=jnp.int32), groups)
        size = mask.sum(axis=1, dtype=jnp.int32)
        at = _Slots(row, spread(size), none, none, keys, spread(size > 0))
        at = at.replace(row=jnp.where(at.live, row, N))
    else:
        trunk = decoder.empty_cache(cfg, lanes, prompts.shape[1], dtype=cache_dtype)
        state, none = jnp.zeros((slots, cfg.width), cfg.compute), jnp.zeros(slots, jnp.int32)
        at = _Slots(none + N, none, none, none, keys[none], none > 0)
    cache = decoder.empty_cache(cfg, slots, max_new, trunk=trunk, dtype=cache_dtype, ring=True)
    cache = cache.apart() if apart else cache
    cache = decoder.placed(cache, rules)
    take = local(functools.partial(_take, samples=samples, share=share))

    def refilled(taken, at, state, cache):
        if in_place:
            return taken, at, state, cache
        work = taken, at, state, cache.trunk, cache.segments
        taken, at, state, trunk, segments = take(pool, work)
        return taken, at, state, cache.replace(segments=segments, trunk=trunk)

    out = dict(
        tokens=jnp.full((N, max_new), fill, jnp.int32),
        length=jnp.zeros(N, jnp.int32),
        reason=jnp.full(N, -1, jnp.int32),
        logps=jnp.zeros((N, max_new), jnp.float32),
        full_logps=jnp.zeros((N, max_new), jnp.float32),
    )
    head = decoder.head_matrix(params, cfg).astype(cfg.compute)
    ones = jnp.ones((slots, 1), jnp.int32)

    def body(carry):
        steps, taken, at, state, cache, out = carry
        # Before the layers read the lanes, which are then changed in place.
        taken, at, state, cache = refilled(taken, at, state, cache)
        logits = decoder.logits(state, head, cfg)
        drawn_from = choose.logits(logits)
        token = choose.pick(drawn_from, jax.vmap(jax.random.fold_in)(at.keys, at.count))
        logp = lambda x: (
            jnp.take_along_axis(x, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(x, axis=-1)
        )
        reason, match = _ended(token, at.match, stop, matcher)
        new = dict(tokens=token, length=at.count + 1, reason=reason)
        new |= dict(logps=logp(drawn_from), full_logps=logp(logits))
        out = local(_write)((at.row, at.count, new), out)
        place = (at.prompt + at.count)[:, None, None]
        live = at.live & (reason < 0) & (at.count + 1 < max_new)
        row = jnp.where(live, at.row, N)
        at = at.replace(row=row, count=at.count + 1, match=match, live=live)
        rows = Rows(token[:, None], ones > 0, ones > 0, place, ones, ones * 0)
        # The state after the last token is never read, but a branch here would cost a copy.
        hidden = decoder.backbone(
            params,
            cfg,
            decoder.embed(params, cfg, rows, rules=rules),
            positions=rows.positions,
            segments=rows.segments,
            trunk=rows.trunk,
            rules=rules,
            cache=cache,
        )
        return steps + 1, taken, at, hidden.states[:, 0], hidden.cache, out

    def unfinished(carry):
        _, taken, at, *_ = carry
        return at.live.any() | ((taken < pool.count).any() & (not in_place))

    start = jnp.int32(0), taken, at, state, cache, out
    steps, *_, out = jax.lax.while_loop(unfinished, body, start)
    collect = lambda x: x.reshape(groups, P // groups, samples, -1).swapaxes(0, 1).reshape(x.shape)
    return Completion(**jax.tree.map(collect, out), steps=steps, slots=slots)


def _layout(N, samples, slots, share):
    slots = N if slots is None else min(slots, N)
    if share is None:
        share = samples if slots == N else 1
    if slots < 1 or share < 1 or samples % share or slots % share:
        raise ValueError(
            f"share must divide both samples and slots; received share={share}, samples={samples}, "
            f"slots={slots}. Share 1 always does"
        )
    return slots, share


def _grouped(rules: Rules | None, prompts: int, lanes: int) -> tuple[int, Callable]:
    """How many groups of devices have slots of their own, and what runs a function in each.

    Such a function, (given, old) -> new, gets what belongs to its group, so no prompt travels.
    """
    axes = None
    if rules is not None:
        axes, also = (rules.spec(("batch",), (n,))[0] for n in (prompts, lanes))
        axes = axes if also is not None else None
    if axes is None:
        return 1, lambda fn: fn
    axes = (axes,) if isinstance(axes, str) else axes
    # Stacked keys and values [L, B, K, S, H] have their layers in front.
    spec = lambda x: PartitionSpec(*(None,) * (x.ndim == 5), *(axes,) * (x.ndim > 0))

    def local(fn):
        def run(given, old):
            leaves, tree = jax.tree.flatten((given, old))
            results, like = jax.tree.flatten(old)
            on_leaves = lambda *x: jax.tree.leaves(fn(*jax.tree.unflatten(tree, x)))
            new = jax.shard_map(
                on_leaves,
                mesh=rules.mesh,
                in_specs=tuple(map(spec, leaves)),
                out_specs=list(map(spec, results)),
                axis_names=set(axes),
                check_vma=False,
            )(*leaves)
            return jax.tree.unflatten(like, new)

        return run

    return int(np.prod([rules.mesh.shape[a] for a in axes])), local


def _prefill(params, cfg, prompts, mask, rules, groups, dtype):
    """Keys and values of the prompts, and the state after the last token of each."""
    P, T = prompts.shape
    each = P // groups
    passes = -(-P * T // PREFILL)
    rows_each = -(-each // passes)
    passes = -(-each // rows_each)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    segments = mask.astype(jnp.int32)

    def run(part):
        tokens, mask, positions, segments = part
        rows = Rows(tokens, mask, mask, positions[..., None], segments, jnp.zeros_like(segments))
        hidden = decoder.backbone(
            params,
            cfg,
            decoder.embed(params, cfg, rows, rules=rules),
            positions=rows.positions,
            segments=segments,
            trunk=rows.trunk,
            rules=rules,
            cache=decoder.empty_cache(cfg, len(tokens), T, dtype=dtype),
        )
        return hidden.cache, hidden.states[:, -1]

    whole = prompts, mask, positions, segments
    if passes == 1:
        return run(whole)
    cache = decoder.placed(decoder.empty_cache(cfg, P, T, dtype=dtype), rules)
    # P as groups and rows: each pass takes rows of every group. The last pass reaches back into the
    # one before it where they do not divide.
    apart = lambda x, axis: x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    together = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def one(i, held):
        start = jnp.minimum(i * rows_each, each - rows_each)
        take = lambda x: jax.lax.dynamic_slice_in_dim(apart(x, 0), start, rows_each, axis=1)
        new, last = run(jax.tree.map(lambda x: together(take(x), 0), whole))
        put = lambda x, new, axis: jax.lax.dynamic_update_slice_in_dim(
            x, apart(new, axis), start, axis=axis + 1
        )
        k, v, states = held
        return put(k, new.k, 1), put(v, new.v, 1), put(states, last, 0)

    states = jnp.zeros((groups, each, cfg.width), cfg.compute)
    held = apart(cache.k, 1), apart(cache.v, 1), states
    k, v, states = jax.lax.fori_loop(0, passes, one, held)
    cache = cache.replace(k=together(k, 1), v=together(v, 1))
    return cache.replace(segments=segments, positions=positions), together(states, 0)


def _ended(token, match, stop, matcher):
    """Why a token ends its answer (-1: it does not), and the matcher's next state."""
    E = stop.shape[0]
    ends = token[:, None] == stop
    reason = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), -1) if E else token * 0 - 1
    if matcher is None:
        return reason.astype(jnp.int32), match
    states = matcher.shape[0]
    match = matcher[match, token].astype(jnp.int32)
    said = match >= states
    reason = jnp.where((reason < 0) & said, E + match - states, reason)
    return reason.astype(jnp.int32), jnp.where(said, 0, match)


def _write(given, out):
    """Puts what each slot has said into the row of its answer; slots without one write nothing."""
    row, count, new = given
    whole = lambda x, value: x.at[row].set(value, mode="drop")
    one = lambda x, value: x.at[row, count].set(value, mode="drop")
    return {n: (one if out[n].ndim == 2 else whole)(out[n], new[n]) for n in out}


def _take(pool, work, *, samples, share):
    """Gives the next jobs to lanes whose slots have all ended."""
    taken, at, state, trunk, segments = work
    parts = samples // share
    free = ~at.live.reshape(-1, share).any(axis=1)
    job = taken + jnp.cumsum(free, dtype=jnp.int32) - 1
    takes = free & (job < pool.count)
    prompt = pool.queue[jnp.where(takes, job // parts, 0)]
    row = (prompt * samples + job % parts * share)[:, None] + jnp.arange(share, dtype=jnp.int32)
    row = row.reshape(-1)
    spread = lambda x: jnp.repeat(x, share, axis=0)
    new = spread(takes)
    size = (pool.cache.segments[prompt] > 0).sum(axis=1, dtype=jnp.int32)
    at = _Slots(
        row=jnp.where(new, row, at.row),
        prompt=jnp.where(new, spread(size), at.prompt),
        count=jnp.where(new, 0, at.count),
        match=jnp.where(new, 0, at.match),
        keys=jnp.where(new, pool.keys[jnp.where(new, row, 0)], at.keys),
        live=at.live | new,
    )
    state = jnp.where(new[:, None], spread(pool.last[prompt]), state)
    segments = jnp.where(new[:, None], 0, segments)
    first = jnp.argsort(~takes, stable=True)

    def copy(j, kv):
        # One prompt at a time and in place; in most steps there is none.
        lane = first[j]

        def put(into, source):
            one = jax.lax.dynamic_slice_in_dim(source, prompt[lane], 1, axis=1)
            write = jax.lax.dynamic_update_slice_in_dim
            if isinstance(into, tuple):  # layers apart
                return tuple(write(x, y, lane, axis=0) for x, y in zip(into, one))
            return write(into, one, lane, axis=1)

        return tuple(map(put, kv, (pool.cache.k, pool.cache.v)))

    k, v = jax.lax.fori_loop(0, takes.sum(), copy, (trunk.k, trunk.v))
    put = lambda old, source: jnp.where(takes[:, None], source[prompt], old)
    trunk = trunk.replace(
        k=k,
        v=v,
        segments=put(trunk.segments, pool.cache.segments),
        positions=put(trunk.positions, pool.cache.positions),
    )
    return taken + takes.sum(dtype=jnp.int32), at, state, trunk, segments
