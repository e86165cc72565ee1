"""Scores of pairs beside `AutoModelForSequenceClassification`, alternating, in own processes.

Target: on a CPU, pairs of many lengths are scored at least 1.5 times as fast as by a competent loop
in torch, with equal scores. docs/performance.md says what came.

All sides read the same Hugging Face folder and texts, in float32, and go from texts to scores:

    ours       what `jaxreward score` does: trees, prompts shared, rows packed
    sorted     torch: all texts sorted by length, 32 at a time, padded on the right, SDPA,
               `inference_mode`
    unsorted   torch: the same in the order of the file, as a pipeline does

The model is a random Llama with a score head (`tiny`: 4 layers, width 256, vocabulary 32000). Pairs
are synthetic: words drawn at random from a seed, with log-normal lengths after the harmless test
pairs of HH-RLHF (prompts of median 50 and sigma 1.1, answers of median 23 and sigma 1.0, in words).
`--pairs FILE` takes a file of pairs instead, its words for tokens, again and again up to `--count`.

    python benchmarks/scoring.py [--count 10000] [--pairs pairs.jsonl]
    python benchmarks/scoring.py --size toy --count 64 --rounds 1

Appends one JSON line per process to `--out`, prints medians and ratios, and fails where scores
differ by more than 1e-4.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from reward_model import clock, cpu, gemm

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SIZES = {
    "toy": dict(vocab=1000, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, mlp=128),
    "tiny": dict(vocab=32_000, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, mlp=1024),
}
SIDES = ("ours", "sorted", "unsorted")
BATCH, LONGEST, CLOSE = 32, 1024, 1e-4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


# The data and the model, made once


def synthetic(count: int, words: list[str]):
    """Pairs of random words: half of a text is its prompt, and a few texts are very long."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(50), 1.1, count)
    answers = rng.lognormal(np.log(23), 1.0, (count, 2))
    text = lambda n: " ".join(words[i] for i in rng.integers(len(words), size=n))
    for prompt, both in zip(prompts, answers):
        n = int(np.clip(prompt, 1, LONGEST // 2))
        chosen, rejected = (text(int(np.clip(x, 1, LONGEST // 2 - 1))) for x in both)
        yield {"prompt": text(n), "chosen": " " + chosen, "rejected": " " + rejected}


def from_file(path: str, count: int):
    """The pairs of a file as plain texts, from the front again where they are too few."""
    from jaxreward.data import sources
    from jaxreward.data.corpora import hh_rlhf

    rows = []
    for record in sources.read_pairs(path, on_bad="skip")[0]:
        prompt = record["prompt"]
        if not isinstance(prompt, str):
            prompt = hh_rlhf.to_text(prompt, add_generation_prompt=True)
        ends = [record[side] for side in ("chosen", "rejected")]
        ends = [" " + (x if isinstance(x, str) else x[0]["content"]).strip() for x in ends]
        if len((prompt + max(ends, key=len)).split()) < LONGEST:
            rows.append({"prompt": prompt.strip(), "chosen": ends[0], "rejected": ends[1]})
    return itertools.islice(itertools.cycle(rows), count)


def model(work: Path, size: str, words: list[str]):
    """Writes `<work>/model`, a random reward model that knows these words."""
    import jax
    import tokenizers
    import transformers

    from jaxreward.hub import export
    from jaxreward.models import decoder, families, heads
    from jaxreward.parallel import specs as sp

    cfg = decoder.Config(**SIZES[size])
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words][: cfg.vocab])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(work / "source"))
    raw = families.to_hf_config(cfg) | {"eos_token_id": 2, "pad_token_id": 0}
    (work / "source" / "config.json").write_text(json.dumps(raw))
    params = sp.init(decoder.specs(cfg), jax.random.key(0))
    params.pop("head", None)
    score = sp.init(heads.specs(heads.SCALAR, cfg.width), jax.random.key(1))
    whole = {"source": work / "source", "score": score, "template": "plain"}
    export.write(work / "model", cfg, params, about="For a benchmark.", **whole)


def prepare(work: Path, size: str, count: int, pairs: str | None):
    """Writes `<work>/pairs.jsonl`, and a model that knows its words."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    words = [f"w{i}" for i in range(SIZES[size]["vocab"] - len(SPECIAL))]
    rows = list(from_file(pairs, count) if pairs else synthetic(count, words))
    if pairs:
        seen = dict.fromkeys(word for row in rows for text in row.values() for word in text.split())
        words = [*seen, *words]
    model(work, size, words)
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(work: Path):
    """The pairs."""
    return [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]


# The two sides: (seconds by part, scores [pairs, 2], facts)


def ours(work: Path, how: str):
    """As `recipes.evaluate.score`, without reading and writing lines."""
    import jax
    import numpy as np

    from jaxreward.data import tokenize
    from jaxreward.recipes import evaluate

    compiling = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: "/jax/core/compile" in name and compiling.append(seconds)
    )
    rows, loaded = read(work), evaluate.load_model(work / "model", template="plain")
    compiling.clear()
    with clock() as encode:
        trees = [
            tokenize.encode_tree(
                loaded.tokenizer, row["prompt"], [row["chosen"], row["rejected"]], template="plain"
            )
            for row in rows
        ]
    with clock() as score:
        scores = np.stack(loaded.predict(trees))
    tokens = sum(tree.size for tree in trees)
    spent = {"encode": encode, "score": score}
    return spent, scores, {"compile_s": round(sum(compiling), 2), "tokens": tokens}


def theirs(work: Path, how: str):
    """`AutoModelForSequenceClassification` in batches; the end token is put at the end of a text,
    as ours does."""
    import numpy as np
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "model", padding_side="right")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        work / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    texts = [row["prompt"] + row[side] for row in read(work) for side in ("chosen", "rejected")]
    with clock() as encode:
        ids = tokenizer([text + " </s>" for text in texts], add_special_tokens=False)["input_ids"]
        order = list(range(len(ids)))
        if how == "sorted":
            order.sort(key=lambda i: len(ids[i]), reverse=True)
    scores = np.zeros(len(ids), np.float32)
    slots = 0
    with clock() as score, torch.inference_mode():
        for first in range(0, len(ids), BATCH):
            some = order[first : first + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt")
            slots += batch["input_ids"].numel()
            scores[some] = model(**batch).logits[:, 0].numpy()
    spent = {"encode": encode, "score": score}
    facts = {"compile_s": 0.0, "tokens": sum(map(len, ids)), "slots": slots}
    return spent, scores.reshape(-1, 2), facts


def worker(side: str, work: Path):
    """Runs one side, keeps its scores and prints what it took."""
    import numpy as np

    spent, scores, facts = {"ours": ours}.get(side, theirs)(work, side)
    np.save(work / f"{side}.npy", scores)
    wall, used = (sum(getattr(x, name) for x in spent.values()) for name in ("wall", "cpu"))
    print(
        "RESULT "
        + json.dumps(
            {
                "pairs_per_s": round(len(scores) / wall, 2),
                "pairs_per_cpu_s": round(len(scores) / used, 2),
                "compiled_pairs_per_s": round(len(scores) / (wall - facts["compile_s"]), 2),
                "encode_s": round(spent["encode"].wall, 2),
                "score_s": round(spent["score"].wall, 2),
                **facts,
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
        )
    )


# Rounds


def one(side: str, work: Path, args) -> dict:
    """Starts a worker and returns its line."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    speed = gemm()
    command = [sys.executable, __file__, "--worker", side, "--work", str(work)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
    if run.returncode or not found:
        raise SystemExit(f"{side} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    versions = ("jax",) if side == "ours" else ("torch", "transformers")
    return {
        "benchmark": "scoring",
        "size": args.size,
        "data": Path(args.pairs).name if args.pairs else "synthetic",
        "count": args.count,
        "side": side,
        **json.loads(found[0].removeprefix("RESULT ")),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "gemm_gflops": speed,
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{len(os.sched_getaffinity(0))} x {cpu()}",
        "python": platform.python_version(),
        "date": str(datetime.date.today()),
    }


def main(args):
    """Alternates the sides, compares their scores, then the rounds."""
    import numpy as np

    work = Path(args.work).resolve() / args.size
    prepare(work, args.size, args.count, args.pairs)
    lines = {side: [] for side in args.sides.split(",")}
    for _ in range(args.rounds):
        for side in lines:
            line = one(side, work, args)
            lines[side].append(line)
            want = np.load(work / f"{next(iter(lines))}.npy")
            off = np.abs(np.load(work / f"{side}.npy") - want).max()
            line |= {"largest_difference": float(off), "spread": float(np.ptp(want))}
            with Path(args.out).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            if not off <= CLOSE:
                raise SystemExit(f"scores of {side} are {off:.2g} off; at most {CLOSE:g} was meant")
    first, *others = lines
    for side, key in itertools.product(
        others, ("pairs_per_s", "pairs_per_cpu_s", "compiled_pairs_per_s", "peak_rss_mib")
    ):
        pairs = [(a[key], b[key]) for a, b in zip(lines[first], lines[side])]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{key:<21} {first} {statistics.median(a for a, _ in pairs):>9.2f}   "
            f"{side:<8} {statistics.median(b for _, b in pairs):>9.2f}   ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--count", type=int, default=10_000, help="pairs")
    parser.add_argument("--pairs", help="a file of pairs in place of synthetic ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--work", default="runs/benchmark_scoring")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, Path(given.work))
    else:
        main(given)
