"""Low-rank adapters as a second tree with the same paths.

For a kernel W of shape [in..., out...] the adapter holds a [in, R] and b [R, out], and the layer
uses W + (alpha / R) a b, reshaped. `b` starts at zero, so a new adapter changes nothing.
Source: Hu et al., LoRA (arXiv:2106.09685), section 4.1.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxreward.core import trees
from jaxreward.parallel.specs import Param

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config:
    """Rank, scale and which kernels (a regular expression over the whole path) are adapted."""

    rank: int
    alpha: float = 16.0
    targets: str = r"layers/(attn|mlp)/(q|k|v|o|gate|up|down)/kernel"


@struct.dataclass
class Adapters:
    """What a backbone receives: the adapter tree, and alpha / rank as a static number."""

    tree: PyTree
    scale: float = struct.field(pytree_node=False)


def _inner(path: str) -> int:
    # The output projection of attention contracts two axes (heads, head_dim); all others one.
    return 2 if path.endswith("attn/o/kernel") else 1


def specs(model: PyTree, cfg: Config) -> PyTree:
    """Adapter leaves for the kernels of `model` (a spec tree) that match `cfg.targets`.

    `a` is normal with variance 1 / inputs, `b` is zero.

    Raises:
      ValueError: if no path matches, or the rank is not positive.
    """
    if cfg.rank < 1:
        raise ValueError(f"LoRA rank must be at least 1; received {cfg.rank}")
    flat = trees.flatten(model, is_leaf=lambda x: isinstance(x, Param))
    hits = {path: p for path, p in flat.items() if re.fullmatch(cfg.targets, path)}
    if not hits:
        raise ValueError(
            f"LoRA targets {cfg.targets!r} match none of {len(flat)} parameters, for example "
            f"{', '.join(list(flat)[:3])}"
        )
    out = {}
    for path, p in hits.items():
        lead = 1 if p.axes[0] == "layers" else 0
        cut = lead + _inner(path)
        rows, columns = math.prod(p.shape[lead:cut]), math.prod(p.shape[cut:])
        stacked = p.shape[:lead], p.axes[:lead]
        first = p.axes[lead] if cut - lead == 1 else None
        last = p.axes[cut] if len(p.shape) - cut == 1 else None
        out[f"{path}/a"] = Param(
            (*stacked[0], rows, cfg.rank), (*stacked[1], first, "rank"), scale=1 / math.sqrt(rows)
        )
        out[f"{path}/b"] = Param(
            (*stacked[0], cfg.rank, columns), (*stacked[1], "rank", last), "zeros"
        )
    return trees.unflatten(out)


def merge(weights: PyTree, adapters: PyTree, scale: float) -> PyTree:
    """weights + scale * a b on every adapted kernel, in the kernel's dtype.

    Works on one layer (inside the scan) and on stacked layers (for export): the products act on
    the last two axes. The sum is formed in float32.
    """
    adapted: dict[str, dict] = {}
    for path, leaf in trees.flatten(adapters).items():
        kernel, part = path.rsplit("/", 1)
        adapted.setdefault(kernel, {})[part] = leaf

    def one(path, w):
        if path not in adapted:
            return w
        a, b = adapted[path]["a"], adapted[path]["b"]
        delta = scale * jnp.matmul(
            a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return (w.astype(jnp.float32) + delta.reshape(w.shape)).astype(w.dtype)

    return trees.map_with_path(one, weights)
