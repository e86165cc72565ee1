"""Between processes and the mesh: joining, who reads which rows, who writes, when all stop.

One process drives the devices of one host, or one GPU. All processes run the same program on the
same config and read the same files; what differs is said here and nowhere else. With one process
every function does the obvious thing and costs nothing.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxreward.parallel.rules import Rules

PyTree = Any
SWITCH = "JAXREWARD_DISTRIBUTED"
PLACE = ("JAXREWARD_COORDINATOR", "JAXREWARD_NUM_PROCESSES", "JAXREWARD_PROCESS_ID")
HEARTBEAT = "JAXREWARD_HEARTBEAT"
# Seconds without a sign of life after which a process counts as dead and the others end.
_HEARTBEAT = 45


# Joining and leaving


def place(env: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator's host:port, number of processes, this process) from the environment.

    Returns:
      None where none of the three variables is set: JAX then asks SLURM, the TPU or Kubernetes.

    Raises:
      ValueError: if only some are set, or one is no such number.
    """
    given = [name for name in PLACE if env.get(name)]
    if not given:
        return None
    missing = [name for name in PLACE if name not in given]
    if missing:
        raise ValueError(
            f"{', '.join(given)} without {', '.join(missing)}; set all three, or none where JAX "
            "finds them by itself (SLURM, TPU pods, GKE)"
        )
    address, *numbers = (env[name] for name in PLACE)
    if not address.rpartition(":")[2].isdigit() or ":" not in address:
        raise ValueError(f"{PLACE[0]}: expected HOST:PORT, got {address!r}")
    for name, text in zip(PLACE[1:], numbers):
        if not text.isdigit():
            raise ValueError(f"{name}: expected a number, 0 or more, got {text!r}")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"{PLACE[2]} is {index}, but there are {count} processes, from 0")
    return address, count, index


def join(env: Mapping[str, str] | None = None) -> bool:
    """Joins the other processes where `JAXREWARD_DISTRIBUTED=1` says that there are some.

    To be called before JAX starts a backend. See docs/launch.md for the variables.

    Returns:
      Whether this process is now one of several (or of one, under a launcher).

    Raises:
      ValueError: on a variable that does not fit.
    """
    env = os.environ if env is None else env
    wanted = env.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: expected 1, 0 or nothing, got {wanted!r}")
    if wanted != "1":
        return False
    seconds = env.get(HEARTBEAT) or str(_HEARTBEAT)
    if not seconds.isdigit() or int(seconds) < 10:
        raise ValueError(f"{HEARTBEAT}: expected seconds, 10 or more, got {seconds!r}")
    kw: dict[str, Any] = {"heartbeat_timeout_seconds": int(seconds)}
    where = place(env)
    if where is not None:
        # Told everything, JAX has nothing to detect; the machine may be part of a cluster's job.
        kw |= dict(zip(("coordinator_address", "num_processes", "process_id"), where))
        kw["cluster_detection_method"] = "deactivate"
    jax.distributed.initialize(**kw)
    return True


# Who does what


def is_writer() -> bool:
    """True on the one process that writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here, at the barrier of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """A block that the writer runs before the others, so that they find the files it makes."""
    if not is_writer():
        barrier(name)
    try:
        yield
    finally:
        # Also after an error: the others must not wait for ever.
        if is_writer():
            barrier(name)


def all_true(value: bool) -> bool:
    """Whether `value` is true on every process; the same answer on all of them."""
    if jax.process_count() == 1:
        return bool(value)
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(bool(value))).all())


def check_shared(folder: str | Path) -> None:
    """Makes sure that all processes see one and the same folder.

    Raises:
      ValueError: on all processes, if one does not see what the writer writes there.
    """
    if jax.process_count() == 1:
        return
    folder = Path(folder)
    mark = folder / ".shared"
    with writer_first("mark of the shared folder"):
        if is_writer():
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        # File systems of networks may show a new file late.
        until = time.monotonic() + 5
        while not (seen := mark.exists()) and time.monotonic() < until:
            time.sleep(0.2)
    everywhere = all_true(seen)
    if is_writer():
        mark.unlink(missing_ok=True)
    if not everywhere:
        raise ValueError(
            f"{folder} must be a folder that all {jax.process_count()} processes share (NFS, "
            "Lustre, a mounted bucket), since each writes its part of a checkpoint there; "
            + ("another process does not see it" if seen else f"{_here()} does not see it")
        )


def _here():
    return f"process {jax.process_index()} of {jax.process_count()}"


def stopping(step: int) -> bool:
    """Whether all processes stop after this step, because one of them got SIGTERM.

    JAX's preemption service, which `join` starts, takes the signal, tells the others, and settles
    on a step that none of them has passed. To be called by all processes after every step.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


# Rows


def batch_sharding(rules: Rules) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(rules.mesh, PartitionSpec(("data", "fsdp")))


def rows(rules: Rules | None, batch: int) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, in order, each once.

    Two processes hold the same rows where `tensor` spans hosts.

    Raises:
      ValueError: if the rows do not divide over the devices.
    """
    if rules is None:
        return np.arange(batch)
    ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"]
    if batch % ways:
        raise ValueError(
            f"a global batch of {batch} rows does not divide over data x fsdp = {ways} devices; "
            "set data.batch to a multiple"
        )
    held = batch_sharding(rules).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[part] for part in held.values()]))


def to_global(batch: PyTree, rules: Rules | None) -> PyTree:
    """This process's rows as part of arrays that span the mesh.

    Args:
      batch: Tree of NumPy arrays with a leading axis of the rows that `rows` names.
      rules: Mesh and layouts, or None for the default device.

    Raises:
      ValueError: if the rows do not divide over the devices.
    """
    if rules is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = batch_sharding(rules)
    ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"]
    mine = len(rows(rules, ways))

    def one(x):
        if x.shape[0] % mine:
            raise ValueError(
                f"a global batch of {x.shape[0] * ways / mine:g} rows does not divide over "
                f"data x fsdp = {ways} devices; set data.batch to a multiple"
            )
        shape = (x.shape[0] // mine * ways, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(one, batch)


def total(count: int, rules: Rules | None) -> int:
    """Sum over the processes of what each counted in its rows; every row counts once."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    ways = rules.mesh.shape["data"] * rules.mesh.shape["fsdp"]
    # float32: that is what devices have. A count of tokens for a log line.
    both = np.float32([count, len(rows(rules, ways))])
    counted, read = multihost_utils.process_allgather(both).sum(axis=0)
    return round(float(counted) * ways / float(read))


# Arrays


def put(x: np.ndarray, where: Any) -> jax.Array:
    """A host array that all processes have, on a sharding; each copies its own shards only.

    `jax.device_put` would first compare the whole array between all processes.
    """
    if where is None or where.is_fully_addressable:
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def whole(rules: Rules | None) -> NamedSharding | None:
    """Where a result must lie for each process to read all of it; None leaves it to XLA."""
    if rules is None or jax.process_count() == 1:
        return None
    return NamedSharding(rules.mesh, PartitionSpec())
