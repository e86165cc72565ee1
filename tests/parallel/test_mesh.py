"""The mesh: sizes, order of the axes, and what is refused."""

import jax
import pytest
from jax.sharding import AxisType

from jaxreward.parallel import mesh


def sizes(**kw):
    return dict(mesh.make_mesh(kw).shape)


def test_missing_axes_have_size_one_and_minus_one_takes_the_rest():
    """Catches a wrong default or a rest that counts the other axes twice."""
    one = dict.fromkeys(mesh.AXES, 1)
    assert dict(mesh.make_mesh().shape) == {**one, "data": 4}
    assert sizes(data=2, fsdp=2) == {**one, "data": 2, "fsdp": 2}
    assert sizes(data=-1, tensor=2) == {**one, "data": 2, "tensor": 2}
    assert sizes(data=1, fsdp=-1) == {**one, "fsdp": 4}
    assert sizes(data=-1, fsdp=4) == {**one, "fsdp": 4}
    assert mesh.make_mesh({}, devices=jax.devices()[:1]).size == 1


def test_axes_are_in_order_and_auto():
    """Catches explicit axis types, jax's default, under which unannotated code does not run."""
    made = mesh.make_mesh({"fsdp": 2, "tensor": 2})
    assert made.axis_names == ("data", "fsdp", "context", "expert", "tensor")
    assert set(made.axis_types) == {AxisType.Auto}
    # The last axis is the fastest: neighbours along `tensor` are neighbouring devices.
    ids = [[d.id for d in row] for row in made.devices.reshape(2, 2)]
    assert ids == [[0, 1], [2, 3]]


def test_chosen_devices_are_used():
    """Catches a mesh over all devices when some were asked for."""
    made = mesh.make_mesh({"data": 2}, devices=jax.devices()[2:])
    assert [d.id for d in made.devices.flat] == [2, 3]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"dat": 4}, r"unknown mesh axes \['dat'\]; the axes are data, fsdp"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2, "fsdp": 2}, "must be positive"),
        ({"data": 3}, r"needs 3 devices; there are 4\. .*product is 4"),
        ({"data": 2}, r"needs 2 devices; there are 4"),
        ({"data": 8}, r"needs 8 devices; there are 4"),
        ({"data": -1, "tensor": 3}, r"needs a multiple of 3 devices; there are 4"),
        ({"data": -1, "tensor": 8}, r"needs a multiple of 8 devices; there are 4"),
    ],
)
def test_sizes_that_do_not_fit_say_why(wanted, text):
    """Catches idle devices, or an error that names numbers which do fit."""
    with pytest.raises(ValueError, match=text):
        mesh.make_mesh(wanted)


def test_the_caller_keeps_its_sizes():
    """Catches a mesh that writes the resolved -1 back into a config."""
    wanted = {"data": -1, "fsdp": 2}
    mesh.make_mesh(wanted)
    assert wanted == {"data": -1, "fsdp": 2}


def test_describe():
    """Catches axes of size 1 in the line, or a missing one."""
    assert mesh.describe(mesh.make_mesh({"data": 2, "tensor": 2})) == (
        "4 cpu devices: data 2 x tensor 2"
    )
    alone = mesh.make_mesh(devices=jax.devices()[:1])
    assert mesh.describe(alone) == "1 cpu device: no sharding"
