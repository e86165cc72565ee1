"""Our reward-model training beside TRL's `RewardTrainer`, alternating, each in its own process.

Claims (docs/performance.md): on a CPU a step on unpadded rows takes no longer than TRL's, and an
epoch over pairs of many lengths that share prompts takes at most 0.6 of its time.

Both sides start from the same Hugging Face folder (Llama, 4 layers, width 256, MLP 1024, 8 heads
on 4 key heads of 32, vocabulary 32000, float32) and the same text; AdamW, gradients clipped at 1.

    unpadded   8 pairs = 16 texts of 512 tokens a step, no shared prompt
    epoch      all pairs of a file, about 8 pairs a step; TRL pads 8 pairs to their longest

    pip install torch==2.13.0 && pip install trl        # in a fresh environment
    python benchmarks/reward_model.py --trl-python ENV/bin/python --pairs pairs.jsonl

Appends one JSON line per process to `--out` and prints medians and ratios.
"""

import argparse
import datetime
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
VOCAB, PAIRS, LENGTH, MAX_LEN = 32_000, 8, 512, 1024
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WARMUP = 2


class clock:
    """Wall and processor seconds of a block."""

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        ended = time.perf_counter(), time.process_time()
        self.wall, self.cpu = (b - a for a, b in zip(self.began, ended))


class Marks:
    """Wall and processor seconds between successive calls."""

    def __init__(self):
        self.seconds, self.last = [], None

    def mark(self):
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.seconds.append([b - a for a, b in zip(self.last, now)])
        self.last = now


def result(marks, **facts):
    """What a worker prints."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"seconds": marks.seconds, "peak_rss_mib": round(peak), **facts}))


# The data and the model, made once


def prepare(work: Path, task: str, pairs: str | None, steps: int):
    """Writes `<work>/pairs.jsonl` and a model folder with a tokenizer that knows its words."""
    import jax
    import tokenizers
    import transformers

    from jaxreward.data import sources
    from jaxreward.data.corpora import hh_rlhf
    from jaxreward.hub import export
    from jaxreward.models import decoder, families
    from jaxreward.parallel import specs as sp

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    words = [f"w{i}" for i in range(VOCAB)]
    if task == "unpadded":
        rng = random.Random(0)
        # One word of prompt, another in every pair, and the end token that both sides append.
        text = lambda: "".join(" " + rng.choice(words[: VOCAB - 4]) for _ in range(LENGTH - 2))
        rows = [
            {"prompt": words[i], "chosen": text(), "rejected": text()}
            for i in range(PAIRS * (WARMUP + steps))
        ]
    else:
        rows = []
        for record in sources.read_pairs(pairs, on_bad="skip")[0]:
            plain = lambda x, **kw: x if isinstance(x, str) else hh_rlhf.to_text(x, **kw)
            head = plain(record["prompt"], add_generation_prompt=True)
            ends = {side: record[side] for side in ("chosen", "rejected")}
            if not isinstance(ends["chosen"], str):
                ends = {side: " " + value[0]["content"] for side, value in ends.items()}
            rows.append({"prompt": head, **ends})
        seen = dict.fromkeys(word for row in rows for text in row.values() for word in text.split())
        words = [*seen, *words]
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words][:VOCAB])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(work / "source"))
    cfg = decoder.Config(
        vocab=VOCAB, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, mlp=1024
    )
    raw = families.to_hf_config(cfg) | {"eos_token_id": 2, "pad_token_id": 0}
    (work / "source" / "config.json").write_text(json.dumps(raw))
    params = sp.init(decoder.specs(cfg), jax.random.key(0))
    export.write(work / "model", cfg, params, source=work / "source", about="For a benchmark.")
    # What does not fit TRL drops without a word; left out here for both sides.
    length = lambda row, side: len((row["prompt"] + row[side]).split()) + 1
    rows = [r for r in rows if max(length(r, s) for s in ("chosen", "rejected")) <= MAX_LEN]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# The two sides


def build(work: Path, task: str):
    """The recipe's step and data, and the config."""
    from jaxreward import presets
    from jaxreward.recipes import preference

    c = presets.load("reward_model/bradley_terry")
    c.models.policy.init = f"hf:{work / 'model'}"
    c.models.policy.train = "all"
    c.data.path = str(work / "pairs.jsonl")
    c.data.template = "plain"
    c.data.eval_fraction = 0.0
    c.data.max_len = MAX_LEN
    c.optim.lr = 1e-5
    if task == "unpadded":
        c.data.row_len, c.data.batch = 2 * LENGTH, PAIRS
    else:
        c.data.batch = 2
    return preference.build(c, work / "run"), c


def ours(work: Path, task: str, steps: int):
    """Steps the recipe by hand."""
    import jax

    built, c = build(work, task)
    facts, marks, state = built.facts, Marks(), built.state
    count = WARMUP + steps if task == "unpadded" else built.steps
    marks.mark()
    for _ in range(count):
        state, metrics = built.step(state, built.frozen, built.to_device(next(built.batches)))
        jax.block_until_ready(metrics)
        marks.mark()
    rows = facts["rows"]["length"] * c.data.batch
    result(
        marks,
        slots_a_step=rows,
        efficiency=facts["rows"]["efficiency"],
        pairs_a_step=round(facts["data"]["pairs"] / built.steps, 2),
        versions={"jax": jax.__version__},
    )


def profile(work: Path, task: str, steps: int):
    """Where the time of our step goes: seconds by part of the model and kind of operation."""
    import gzip
    import re

    import jax

    built, _ = build(work, task)
    state, batch = built.state, built.to_device(next(built.batches))
    compiled = built.step.lower(state, built.frozen, batch).compile().as_text()
    scopes = dict(
        re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', compiled, re.MULTILINE)
    )
    for _ in range(WARMUP):
        state, metrics = built.step(state, built.frozen, batch)
        jax.block_until_ready(metrics)
    with jax.profiler.trace(str(work / "trace")):
        began = time.perf_counter()
        state, metrics = built.step(state, built.frozen, batch)
        jax.block_until_ready(metrics)
        wall = time.perf_counter() - began
    newest = max((work / "trace").rglob("*.trace.json.gz"), key=lambda x: x.stat().st_mtime)
    spent = {}
    for event in json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]:
        name = event.get("name", "")
        # A branch, a loop and a call contain what they run.
        if "hlo_op" not in event.get("args", {}) or re.match("cond|while|call", name):
            continue
        scope = scopes.get(name, "")
        part = "other"
        if "branch_1_fun" in scope:
            part = "attention tiles"
        elif "mlp" in scope:
            part = "mlp"
        elif "attention" in scope or "closed_call" in scope:
            part = "projections, norms, slices"
        product = scope.endswith("dot_general")
        key = part, "products" if product else "elementwise and copies"
        spent[key] = spent.get(key, 0) + event["dur"] / 1e6
    line = {
        "benchmark": "reward_model",
        "task": f"{task}, profile",
        "step_s": round(wall, 2),
        **{f"{part}: {kind}": round(v, 2) for (part, kind), v in sorted(spent.items())},
        "gemm_gflops": gemm(),
        "machine": f"{os.cpu_count()} x {cpu()}",
        "date": str(datetime.date.today()),
    }
    print(json.dumps(line, indent=1))
    return line


def trl(work: Path, task: str, steps: int):
    """The trainer at its defaults, but for float32, the processor and no files."""
    import torch
    import transformers
    import trl as peer
    from datasets import Dataset

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(work / "model"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(work / "model"), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]
    marks = Marks()

    class Timer(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.mark()

        def on_step_end(self, *_, **__):
            marks.mark()

    trainer = peer.RewardTrainer(
        model=model,
        args=peer.RewardConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=PAIRS,
            max_length=MAX_LEN,
            learning_rate=1e-5,
            max_steps=WARMUP + steps if task == "unpadded" else -1,
            num_train_epochs=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=10_000,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timer()],
    )
    sizes = [tuple(b["input_ids"].shape) for b in trainer.get_train_dataloader()]
    trainer.train()
    result(
        marks,
        slots_a_step=round(statistics.mean(b * t for b, t in sizes)),
        pairs_a_step=round(statistics.mean(b / 2 for b, _ in sizes), 2),
        versions={"trl": peer.__version__, "torch": torch.__version__},
    )


# Rounds


def gemm() -> float:
    """GFLOP/s of a float32 product right now: how busy the machine is."""
    import numpy as np

    a, b = np.ones((2048, 1024), "f"), np.ones((1024, 1024), "f")
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return round(2 * 2048 * 1024 * 1024 / best / 1e9)


def one(side, python, work, args):
    """Runs a worker and returns its line."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXREWARD_COMPILE_CACHE": "0"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    speed = gemm()
    command = [python, __file__, "--worker", side, "--work", str(work), "--task", args.task]
    run = subprocess.run(
        [*command, "--steps", str(args.steps)], env=env, capture_output=True, text=True
    )
    found = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
    if run.returncode or not found:
        raise SystemExit(f"{side} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    line = json.loads(found[0].removeprefix("RESULT "))
    seconds = line.pop("seconds")
    kept = seconds[WARMUP:]
    line = {
        "benchmark": "reward_model",
        "task": args.task,
        "side": side,
        "steps": len(seconds),
        "total_s": round(sum(w for w, _ in seconds), 2),
        "total_cpu_s": round(sum(c for _, c in seconds), 2),
        "first_step_s": round(seconds[0][0], 2),
        "step_median_s": round(statistics.median(w for w, _ in kept), 3),
        "step_min_s": round(min(w for w, _ in kept), 3),
        "step_cpu_median_s": round(statistics.median(c for _, c in kept), 3),
        **line,
        "gemm_gflops": speed,
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{os.cpu_count()} x {cpu()}",
        "python": platform.python_version(),
        "date": str(datetime.date.today()),
    }
    with Path(args.out).open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown")


def main(args):
    """Alternates the sides, then compares round by round."""
    work = Path(args.work).resolve() / args.task
    prepare(work, args.task, args.pairs, args.steps)
    if args.profile:
        line = profile(work, args.task, args.steps)
        with Path(args.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return
    sides = {"ours": sys.executable}
    if args.trl_python:
        sides["trl"] = args.trl_python
    else:
        print("no --trl-python: only our side runs")
    lines = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, python in sides.items():
            lines[side].append(one(side, python, work, args))
    if "trl" not in lines:
        return
    for key in ("step_median_s", "step_min_s", "step_cpu_median_s", "total_s", "total_cpu_s",
                "peak_rss_mib"):  # fmt: skip
        pairs = [(a[key], b[key]) for a, b in zip(lines["ours"], lines["trl"])]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{key:<20} ours {statistics.median(a for a, _ in pairs):>9.2f}   "
            f"trl {statistics.median(b for _, b in pairs):>9.2f}   ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("unpadded", "epoch"), default="unpadded")
    parser.add_argument("--pairs", help="JSON lines with prompt, chosen, rejected; for epoch")
    parser.add_argument("--trl-python", help="a Python that has trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of unpadded")
    parser.add_argument("--profile", action="store_true", help="our side alone, taken apart")
    parser.add_argument("--work", default="runs/benchmark")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        {"ours": ours, "trl": trl}[given.worker](Path(given.work), given.task, given.steps)
    else:
        if given.task == "epoch" and not given.pairs:
            parser.error("--task epoch needs --pairs FILE")
        main(given)
