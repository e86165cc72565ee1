"""One description of a parameter tree, from which everything else is derived.

A model returns a nested dict of `Param`s. From it come initial values, abstract shapes,
shardings, checkpoint targets and, through paths, Hugging Face names, LoRA targets and masks.
"""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxreward.core import trees
from jaxreward.parallel.rules import Rules, gathered

log = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Param:
    """One leaf: shape, logical axes (one a dimension), initialiser, dtype.

    `init` is "normal" (standard deviation `scale`), "zeros" or "ones".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.axes)} axes {self.axes} for shape {self.shape}")


def _is_param(x):
    return isinstance(x, Param)


def _map(fn, specs):
    return trees.map_with_path(fn, specs, is_leaf=_is_param)


def stack(specs: PyTree, count: int) -> PyTree:
    """The same leaves with a leading "layers" axis of size `count`."""
    return _map(
        lambda _, p: dataclasses.replace(p, shape=(count, *p.shape), axes=("layers", *p.axes)),
        specs,
    )


def unstack(specs: PyTree) -> PyTree:
    """`stack` undone: the leaves of one layer."""
    return _map(lambda _, p: dataclasses.replace(p, shape=p.shape[1:], axes=p.axes[1:]), specs)


def abstract(specs: PyTree, *, rules: Rules | None = None) -> PyTree:
    """`jax.ShapeDtypeStruct`s, with storage shardings when rules are given."""
    return _map(
        lambda _, p: jax.ShapeDtypeStruct(
            p.shape,
            jnp.dtype(p.dtype),
            sharding=rules and rules.sharding(p.axes, p.shape, layout="storage"),
        ),
        specs,
    )


def shardings(specs: PyTree, rules: Rules) -> PyTree:
    """Storage shardings. Leaves that cannot be split as asked are named in the log, once."""
    stuck = []

    def one(path, p):
        stuck.extend(f"{path} ({axis})" for axis in rules.unsplit(p.axes, p.shape))
        return rules.sharding(p.axes, p.shape, layout="storage")

    tree = _map(one, specs)
    if stuck:
        log.warning("not divisible by the mesh, kept whole: %s", ", ".join(stuck))
    return tree


def _draw(flat, key):
    def one(path, p):
        if p.init == "zeros":
            return jnp.zeros(p.shape, p.dtype)
        if p.init == "ones":
            return jnp.ones(p.shape, p.dtype)
        if p.init != "normal":
            raise ValueError(f"{path}: unknown init {p.init!r}; use normal, zeros or ones")
        noise = jax.random.normal(trees.path_key(key, path), p.shape, jnp.float32)
        return (p.scale * noise).astype(p.dtype)

    return {path: one(path, p) for path, p in flat}


_draw_here = jax.jit(_draw, static_argnums=0)


def init(specs: PyTree, key: jax.Array, *, rules: Rules | None = None) -> PyTree:
    """Draws every leaf under one jit, each from a key that depends on its path alone.

    With rules the arrays are born sharded; the values do not depend on the mesh.

    Raises:
      ValueError: on an unknown initialiser, naming the leaf.
    """
    flat = tuple(trees.flatten(specs, is_leaf=_is_param).items())
    draw = _draw_here
    if rules is not None:
        where = trees.flatten(shardings(specs, rules))
        draw = jax.jit(_draw, static_argnums=0, out_shardings=where)
    return trees.unflatten(draw(flat, key))


def gather(params: PyTree, specs: PyTree, rules: Rules | None) -> PyTree:
    """Moves a tree of weights from storage to compute layout; see `rules.gathered`."""
    if rules is None:
        return params
    flat = trees.flatten(specs, is_leaf=_is_param)
    return trees.map_with_path(lambda path, x: gathered(x, flat[path].axes, rules), params)


def check(params: PyTree, specs: PyTree, *, what: str = "parameters") -> None:
    """Compares a tree of arrays with its description.

    Raises:
      ValueError: listing every missing, unknown and wrongly shaped path at once.
    """
    have = trees.flatten(params)
    want = trees.flatten(specs, is_leaf=_is_param)
    problems = [f"missing {p}" for p in want if p not in have]
    problems += [f"unknown {p}" for p in have if p not in want]
    problems += [
        f"{p} has shape {list(have[p].shape)}, expected {list(want[p].shape)}"
        for p in want
        if p in have and tuple(have[p].shape) != want[p].shape
    ]
    if problems:
        raise ValueError(f"{what} do not fit the model: " + "; ".join(problems))


def size(specs: PyTree) -> int:
    """Number of scalars described."""
    return sum(math.prod(p.shape) for p in trees.flatten(specs, is_leaf=_is_param).values())
