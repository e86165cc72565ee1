"""From this process's rows to arrays that span the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxreward.parallel import hosts
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules

BATCH = {
    "tokens": np.arange(32, dtype=np.int32).reshape(8, 4),
    "mask": np.arange(8) % 3 == 0,
    "weight": np.linspace(0, 1, 16, dtype=np.float32).reshape(8, 2, 1),
}


@pytest.mark.parametrize(
    ("sizes", "rows"), [({"data": 2, "fsdp": 2}, 2), ({"fsdp": 2, "tensor": 2}, 4)]
)
def test_rows_are_split_over_data_and_fsdp_in_order(sizes, rows):
    """Catches rows in another order, or a batch repeated on every device."""
    rules = Rules(make_mesh(sizes))
    made = hosts.to_global(BATCH, rules)
    for name, array in made.items():
        np.testing.assert_array_equal(np.asarray(array), BATCH[name])
        assert array.dtype == BATCH[name].dtype
        assert array.sharding.spec == P(("data", "fsdp"))
        assert {s.data.shape[0] for s in array.addressable_shards} == {rows}
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, BATCH[name][shard.index])


def test_the_sharding_is_the_one_the_step_is_given():
    """Catches a batch that is moved again when the step starts."""
    rules = Rules(make_mesh({"data": 2, "fsdp": 2}))
    array = hosts.to_global(BATCH["tokens"], rules)
    assert array.sharding == hosts.batch_sharding(rules)
    assert array.sharding.is_equivalent_to(rules.sharding(("batch", "length"), (8, 4)), 2)


def test_without_rules_the_default_device_holds_the_batch():
    """Catches a mesh that is needed for one device."""
    made = hosts.to_global(BATCH, None)
    assert made["tokens"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(made["weight"], BATCH["weight"])


def test_rows_that_do_not_divide_are_refused(monkeypatch):
    """Catches jax's own error, which names neither the batch nor the remedy."""
    rules = Rules(make_mesh({"data": 2, "fsdp": 2}))
    with pytest.raises(ValueError, match=r"batch of 6 rows .*fsdp = 4 devices; set data\.batch"):
        hosts.to_global(np.zeros((6, 2)), rules)
    with pytest.raises(ValueError, match=r"batch of 6 rows .*fsdp = 4 devices; set data\.batch"):
        hosts.rows(rules, 6)


def test_one_process_writes_and_holds_all_rows(monkeypatch):
    """Catches two processes that write one file, and rows that no process reads."""
    rules = Rules(make_mesh({"data": 2, "tensor": 2}))
    assert hosts.is_writer() and hosts.whole(rules) is None
    np.testing.assert_array_equal(hosts.rows(rules, 8), np.arange(8))
    np.testing.assert_array_equal(hosts.rows(None, 3), np.arange(3))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert not hosts.is_writer()


class Held:
    """A batch sharding of which this process's devices hold some blocks, one a device."""

    def __init__(self, blocks, size):
        self.blocks, self.size = blocks, size

    def addressable_devices_indices_map(self, shape):
        return {
            i: (slice(block * self.size, (block + 1) * self.size),)
            for i, block in enumerate(self.blocks)
        }


@pytest.mark.parametrize(
    ("blocks", "want"), [((2, 3), [4, 5, 6, 7]), ((0, 3), [0, 1, 6, 7]), ((1, 1), [2, 3])]
)
def test_rows_follow_the_devices_of_the_mesh(monkeypatch, blocks, want):
    """Catches rows dealt out by process number: a mesh may order devices otherwise (TPU), and
    `tensor` may span processes, which then read the same rows."""
    rules = Rules(make_mesh({"data": 4}))
    monkeypatch.setattr(hosts, "batch_sharding", lambda rules: Held(blocks, 2))
    np.testing.assert_array_equal(hosts.rows(rules, 8), want)


def test_the_place_among_processes_is_read_whole():
    """Catches half a set of variables, which JAX would complete by guessing, and bad numbers."""
    env = dict(zip(hosts.PLACE, ("10.0.0.1:1234", "4", "3")))
    assert hosts.place({}) is None
    assert hosts.place(env) == ("10.0.0.1:1234", 4, 3)
    with pytest.raises(ValueError, match="without JAXREWARD_PROCESS_ID; set all three"):
        hosts.place({**env, "JAXREWARD_PROCESS_ID": ""})
    with pytest.raises(ValueError, match=r"expected HOST:PORT, got '10\.0\.0\.1'"):
        hosts.place({**env, "JAXREWARD_COORDINATOR": "10.0.0.1"})
    with pytest.raises(ValueError, match="NUM_PROCESSES: expected a number, 0 or more, got 'x'"):
        hosts.place({**env, "JAXREWARD_NUM_PROCESSES": "x"})
    with pytest.raises(ValueError, match="there are 4 processes, from 0"):
        hosts.place({**env, "JAXREWARD_PROCESS_ID": "4"})


def test_joining_is_asked_for_by_name():
    """Catches a process that joins because its machine is part of somebody's cluster."""
    assert hosts.join({}) is False and hosts.join({"JAXREWARD_DISTRIBUTED": "0"}) is False
    with pytest.raises(ValueError, match="JAXREWARD_DISTRIBUTED: expected 1, 0 or nothing"):
        hosts.join({"JAXREWARD_DISTRIBUTED": "yes"})
    with pytest.raises(ValueError, match="JAXREWARD_HEARTBEAT: expected seconds, 10 or more"):
        hosts.join({"JAXREWARD_DISTRIBUTED": "1", "JAXREWARD_HEARTBEAT": "2"})


def test_what_is_told_reaches_jax(monkeypatch):
    """Catches a coordinator that is not passed on, and detection that overrides what was told."""
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: seen.append(kw))
    env = dict(zip(hosts.PLACE, ("h:1", "2", "1")), JAXREWARD_DISTRIBUTED="1")
    assert hosts.join(env) and hosts.join({"JAXREWARD_DISTRIBUTED": "1"})
    assert seen == [
        {
            "heartbeat_timeout_seconds": 45,
            "coordinator_address": "h:1",
            "num_processes": 2,
            "process_id": 1,
            "cluster_detection_method": "deactivate",
        },
        {"heartbeat_timeout_seconds": 45},
    ]
