"""Drawing one token a row: our two-level search of the cumulative sum against a Gumbel draw, and
our way to a nucleus (top-p) against a sort.

Claims (docs/architecture.md): the search is exact and costs less than `jax.random.categorical`,
which needs a random number per vocabulary entry; a nucleus costs little where its tokens are among
the 256 likeliest (peaked logits), and less than a sort where they are not (flat logits). Prints one
JSON line; compare the ratios.

    python benchmarks/draw.py [--rows 64] [--vocab 49152] [--rounds 15]
"""

import argparse
import datetime
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from jaxreward.sampling.choose import Filtered, Temperature


def main(rows, vocab, rounds):
    """Times both, alternating, and prints medians in milliseconds."""
    logits = jax.random.normal(jax.random.key(0), (rows, vocab))
    keys = jax.random.split(jax.random.key(1), rows)
    nucleus = Filtered(1.0, 0, 0.9).logits
    programs = {
        "search": Temperature(0.8),
        "gumbel": lambda x, k: jax.vmap(jax.random.categorical)(k, x / 0.8),
        "nucleus": lambda x, k: nucleus(6 * x),
        "wide_nucleus": lambda x, k: nucleus(x),
        "sort": lambda x, k: jnp.sort(x, axis=-1),
    }
    programs = {name: jax.jit(program) for name, program in programs.items()}
    times = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program(logits, keys))
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(logits, keys))
            times[name].append(1e3 * (time.perf_counter() - began))
    medians = {f"{name}_ms": round(statistics.median(t), 2) for name, t in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "draw",
                "rows": rows,
                "vocab": vocab,
                **medians,
                "gumbel_over_search": round(medians["gumbel_ms"] / medians["search_ms"], 2),
                "sort_over_wide_nucleus": round(medians["sort_ms"] / medians["wide_nucleus_ms"], 2),
                "device": jax.devices()[0].device_kind,
                "machine": platform.processor() or platform.machine(),
                "jax": jax.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=15)
    main(**vars(parser.parse_args()))
