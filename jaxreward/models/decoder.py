"""The decoder of Llama, Mistral, Qwen and Gemma: RMSNorm, rotary attention, a gated MLP.

What sets the families apart is in `Config`; which checkpoint is which is in `models/families.py`.
Parameters (layers stacked on a leading axis, scanned):

    embed/table [V,D]   norm/scale [D]   head/kernel [D,V] (absent when tied)
    layers/attn_norm/scale   layers/attn/{q,k,v,o}/kernel   layers/attn/{q,k,v}/bias (bias)
    layers/mlp_norm/scale    layers/mlp/{gate,up,down}/kernel
    layers/attn/{q,k}_norm/scale (qk_norm)   layers/{attn,mlp}_post/scale (post_norms)

A model may be cut into a lower and an upper part (`split`): frozen lower layers then run once, and
the upper part starts from their states.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Num

from jaxreward.core import masked
from jaxreward.core.types import Array, Rows
from jaxreward.models import attention, lora
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules, constrain, lookup
from jaxreward.parallel.specs import Param

PyTree = Any
REMAT = ("cheap", "full", "none")
ACTS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
# What remat="cheap" keeps of a block besides what attention keeps: results of matrix products.
KEPT = ("residual", "gate", "up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and arithmetic of a decoder. Hashable: it can be a static argument of jit.

    Attributes:
      vocab, width, depth, heads, kv_heads, head_dim, mlp: Sizes.
      rope_theta, norm_eps: Rotary base and RMSNorm epsilon.
      family: Whose checkpoints it reads and writes (`models/families.py`).
      act: Of the MLP's gate, "silu" or "gelu_tanh".
      bias: Queries, keys and values have a bias (Qwen2).
      qk_norm: Queries and keys are normalised head by head (Qwen3, Gemma 3).
      post_norms: The results of attention and MLP are normalised too (Gemma).
      plus_one: Norms multiply by 1 + scale (Gemma).
      embed_scale: Embeddings are multiplied by sqrt(width) (Gemma).
      query_scalar: Scores are divided by its square root; 0 = head_dim.
      attn_softcap, logit_softcap: c of c * tanh(x / c) on scores and logits; 0 = none (Gemma 2).
      window: What a windowed layer sees, in positions; 0 = no layer has a window.
      windowed: Which layers those are; one flag a layer, or empty.
      rope_scaling: Stretched rotary frequencies, of the layers without a window if both exist.
      window_theta: Rotary base of the windowed layers; 0 = as the others.
      tied: The head is the transposed embedding table.
      max_len: Longest position the checkpoint was trained for.
      mask: "causal"; for a denoiser "full", or "block" with `block` positions a block.
      predict_offset: 1 if the state at t predicts token t+1, 0 if it predicts token t.
      mask_id: Token that stands for a masked position of a denoiser; -1 = none.
      compute: Dtype of matrix products.
      scan: Scan over layers (one compiled block); False unrolls them.
      remat: What the backward pass computes again: "cheap" (all but matrix products and
        attention), "full" (each block from its input), or "none" (nothing).
      has_embed, has_norm: False for the upper or the lower part of a split model.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    family: str = "llama"
    act: str = "silu"
    bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    plus_one: bool = False
    embed_scale: bool = False
    query_scalar: float = 0.0
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0
    windowed: tuple[bool, ...] = ()
    rope_scaling: attention.Scaling | None = None
    window_theta: float = 0.0
    max_len: int = 2048
    mask: str = "causal"
    block: int = 0
    predict_offset: int = 1
    mask_id: int = -1
    compute: str = "float32"
    scan: bool = True
    remat: str = "cheap"
    has_embed: bool = True
    has_norm: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} key heads evenly")
        if self.mask not in attention.MASKS:
            raise ValueError(f"unknown mask {self.mask!r}; use {', '.join(attention.MASKS)}")
        if (self.mask == "block") != (self.block > 0) or self.block < 0:
            raise ValueError(f"mask={self.mask!r} does not go with block={self.block}")
        if self.predict_offset not in (0, 1):
            raise ValueError(f"predict_offset is 0 or 1; received {self.predict_offset}")
        if not -1 <= self.mask_id < self.vocab:
            raise ValueError(
                f"mask_id={self.mask_id} is no token of a vocabulary of {self.vocab}; -1 is none"
            )
        if self.remat not in REMAT:
            raise ValueError(f"unknown remat {self.remat!r}; use {', '.join(REMAT)}")
        if self.act not in ACTS:
            raise ValueError(f"unknown act {self.act!r}; use {', '.join(ACTS)}")
        if any(self.windowed) and (self.window < 1 or self.mask != "causal"):
            raise ValueError(
                f"windowed layers need window >= 1 and mask='causal'; received "
                f"window={self.window} and mask={self.mask!r}"
            )
        if self.windowed and len(self.windowed) != self.depth:
            raise ValueError(f"windowed has {len(self.windowed)} flags for {self.depth} layers")


@struct.dataclass
class Cache:
    """Keys and values of past tokens.

    Attributes:
      k, v: [L, B, K, S, H], the layout that attention reads, or L of [B, K, S, H] (`apart`). They
        are read in the compute dtype and may be held in a smaller one; bfloat16 is held as its
        bits, uint16.
      segments: Segment of each slot, int32[B, S]; 0 = empty.
      positions: Position in the text of each slot, int32[B, S].
      length: Slots filled so far, the same in every row, int32[].
      trunk: Cache of P prompts that B / P consecutive rows each go on from, or None. It is read,
        never copied or written.
      ring: A token that follows the last slot goes to the first again, and whatever a slot holds
        is in the past. Rows at different lengths can then share one place of writing: segment 0
        hides what a row must not see.
    """

    k: Num[Array, "L B K S H"] | tuple[Num[Array, "B K S H"], ...]
    v: Num[Array, "L B K S H"] | tuple[Num[Array, "B K S H"], ...]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]
    trunk: "Cache | None" = None
    ring: bool = struct.field(pytree_node=False, default=False)

    def apart(self) -> "Cache":
        """The same with an array a layer, to go with parameters that are `apart`."""
        trunk = self.trunk and self.trunk.apart()
        return self.replace(k=tuple(self.k), v=tuple(self.v), trunk=trunk)


@struct.dataclass
class Hidden:
    """What the backbone returns: states in the compute dtype, and the cache if one came in."""

    states: Float[Array, "B T D"]
    cache: Cache | None = None


def block_specs(cfg: Config) -> PyTree:
    """Leaves of one layer."""
    D, N, K, H, F = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp
    one = "zeros" if cfg.plus_one else "ones"
    norm = lambda: {"scale": Param((D,), ("act_embed",), one)}
    tree = {
        "attn_norm": norm(),
        "attn": {
            "q": {"kernel": Param((D, N, H), ("embed", "heads", "head_dim"))},
            "k": {"kernel": Param((D, K, H), ("embed", "kv_heads", "head_dim"))},
            "v": {"kernel": Param((D, K, H), ("embed", "kv_heads", "head_dim"))},
            "o": {"kernel": Param((N, H, D), ("heads", "head_dim", "embed"))},
        },
        "mlp_norm": norm(),
        "mlp": {
            "gate": {"kernel": Param((D, F), ("embed", "mlp"))},
            "up": {"kernel": Param((D, F), ("embed", "mlp"))},
            "down": {"kernel": Param((F, D), ("mlp", "embed"))},
        },
    }
    attn = tree["attn"]
    if cfg.bias:
        attn["q"]["bias"] = Param((N, H), ("heads", "head_dim"), "zeros")
        for n in ("k", "v"):
            attn[n]["bias"] = Param((K, H), ("kv_heads", "head_dim"), "zeros")
    if cfg.qk_norm:
        attn |= {n: {"scale": Param((H,), ("head_dim",), one)} for n in ("q_norm", "k_norm")}
    if cfg.post_norms:
        tree |= {"attn_post": norm(), "mlp_post": norm()}
    return tree


def specs(cfg: Config) -> PyTree:
    """The whole tree."""
    tree = {"layers": sp.stack(block_specs(cfg), cfg.depth)}
    if cfg.has_embed:
        tree["embed"] = {"table": Param((cfg.vocab, cfg.width), ("vocab", "embed"))}
    if cfg.has_norm:
        one = "zeros" if cfg.plus_one else "ones"
        tree["norm"] = {"scale": Param((cfg.width,), ("act_embed",), one)}
        if not cfg.tied:
            tree["head"] = {"kernel": Param((cfg.width, cfg.vocab), ("embed", "vocab"))}
    return tree


def split(cfg: Config, at: int) -> tuple[Config, Config]:
    """Configs of layers [0, at) with the embedding, and of layers [at, depth) with the norm.

    Raises:
      ValueError: unless 0 < at <= depth. (At depth, the upper part is the final norm alone.)
    """
    if not 0 < at <= cfg.depth:
        raise ValueError(f"cannot split {cfg.depth} layers at {at}; choose 1 to {cfg.depth}")
    below = dict(depth=at, windowed=cfg.windowed[:at], has_norm=False)
    above = dict(depth=cfg.depth - at, windowed=cfg.windowed[at:], has_embed=False)
    return dataclasses.replace(cfg, **below), dataclasses.replace(cfg, **above)


def split_params(params: PyTree, at: int) -> tuple[PyTree, PyTree]:
    """Parameters of the two parts of `split`. The embedding, and with it a tied head, is below."""
    lower = {"embed": params["embed"], "layers": jax.tree.map(lambda x: x[:at], params["layers"])}
    upper = {k: v for k, v in params.items() if k not in ("embed", "layers")}
    return lower, {**upper, "layers": jax.tree.map(lambda x: x[at:], params["layers"])}


def join_params(lower: PyTree, upper: PyTree) -> PyTree:
    """`split_params` undone."""
    layers = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), lower["layers"], upper["layers"])
    return {**lower, **upper, "layers": layers}


def apart(params: PyTree) -> PyTree:
    """The parameters with the layers in a tuple, each with arrays of its own; `backbone` unrolls.

    For loops that run the model often on few tokens: XLA:CPU copies what it takes out of a stack at
    every turn, weights, keys and values. The price is a second copy of the layers in memory and a
    larger program to compile.
    """
    layers, tree = jax.tree.flatten(params["layers"])
    return {**params, "layers": tuple(jax.tree.unflatten(tree, one) for one in zip(*layers))}


def prefers_apart(cfg: Config) -> bool:
    """Whether loops are faster with layers `apart`: on a CPU, if a layer has 1 MiB or more."""
    return jax.default_backend() == "cpu" and sp.size(block_specs(cfg)) >= 1 << 18


def placed(cache: Cache, rules: Rules | None) -> Cache:
    """The cache, and the trunk in it, with keys and values laid out on the mesh."""
    axes = ("batch", "kv_heads", None, "head_dim")
    put = lambda x: constrain(x, (None,) * (x.ndim == 5) + axes, rules)
    k, v = jax.tree.map(put, (cache.k, cache.v))
    return cache.replace(k=k, v=v, trunk=cache.trunk and placed(cache.trunk, rules))


def embed(params: PyTree, cfg: Config, rows: Rows, *, rules: Rules | None = None):
    """Token embeddings [B,T,D] in the compute dtype; `rows.features` if the row carries them."""
    if rows.features is not None:
        return constrain(rows.features.astype(cfg.compute), ("batch", "length", "act_embed"), rules)
    x = lookup(params["embed"]["table"], ("vocab", "embed"), rows.tokens, cfg.compute, rules)
    if cfg.embed_scale:
        # Rounded to the compute dtype first, as the checkpoints were trained.
        x = x * jnp.asarray(cfg.width**0.5, cfg.compute)
    return constrain(x, ("batch", "length", "act_embed"), rules)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], cfg: Config):
    """x / rms(x) * scale (1 + scale with `plus_one`), in float32; returned in the dtype of x."""
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + cfg.norm_eps)
    return (x32 * inverse * (1 + scale if cfg.plus_one else scale)).astype(x.dtype)


def dense(x: Float[Array, "B T *inner"], kernel: Float[Array, "..."], inner: int = 1):
    """x @ kernel over the last `inner` axes of x, as one two-dimensional product.

    XLA:CPU runs the flattened product much faster than the three-dimensional einsum, backward too.
    float32 means float32 on every device: by default a GPU would take TF32 for it, and a TPU
    bfloat16, and scores would move with the device.
    """
    B, T = x.shape[:2]
    left = x.reshape(B * T, -1)
    out = kernel.shape[inner:]
    right = kernel.astype(x.dtype).reshape(left.shape[1], -1)
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST).reshape(B, T, *out)


def block(w: PyTree, cfg: Config, x, *, turn, see, rules=None, cached=None, trunk=None, at=None):
    """One layer.

    Args:
      w: Weights of this layer, in compute layout.
      x: Residual stream [B,T,D].
      turn: From `attention.angles`. see: From `attention.sight`.
      cached: None, or a function (k, v) -> (k, v) that stores new keys and values [B,K,T,H] and
        returns all.
      trunk: Keys, values and sight of a shared prompt, as `attention.attend` takes them.
      at: None, or the slots of each row that go on, [B,K], -1 for none; `see` is then theirs. The
        others are keys and values still.

    Returns:
      The residual stream after the layer, of all slots or of those.
    """
    remember = _cheap(cfg)
    wanted = lambda x: x if at is None else masked.pick(x, at)
    normed = lambda x, name: rms_norm(x, w[name]["scale"], cfg) if name in w else x

    def project(x):
        h = normed(x, "attn_norm")
        q, k, v = (dense(h, w["attn"][n]["kernel"]) for h, n in zip((wanted(h), h, h), "qkv"))
        if cfg.bias:
            q, k, v = (x + w["attn"][n]["bias"].astype(x.dtype) for x, n in zip((q, k, v), "qkv"))
        if cfg.qk_norm:
            q = rms_norm(q, w["attn"]["q_norm"]["scale"], cfg)
            k = rms_norm(k, w["attn"]["k_norm"]["scale"], cfg)
        q = attention.rotary(q, jax.tree.map(wanted, turn))
        k = attention.rotary(k, turn)
        q = constrain(q, ("batch", "length", "heads", "head_dim"), rules)
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def mix(x, mixed):
        mixed = normed(dense(mixed, w["attn"]["o"]["kernel"], inner=2), "attn_post")
        x = checkpoint_name(x + mixed, "residual")
        with jax.named_scope("mlp"):
            h = normed(x, "mlp_norm")
            gate, up = (dense(h, w["mlp"][n]["kernel"]) for n in ("gate", "up"))
            gate = constrain(gate, ("batch", "length", "mlp"), rules)
            gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
            down = dense(ACTS[cfg.act](gate) * up, w["mlp"]["down"]["kernel"])
        return x + normed(down, "mlp_post")

    with jax.named_scope("attention"):
        q, k, v = remember(project)(x)
        if cached is not None:
            k, v = cached(k, v)
        scale = (cfg.query_scalar or cfg.head_dim) ** -0.5
        mixed = attention.attend(q, k, v, see, trunk=trunk, scale=scale, softcap=cfg.attn_softcap)
    x = remember(mix)(wanted(x), mixed)
    return constrain(x, ("batch", "length", "act_embed"), rules)


def empty_cache(
    cfg: Config,
    batch: int,
    slots: int,
    *,
    trunk: Cache | None = None,
    dtype: str | None = None,
    ring: bool = False,
) -> Cache:
    """A cache of `slots` empty slots for `batch` rows, which may go on from shared prompts.

    `dtype` is that of keys and values, the compute dtype unless given; `ring` as in `Cache`.
    """
    shape = (cfg.depth, batch, cfg.kv_heads, slots, cfg.head_dim)
    dtype = jnp.dtype(dtype or cfg.compute)
    zeros = jnp.zeros(shape, jnp.uint16 if dtype == jnp.bfloat16 else dtype)
    none = jnp.zeros((batch, slots), jnp.int32)
    return Cache(zeros, zeros, none, none, jnp.zeros((), jnp.int32), trunk, ring)


def backbone(
    params: PyTree,
    cfg: Config,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T R"],
    segments: Int[Array, "B T"],
    trunk: Int[Array, "B T"],
    rules: Rules | None = None,
    cache: Cache | None = None,
    adapters: lora.Adapters | None = None,
    layer_xs: PyTree | None = None,
    ends: Int[Array, "B K"] | None = None,
) -> Hidden:
    """Runs the layers, and the final norm if this part of the model has it.

    Args:
      params: The tree of `specs(cfg)`.
      x: Inputs of the first layer, from `embed`.
      positions, segments, trunk: As in `Rows`.
      rules: Mesh and layouts, or None.
      cache: Keys and values of earlier tokens; the new tokens follow slot `cache.length`.
      adapters: LoRA tree {"layers": ...}, merged into each block's weights as it runs, or None.
      layer_xs: Per-layer inputs, stacked; this family takes none.
      ends: Last slots of segments, -1 for none, if nothing is wanted but their states: of the last
        layer only these are computed, and the keys and values of all.

    Returns:
      Hidden states [B,T,D], or [B,K,D] of `ends`, and the grown cache.

    Raises:
      ValueError: if `layer_xs` is given, positions have more than one axis, several tokens a row
        are given with a cache that is a ring, or `ends` with a cache or a mask that is not causal.
    """
    if layer_xs is not None:
        raise ValueError("this decoder takes no per-layer inputs; leave layer_xs at None")
    if positions.shape[-1] != 1:
        raise ValueError(f"this decoder has one rotary axis; positions have {positions.shape[-1]}")
    if ends is not None and (cache is not None or cfg.mask != "causal"):
        raise ValueError(
            f"the ends of segments need mask='causal' and no cache; received mask={cfg.mask!r}, "
            f"{'no cache' if cache is None else 'a cache'}"
        )
    if cache is not None and cache.ring and x.shape[1] != 1:
        raise ValueError(f"a ring takes one token a row at a time; received {x.shape[1]}")
    places = positions[..., 0]
    turn, windowed_turn = _turns(cfg, places)
    one_layer = block_specs(cfg)
    stacked = {"w": params["layers"], "lora": adapters.tree["layers"] if adapters else {}}
    if any(cfg.windowed):
        stacked["windowed"] = jnp.array(cfg.windowed)
    is_apart = isinstance(params["layers"], tuple)
    if is_apart or (cache is not None and isinstance(cache.k, tuple)):
        cfg = dataclasses.replace(cfg, scan=False)

    def number(i):
        w = {"w": params["layers"][i]} if is_apart else {}
        return jax.tree.map(lambda a: a[i], {n: x for n, x in stacked.items() if n not in w}) | w

    def layer(x, leaf, see, cached=None, trunk_kv=None, at=None):
        w = sp.gather(leaf["w"], one_layer, rules)
        if adapters is not None:
            w = lora.merge(w, leaf["lora"], adapters.scale)
        angles = turn
        if windowed_turn is not None:
            angles = jax.tree.map(
                lambda a, b: jnp.where(leaf["windowed"], a, b), windowed_turn, turn
            )
        return block(
            w, cfg, x, turn=angles, see=see, rules=rules, cached=cached, trunk=trunk_kv, at=at
        )

    if cache is None:
        looks = _looks(
            cfg,
            lambda **kw: attention.sight(
                segments, trunk, mask=cfg.mask, positions=places, block=cfg.block, **kw
            ),
        )
        step = lambda x, leaf: layer(x, leaf, looks(leaf))
        if cfg.remat == "full":
            step = jax.checkpoint(step, prevent_cse=not cfg.scan)
        whole = cfg.depth if ends is None else cfg.depth - 1  # layers that compute every slot
        if not cfg.scan:
            for i in range(whole):
                x = step(x, number(i))
        elif ends is None:
            x, _ = jax.lax.scan(lambda x, leaf: (step(x, leaf), None), x, stacked)
        elif whole > 0:
            # By number: without the last, the stacked weights would be copied.
            x, _ = jax.lax.scan(lambda x, i: (step(x, number(i)), None), x, jnp.arange(whole))
        if ends is not None and cfg.depth == 0:
            x = masked.pick(x, ends)
        elif ends is not None:
            window = cfg.window if any(cfg.windowed[-1:]) else 0
            at = [masked.pick(y, ends) for y in (segments, trunk, places)]
            # From behind the row an end sees all of its segment, which ends with it.
            see = attention.sight(
                *at[:2],
                segments,
                offset=x.shape[1],
                positions=at[2],
                key_positions=places,
                window=window,
            )
            x = layer(x, number(whole), see, at=ends)
    else:
        inputs = stacked if cfg.scan else [number(i) for i in range(cfg.depth)]
        x, cache = _cached_layers(layer, cfg, x, inputs, segments, trunk, places, cache)
    if cfg.has_norm:
        x = rms_norm(x, params["norm"]["scale"], cfg)
    return Hidden(x, cache)


def _turns(cfg, places):
    """Rotary angles of the layers without and with a window; None if both have the same."""
    turn = attention.angles(places, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    if not any(cfg.windowed) or not cfg.window_theta:
        return turn, None
    return turn, attention.angles(places, cfg.head_dim, cfg.window_theta)


def _looks(cfg, sight):
    """What a layer sees, as a function of its leaf; `sight` makes it for a window."""
    if not any(cfg.windowed):
        whole = sight()
        return lambda leaf: whole
    windowed = sight(window=cfg.window)
    if all(cfg.windowed):
        return lambda leaf: windowed
    whole = sight()
    return lambda leaf: attention.either(leaf["windowed"], windowed, whole)


def _cheap(cfg):
    """Around the two halves of a block, between which attention keeps what it needs itself."""
    if cfg.remat != "cheap":
        return lambda half: half
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
    # Inside a scan nothing can be merged back, so the barrier against it would only cost.
    return lambda half: jax.checkpoint(half, policy=policy, prevent_cse=not cfg.scan)


def _cached_layers(layer, cfg, x, inputs, segments, trunk, places, cache):  # stacked, or a list
    start, slots = cache.length, cache.segments.shape[1]
    # The order of the one query: in a ring, after every slot.
    offset = slots - 1 if cache.ring else start
    key_segments = jax.lax.dynamic_update_slice(cache.segments, segments, (0, start))
    key_places = jax.lax.dynamic_update_slice(cache.positions, places, (0, start))

    def sight(window=0):
        where = dict(positions=places, key_positions=key_places) if window else {}
        return attention.sight(
            segments, trunk, key_segments, offset=offset, mask=cfg.mask, window=window, **where
        )

    def trunk_sight(window=0):
        prompts = cache.trunk
        return attention.shared_sight(places, prompts.segments > 0, prompts.positions, window)

    looks = _looks(cfg, sight)
    prompt = () if cache.trunk is None else (cache.trunk.k, cache.trunk.v)
    if prompt:
        trunk_looks = _looks(cfg, trunk_sight)

    def put(old, x, i):
        # Written into buffers that XLA updates in place inside a loop.
        if isinstance(old, tuple):
            grown = jax.lax.dynamic_update_slice(old[i], _packed(x, old[i].dtype), (0, 0, start, 0))
            return *old[:i], grown, *old[i + 1 :]
        at = (i, 0, 0, start, 0)
        return jax.lax.dynamic_update_slice(old, _packed(x, old.dtype)[None], at)

    def one(carry, leaf, i):
        x, own, prompt = carry
        read = lambda kv: tuple(_unpacked(y[i]).astype(x.dtype) for y in kv)
        trunk_kv = (*read(prompt), trunk_looks(leaf)) if prompt else None
        new = []

        def cached(*kv):
            new.extend(put(old, x, i) for old, x in zip(own, kv))
            return read(new)

        x = layer(x, leaf, looks(leaf), cached, trunk_kv)
        return x, tuple(new), prompt

    # The prompt is carried although it stays as it is: a caller can then change it in place.
    carry = x, (cache.k, cache.v), prompt
    if isinstance(inputs, list):
        for i, leaf in enumerate(inputs):
            carry = one(carry, leaf, i)
    else:
        carry, _ = jax.lax.scan(
            lambda c, xs: (one(c, *xs), None), carry, (inputs, jnp.arange(cfg.depth))
        )
    x, (ks, vs), prompt = carry
    if prompt:
        prompt = cache.trunk.replace(k=prompt[0], v=prompt[1])
    length = start + segments.shape[1]
    if cache.ring:
        length = length % slots
    return x, Cache(ks, vs, key_segments, key_places, length, prompt or None, cache.ring)


def _packed(x, dtype):
    # XLA:CPU updates a bfloat16 buffer by way of a float32 copy of all of it; not so its bits.
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def _unpacked(x):
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def head_matrix(params: PyTree, cfg: Config) -> Float[Array, "D V"]:
    """The matrix from states to logits."""
    return params["embed"]["table"].T if cfg.tied else params["head"]["kernel"]


def logits(states: Float[Array, "... D"], head: Float[Array, "D V"], cfg: Config):
    """Logits of states, float32[..., V], with the soft cap of the config if it has one."""
    out = jnp.matmul(
        states,
        head.astype(states.dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
    return cfg.logit_softcap * jnp.tanh(out / cfg.logit_softcap) if cfg.logit_softcap else out
