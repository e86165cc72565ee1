"""What a confidence threshold saves a denoiser, and what it costs in right answers.

Claim (docs/performance.md): at how many tokens a pass answers are still right as often as when one
token is filled in at a time.

A denoiser of 0.2M parameters that reads bytes learns 4x4 Sudoku (`data.corpora.sudoku`), then fills
in 200 puzzles whose grids it has not seen: greedily one position a pass, and with all positions
whose likeliest token has at least the threshold. A row's passes are those in which it commits
something.

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
CANVAS, HELD, SEED = 20, 200, 0


def trained(work: Path, steps: int) -> tuple[Path, list[dict]]:
    """(the denoiser's folder, held-out puzzles)."""
    from jaxreward import presets
    from jaxreward.data import sources
    from jaxreward.data.corpora import sudoku
    from jaxreward.hub import export
    from jaxreward.recipes import evaluate, sft

    drawn = sudoku.problems(8000, seed=SEED)
    train, held = sudoku.held_out_grids(drawn, fraction=0.2, seed=SEED)
    held, out = held[:HELD], work / "model"
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


def measured(model: Path, held: list[dict], threshold: float) -> dict:
    """Share of right answers and tokens a pass; a threshold of 0 fills in one token a pass."""
    import jax
    import numpy as np

    from jaxreward.data import tokenize
    from jaxreward.hub import load
    from jaxreward.sampling import autoregressive, denoise

    tokenizer = tokenize.load_tokenizer(model)
    cfg, params, _ = load.load(model)
    prompts, mask = autoregressive.padded([tokenizer.ids(p["prompt"]) for p in held])
    keys = jax.random.split(jax.random.key(0), len(prompts))
    schedule = denoise.llada(CANVAS, CANVAS, temperature=0.0, threshold=threshold)
    canvas = denoise.sample(params, cfg, prompts, mask, keys, schedule=schedule)
    here = slice(0, len(held)), slice(prompts.shape[1], None)
    texts = [tokenizer.decode(row) for row in np.asarray(canvas.tokens)[here]]
    right = [text.strip().startswith(p["answer"]) for text, p in zip(texts, held)]
    passes = [len(set(row.tolist())) for row in np.asarray(canvas.reveal)[here]]
    return {"right": float(np.mean(right)), "tokens_a_pass": CANVAS / float(np.mean(passes))}


def main(args):
    """Trains if need be, measures, prints, appends."""
    model, held = trained(args.work.resolve(), args.steps)
    found = {str(t): measured(model, held, t) for t in (0.0, *THRESHOLDS)}
    exact = found["0.0"]["right"]
    print("| threshold | right | of the exact | tokens a pass |\n|---|---|---|---|")
    for t, row in found.items():
        part = row["right"] / exact if exact else float("nan")
        print(f"| {t} | {row['right']:.3f} | {part:.2f} | {row['tokens_a_pass']:.2f} |")
    line = {
        "benchmark": "threshold",
        "steps": args.steps,
        "puzzles": len(held),
        "found": found,
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
