"""The device mesh: five named axes, slowest link first, most of size 1."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

AXES = ("data", "fsdp", "context", "expert", "tensor")


def make_mesh(sizes: Mapping[str, int] | None = None, *, devices: Sequence | None = None):
    """Builds the mesh (data, fsdp, context, expert, tensor).

    Args:
      sizes: Devices along each axis; a missing axis has size 1 and at most one axis may be -1,
        meaning "the rest". Default: all devices on `data`.
      devices: The devices to use; default all of them.

    Returns:
      A `jax.sharding.Mesh` with Auto axis types: annotations are constraints, and XLA places the
      rest. (Explicit is the default of `jax.make_mesh`, hence the request by name.)

    Raises:
      ValueError: on an unknown axis, or sizes whose product is not the number of devices.
    """
    sizes = {"data": -1} if sizes is None else dict(sizes)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    free = [i for i, size in enumerate(shape) if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh sizes must be positive, with at most one -1; received {dict(zip(AXES, shape))}"
        )
    fixed = math.prod(size for size in shape if size != -1)
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape))} needs {'a multiple of ' if free else ''}{fixed} "
            f"devices; there are {len(devices)}. Set the sizes so that their product is "
            f"{len(devices)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        return jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=auto)
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=auto)


def describe(mesh) -> str:
    """One line such as "4 cpu devices: data 2 x fsdp 2"."""
    used = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    kind = mesh.devices.flat[0].device_kind
    count = mesh.devices.size
    hosts = len({device.process_index for device in mesh.devices.flat})
    where = f" of {hosts} processes" if hosts > 1 else ""
    return f"{count} {kind} device{'s' * (count > 1)}{where}: {' x '.join(used) or 'no sharding'}"
