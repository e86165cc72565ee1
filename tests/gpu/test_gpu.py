"""A first check of a GPU host: JAX_PLATFORMS=cuda,cpu pytest -m gpu (needs one GPU, minutes).

Values on the GPU are compared with those of the CPU beside it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import presets, testing
from jaxreward.core import trees
from jaxreward.core.types import Rows
from jaxreward.models import decoder
from jaxreward.objectives import supervised
from jaxreward.parallel import specs as sp

pytestmark = pytest.mark.gpu

CFG = testing.tiny_config(width=256, heads=4, kv_heads=2, head_dim=64, mlp=512, vocab=1024)
RICH = dataclasses.replace(
    CFG, window=64, windowed=(True, False), attn_softcap=20.0, qk_norm=True, post_norms=True
)


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU; with one, set JAX_PLATFORMS=cuda,cpu")
    return jax.devices("gpu")[0]


def batch():
    """Two packed rows with a shared prompt, long enough for attention in tiles."""
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 3, 0]], [80, 90, 70, 60], axis=1).repeat(2, 0).astype(np.int32)
    trunk = np.where(segments > 1, 1, 0).astype(np.int32)
    start = np.where(segments == 3, 90, 0)
    positions = np.where(segments > 0, np.arange(300) - start, 0).astype(np.int32)
    tokens = rng.integers(0, CFG.vocab, (2, 300)).astype(np.int32)
    mask = segments > 0
    return Rows(tokens, mask, mask, positions[..., None], segments, trunk)


@functools.partial(jax.jit, static_argnames="cfg")
def slope(params, rows, cfg):
    def loss(params):
        states = decoder.backbone(
            params,
            cfg,
            decoder.embed(params, cfg, rows),
            positions=rows.positions,
            segments=rows.segments,
            trunk=rows.trunk,
        ).states
        at = supervised.scored(rows.tokens, rows.loss_mask, rows.segments, rows.trunk)
        nll = supervised.cross_entropy(states, decoder.head_matrix(params, cfg), at)
        return jnp.sum(nll) / jnp.sum(at.mask), states

    (value, states), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return {"loss": value, "states": states, "grads": grads}


@pytest.mark.parametrize("cfg", [CFG, RICH], ids=["plain", "rich"])
def test_float32_is_float32(cfg, gpu):
    """Catches TF32 products: states, loss and gradients must be the CPU's to rounding."""
    params = sp.init(decoder.specs(cfg), jax.random.key(0))
    there = jax.device_get(slope(*jax.device_put((params, batch()), gpu), cfg))
    here = jax.devices("cpu")[0]
    here = jax.device_get(slope(*jax.device_put((jax.device_get(params), batch()), here), cfg))
    for path, want in trees.flatten(here).items():
        got = trees.flatten(there)[path]
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=path)


def test_bfloat16_is_near(gpu):
    """Catches a bfloat16 program that overflows or loses its softmax on the GPU."""
    params = sp.init(decoder.specs(CFG), jax.random.key(0))
    exact = slope(params, batch(), CFG)
    short = slope(params, batch(), dataclasses.replace(CFG, compute="bfloat16"))
    assert abs(float(short["loss"]) - float(exact["loss"])) < 0.02 * float(exact["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(short["grads"])))


def test_a_run_trains_and_resumes(tmp_path):
    """Catches a recipe that only works on CPU: data, step, checkpoint, evaluation, export."""
    from jaxreward.recipes import evaluate, preference

    config = presets.load("reward_model/bradley_terry:smoke")
    workdir = preference.run(config, tmp_path / "run")
    again = preference.run(config, tmp_path / "run")  # finished: nothing is done twice
    assert again == workdir
    evaluate.export(workdir, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
