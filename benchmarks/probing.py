"""What share of a probing run on MRMBench is the reading of the texts.

Claim (docs/performance.md): most of the time goes into the states, which are computed once and
kept. The probes, six tasks x 5 seeds x 3 learning rates in one program, and as many of both
controls, are the smaller part.

The model is that of `benchmarks/scoring.py`. The texts are the toy of `data.corpora.mrmbench`, made
longer by random words, with log-normal lengths (prompts of median 50 and sigma 1.1, answers of
median 23 and sigma 1.0). Both modes run; the second reads the states that the first one kept, so
that its share counts the seconds of the first.

    python benchmarks/probing.py [--train 2000] [--test 1000]
    python benchmarks/probing.py --size toy --train 64 --test 32

Appends one JSON line per mode to `--out`.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import time
from pathlib import Path

from reward_model import cpu, gemm
from scoring import SIZES, SPECIAL, model

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SEEDS, LRS = 5, 3


def lengthened(row: dict, words: list[str]) -> dict:
    """A row of the toy with random words behind its prompt and before its answers.

    Drawn from the text itself: equal texts stay equal.
    """

    def some(text, median, sigma):
        rng = random.Random(text)
        return " ".join(rng.choices(words, k=min(511, int(median * rng.lognormvariate(0, sigma)))))

    found = {k: f"{some(v, 23, 1.0)} {v}" for k, v in row.items() if isinstance(v, str)}
    return {**row, **found, "prompt": f"{row['prompt']} {some(row['prompt'], 50, 1.1)}"}


def prepare(work: Path, args) -> Path:
    """Writes the model and the files of the benchmark."""
    from jaxreward.data import sources
    from jaxreward.data.corpora import mrmbench

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    words = [f"w{i}" for i in range(SIZES[args.size]["vocab"] // 2)]
    folder = mrmbench.write_toy(work / "data", train=args.train, test=args.test)
    seen = {}
    for path in folder.rglob("*.jsonl"):
        rows = [row for _, row in sources.read_jsonl(path)]
        texts = [v for row in rows for v in row.values() if isinstance(v, str)]
        seen |= dict.fromkeys(word for text in texts for word in text.split())
        sources.write_jsonl(path, [lengthened(row, words) for row in rows])
    room = SIZES[args.size]["vocab"] - len(SPECIAL) - len(words)
    model(work, args.size, [*words, *list(seen)[:room]])
    return folder


def main(args):
    """Both modes, and what each took."""
    from jaxreward.recipes import probing

    work = Path(args.work).resolve() / args.size
    folder = prepare(work, args)
    read = None
    for mode in ("paper", "strong"):
        speed, began = gemm(), time.perf_counter()
        result = probing.run(work / "model", folder, work / f"{mode}.json", mode=mode, seeds=SEEDS)
        total = time.perf_counter() - began
        spent = result["protocol"]["seconds"]
        read = read or spent["states"]
        rest = total - spent["states"] - spent["probes"]
        line = {
            "benchmark": "probing",
            "size": args.size,
            "train": args.train,
            "test": args.test,
            "mode": mode,
            "states_s": round(read, 2),
            "probes_s": round(spent["probes"], 2),
            "rest_s": round(rest, 2),
            "share_of_states": round(read / (read + spent["probes"] + rest), 3),
            "states_of_both": round(read / (read + spent["probes"]), 3),
            "accuracy": round(result["metrics"]["accuracy"], 3),
            "gemm_gflops": speed,
            "load": round(os.getloadavg()[0], 1),
            "machine": f"{len(os.sched_getaffinity(0))} x {cpu()}",
            "date": str(datetime.date.today()),
        }
        with Path(args.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--train", type=int, default=2000, help="answers")
    parser.add_argument("--test", type=int, default=1000, help="answers")
    parser.add_argument("--work", default="runs/benchmark_probing")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    main(parser.parse_args())
