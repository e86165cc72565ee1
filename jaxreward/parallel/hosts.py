"""Between processes and the mesh: local batches to global arrays, writing by one process."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxreward.parallel.rules import Rules

PyTree = Any


def is_writer() -> bool:
    """True on the one process that writes files."""
    return jax.process_index() == 0


def shard() -> tuple[int, int]:
    """(index, count) of this process among those that read data."""
    return jax.process_index(), jax.process_count()


def batch_sharding(rules: Rules) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(rules.mesh, PartitionSpec(("data", "fsdp")))


def to_global(batch: PyTree, rules: Rules | None) -> PyTree:
    """This process's rows as part of arrays that span the mesh.

    Args:
      batch: Tree of NumPy arrays with a leading axis of local rows.
      rules: Mesh and layouts, or None for the default device.

    Raises:
      ValueError: if the rows do not divide over the devices.
    """
    if rules is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = batch_sharding(rules)
    ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"]

    def one(x):
        rows = x.shape[0] * jax.process_count()
        if rows % ways:
            raise ValueError(
                f"a global batch of {rows} rows does not divide over data x fsdp = {ways} devices; "
                "set data.batch to a multiple"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(one, batch)
