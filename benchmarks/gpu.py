"""Training and attention on one GPU, in numbers: python benchmarks/gpu.py [--record]

    train      steps of a reward model of SmolLM2-135M's shape (random weights), bfloat16 compute:
               tokens a second, share of the chip's bfloat16 peak (six times parameters and the
               square of attention)
    attention  forward and backward of `attention.attend` beside cudnn's kernel

With --record the rows are added to benchmarks/gpu.jsonl.
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreward.core.types import Rows
from jaxreward.models import attention, decoder, heads
from jaxreward.objectives import preference
from jaxreward.parallel import specs as sp

SHAPE = dict(
    vocab=49152,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    rope_theta=1e5,
    tied=True,
)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def seconds(f, *args, times=10):
    """Median time of a call, after two that warm up."""
    for _ in range(2):
        jax.block_until_ready(f(*args))
    took = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def train(batch, length, compute, remat):
    """One row: a Bradley-Terry step with AdamW on `batch` texts of `length` tokens, in pairs."""
    cfg = decoder.Config(**SHAPE, compute=compute, remat=remat, max_len=length)
    tree = {"model": decoder.specs(cfg), "score": heads.scalar_specs(cfg.width)}
    params = sp.init(tree, jax.random.key(0))
    rng = np.random.default_rng(0)
    segments = jnp.ones((batch, length), jnp.int32)
    mask = segments > 0
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))[..., None]
    tokens = jnp.asarray(rng.integers(0, cfg.vocab, (batch, length)), jnp.int32)
    rows = Rows(tokens, mask, mask, positions, segments, 0 * segments)
    optimizer = optax.adamw(1e-5)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows):
        def loss(params):
            states = decoder.backbone(
                params["model"],
                cfg,
                decoder.embed(params["model"], cfg, rows),
                positions=rows.positions,
                segments=rows.segments,
                trunk=rows.trunk,
            ).states
            scores = heads.scalar(params["score"], states[:, -1])
            return jnp.mean(preference.bradley_terry(scores[::2], scores[1::2]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    took = []
    for _ in range(12):
        start = time.perf_counter()
        params, state, value = step(params, state, rows)
        value.block_until_ready()
        took.append(time.perf_counter() - start)
    step_s = statistics.median(took[3:])
    matrices = sp.size(decoder.specs(cfg)) - cfg.vocab * cfg.width
    flops = batch * length * 6 * matrices
    flops += batch * 12 * cfg.depth * cfg.heads * cfg.head_dim * length**2
    kind = jax.devices()[0].device_kind
    peak = next((v for k, v in PEAK.items() if k in kind), None)
    return dict(
        what="train",
        batch=batch,
        length=length,
        compute=compute,
        remat=remat,
        step_s=round(step_s, 4),
        tokens_per_s=round(batch * length / step_s),
        mfu=peak and round(flops / step_s / peak, 3),
        first_step_s=round(took[0], 1),
        memory_gib=round(jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30, 2),
    )


def attend(batch, length, chunk):
    """One row: attention with its gradient beside cudnn, 16 heads of 64 over 4 key heads."""
    attention.WIDE = chunk
    q, k, v = (
        jax.random.normal(jax.random.key(i), (batch, length, n, 64), jnp.bfloat16)
        for i, n in enumerate((16, 4, 4))
    )
    segments = jnp.ones((batch, length), jnp.int32)

    def ours(q, k, v):
        see = attention.sight(segments, 0 * segments)
        return attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), see)

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    slope = lambda f: jax.jit(
        jax.grad(lambda *a: jnp.sum(jnp.square(f(*a).astype(jnp.float32))), (0, 1, 2))
    )
    row = dict(what="attention", batch=batch, length=length, chunk=chunk)
    row["ours_ms"] = round(1e3 * seconds(slope(ours), q, k, v), 3)
    row["cudnn_ms"] = round(1e3 * seconds(slope(cudnn), q, k, v), 3)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    stamp = dict(date=datetime.date.today().isoformat(), device=device, jax=jax.__version__)
    jobs = [
        *(functools.partial(train, 16, 2048, "bfloat16", r) for r in ("cheap", "none", "full")),
        functools.partial(train, 64, 512, "bfloat16", "cheap"),
        functools.partial(train, 16, 512, "float32", "cheap"),
        *(
            functools.partial(attend, 8, length, chunk)
            for length in (512, 2048, 8192)
            for chunk in (128, 256, 512, 1024)
        ),
    ]
    path = Path(__file__).with_suffix(".jsonl")
    for job in jobs:
        try:
            row = job()
        except (RuntimeError, ValueError) as error:  # one shape out of memory: go on
            row = dict(what="failed", job=str(job.args), error=str(error)[:200])
        print(json.dumps(row), flush=True)
        if args.record:
            with path.open("a") as file:
                file.write(json.dumps(row | stamp) + "\n")


if __name__ == "__main__":
    main()
