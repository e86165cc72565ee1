"""Our sampler beside `transformers.generate`, alternating, each in its own process.

Claim (docs/performance.md): on a CPU, at batch 32 and lengths with a long tail, useful tokens come
at least twice as fast.

Both sides sample one answer to every prompt at temperature 1 from the same Hugging Face folder, in
float32; ours refills 32 slots, theirs takes the prompts 32 at a time. Counted are tokens up to and
including the end of each answer. Random numbers differ, so answers do too: compare the rates.

    tiny      a random Llama, 4 layers, width 256, vocabulary 32000, 1 in 50 of which is an end;
              prompts of 16 to 64 tokens, at most 256 new ones
    smollm2   SmolLM2-135M-Instruct answers short questions, at most 256 new tokens

    python benchmarks/sampler.py --task tiny [--rounds 3] [--prompts 256]

Appends one JSON line per process to `--out` and prints medians and ratios.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from reward_model import clock, cpu, gemm

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SLOTS, MAX_NEW = 32, 256
ASKS = (
    "What is {}?",
    "Give one example of {}.",
    "Why does {} matter?",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "List three facts about {}.",
    "What is the opposite of {}?",
    "Write a haiku on {}.",
)
TOPICS = (
    *("rain", "bread", "gravity", "a bicycle", "the sea", "a library", "sleep", "money"),
    *("a volcano", "music", "the moon", "a bridge", "paper", "a bee", "winter", "salt"),
    *("a promise", "glass", "chess", "the heart", "a market", "iron", "tea", "a map"),
    *("wind", "a clock", "soil", "laughter", "a mirror", "numbers", "silk", "fire"),
)


def prepare(work: Path, task: str, prompts: int):
    """Writes a model folder and the prompts as tokens, with the ids that end an answer."""
    import numpy as np

    from jaxreward.data import tokenize
    from jaxreward.hub import gguf
    from jaxreward.models import decoder, families

    model = work / "model"
    if task == "smollm2":
        if not model.exists():
            gguf.import_smollm2(model)
        tokenizer = tokenize.load_tokenizer(model)
        texts = [ask.format(topic) for topic, ask in itertools.product(TOPICS, ASKS)]
        # Neighbours ask for different things, so that short and long answers meet.
        chosen = [
            tokenize.encode_conversation(tokenizer, texts[i % len(texts)]).tokens
            for i in range(prompts)
        ]
        stop = sorted(tokenizer.eos_ids)
    else:
        import torch
        import transformers

        cfg = decoder.Config(
            vocab=32_000, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, mlp=1024
        )
        raw = families.to_hf_config(cfg) | {"eos_token_id": 2, "pad_token_id": 0}
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(model)
        rng = np.random.default_rng(0)
        chosen = [rng.integers(3, 32_000, n).tolist() for n in rng.integers(16, 65, prompts)]
        stop = list(range(640))
    (work / "prompts.json").write_text(json.dumps({"prompts": chosen, "stop": stop}))


def ours(work: Path):
    """One call for all prompts; compiled by a call before it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxreward.hub import load
    from jaxreward.sampling import autoregressive
    from jaxreward.sampling.choose import Temperature

    given = json.loads((work / "prompts.json").read_text())
    cfg, params, _ = load.load(work / "model")
    tokens, mask = autoregressive.padded(given["prompts"], rows=len(given["prompts"]))

    def run(seed):
        out = autoregressive.sample(
            params,
            cfg,
            tokens,
            mask,
            jax.random.split(jax.random.key(seed), len(tokens)),
            max_new=MAX_NEW,
            choose=Temperature(1.0),
            stop=jnp.asarray(given["stop"], jnp.int32),
            slots=SLOTS,
        )
        return jax.block_until_ready(out)

    run(0)
    with clock() as taken:
        out = run(1)
    lengths = np.asarray(out.length).tolist()
    return taken, lengths, int(out.steps), {"jax": jax.__version__}


def theirs(work: Path):
    """`generate` in batches of 32, padded on the left; warmed up by a short one."""
    import torch
    import transformers

    given = json.loads((work / "prompts.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    model = model.eval()
    stop = set(given["stop"])
    torch.manual_seed(1)

    def run(prompts, max_new):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new,
                eos_token_id=given["stop"],
                pad_token_id=0,
            )
        answers = out[:, width:].tolist()
        ends = [next((i + 1 for i, t in enumerate(a) if t in stop), len(a)) for a in answers]
        return ends, len(answers[0])

    run(given["prompts"][:SLOTS], 4)
    lengths, steps = [], 0
    with clock() as taken:
        for first in range(0, len(given["prompts"]), SLOTS):
            ends, turns = run(given["prompts"][first : first + SLOTS], MAX_NEW)
            lengths += ends
            steps += turns
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return taken, lengths, steps, versions


def worker(side: str, work: Path):
    """Runs one side and prints what it took."""
    taken, lengths, steps, versions = {"ours": ours, "theirs": theirs}[side](work)
    useful = sum(lengths)
    facts = {
        "answers": len(lengths),
        "tokens": useful,
        "median_length": statistics.median(lengths),
        "longest": max(lengths),
        "steps": steps,
        "utilisation": round(useful / (SLOTS * steps), 3),
        "wall_s": round(taken.wall, 2),
        "cpu_s": round(taken.cpu, 2),
        "tokens_per_s": round(useful / taken.wall, 1),
        "tokens_per_cpu_s": round(useful / taken.cpu, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "versions": versions,
    }
    print("RESULT " + json.dumps(facts))


def one(side: str, work: Path, args) -> dict:
    """Starts a worker and returns its line."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    speed = gemm()
    command = [sys.executable, __file__, "--worker", side, "--work", str(work)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
    if run.returncode or not found:
        raise SystemExit(f"{side} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    line = {
        "benchmark": "sampler",
        "task": args.task,
        "side": side,
        **json.loads(found[0].removeprefix("RESULT ")),
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


def main(args):
    """Alternates the sides, then compares round by round."""
    work = Path(args.work).resolve() / args.task
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, args.task, args.prompts)
    lines = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        for side in lines:
            lines[side].append(one(side, work, args))
    for key in ("tokens_per_s", "tokens_per_cpu_s", "utilisation"):
        pairs = [(a[key], b[key]) for a, b in zip(lines["ours"], lines["theirs"])]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{key:<18} ours {statistics.median(a for a, _ in pairs):>9.2f}   "
            f"transformers {statistics.median(b for _, b in pairs):>9.2f}   ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--work", default="runs/benchmark_sampler")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, Path(given.work))
    else:
        main(given)
