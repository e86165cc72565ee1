"""Sampling from masked diffusion models: a canvas of masks is filled in one jitted loop.

    canvas   [prompt, padded on the left | L masked positions]
    step     run the model on the canvas, draw a candidate for the open positions of the current
             block, commit those that the schedule chooses; the others stay masked
    block    K positions; the next begins when all of one are committed. K = L is pure diffusion

One program serves all blocks: where a block lies is data. Of the states only those that predict the
block meet the head, and their logits live for one step. What was committed when, and how likely it
was, stands in the `Canvas` that comes back, which is the trajectory.

Two ways to be faster, both approximations; `benchmarks/denoise.py` measures how far each agrees:

    threshold   commit every position whose confidence is high enough, so that a step commits
                several tokens (Fast-dLLM, arXiv:2505.22618, section 3.3)
    cache       keys and values are computed once a block and kept for its other steps ("prefix":
                of what is before the block; "dual": of everything but the block; section 3.2)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array as Jax
from jaxtyping import Bool, Int

from jaxreward.core.types import Array, Rows
from jaxreward.diffusion import process
from jaxreward.diffusion.trajectory import Canvas
from jaxreward.models import decoder
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import choose

PyTree = Any
ORDERS = ("confidence", "margin", "entropy", "random", "origin")
CACHES = ("none", "prefix", "dual")
ENDS = ("free", "last", "never")
# Logits held at a time (256 MiB in float32); more positions are taken in turns.
LOGITS = 1 << 26
# Taken off the confidence of an end token under ends="last": more than any two differ by.
_LAST = 64.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a canvas is filled. Hashable: a static argument of jit.

    Attributes:
      length: Positions of an answer, L.
      steps: Denoising steps S. Each block takes S / (L / K) of them, or, with a threshold, as many
        as it needs.
      block: Positions of a block, K, a divisor of L; 0 = L.
      order: Which open positions are committed first: "confidence" (probability of the candidate),
        "margin" (between the two likeliest tokens), "entropy" (least first), "random", or "origin"
        (each by itself with the probability that the process has; Dream's).
      pace: "even" (LLaDA: a block's positions in equal parts) or "linear" (Dream: the part
        1 - s / t of those that are open, over times from 1 to `eps`; one block).
      choose: How a candidate is drawn, as in `sampling.choose`.
      tempered: Confidence is of the distribution drawn from (Dream) and not of the model's own at
        temperature 1 (LLaDA).
      order_temperature: Positions are drawn from softmax(confidence / it) without replacement; 0
        takes the highest.
      guidance: s of unconditional + (s + 1) (conditional - unconditional), where the former has its
        prompt masked; 0 = none (LLaDA). `guidance_of` takes Dream's number.
      ends: "free"; "last" (end tokens may be predicted and are committed last); "never".
      end_ids: The end tokens that `ends` speaks of.
      threshold: Commit every candidate of at least this confidence, and the highest in any case;
        0 = follow `pace`.
      cache: "none", "prefix" or "dual".
      every: Keep what each `every`-th step predicted for the whole canvas (`Canvas.drafts`); 0 =
        nothing is kept.
      eps: Last time of pace="linear".
    """

    length: int
    steps: int
    block: int = 0
    order: str = "confidence"
    pace: str = "even"
    choose: Any = dataclasses.field(default_factory=choose.Greedy)
    tempered: bool = False
    order_temperature: float | int = 0.0
    guidance: float | int = 0.0
    ends: str = "free"
    end_ids: tuple[int, ...] = ()
    threshold: float | int = 0.0
    cache: str = "none"
    every: int = 0
    eps: float = 1e-3

    def __post_init__(self):
        if self.length < 1 or self.steps < 1 or self.block < 0:
            raise ValueError(
                f"length and steps must be at least 1 and block at least 0; received "
                f"length={self.length}, steps={self.steps}, block={self.block}"
            )
        for name, value, known in (
            ("order", self.order, ORDERS),
            ("pace", self.pace, ("even", "linear")),
            ("ends", self.ends, ENDS),
            ("cache", self.cache, CACHES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name}={value!r}; use one of {', '.join(known)}")
        if self.length % self.size:
            raise ValueError(
                f"a canvas of {self.length} does not split into blocks of {self.size}; choose a "
                f"divisor, such as {_divisor(self.length, self.size)}"
            )
        if self.steps % self.blocks and not self.threshold:
            raise ValueError(
                f"{self.steps} steps do not divide over {self.blocks} blocks; choose a multiple, "
                f"such as {-(-self.steps // self.blocks) * self.blocks}"
            )
        if self.steps > self.length and self.pace == "even":
            raise ValueError(
                f"{self.steps} steps for {self.length} positions: with pace='even' a step commits "
                f"at least one, so use at most {self.length}"
            )
        if (self.pace == "linear" or self.order == "origin") and self.blocks > 1:
            raise ValueError(
                "pace='linear' and order='origin' know one block; set block=0, or pace='even' with "
                "another order"
            )
        if self.order == "origin" and (self.pace != "linear" or self.threshold):
            raise ValueError("order='origin' needs pace='linear' and no threshold")
        if not 0 <= self.threshold <= 1 or (self.threshold and self.order != "confidence"):
            raise ValueError(
                f"threshold is a probability and needs order='confidence'; received "
                f"{self.threshold} with order={self.order!r}"
            )
        if self.order_temperature < 0 or (self.order_temperature and self.threshold):
            raise ValueError(
                f"order_temperature must not be negative, and 0 with a threshold; received "
                f"{self.order_temperature}"
            )
        if self.ends != "free" and not self.end_ids:
            raise ValueError(f"ends={self.ends!r} needs end_ids, the tokens that end an answer")
        if self.every and (self.cache != "none" or self.threshold or self.steps % self.every):
            raise ValueError(
                f"drafts every {self.every} of {self.steps} steps: `every` must divide the steps, "
                "and goes with neither cache nor threshold, whose states or steps are not those "
                "of the whole canvas"
            )

    @property
    def size(self) -> int:
        """Positions of a block."""
        return self.block or self.length

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.size

    @property
    def turns(self) -> int:
        """Steps of a block; with a threshold, the most that one can take."""
        return self.size if self.threshold else self.steps // self.blocks


def _divisor(length, size):
    return min((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(d - size))


def llada(length: int, steps: int, *, block: int = 0, temperature: float = 0.0, **kw) -> Schedule:
    """LLaDA's schedule: low-confidence remasking, semi-autoregressive with a block.

    References: Nie et al. 2025, arXiv:2502.09992, and the authors' generate.py.
    """
    return Schedule(length, steps, block, choose=choose.make(temperature), **kw)


def dream(
    length: int,
    steps: int,
    *,
    order: str = "entropy",
    temperature: float = 0.2,
    top_p: float = 0.95,
    top_k: int = 0,
    **kw,
) -> Schedule:
    """Dream's schedule; its names: origin, maskgit_plus = "confidence", topk_margin = "margin",
    entropy.

    References: Ye et al. 2025, arXiv:2508.15487, and the authors' generation code. Its alg_temp is
    `order_temperature`; its eps is 1e-3, in a derivative 1e-12.
    """
    drawn = choose.make(temperature, top_k, top_p)
    return Schedule(length, steps, 0, order, "linear", drawn, tempered=True, **kw)


def guidance_of(scale: float) -> float:
    """Our `guidance` of a scale in Dream's convention, unconditional + scale * difference."""
    return scale - 1.0


def begin(
    prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], schedule: Schedule, cfg: decoder.Config
) -> Canvas:
    """The canvas before the first step.

    Args:
      prompts, mask: Padded on the left, as `autoregressive.padded` makes them.
      schedule, cfg: How it is filled, and the model.

    Raises:
      ValueError: if the model is no denoiser, the canvas is longer than it has learnt, or it needs
        a prompt and has none.
    """
    B, P = prompts.shape
    if cfg.mask == "causal" or cfg.mask_id < 0:
        raise ValueError(
            f"sampling by denoising needs a denoiser with a mask token; this model has "
            f"mask={cfg.mask!r} and mask_id={cfg.mask_id}. See models.families.as_denoiser"
        )
    if schedule.cache != "none" and cfg.mask != "full":
        raise ValueError(f"cache={schedule.cache!r} needs mask='full'; this model has {cfg.mask!r}")
    T = P + schedule.length
    if cfg.max_len < T:
        raise ValueError(
            f"a prompt of {P} slots and an answer of {schedule.length} make a canvas of {T}, and "
            f"the model knows {cfg.max_len} positions; shorten one of them"
        )
    if cfg.predict_offset and not P:
        raise ValueError("this model predicts a token from the one before it: give it a prompt")
    wide = lambda x, value: jnp.pad(x, ((0, 0), (0, schedule.length)), constant_values=value)
    drafts = None
    if schedule.every:
        drafts = jnp.zeros((schedule.steps // schedule.every, B, T), jnp.int32)
    none = jnp.zeros((B, T), jnp.float32)
    zero = jnp.int32(0)
    return Canvas(
        tokens=wide(jnp.asarray(prompts, jnp.int32), cfg.mask_id),
        segments=wide(jnp.asarray(mask, jnp.int32), 1),
        given=wide(jnp.ones((B, P), bool), False),
        reveal=jnp.full((B, T), -1, jnp.int32),
        logps=none,
        full_logps=none,
        step=zero,
        block=zero,
        turn=zero,
        whole=zero,
        drafts=drafts,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "schedule", "rules"))
def sample(
    params: PyTree,
    cfg: decoder.Config,
    prompts: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    keys: Array,
    *,
    schedule: Schedule,
    rules: Rules | None = None,
) -> Canvas:
    """Fills a canvas behind every prompt.

    The mask itself is no candidate: its logit is -inf, which LLaDA's code leaves to the training.
    Only `full_logps` are of the logits as they are.

    A row depends on its prompt and its key alone: not on the batch, its padding or the mesh. (With
    a threshold or a cache, rows of a batch begin a block together, so that a cache is filled when
    the slowest row is ready; what a row commits does not change, only the steps it is counted at.)

    Args:
      params: Weights of `decoder.specs(cfg)`, with embedding and head.
      cfg: The model, a denoiser (`mask`, `mask_id` and `predict_offset`).
      prompts, mask: Token ids, padded on the left, and where there are any.
      keys: One typed key a row, [B].
      schedule: How the canvas is filled.
      rules: Mesh and layouts, or None.

    Returns:
      The full canvas; prompts occupy its first P slots.

    Raises:
      ValueError: as `begin`.
    """
    return _advance(
        params, cfg, begin(prompts, mask, schedule, cfg), keys, None, schedule=schedule, rules=rules
    )


@functools.partial(jax.jit, static_argnames=("cfg", "schedule", "rules"))
def advance(
    params: PyTree,
    cfg: decoder.Config,
    canvas: Canvas,
    keys: Array,
    steps: int | Int[Array, ""],
    *,
    schedule: Schedule,
    rules: Rules | None = None,
) -> Canvas:
    """Goes on with a canvas for some steps, for a search that chooses between continuations.

    Args:
      canvas: From `begin` or `advance`, with the same schedule. Rows may have been exchanged, as
        long as all are at the same step.
      steps: How many; fewer are done if the canvas is full before.
      Others: As `sample`. Going on in parts with the same keys gives what `sample` gives; with a
        cache only if every part begins with a block, as the first step of a part fills the cache.
    """
    return _advance(params, cfg, canvas, keys, steps, schedule=schedule, rules=rules)


def _advance(params, cfg, canvas, keys, steps, *, schedule, rules):
    B, T = canvas.tokens.shape
    K, P = schedule.size, T - schedule.length
    last = None if steps is None else canvas.step + steps
    head = decoder.head_matrix(params, cfg).astype(cfg.compute)
    cached = schedule.cache != "none"
    if not cached and decoder.prefers_apart(cfg):  # with a cache it gained nothing
        params = decoder.apart(params)
    run = functools.partial(_run, params, cfg, schedule, rules)
    start = (canvas, _cache(cfg, schedule, B, T, rules) if cached else None)

    def unfinished(carry):
        at = carry[0]
        go = at.block < schedule.blocks
        return go if last is None else go & (at.step < last)

    def step(carry, later=False):
        at, cache = carry
        first = P + at.block * K
        states, whole, cache = run(at, first, cache, later)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, K, axis=1)
        own, drawn = _keys(keys, at.step, at.block * K, K)
        found = _candidates(states, head, cfg, schedule, drawn)
        open_, given = cut(at.open), cut(at.given)
        new = _commits(schedule, at, found["confidence"], open_, given, own)
        put = lambda old, value: jax.lax.dynamic_update_slice_in_dim(
            old, jnp.where(new, value, cut(old)), first, axis=1
        )
        filled = at.replace(
            tokens=put(at.tokens, found["token"]),
            reveal=put(at.reveal, at.step),
            logps=put(at.logps, found["logp"]),
            full_logps=put(at.full_logps, found["full"]),
        )
        if schedule.every:
            filled = filled.replace(drafts=_draft(at, whole, head, cfg, schedule, keys))
        turn = at.turn + 1
        over = ~cut(filled.open).any() if schedule.threshold else turn == schedule.turns
        filled = filled.replace(
            step=at.step + 1,
            turn=jnp.where(over, 0, turn),
            block=at.block + over,
            whole=at.whole + (not later),
        )
        return filled, cache

    def block(carry):
        # A loop of its own for the steps that read the cache: XLA copies what a branch writes.
        inside = lambda carry: unfinished(carry) & (carry[0].turn > 0)
        return jax.lax.while_loop(inside, functools.partial(step, later=True), step(carry))

    return jax.lax.while_loop(unfinished, block if cached else step, start)[0]


# The model on the canvas


def _doubled(schedule, x, other=None):
    """Rows with and without their prompt, for guidance."""
    if not schedule.guidance:
        return x
    return jnp.concatenate([x, x if other is None else other])


def _cache(cfg, schedule, B, T, rules):
    cache = decoder.empty_cache(cfg, 2 * B if schedule.guidance else B, T)
    return decoder.placed(cache, rules)


def _run(params, cfg, schedule, rules, at, first, cache, later):
    """States that predict the block, [B, K, D] (2 B with guidance); all states if nothing is
    cached, else None; and the cache."""
    T, offset, K = at.tokens.shape[1], cfg.predict_offset, schedule.size
    real = at.segments > 0
    hidden_prompt = jnp.where(at.given & real, cfg.mask_id, at.tokens)
    tokens = _doubled(schedule, at.tokens, hidden_prompt)
    places = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0).astype(jnp.int32)
    places, segments = (_doubled(schedule, x) for x in (places, at.segments))

    def model(begin, width, cache):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, width, axis=1)
        ids, seg = cut(tokens), cut(segments)
        rows = Rows(ids, seg > 0, seg > 0, cut(places)[..., None], seg, jnp.zeros_like(seg))
        return decoder.backbone(
            params,
            cfg,
            decoder.embed(params, cfg, rows, rules=rules),
            positions=rows.positions,
            segments=rows.segments,
            trunk=rows.trunk,
            rules=rules,
            cache=None if cache is None else cache.replace(length=jnp.asarray(begin, jnp.int32)),
        )

    def part(width):
        """Runs the last `width` slots before `end`, of which the block's are cut out."""

        def of(cache):
            begin = jnp.minimum(first - offset, T - width)
            hidden = model(begin, width, cache)
            wanted = first - offset - begin
            return jax.lax.dynamic_slice_in_dim(hidden.states, wanted, K, axis=1), hidden.cache

        return of

    if cache is None:
        states = model(0, T, None).states
        block = jax.lax.dynamic_slice_in_dim(states, first - offset, K, axis=1)
        return block, states, None
    if not later:
        block, cache = part(T)(cache)
    elif schedule.cache == "dual":
        block, cache = part(K + offset)(cache)
    else:
        widths = _widths(schedule, T, offset)
        sizes = sorted(set(widths))
        which = jnp.array([sizes.index(w) for w in widths], jnp.int32)
        block, cache = jax.lax.switch(which[at.block], list(map(part, sizes)), cache)
    return block, None, cache


def _widths(schedule, T, offset):
    """Slots that "prefix" runs again, block by block: to the end, rounded up to few sizes."""
    P = T - schedule.length
    exact = [T - (P + i * schedule.size) + offset for i in range(schedule.blocks)]
    if schedule.blocks <= 4:
        return exact
    steps = [schedule.length + offset]
    while steps[-1] > schedule.size + offset:
        steps.append(max(-(-steps[-1] // 2), schedule.size + offset))
    return [min(s for s in steps if s >= width) for width in exact]


# Candidates and what is committed of them


def _keys(keys, step, first, width):
    """Keys of this step: one a row, and one a position, by its place in the answer."""
    own = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
    places = first + jnp.arange(width)
    return own, jax.vmap(lambda k: jax.vmap(lambda s: jax.random.fold_in(k, s))(places))(own)


def _candidates(states, head, cfg, schedule, keys):
    """Token, its log-probabilities and its confidence at each position, all [B, K]."""
    B, K = keys.shape
    banned = sorted({cfg.mask_id, *(schedule.end_ids if schedule.ends == "never" else ())})

    def some(given):
        states, keys = given
        logits = decoder.logits(states, head, cfg)
        if schedule.guidance:
            with_prompt, without = jnp.split(logits, 2)
            logits = without + (schedule.guidance + 1) * (with_prompt - without)
        width = logits.shape[1]
        raw = logits.reshape(B * width, -1)
        # Compared and not scattered: XLA copies the logits for a scatter, several times.
        flat = jnp.where(jnp.isin(jnp.arange(cfg.vocab), jnp.array(banned)), -jnp.inf, raw)
        drawn = schedule.choose.logits(flat)
        token = schedule.choose.pick(drawn, keys.reshape(-1))
        pick = lambda z: jnp.take_along_axis(z, token[:, None], axis=1)[:, 0]
        mass = jax.nn.logsumexp(flat, axis=-1)
        own = pick(flat) - mass
        # What is not allowed is a few tokens: no second pass over the vocabulary.
        rest = jax.nn.logsumexp(raw[:, jnp.array(banned)], axis=-1)
        logp = own if drawn is flat else pick(drawn) - jax.nn.logsumexp(drawn, axis=-1)
        of, sure = (drawn, logp) if schedule.tempered else (flat, own)
        shaped = lambda x: x.reshape(B, width, *x.shape[1:])
        found = dict(token=token, logp=logp, full=pick(flat) - jnp.logaddexp(mass, rest))
        found = jax.tree.map(shaped, found)
        confidence = _confidence(schedule, shaped(of), shaped(sure), found["token"])
        return {**found, "confidence": confidence}

    chunk = max(1, min(K, LOGITS // (len(states) * cfg.vocab)))
    if chunk == K:
        return some((states, keys))
    pieces = -(-K // chunk)
    pad = pieces * chunk - K
    split = lambda x: jnp.moveaxis(x.reshape(len(x), pieces, chunk, *x.shape[2:]), 1, 0)
    states = jnp.pad(states, ((0, 0), (0, pad), (0, 0)))
    keys = jnp.concatenate([keys, jnp.repeat(keys[:, -1:], pad, axis=1)], axis=1)
    found = jax.lax.map(some, (split(states), split(keys)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :K]
    return jax.tree.map(join, found)


def _confidence(schedule, logits, logp, token):
    if schedule.order == "margin":
        found = process.margin(logits, token)
    elif schedule.order == "entropy":
        found = process.negative_entropy(logits, token)
    else:
        found = jnp.exp(logp)
    if schedule.ends == "last":
        ends = (token[..., None] == jnp.array(schedule.end_ids)).any(axis=-1)
        found = jnp.where(ends, found - _LAST, found)
    return found


def _commits(schedule, at, confidence, open_, given, keys) -> Bool[Jax, "B K"]:
    """Which open positions of the block this step commits."""
    if schedule.order == "random":
        drawn = process.random_confidence(keys, open_.shape)
        # Only an end token that is to come last has a confidence below -1.
        late = confidence < -_LAST / 2 if schedule.ends == "last" else False
        confidence = jnp.where(late, drawn - _LAST, drawn)
    if schedule.threshold:
        sure = open_ & (confidence >= schedule.threshold)
        return sure | process.chosen(confidence, open_, jnp.ones(len(open_), jnp.int32))
    if schedule.order == "origin":
        share = process.revealed_share(at.step, schedule.steps, eps=schedule.eps)
        return open_ & (process.random_confidence(keys, open_.shape) < share)
    if schedule.pace == "linear":
        count = process.revealed_count(open_.sum(axis=1), at.step, schedule.steps, eps=schedule.eps)
    else:
        count = process.transfer_counts((~given).sum(axis=1), schedule.turns)[:, at.turn]
    if schedule.order_temperature:
        # The highest of perturbed scores are a draw without replacement (Gumbel top-k).
        noise = jax.vmap(lambda k, row: jax.random.gumbel(jax.random.fold_in(k, 1), row.shape))
        confidence = confidence / schedule.order_temperature + noise(keys, confidence)
    return process.chosen(confidence, open_, count)


def _draft(at, states, head, cfg, schedule, keys):
    """Drafts with that of this step, if it is one of those that are kept."""
    T = at.tokens.shape[1]
    P = T - schedule.length

    def keep(drafts):
        first = P - cfg.predict_offset
        part = jax.lax.dynamic_slice_in_dim(states, first, schedule.length, axis=1)
        _, drawn = _keys(keys, at.step, 0, schedule.length)
        token = _candidates(part, head, cfg, schedule, drawn)["token"]
        whole = jnp.concatenate([at.tokens[:, :P], token], axis=1)
        draft = jnp.where(at.open, whole, at.tokens)
        return jax.lax.dynamic_update_index_in_dim(drafts, draft, at.step // schedule.every, 0)

    ends = (at.step + 1) % schedule.every == 0
    return jax.lax.cond(ends, keep, lambda drafts: drafts, at.drafts)
