"""Adapters: what they are made for, what they add, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import trees
from jaxreward.models import decoder, lora
from jaxreward.parallel import specs as sp
from jaxreward.testing import tiny_config

CFG = tiny_config(head_dim=6)  # heads 4 x 6 = 24, so that no two sizes agree by accident


def flat_specs(tree):
    return trees.flatten(tree, is_leaf=lambda x: isinstance(x, sp.Param))


def draw(specs, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(np.float32),
        specs,
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


def test_merge_by_hand():
    """Catches a missing or doubled alpha / rank, and a kernel without adapter that changes."""
    weights = {"q": {"kernel": jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])}, "scale": jnp.ones(2)}
    adapters = {"q": {"kernel": {"a": jnp.array([[1.0], [-1.0]]), "b": jnp.array([[10.0, 20.0]])}}}
    merged = lora.merge(weights, adapters, 0.5)
    # W + 0.5 * outer([1, -1], [10, 20]) on the kernel [2, 1, 2].
    np.testing.assert_array_equal(merged["q"]["kernel"], [[[6.0, 12.0]], [[-2.0, -6.0]]])
    np.testing.assert_array_equal(merged["scale"], [1.0, 1.0])


def test_specs_follow_the_kernels():
    """Catches a kernel cut at the wrong axis: the output projection contracts two of them."""
    flat = flat_specs(lora.specs(decoder.specs(CFG), lora.Config(rank=3)))
    shapes = {path.removeprefix("layers/"): p.shape for path, p in flat.items()}
    assert shapes == {
        "attn/q/kernel/a": (2, 32, 3),
        "attn/q/kernel/b": (2, 3, 24),
        "attn/k/kernel/a": (2, 32, 3),
        "attn/k/kernel/b": (2, 3, 12),
        "attn/v/kernel/a": (2, 32, 3),
        "attn/v/kernel/b": (2, 3, 12),
        "attn/o/kernel/a": (2, 24, 3),
        "attn/o/kernel/b": (2, 3, 32),
        "mlp/gate/kernel/a": (2, 32, 3),
        "mlp/gate/kernel/b": (2, 3, 64),
        "mlp/up/kernel/a": (2, 32, 3),
        "mlp/up/kernel/b": (2, 3, 64),
        "mlp/down/kernel/a": (2, 64, 3),
        "mlp/down/kernel/b": (2, 3, 32),
    }
    for path, p in flat.items():
        assert p.init == ("zeros" if path.endswith("/b") else "normal")
    assert flat["layers/attn/o/kernel/a"].scale == pytest.approx(24**-0.5)
    # An unsplit axis of the kernel keeps its name, so that adapters are sharded like it.
    assert flat["layers/mlp/gate/kernel/b"].axes == ("layers", "rank", "mlp")
    assert flat["layers/mlp/down/kernel/a"].axes == ("layers", "mlp", "rank")


def test_targets_choose_kernels_by_whole_path():
    """Catches a search instead of a full match: "q" alone must not hit anything."""
    model = decoder.specs(CFG)
    only = lora.specs(model, lora.Config(rank=1, targets=r"layers/attn/(q|v)/kernel"))
    assert sorted(only["layers"]["attn"]) == ["q", "v"]
    assert list(only["layers"]) == ["attn"]
    with pytest.raises(ValueError, match="'attn/q' match none of 11 parameters, for example"):
        lora.specs(model, lora.Config(rank=1, targets="attn/q"))


@pytest.mark.parametrize("rank", [0, -2])
def test_rank_must_be_positive(rank):
    """Catches an empty adapter that would train nothing."""
    with pytest.raises(ValueError, match=f"at least 1; received {rank}"):
        lora.specs(decoder.specs(CFG), lora.Config(rank=rank))


def test_merge_of_the_stack_is_numpy_per_layer():
    """Catches layers that get each other's adapter, and a folded output projection."""
    model = decoder.specs(CFG)
    weights, adapters = draw(model), draw(lora.specs(model, lora.Config(rank=3)), 1)
    merged = trees.flatten(lora.merge(weights, adapters, 0.25))
    a, b, flat = trees.flatten(adapters), trees.flatten(adapters), trees.flatten(weights)
    for path, got in merged.items():
        want = np.array(flat[path], np.float64)
        if f"{path}/a" in a:
            for layer in range(2):
                delta = np.float64(a[f"{path}/a"][layer]) @ np.float64(b[f"{path}/b"][layer])
                want[layer] += 0.25 * delta.reshape(want[layer].shape)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=path)


def test_merge_keeps_the_dtype_and_sums_in_float32():
    """Catches adapters rounded to bfloat16 before the sum is formed."""
    weights = {"kernel": jnp.ones((1, 1), jnp.bfloat16)}
    adapters = {"kernel": {"a": jnp.full((1, 1), 1 + 2.0**-9), "b": jnp.full((1, 1), 2.0**-8)}}
    merged = lora.merge(weights, adapters, 1.0)["kernel"]
    assert merged.dtype == jnp.bfloat16
    # Just above half way from 1 to the next number, 1 + 2^-7. With `a` rounded to 1, the tie goes
    # to 1.
    assert float(merged[0, 0]) == 1 + 2.0**-7
