"""Batch types: what `validate` lets through and what it refuses, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import testing
from jaxreward.core.types import PairRows, Rows, TrainState


def good(*, positions=None):
    """Two rows of 6 slots: a prompt of 2, answers of 2 and 1, one slot of padding; then nothing."""
    segments = np.array([[1, 1, 2, 2, 3, 0], [0] * 6], np.int32)
    return testing.empty_pair_rows(2, 6).replace(
        tokens=np.array([[5, 6, 7, 8, 9, 0], [0] * 6], np.int32),
        mask=segments > 0,
        loss_mask=segments > 1,
        segments=segments,
        trunk=np.array([[0, 0, 1, 1, 1, 0], [0] * 6], np.int32),
        ends=np.array([[3, 4], [-1, -1]], np.int32),
        pairs=np.array([[[0, 1]], [[-1, -1]]], np.int32),
        weight=np.array([[1.0], [0.0]], np.float32),
    )


def test_a_good_batch_is_returned_as_it_is():
    """Catches a check that refuses correct rows, absent answers (-1) or padding among them."""
    rows = good()
    assert rows.validate() is rows
    assert testing.empty_pair_rows(3, 4, answers=5, pairs=2).validate().ends.shape == (3, 5)
    device = jax.tree.map(jnp.asarray, rows)
    assert device.validate() is device


BAD = [
    ("tokens", np.zeros(6, np.int32), r"Rows\.tokens must be \[B, T\]; received \[6\]"),
    ("tokens", np.zeros((2, 6), np.float32), r"Rows\.tokens must be integer.*float32\[2, 6\]"),
    ("mask", np.ones((2, 6), np.int32), r"Rows\.mask must be bool\w*\[2, 6\].*int32"),
    ("mask", np.ones((2, 5), bool), r"Rows\.mask .*received bool\[2, 5\]"),
    ("loss_mask", np.zeros((2, 7), bool), r"Rows\.loss_mask "),
    ("segments", np.zeros((2, 6), np.float32), r"Rows\.segments must be integer"),
    ("trunk", np.zeros((1, 6), np.int32), r"Rows\.trunk "),
    ("positions", np.zeros((2, 6), np.int32), r"Rows\.positions .*R = 1 or 3"),
    ("positions", np.zeros((2, 6, 2), np.int32), r"Rows\.positions .*received \[2, 6, 2\]"),
    ("features", np.zeros((2, 5, 4), np.float32), r"Rows\.features .*received \[2, 5, 4\]"),
    ("mask", np.ones((2, 6), bool), r"Rows\.segments must be 0 exactly where"),
    ("loss_mask", np.ones((2, 6), bool), r"Rows\.loss_mask is True on padding"),
    ("ends", None, r"PairRows\.ends must have 2 dimensions and 2 rows; received None"),
    ("ends", np.zeros((3, 2), np.int32), r"PairRows\.ends .*\(3, 2\)"),
    ("ends", np.zeros((2, 2), np.float32), r"PairRows\.ends must be integer; received float32"),
    ("ends", np.array([[6, 4], [-1, -1]]), r"PairRows\.ends must lie in -1\.\.5; received -1\.\.6"),
    ("ends", np.array([[3, -2], [-1, -1]]), r"PairRows\.ends must lie in .*received -2\.\.3"),
    ("pairs", np.zeros((2, 1, 3), np.int32), r"PairRows\.pairs must end in \(chosen, rejected\)"),
    ("pairs", np.array([[[0, 2]], [[-1, -1]]]), r"PairRows\.pairs must lie in -1\.\.1; .*\.\.2"),
    ("margin", np.zeros((2, 2), np.float32), r"PairRows\.margin \(2, 2\) and weight \(2, 1\)"),
    ("weight", np.zeros((2, 1), np.int32), r"PairRows\.weight must be floating"),
    ("weight", np.ones((2, 1), np.float32), r"weight is non-zero for a pair that names a missing"),
    ("ends", np.array([[3, -1], [-1, -1]]), r"weight is non-zero for a pair that names a missing"),
]


@pytest.mark.parametrize(("field", "value", "text"), BAD)
def test_a_bad_field_is_named(field, value, text):
    """Catches a wrong shape, dtype or index that would score the wrong slot without a word."""
    with pytest.raises(ValueError, match=text):
        good().replace(**{field: value}).validate()


def test_rotary_axes_are_one_or_three():
    """Catches a check that forbids M-RoPE's three axes."""
    good().replace(positions=np.zeros((2, 6, 3), np.int32)).validate()


def test_static_checks_work_while_tracing_and_on_abstract_rows():
    """Catches a value check that breaks jit, and a shape check that is lost under it."""

    @jax.jit
    def f(rows):
        return rows.validate().tokens.sum()

    assert int(f(jax.tree.map(jnp.asarray, good()))) == 5 + 6 + 7 + 8 + 9
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), good())
    assert abstract.validate() is abstract
    with pytest.raises(ValueError, match=r"Rows\.mask"):
        jax.eval_shape(lambda r: r.validate(), abstract.replace(mask=abstract.tokens))


def test_types_are_frozen_pytrees():
    """Catches a field that jit would not see, and a batch that can be changed in place."""
    rows = good()
    assert isinstance(rows, Rows) and isinstance(rows, PairRows)
    assert len(jax.tree.leaves(rows)) == 10  # media and features are None
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), rows)
    assert doubled.validate().tokens.shape == (4, 6)
    with pytest.raises(AttributeError):
        rows.tokens = rows.tokens
    state = TrainState(jnp.int32(3), {"w": jnp.ones(2)}, (), {}, jax.random.key(0))
    back = jax.jit(lambda s: s.replace(step=s.step + 1))(state)
    assert int(back.step) == 4 and back.extra == {}
