"""What a confidence threshold and caches save a denoiser, and what they cost in right answers.

Claims (docs/performance.md): at how many tokens a pass answers are still right as often as when one
token is filled in at a time; what becomes of answers when keys and values are kept for a block.

A denoiser of 0.2M parameters that reads bytes learns 4x4 Sudoku (`data.corpora.sudoku`), then fills
in 200 puzzles whose grids it has not seen: greedily one position a pass, and with all positions
whose likeliest token has at least the threshold. A row's passes are those in which it commits
something. Caches are measured in blocks of the whole canvas and of parts of it, each against the
sampler without cache and threshold in the same blocks, on 1000 such puzzles: right answers, those
lost and gained, equal tokens, and how many passes of a row ran over a part of the canvas only.

    python benchmarks/threshold.py --work runs/threshold [--steps 5000]

A model that is in --work already is not trained again. Appends one JSON line to `--out`, prints a
table.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

from reward_model import cpu

os.environ.setdefault("JAX_PLATFORMS", "cpu")
THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)
BLOCKS, CACHES = (20, 10, 5), ("none", "prefix", "dual")
CANVAS, HELD, MORE, SEED = 20, 200, 1000, 0


def trained(work: Path, steps: int) -> tuple[Path, list[dict]]:
    """(the denoiser's folder, held-out puzzles)."""
    from jaxreward import presets
    from jaxreward.data import sources
    from jaxreward.data.corpora import sudoku
    from jaxreward.hub import export
    from jaxreward.recipes import evaluate, sft

    drawn = sudoku.problems(8000, seed=SEED)
    train, held = sudoku.held_out_grids(drawn, fraction=0.2, seed=SEED)
    out = work / "model"
    if out.is_dir():
        return out, held
    size = dict(width=64, depth=3, heads=4, kv_heads=4, head_dim=16, mlp=192, max_len=512)
    start = export.write_tiny(work / "new", seed=SEED, denoiser=True, tied=False, **size)
    rows = [dict(id=p["id"], prompt=p["prompt"], completion=p["answer"]) for p in train]
    sources.write_jsonl(work / "rows.jsonl", rows)
    overrides = [
        f"models.policy.init=hf:{start}",
        f"data.path={work / 'rows.jsonl'}",
        "data.template=plain",
        "data.max_len=64",
        "data.row_len=256",
        "data.batch=8",
        "data.eval_fraction=0.02",
        f"data.canvas={CANVAS}",
        "data.padding=noised",
        "optim.lr=4e-3",
        "optim.warmup=0.05",
        "optim.decay=0.0",
        f"train.steps={steps}",
        "train.log_every=250",
        "train.eval_every=0",
        "train.save_every=1000",
    ]
    sft.run(presets.load("diffusion/sft", overrides), work / "run")
    return evaluate.export(work / "run", out), held


def filled(model: Path, held: list[dict], threshold: float, block: int = 0, cache: str = "none"):
    """(facts, which answers are right, their tokens); threshold 0 fills in one token a pass."""
    import jax
    import numpy as np

    from jaxreward.data import tokenize
    from jaxreward.hub import load
    from jaxreward.sampling import autoregressive, denoise

    tokenizer = tokenize.load_tokenizer(model)
    cfg, params, _ = load.load(model)
    prompts, mask = autoregressive.padded([tokenizer.ids(p["prompt"]) for p in held])
    keys = jax.random.split(jax.random.key(0), len(prompts))
    kw = dict(block=block, temperature=0.0, threshold=threshold, cache=cache)
    schedule = denoise.llada(CANVAS, CANVAS, **kw)
    canvas = denoise.sample(params, cfg, prompts, mask, keys, schedule=schedule)
    here = slice(0, len(held)), slice(prompts.shape[1], None)
    tokens = np.asarray(canvas.tokens)[here]
    texts = [tokenizer.decode(row) for row in tokens]
    right = np.array([text.strip().startswith(p["answer"]) for text, p in zip(texts, held)])
    passes = float(np.mean([len(set(row.tolist())) for row in np.asarray(canvas.reveal)[here]]))
    return {"right": float(right.mean()), "tokens_a_pass": CANVAS / passes}, right, tokens


def cached(model: Path, held: list[dict]) -> list[dict]:
    """Both caches in blocks, with and without a threshold, beside the sampler that has neither."""
    rows = []
    for block in BLOCKS:
        exact, was, expected = filled(model, held, 0.0, block)
        for cache in CACHES:
            for threshold in (0.0, 0.99):
                found, right, tokens = filled(model, held, threshold, block, cache)
                passes = CANVAS / found["tokens_a_pass"]
                # The first pass of a block is of the whole canvas: it fills the cache.
                part = passes - CANVAS // block if cache != "none" else 0.0
                rows.append(
                    {
                        "block": block,
                        "cache": cache,
                        "threshold": threshold,
                        **found,
                        "of_exact": found["right"] / exact["right"] if exact["right"] else None,
                        "lost": int((was & ~right).sum()),
                        "gained": int((right & ~was).sum()),
                        "tokens_equal": float((tokens == expected).mean()),
                        "answers_equal": float((tokens == expected).all(axis=1).mean()),
                        "passes": passes,
                        "over_a_part": part,
                    }
                )
    return rows


def main(args):
    """Trains if need be, measures, prints, appends."""
    model, held = trained(args.work.resolve(), args.steps)
    found = {str(t): filled(model, held[:HELD], t)[0] for t in (0.0, *THRESHOLDS)}
    exact = found["0.0"]["right"]
    print("| threshold | right | of the exact | tokens a pass |\n|---|---|---|---|")
    for t, row in found.items():
        part = row["right"] / exact if exact else float("nan")
        print(f"| {t} | {row['right']:.3f} | {part:.2f} | {row['tokens_a_pass']:.2f} |")
    held = held[:MORE]
    caches = cached(model, held)
    print(f"\n| {' | '.join(caches[0])} |\n{'|---' * len(caches[0])}|")
    for row in caches:
        shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        print(f"| {' | '.join(shown)} |")
    line = {
        "benchmark": "threshold",
        "steps": args.steps,
        "puzzles": HELD,
        "found": found,
        "puzzles_of_caches": len(held),
        "caches": caches,
        "machine": f"{os.cpu_count()} x {cpu()}",
        "date": str(datetime.date.today()),
    }
    with args.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/threshold"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    main(parser.parse_args())
