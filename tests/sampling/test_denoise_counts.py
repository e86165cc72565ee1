"""What a denoising step costs: products of the traced program, memory of the compiled one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.sampling import denoise
from jaxreward.testing import tiny_config
from jaxreward.train import plan

# A vocabulary beside which everything else is small; 8 blocks.
B, P, L, K, V = 4, 8, 64, 8, 4096
T = P + L
CFG = tiny_config(
    vocab=V, width=16, heads=2, kv_heads=1, mlp=32, mask="full", mask_id=V - 1, predict_offset=0
)
SHIFTED = dataclasses.replace(CFG, predict_offset=1)


def trace(schedule, cfg=CFG):
    prompts = [jax.ShapeDtypeStruct((B, P), dtype) for dtype in (jnp.int32, bool)]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    params = sp.abstract(decoder.specs(cfg))
    return denoise.sample.trace(params, cfg, *prompts, keys, schedule=schedule)


def products(program):
    """(FLOPs of every run of the layers, FLOPs of every product elsewhere), as the program has
    them, each once: the steps are a loop whose count is not known before it runs."""
    layers, others = [], []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            inside = list(jaxprs_in_params(eqn.params))
            if eqn.primitive.name == "scan" and (one := sum(map(plan.flops, inside))):
                layers.append(eqn.params["length"] * one)
            elif eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                inner = [eqn.invars[0].aval.shape[d] for d in contracted]
                others.append(2 * math.prod(inner) * math.prod(eqn.outvars[0].aval.shape))
            else:
                for one in inside:
                    walk(one)

    walk(program.jaxpr.jaxpr)
    return sorted(layers), sorted(others)


def layers_of(slots, keys):
    """By hand: projections, MLP and both products of attention, of `slots` that see `keys`."""
    c = CFG
    linear = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim * c.width
    linear += 3 * c.width * c.mlp
    return 2 * B * c.depth * slots * (linear + 2 * c.heads * c.head_dim * keys)


def head_of(slots):
    return 2 * B * slots * CFG.width * V


@pytest.mark.parametrize("cfg", [CFG, SHIFTED], ids=["in place", "shifted"])
def test_the_head_meets_the_block_alone(cfg):
    """Catches logits of the whole canvas, and a model that is run twice a step."""
    layers, heads = products(trace(denoise.llada(L, 16, block=K), cfg))
    assert layers == [layers_of(T, T)]
    assert heads == [head_of(K)]


@pytest.mark.parametrize("cfg", [CFG, SHIFTED], ids=["in place", "shifted"])
def test_dual_runs_the_block_alone(cfg):
    """Catches a cached step that computes the rest of the canvas again. The shifted model also
    needs the slot before the block."""
    layers, heads = products(trace(denoise.llada(L, 16, block=K, cache="dual"), cfg))
    assert layers == [layers_of(K + cfg.predict_offset, T), layers_of(T, T)]
    assert set(heads) == {head_of(K)}


def test_prefix_runs_what_is_not_before_the_block():
    """Catches widths that are the canvas's for every block, and one program for each block."""
    layers, heads = products(trace(denoise.llada(L, 16, block=K, cache="prefix")))
    assert layers == [layers_of(slots, T) for slots in (8, 16, 32, 64, T)]
    assert set(heads) == {head_of(K)}


def test_a_threshold_costs_nothing_more():
    """Catches confidences that need logits of their own."""
    exact = products(trace(denoise.llada(L, 16, block=K)))
    assert products(trace(denoise.llada(L, 16, block=K, threshold=0.9))) == exact


def test_memory_does_not_grow_with_the_steps():
    """Catches states or logits that are kept of every step, and logits of the canvas: a state of
    all rows is 1 KiB, the logits of a block 512 KiB and those of an answer eight times that."""
    few, many = (
        plan.memory(trace(denoise.llada(L, steps, block=K)).lower().compile()).temporaries
        for steps in (8, 64)
    )
    assert abs(many - few) < 8 * 1024
    block = 4 * B * K * V
    assert many <= 3 * block < 4 * B * L * V


def test_one_program_serves_all_prompts_and_parts():
    """Catches a compilation for each block, length of prompt, or number of steps to go on."""
    small = dataclasses.replace(CFG, vocab=32, mask_id=31)
    params = sp.init(decoder.specs(small), jax.random.key(0))
    schedule = denoise.llada(8, 8, block=2)
    rng = np.random.default_rng(0)
    with plan.compilations() as counts:
        for length, parts in ((6, (1, 2, 5)), (3, (4, 4))):
            tokens = rng.integers(0, 31, (2, 6)).astype(np.int32)
            mask = np.arange(6) >= 6 - np.array([[length], [1]])
            keys = jax.random.split(jax.random.key(length), 2)
            canvas = denoise.begin(tokens, mask, schedule, small)
            for steps in parts:
                canvas = denoise.advance(params, small, canvas, keys, steps, schedule=schedule)
            assert int(canvas.step) == 8
            assert not np.asarray(canvas.open).any()
    assert counts["jit(advance)"] == 1, counts
