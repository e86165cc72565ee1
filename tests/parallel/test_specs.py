"""One description of a parameter tree, and what is made from it."""

import logging
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxreward.core import trees
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.parallel.specs import Param

BLOCK = {
    "norm": {"scale": Param((16,), ("act_embed",), "ones")},
    "up": {"kernel": Param((16, 24), ("embed", "mlp"), scale=0.5)},
}
TREE = {
    "layers": sp.stack(BLOCK, 3),
    "bias": Param((24,), ("mlp",), "zeros"),
    "score": {"kernel": Param((16, 1), ("embed", "scores"), scale=0.1, dtype="bfloat16")},
}


@pytest.fixture(scope="module", params=[{"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}])
def rules(request):
    """Two layouts of four devices."""
    return Rules(make_mesh(request.param))


@pytest.fixture(scope="module")
def born(rules):
    """The tree drawn on four devices, from the same key as `single`."""
    return sp.init(TREE, jax.random.key(3), rules=rules)


@pytest.fixture(scope="module")
def single():
    """The tree drawn on one device."""
    return sp.init(TREE, jax.random.key(3))


def test_stack_and_unstack():
    """Catches a layer axis at the wrong end, or a leaf that loses its init, scale or dtype."""
    stacked = sp.stack(BLOCK, 3)
    assert stacked["up"]["kernel"] == Param((3, 16, 24), ("layers", "embed", "mlp"), scale=0.5)
    assert stacked["norm"]["scale"] == Param((3, 16), ("layers", "act_embed"), "ones")
    assert sp.unstack(stacked) == BLOCK


def test_init_follows_the_description(single):
    """Catches a wrong scale, shape or dtype: 3 * 16 * 24 draws of deviation 0.5."""
    sp.check(single, TREE)
    kernel = np.asarray(single["layers"]["up"]["kernel"], np.float64)
    assert kernel.shape == (3, 16, 24)
    assert abs(kernel.std() - 0.5) < 0.05 and abs(kernel.mean()) < 0.05
    assert not np.allclose(kernel[0], kernel[1])  # layers differ
    np.testing.assert_array_equal(single["layers"]["norm"]["scale"], np.ones((3, 16)))
    np.testing.assert_array_equal(single["bias"], np.zeros(24))
    assert single["score"]["kernel"].dtype == jnp.bfloat16
    # Paths enter through crc32: Python's own hash would differ from process to process.
    key = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"score/kernel"))
    want = (0.1 * jax.random.normal(key, (16, 1))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(single["score"]["kernel"], want)
    assert single["bias"].dtype == jnp.float32


def test_values_do_not_depend_on_the_mesh(single, born):
    """Catches random numbers that differ from one layout to another."""
    for (path, a), b in zip(trees.flatten(born).items(), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
        assert len(a.sharding.device_set) == 4, path


def test_arrays_are_born_in_the_storage_layout(rules, born):
    """Catches weights that start whole on every device."""
    tensor = "tensor" if rules.mesh.shape["tensor"] > 1 else None
    want = {
        "layers/up/kernel": P(None, "fsdp", tensor),
        "layers/norm/scale": P(None, None),
        "bias": P(tensor),
        "score/kernel": P("fsdp", None),
    }
    described = trees.flatten(sp.shardings(TREE, rules))
    for path, leaf in trees.flatten(born).items():
        wanted = jax.sharding.NamedSharding(rules.mesh, want[path])
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
        assert described[path].spec == want[path]
    assert born["layers"]["up"]["kernel"].addressable_shards[0].data.shape == (
        3,
        8,
        12 if tensor else 24,
    )


def test_adding_a_leaf_leaves_the_others_as_they_were(single):
    """Catches keys split in tree order, with which one new head changes every weight."""
    more = {**TREE, "adapter": {"a": Param((4, 4), (None, None))}, "aa": Param((2,), (None,))}
    again = sp.init(more, jax.random.key(3))
    for path, leaf in trees.flatten(single).items():
        np.testing.assert_array_equal(leaf, trees.flatten(again)[path], err_msg=path)
    other = sp.init({"score": TREE["score"]}, jax.random.key(4))
    assert (other["score"]["kernel"] != single["score"]["kernel"]).any()  # the key matters
    twins = sp.init({"x": Param((4,), (None,)), "y": Param((4,), (None,))}, jax.random.key(0))
    assert (twins["x"] != twins["y"]).all()  # and so does the path


def test_what_does_not_divide_is_logged_by_name(caplog):
    """Catches a silent fallback to whole copies."""
    rules = Rules(make_mesh({"fsdp": 2, "tensor": 2}))
    tree = {
        "fits": Param((16, 24), ("embed", "mlp")),
        "attn": {"q": Param((16, 3, 8), ("embed", "heads", "head_dim"))},
        "odd": Param((15, 7), ("embed", "mlp")),
    }
    with caplog.at_level(logging.WARNING):
        placed = sp.shardings(tree, rules)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert text.endswith("kept whole: attn/q (heads), odd (embed), odd (mlp)")
    assert placed["attn"]["q"].spec == P("fsdp", None, None)
    assert placed["odd"].spec == P(None, None)
    caplog.clear()
    sp.shardings(TREE, rules)
    assert not caplog.records


def test_abstract_says_what_init_makes(rules, born):
    """Catches a checkpoint target that differs from the weights."""
    plain, placed = sp.abstract(TREE), sp.abstract(TREE, rules=rules)
    for a, b, c in zip(jax.tree.leaves(plain), jax.tree.leaves(placed), jax.tree.leaves(born)):
        assert a.shape == b.shape == c.shape and a.dtype == b.dtype == c.dtype
        assert a.sharding is None and b.sharding.is_equivalent_to(c.sharding, c.ndim)


def test_gather_moves_every_leaf_to_its_compute_layout(rules, single):
    """Catches a leaf gathered with the axes of another, and changed values."""
    block = jax.tree.map(lambda x: x[0], single["layers"])
    stored = jax.device_put(block, sp.shardings(BLOCK, rules))
    moved = jax.jit(lambda w: sp.gather(w, BLOCK, rules))(stored)
    for path, leaf in trees.flatten(moved).items():
        np.testing.assert_array_equal(leaf, trees.flatten(block)[path], err_msg=path)
    split = rules.mesh.shape["tensor"]
    assert moved["up"]["kernel"].addressable_shards[0].data.shape == (16, 24 // split)
    assert moved["norm"]["scale"].addressable_shards[0].data.shape == (16,)
    assert sp.gather(block, BLOCK, None) is block


def test_check_lists_every_problem_at_once(single):
    """Catches an error that names one tensor a run."""
    sp.check(single, TREE)
    broken = trees.flatten(single)
    broken["extra/kernel"] = broken.pop("bias")
    broken["score/kernel"] = jnp.zeros((1, 16))
    with pytest.raises(ValueError) as error:
        sp.check(trees.unflatten(broken), TREE, what="the weights of x")
    assert str(error.value) == (
        "the weights of x do not fit the model: missing bias; unknown extra/kernel; "
        "score/kernel has shape [1, 16], expected [16, 1]"
    )


def test_bad_descriptions_are_refused():
    """Catches axes that do not belong to the shape, and a misspelt initialiser."""
    with pytest.raises(ValueError, match=r"1 axes \('embed',\) for shape \(2, 3\)"):
        Param((2, 3), ("embed",))
    with pytest.raises(ValueError, match="a/b: unknown init 'one'; use normal, zeros or ones"):
        sp.init({"a": {"b": Param((2,), (None,), "one")}}, jax.random.key(0))


def test_size_counts_scalars():
    """Catches leaves counted as one: 3 * (16 + 384) + 24 + 16."""
    assert sp.size(TREE) == 1240
