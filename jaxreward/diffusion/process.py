"""The process of masked diffusion: how texts are corrupted, and in which order they are revealed.

No model here. A row holds several texts; `segments` says which one a slot belongs to, int32[B, T],
0 = padding. What is random takes one typed key a row, and a row's draw does not depend on its
neighbours: dropping a row changes no other.

    times, corrupt                        training: a time a text, each slot masked on its own
    stratified_counts, corrupt_exactly    likelihood: a given number of slots
    context_weights                       Dream's weights in place of 1 / p(t)
    transfer_counts, chosen               sampling: how many slots a step reveals, and which
    revealed_share, revealed_count        the same by Dream's timetable
    low_confidence, margin, negative_entropy, random_confidence    what "the best" slots are
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array
from jaxreward.objectives import denoising


@struct.dataclass
class Corrupted:
    """Texts with masks in them.

    Attributes:
      tokens: Token ids, int32[B, T]; the mask token's where something is hidden.
      masked: True where it is, bool[B, T].
      rate: The probability with which the slot was to be masked, float32[B, T]; 1 at slots that
        could not be, so that dividing by it is safe.
    """

    tokens: Int[Array, "B T"]
    masked: Bool[Array, "B T"]
    rate: Float[Array, "B T"]


def times(
    keys, segments: Int[Array, "B T"], *, eps: float = 1e-3, stratified: bool = False
) -> Float[Array, "B T"]:
    """The probability with which each text is masked, at all its slots.

    .. math:: p = (1 - \\epsilon) t + \\epsilon, \\quad t \\sim U(0, 1)

    Args:
      keys: One typed key a row, [B].
      segments: Which text a slot belongs to. With its key, this number alone decides the time.
      eps: The smallest probability, which bounds the weight 1 / p. Above 0.
      stratified: Spread the times of a row evenly: t = (u + i / n) mod 1 for text i of n and one u.
        Each is still uniform; averages over a row vary less. Segments must be at most T.

    Returns:
      float32[B, T]; 1 at padding.

    Raises:
      ValueError: if eps is out of its range, or `stratified` meets a segment above T.

    References: LLaDA, arXiv:2502.09992, and its code (eps = 1e-3, a time a sequence). Dream's code
    stratifies over the batch, in its likelihood; within a row is ours.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"times needs eps above 0 and at most 1; received {eps}")
    if stratified:
        there = denoising.text_sizes(segments > 0, segments) > 0
        place = (jnp.cumsum(there, axis=1) - 1) / jnp.maximum(there.sum(axis=1, keepdims=True), 1)
        start = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        t = (start[:, None] + jnp.take_along_axis(place, segments, axis=1)) % 1.0
    else:
        # From the number of the text: every slot of it finds the same time without being told.
        of_text = lambda key, i: jax.random.uniform(jax.random.fold_in(key, i))
        t = jax.vmap(jax.vmap(of_text, in_axes=(None, 0)))(keys, segments)
    return jnp.where(segments > 0, (1 - eps) * t + eps, 1.0).astype(jnp.float32)


def corrupt(
    keys,
    tokens: Int[Array, "B T"],
    maskable: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    mask_id: int,
    *,
    eps: float = 1e-3,
    stratified: bool = False,
    rate: Float[Array, "B T"] | None = None,
) -> Corrupted:
    """Masks each maskable slot with the probability of its text, independently.

    Args:
      keys: One typed key a row, [B].
      tokens: Token ids.
      maskable: True where a slot may be masked: everywhere in pre-training, answers in SFT. End
        tokens that pad an answer are noised if they are marked here, and only then.
      segments: Which text a slot belongs to. Padding is never masked.
      mask_id: The mask token.
      eps, stratified: As `times`.
      rate: Probabilities to use instead of drawing times, float[B, T].

    Raises:
      ValueError: as `times`, or if `rate` has another shape than the tokens.

    References: LLaDA, arXiv:2502.09992, and its code; there a row is one text, and SFT restores the
    prompt after masking, which is the same.
    """
    keys = jax.vmap(jax.random.split)(keys)
    if rate is None:
        rate = times(keys[:, 0], segments, eps=eps, stratified=stratified)
    elif rate.shape != tokens.shape:
        raise ValueError(f"corrupt needs a rate a slot, {tokens.shape}; received {rate.shape}")
    live = maskable & (segments > 0)
    rate = jnp.where(live, rate, 1.0).astype(jnp.float32)
    masked = live & (random_confidence(keys[:, 1], tokens.shape) < rate)
    return Corrupted(jnp.where(masked, mask_id, tokens), masked, rate)


def corrupt_exactly(
    keys,
    tokens: Int[Array, "B T"],
    maskable: Bool[Array, "B T"],
    mask_id: int,
    counts: Int[Array, " B"],
) -> Corrupted:
    """Masks a given number of slots of each row, every set of them equally likely.

    Args:
      keys: One typed key a row, [B].
      tokens: Token ids, one text a row.
      maskable: True where a slot may be masked.
      mask_id: The mask token.
      counts: How many slots of the row; all that are maskable if there are fewer.

    Returns:
      `Corrupted`, whose rate is the share of the maskable slots that is masked. It is 0 where the
      count is: nothing is masked there that could be divided by it.

    References: LLaDA, arXiv:2502.09992, and its code for likelihoods.
    """
    masked = chosen(random_confidence(keys, tokens.shape), maskable, counts)
    size = jnp.maximum(maskable.sum(axis=1), 1).astype(jnp.float32)
    rate = jnp.where(maskable, (masked.sum(axis=1) / size)[:, None], 1.0).astype(jnp.float32)
    return Corrupted(jnp.where(masked, mask_id, tokens), masked, rate)


def stratified_counts(key, count: int, length: Int[Array, "..."] | int) -> Int[Array, " count"]:
    """How many slots to mask in each of `count` copies of a text, int32[count], evenly spread.

    .. math:: l_b = \\big((k + \\lfloor b L / B + 1/2 \\rfloor - 1) \\bmod L\\big) + 1, \\quad
              k \\sim U\\{1, ..., L\\}

    Each is uniform on 1 to L; together they cover that range.

    Args:
      key: One typed key.
      count: B, the number of copies.
      length: L, the maskable slots of the text, a number or int32[]; or int32[B], for copies of
        several texts. 0 gives 0.

    Raises:
      ValueError: if `count` is not positive.

    References: LLaDA's code for likelihoods. Deviation: halves go up, in integers. There k + b L/B
    is rounded as a float, halves to the even neighbour, so that with B = 2 and an odd L the second
    count is even unless it wraps around, and the counts are not uniform.
    """
    if count < 1:
        raise ValueError(f"stratified_counts needs a positive number of copies; received {count}")
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (count,))
    size = jnp.maximum(length, 1)
    first = jnp.floor(jax.random.uniform(key) * size).astype(jnp.int32)  # k - 1
    offset = (2 * jnp.arange(count, dtype=jnp.int32) * size + count) // (2 * count)
    return jnp.where(length > 0, (first + offset) % size + 1, 0)


def transfer_counts(masked: Int[Array, " B"], steps: int) -> Int[Array, "B S"]:
    """How many of n masked slots each step reveals: n // S, and one more in the first n % S.

    Args:
      masked: n, how many slots of each row are masked at the beginning.
      steps: S.

    Returns:
      int32[B, S], rows that add up to n.

    Raises:
      ValueError: if there is no step.

    References: LLaDA's code.
    """
    _some_steps("transfer_counts", steps)
    step = jnp.arange(steps, dtype=jnp.int32)
    masked = jnp.asarray(masked, jnp.int32)[:, None]
    return masked // steps + (step < masked % steps).astype(jnp.int32)


def _some_steps(name, steps):
    if steps < 1:
        raise ValueError(f"{name} needs at least one step; received {steps}")


def revealed_share(
    step: Int[Array, ""] | int, steps: int, *, eps: float = 1e-3
) -> Float[Array, ""]:
    """The share of the slots still masked that a step reveals, by Dream's timetable; float32[].

    .. math:: 1 - s / t, \\quad t = \\tau_j, \\; s = \\tau_{j+1}, \\quad
              \\tau_j = 1 - (1 - \\epsilon) j / S

    and 1 at the last step. With its `origin` each masked slot is revealed with this probability.

    Args:
      step: j, 0 to S - 1.
      steps: S.
      eps: The last time, 0 to below 1.

    Raises:
      ValueError: if there is no step, or eps is out of its range.

    References: Dream 7B, arXiv:2508.15487, and its code.
    """
    _some_steps("revealed_share", steps)
    if not 0 <= eps < 1:
        raise ValueError(f"revealed_share needs eps from 0 to below 1; received {eps}")
    step = jnp.asarray(step, jnp.int32)
    pace = (1 - eps) / steps
    share = pace / (1 - pace * step.astype(jnp.float32))
    return jnp.where(step >= steps - 1, 1.0, share).astype(jnp.float32)


def revealed_count(
    masked: Int[Array, " B"], step: Int[Array, ""] | int, steps: int, *, eps: float = 1e-3
) -> Int[Array, " B"]:
    """How many of n slots still masked a step reveals, by Dream's timetable: floor(n (1 - s/t)).

    All at the last step. As in Dream's code the first of S steps reveals nothing if n = S, since
    (1 - eps) is less than one slot.

    Args:
      masked: n, how many slots of each row are masked now.
      step, steps, eps: As `revealed_share`.

    Returns:
      int32[B].

    References: Dream's code. Deviation: it takes the mean of n over the batch; here each row has
    its own.
    """
    share = revealed_share(step, steps, eps=eps)
    return jnp.floor(jnp.asarray(masked, jnp.int32) * share).astype(jnp.int32)


def chosen(
    confidence: Float[Array, "B T"], allowed: Bool[Array, "B T"], count: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    """The `count` allowed slots of highest confidence in each row, bool[B, T].

    Equal confidences are taken in the order of the slots. If fewer are allowed, all of them are
    chosen; a confidence of -inf is the last to go, and NaN counts as that. `count` is data, so one
    compiled program serves every step. With Gumbel noise added to confidence / a, this draws slots
    from softmax(confidence / a) without replacement (Dream's `alg_temp`).

    The bits of the lowest confidence that is still chosen are found by bisection: 32 passes over
    the slots, no sort and no comparison of all pairs.
    """
    confidence = confidence.astype(jnp.float32)
    confidence = jnp.where(jnp.isnan(confidence), -jnp.inf, confidence)
    # Read as an integer, a float32 keeps its order; -0.0, the least of them, is as good as 0.0.
    bits = jax.lax.bitcast_convert_type(confidence, jnp.int32)
    info = jnp.iinfo(jnp.int32)
    order = jnp.where(bits == info.min, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    count = jnp.asarray(count, jnp.int32)

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.sum(allowed & (order > middle[:, None]), axis=1)
        return jnp.where(above < count, low, middle), jnp.where(above < count, middle, high)

    ends = jnp.full_like(count, info.min), jnp.full_like(count, info.max)
    least = jax.lax.fori_loop(0, 32, halve, ends)[1][:, None]
    above, equal = allowed & (order > least), allowed & (order == least)
    room = count[:, None] - jnp.sum(above, axis=1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=1) <= room))


def low_confidence(
    logits: Float[Array, "B T V"], candidate: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The probability of each slot's candidate under softmax(logits), float32[B, T].

    References: LLaDA's "low-confidence remasking" takes it from the logits themselves, without
    temperature or noise. Dream's `maskgit_plus` is the same on logits that temperature, top-p and
    top-k have been applied to; pass those.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, candidate[..., None], axis=-1)[..., 0]
    return jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))


def margin(logits: Float[Array, "B T V"], candidate: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The largest probability less the second largest, float32[B, T]; 0 if two are the largest.

    The candidate is not looked at. References: Dream's code, `topk_margin`.
    """
    del candidate
    logits = logits.astype(jnp.float32)
    top = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(logits.shape[-1]) == top, -jnp.inf, logits)
    highest = jnp.take_along_axis(logits, top, axis=-1)[..., 0]
    norm = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(highest - norm) - jnp.exp(jnp.max(others, axis=-1) - norm)


def negative_entropy(
    logits: Float[Array, "B T V"], candidate: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Sum of p log p over the vocabulary, float32[B, T], at most 0. The candidate is not looked at.

    References: Dream's code, `entropy`, which adds a small number inside the logarithm; here an
    entry of logit -inf counts 0.
    """
    del candidate
    logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    finite = jnp.where(jnp.isneginf(logps), 0.0, logps)
    return jnp.sum(jnp.exp(logps) * finite, axis=-1)


def random_confidence(keys, shape: tuple[int, int]) -> Float[Array, "B T"]:
    """Uniform numbers from 0 to below 1, float32 of the shape [B, T], one typed key a row.

    As a confidence it reveals slots in random order. References: LLaDA's code, remasking "random".

    Raises:
      ValueError: if there is not one key a row.
    """
    if keys.shape != shape[:1]:
        raise ValueError(f"{shape[0]} rows need a key each, [B]; received keys {keys.shape}")
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def context_weights(
    clean: Bool[Array, "B T"], segments: Int[Array, "B T"], p: float
) -> Float[Array, "B T"]:
    """How much clean context a slot has near it: Dream's weights in place of 1 / p(t).

    .. math:: w_n = \\tfrac12 \\sum_{i \\ne n} [i \\; clean] \\, p (1 - p)^{|n - i| - 1}

    where i runs over the text of n. From each side it is a running sum that decays by 1 - p a slot
    and starts anew with each text. A text without clean slots has weights 0.

    Args:
      clean: True where a slot is not masked, prompts included; what is at padding is ignored.
      segments: Which text a slot belongs to; the slots of a text lie side by side.
      p: Of the geometric distribution, above 0 and at most 1; at 1 only the two neighbours count.

    Returns:
      float32[B, T], for every slot (`denoising.weighted` takes those of masked ones), 0 at padding.

    Raises:
      ValueError: if p is out of its range.

    References: Dream 7B, arXiv:2508.15487, CART. The formula comes from secondary sources, copies
    of its trainer in other projects; we have not seen the original. Deviation: there a row is one
    text.
    """
    if not 0 < p <= 1:
        raise ValueError(f"context_weights needs p above 0 and at most 1; received {p}")

    def before(clean, segments):
        same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
        nearest = jnp.pad(clean[:, :-1], ((0, 0), (1, 0))) & same
        join = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        start = (jnp.where(same, 1.0 - p, 0.0), jnp.where(nearest, p, 0.0))
        return jax.lax.associative_scan(join, start, axis=1)[1]

    after = before(clean[:, ::-1], segments[:, ::-1])[:, ::-1]
    return jnp.where(segments > 0, (before(clean, segments) + after) / 2, 0.0).astype(jnp.float32)
