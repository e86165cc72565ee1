"""Checkpoints: bit-equal, onto any mesh, whole or absent, and never mistaken for a newer format."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreward.core import trees
from jaxreward.parallel import mesh, rules
from jaxreward.parallel import specs as sp
from jaxreward.train import checkpoint
from jaxreward.train import state as states

SPECS = {
    "up": {"kernel": sp.Param((8, 12), ("embed", "mlp"))},
    "low": {"kernel": sp.Param((4, 3), ("embed", "rank"), dtype="bfloat16")},
}
TX = optax.adamw(1e-2)
DATA = {"iterator": {"next_index": 3, "nested": {"a": [1, 2], "b": None}}}


@jax.jit
def _update(state):
    grads = jax.tree.map(lambda p: jnp.cos(3 * p), state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


@functools.cache
def _alone(seed, steps):
    state = states.create(sp.init(SPECS, jax.random.key(seed)), TX, jax.random.key(9))
    for _ in range(steps):
        state = _update(state)
    return state


def make(sizes=None, *, seed=0, steps=2):
    """A state after some updates, on one device or on a mesh."""
    state = _alone(seed, steps)
    if sizes is None:
        return state
    where = rules.Rules(mesh.make_mesh(sizes))
    return states.place(state, states.shardings(SPECS, TX, where))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, state): a checkpoint of step 2 written from a mesh, and what was in it."""
    folder = tmp_path_factory.mktemp("saved")
    state = make({"fsdp": 2, "tensor": 2})
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(state, data=DATA, meta={"init_sha256": "abc"})
    return folder, state


def equal(a, b):
    """Same structure, dtypes and bits."""
    a, b = trees.flatten(a), trees.flatten(b)
    assert list(a) == list(b)
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def arrays(state):
    return {"step": state.step, "params": state.params, "opt": state.opt_state}


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"data": 4}, None],
    ids=["same mesh", "fsdp 4", "data 4", "one device"],
)
def test_restore_is_bit_equal_on_any_mesh(saved, sizes):
    """Catches values cast or shuffled by resharding, and arrays that come back replicated."""
    folder, state = saved
    like = make(sizes, seed=5, steps=0)
    where = jax.tree.map(lambda x: x.sharding, like)
    with checkpoint.Checkpoints(folder) as checkpoints:
        got, data, meta = checkpoints.restore(like)
    equal(arrays(got), arrays(state))
    assert jax.tree.map(lambda x: x.sharding, got) == where
    assert (data, meta) == (DATA, {"format": 1, "step": 2, "init_sha256": "abc"})
    assert (jax.random.key_data(got.key) == jax.random.key_data(like.key)).all()


def test_one_device_to_a_mesh(tmp_path):
    """Catches a run that cannot move from a laptop to several devices."""
    state = make()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
        checkpoints.wait()
        got, _, _ = checkpoints.restore(make({"fsdp": 2, "tensor": 2}, seed=5, steps=0))
    equal(arrays(got), arrays(state))
    assert not got.params["up"]["kernel"].sharding.is_fully_replicated


def test_restore_onto_abstract_arrays(saved):
    """Catches a restore that needs a second copy of the state only to know its shapes."""
    folder, state = saved
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    ).replace(key=state.key)
    with checkpoint.Checkpoints(folder) as checkpoints:
        got, _, _ = checkpoints.restore(like)
    equal(arrays(got), arrays(state))


def test_parameters_alone(saved):
    """Catches scoring that needs the optimizer's state, which is twice as large."""
    folder, state = saved
    with checkpoint.Checkpoints(folder) as checkpoints:
        equal(checkpoints.params(make(seed=5, steps=0).params), state.params)


def test_another_model_is_refused_parameter_by_parameter(saved):
    """Catches values that are padded, cut or left out to fit, and an error without their names."""
    folder, _ = saved
    like = make(steps=0)
    wrong = {"up": {"kernel": jnp.zeros((8, 13))}, "more": {"kernel": jnp.zeros(3)}}
    with checkpoint.Checkpoints(folder) as checkpoints:
        for call in (
            lambda: checkpoints.params(wrong),
            lambda: checkpoints.restore(like.replace(params=wrong)),
        ):
            with pytest.raises(ValueError, match="is of another model") as caught:
                call()
            for text in (
                "more/kernel is missing",
                "low/kernel is unknown",
                "up/kernel has shape [8, 12], expected [8, 13]",
            ):
                assert text in str(caught.value)


def test_saving_copies_before_it_returns(tmp_path):
    """Catches a step that overwrites donated buffers while they are still being written."""
    change = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    params = {"w": jnp.arange(2.0**18)}
    state = states.create(params, optax.sgd(0.1), jax.random.key(0))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
        moved = change(state.params)
        for _ in range(5):
            moved = change(moved)
        checkpoints.wait()
        equal(checkpoints.params(params), params)


@pytest.mark.parametrize("extra", [{}, {"ema": {"w": np.arange(3, dtype=np.float32)}}])
def test_extra_state(tmp_path, extra):
    """Catches averages that are lost on resume, and an empty item that cannot be read back."""
    extra = jax.tree.map(jnp.asarray, extra)
    state = make().replace(extra=extra)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
        checkpoints.wait()
        like = state.replace(extra=jax.tree.map(jnp.zeros_like, extra))
        got, _, _ = checkpoints.restore(like)
    equal(got.extra, extra)


def test_only_the_newest_are_kept(tmp_path):
    """Catches a disk that fills up, and the newest checkpoint being the one that goes."""
    state = make()
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3, 4):
            doubled = jax.tree.map(lambda p: p * step, state.params)
            at = state.replace(step=jnp.int32(step), params=doubled)
            checkpoints.save(at, data={"at": step}, meta={})
        checkpoints.wait()
        assert checkpoints.latest() == 4
        got, data, _ = checkpoints.restore(state, step=3)
        assert (int(got.step), data) == (3, {"at": 3})
        equal(got.params, jax.tree.map(lambda p: p * 3, state.params))
    held = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert held == {"3", "4"}


def test_no_checkpoint_is_said(tmp_path):
    """Catches a bare error from the library below, for a run that has not saved yet."""
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for call in (checkpoints.restore, checkpoints.params):
            with pytest.raises(FileNotFoundError, match="no finished checkpoint; train first"):
                call(make())
        with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
            checkpoints.meta()


def test_a_missing_step_names_those_there_are(saved):
    """Catches a bare error from the library below, for a step that was never saved or is gone."""
    with checkpoint.Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; there are 2"):
            checkpoints.params(make().params, step=7)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    """Catches an old program that misreads what a newer one wrote."""
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    state = make()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
    monkeypatch.undo()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for call in (lambda: checkpoints.restore(state), lambda: checkpoints.params(state.params)):
            with pytest.raises(ValueError, match=r"format 2 .* newer .* reads up to 1"):
                call()


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    """Catches a resume from what a kill left half written."""
    state = make()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={}, meta={})
    folder = tmp_path / "checkpoints"
    # What orbax leaves: its own temporary name, and the same beside a whole checkpoint.
    partial = folder / "3.orbax-checkpoint-tmp"
    (partial / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (partial / "params.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"cut")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        got, _, meta = checkpoints.restore(state)
        equal(arrays(got), arrays(state))
        # The step that was lost can be saved again.
        checkpoints.save(state.replace(step=jnp.int32(3)), data={}, meta={})
        checkpoints.wait()
        assert checkpoints.latest() == 3 and meta["step"] == 2


def test_closing_twice_is_harmless(tmp_path):
    """Catches an error on the way out that hides the one that matters."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make(), data={}, meta={})
    checkpoints.close()
    checkpoints.close()
    with checkpoint.Checkpoints(tmp_path) as again:
        assert again.latest() == 2


def test_config_of_a_workdir(tmp_path):
    """Catches a Hugging Face folder, or none, taken for a run."""
    with pytest.raises(FileNotFoundError, match=r"is not a workdir: .*config\.json does not exist"):
        checkpoint.read_config(tmp_path)
    assert not checkpoint.is_workdir(tmp_path)
    for text, run in (
        ('{"recipe": "preference", "seed": 1}', True),
        ('{"architectures": ["LlamaForCausalLM"]}', False),
        ("{", False),
        ("[]", False),
    ):
        (tmp_path / "config.json").write_text(text)
        assert checkpoint.is_workdir(tmp_path) == run
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "preference"}))
    assert checkpoint.read_config(tmp_path) == {"recipe": "preference"}
