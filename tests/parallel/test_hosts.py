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
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="global batch of 18 rows"):
        hosts.to_global(np.zeros((6, 2)), rules)


def test_one_process_writes_and_each_reads_its_share(monkeypatch):
    """Catches two processes that write one file or read the same rows."""
    assert hosts.is_writer() and hosts.shard() == (0, 1)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert not hosts.is_writer() and hosts.shard() == (2, 4)
