"""Our GRPO beside Tunix's and TRL's, alternating, each in its own process.

Claim (docs/performance.md): on a CPU a step takes at most 0.5 of Tunix's wall time and at most 0.4
of TRL's. The time of a whole run, with all that it compiles, is reported beside it.

A step is a whole round of GRPO: G answers to each prompt are sampled, graded, compared within their
group, and learnt from in one update. All sides start from the same Hugging Face folder (Llama, 4
layers, width 256, MLP 1024, 8 heads on 4 key heads of 32, vocabulary 32000, float32) and the same
prompts of equal length, each used once. The tokenizer's end token is none of the model's, so every
answer has the longest length; each side counts what it sampled. The reward is a number made from
the characters of the answer, in the process of the run.

Temperature 1, no filter; advantages over the standard deviation of the group, one clipped update
(0.2), no divergence and so no reference model; mean over the tokens of an answer, then over
answers; AdamW at a constant 1e-5, gradients clipped at 1. All answers of a round are sampled at
once and learnt from in one piece, without accumulation. No side is told how many threads to take.
Settings of a side's own:

    ours    configs/online_rl/math with `data.batch` the prompts of a round, `remat` at its default
    tunix   its own sampler ("vanilla"), no remat (the default), a cache that just fits. It puts <s>
            before a prompt, so its prompts are one word shorter
    trl     generate() of transformers; no gradient checkpointing, which would only cost it time

    python -m venv PEERS/tunix && PEERS/tunix/bin/pip install google-tunix
    python -m venv PEERS/trl && PEERS/trl/bin/pip install torch==2.13.0
    PEERS/trl/bin/pip install trl       # after torch, or a build for GPUs comes with it
    python benchmarks/grpo.py --peers PEERS [--rounds 3] [--steps 8] [--prompts 1]

Each round runs every side once, with 2 steps to warm up and `--steps` timed ones. Appends one JSON
line per process to `--out`, also for one that failed, and prints medians and ratios. `total_s` is
all steps with what they compile; `process_s` also has imports and loading.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reward_model import SPECIAL, VOCAB, WARMUP, Marks, cpu, gemm, result

os.environ.setdefault("JAX_PLATFORMS", "cpu")
LR, DECAY, CLIP, EPSILON = 1e-5, 0.01, 1.0, 0.2
LIMIT = 3600  # seconds for one process
TARGETS = {"tunix": 0.5, "trl": 0.4}
MODEL = {"width": 256, "depth": 4, "heads": 8, "kv_heads": 4, "head_dim": 32, "mlp": 1024}


def prepare(work: Path, args):
    """Writes the model's folder, and `<work>/prompts.jsonl` with the prompts of all steps."""
    import jax
    import tokenizers
    import transformers

    from jaxreward.hub import export
    from jaxreward.models import decoder, families
    from jaxreward.parallel import specs as sp

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    special = [name for name in SPECIAL if name != "</s>"]
    words = [f"w{i}" for i in range(VOCAB - len(special))]
    # The last id is one more than the model has: no answer can end before its longest length.
    vocab = {word: i for i, word in enumerate([*special, *words, "</s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    source = work / "source"
    fast.save_pretrained(str(source))
    cfg = decoder.Config(vocab=VOCAB, **MODEL)
    raw = families.to_hf_config(cfg) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": VOCAB}
    (source / "config.json").write_text(json.dumps(raw))
    params = sp.init(decoder.specs(cfg), jax.random.key(0))
    export.write(work / "model", cfg, params, source=source, about="For a benchmark.")
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choice(words) for _ in range(args.prompt_len))}
        for _ in range((WARMUP + args.steps) * args.prompts)
    ]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts_of(work: Path) -> list[str]:
    """The prompts of all steps."""
    return [json.loads(line)["prompt"] for line in (work / "prompts.jsonl").open()]


def value(answer: str) -> float:
    """A reward that differs within a group and costs nothing."""
    return sum(map(ord, answer)) % 7 / 6


# The three sides


def reward(prompt, answer, record):
    """`value`, as our recipe calls it."""
    del prompt, record
    return {"value": value(answer)}


def ours(work: Path, args):
    """Steps the recipe by hand, and says where the time goes."""
    import jax

    from jaxreward import presets
    from jaxreward.recipes import online_rl

    count = WARMUP + args.steps
    settings = {
        "models.policy.init": f"hf:{work / 'model'}",
        "data.path": work / "prompts.jsonl",
        "data.template": "plain",
        "data.eval_fraction": 0.0,
        "data.max_len": args.prompt_len,
        "data.batch": args.prompts,
        "rollouts.prompts": args.prompts,
        "rollouts.answers": args.answers,
        "rollouts.max_new": args.max_new,
        "rollouts.outcome": "answer/value",
        "rollouts.filter": "none",
        "rollouts.reduction": "sequence",
        "rollouts.workers": 0,
        "rollouts.show": 0,
        "losses.policy.clip_low": EPSILON,
        "losses.policy.clip_high": EPSILON,
        "optim.lr": LR,
        "optim.decay": DECAY,
        "optim.clip": CLIP,
        "train.steps": count,
    }
    c = presets.load("online_rl/math", [f"{key}={value}" for key, value in settings.items()])
    with c.unlocked():
        c.rewards = dict(answer=dict(fn="__main__:reward", weights=dict(value=1.0)))
    built = online_rl.build(c, work / "run")
    marks, state, parts, tokens, efficiency = Marks(), built.state, [], [], []
    marks.mark()
    for _ in range(count):
        built.before(state)
        batch = built.to_device(next(built.batches))
        state, metrics = built.step(state, built.frozen, batch)
        jax.block_until_ready((state, metrics))
        marks.mark()
        seen = built.batches.metrics
        parts.append([seen[f"seconds/{name}"] for name in ("sample", "reward", "prepare")])
        parts[-1].append(marks.seconds[-1][0] - sum(parts[-1]))
        tokens.append(seen["length"] * args.prompts * args.answers)
        efficiency.append(seen["efficiency"])
    medians = [round(statistics.median(x), 3) for x in zip(*parts[WARMUP:])]
    result(
        marks,
        tokens_a_step=round(statistics.mean(tokens)),
        parts_s=dict(zip(("sample", "reward", "prepare", "update"), medians)),
        efficiency=round(statistics.mean(efficiency), 3),
        versions={"jax": jax.__version__},
    )


def tunix(work: Path, args):
    """Its learner at its defaults, with the batch of a round in one piece."""
    import importlib.metadata

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import transformers
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    count, words = WARMUP + args.steps, []
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
    cfg = llama.ModelConfig(
        vocab_size=VOCAB,
        embed_dim=MODEL["width"],
        num_layers=MODEL["depth"],
        num_heads=MODEL["heads"],
        num_kv_heads=MODEL["kv_heads"],
        head_dim=MODEL["head_dim"],
        hidden_dim=MODEL["mlp"],
        norm_eps=1e-5,
        rope_theta=10_000,
        weight_tying=False,
    )
    actor = llama_params.create_model_from_safe_tensors(str(work / "model"), cfg, mesh)
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(actor))}
    if dtypes != {jnp.dtype("float32")}:
        raise ValueError(f"expected float32 weights; Tunix loaded {dtypes}")
    cluster_config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(
                optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY)
            ),
            eval_every_n_steps=10 * count,
            max_steps=count,
            mini_batch_size=args.prompts,
            train_micro_batch_size=args.prompts,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=args.max_new,
            max_prompt_length=args.prompt_len,
            kv_cache_size=args.prompt_len + args.max_new + 8,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
        ),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(work / "model"))
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=actor, tokenizer=tokenizer, cluster_config=cluster_config
        )

    def graded(prompts, completions, **_):
        words.append(sum(len(answer.split()) for answer in completions))
        return [value(answer) for answer in completions]

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=args.answers, num_iterations=1, beta=0.0, epsilon=EPSILON
        ),
        reward_fns=graded,
    )
    marks = Marks()

    def batches():
        # The learner asks for a batch where a step begins.
        texts = [text.split(" ", 1)[1] for text in prompts_of(work)]
        for i in range(0, len(texts), args.prompts):
            marks.mark()
            yield {"prompts": np.array(texts[i : i + args.prompts])}

    with mesh:
        learner.train(batches())
        jax.block_until_ready(nnx.state(actor))
    marks.mark()
    result(
        marks,
        tokens_a_step=round(statistics.mean(words)),
        versions={
            name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")
        },
    )


def trl(work: Path, args):
    """The trainer at its defaults, but for float32, the processor and no files."""
    import torch
    import transformers
    import trl as peer
    from datasets import Dataset

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(work / "model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(work / "model"), dtype=torch.float32
    )
    marks, words = Marks(), []

    class Timer(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.mark()

        def on_step_end(self, *_, **__):
            marks.mark()

    def graded(completion_ids, completions, **_):
        words.append(sum(map(len, completion_ids)))
        return [value(answer) for answer in completions]

    trainer = peer.GRPOTrainer(
        model=model,
        reward_funcs=graded,
        args=peer.GRPOConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=args.prompts * args.answers,
            num_generations=args.answers,
            max_completion_length=args.max_new,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            epsilon=EPSILON,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            max_steps=WARMUP + args.steps,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=10_000,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts_of(work)]),
        processing_class=tokenizer,
        callbacks=[Timer()],
    )
    trainer.train()
    result(
        marks,
        tokens_a_step=round(statistics.mean(words)),
        versions={
            "trl": peer.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


# Rounds

SIDES = {"ours": ours, "tunix": tunix, "trl": trl}


def one(side: str, python: str, work: Path, args) -> dict | None:
    """Runs a worker and appends its line; None if the worker failed, which is said."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXREWARD_COMPILE_CACHE": "0"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"WANDB_MODE": "disabled"}
    speed, load = gemm(), round(os.getloadavg()[0], 1)
    command = [python, __file__, "--worker", side, "--work", str(work)]
    for name in ("steps", "prompts", "answers", "prompt_len", "max_new"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    began = time.perf_counter()
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
        out, errors, code = run.stdout, run.stderr, run.returncode
    except subprocess.TimeoutExpired:
        out, errors, code = "", f"not done after {LIMIT} seconds", None
    except OSError as error:
        out, errors, code = "", str(error), None
    took = time.perf_counter() - began
    found = [x for x in out.splitlines() if x.startswith("RESULT ")]
    sizes = ("prompts", "answers", "prompt_len", "max_new")
    line = {"benchmark": "grpo", "side": side, **{name: getattr(args, name) for name in sizes}}
    failed = code != 0 or not found
    if failed:
        last = (errors.strip() or out.strip() or "nothing was printed").splitlines()[-1]
        line["failed"] = f"exit {code}: {last}"[:300]
        print(f"{side} FAILED:\n{out[-2000:]}\n{errors[-4000:]}", file=sys.stderr)
    else:
        facts = json.loads(found[-1].removeprefix("RESULT "))
        seconds = facts.pop("seconds")
        kept = seconds[WARMUP:]
        line |= {
            "steps": len(seconds),
            "process_s": round(took, 2),
            "total_s": round(sum(w for w, _ in seconds), 2),
            "total_cpu_s": round(sum(c for _, c in seconds), 2),
            "warmup_s": [round(w, 2) for w, _ in seconds[:WARMUP]],
            "step_median_s": round(statistics.median(w for w, _ in kept), 3),
            "step_min_s": round(min(w for w, _ in kept), 3),
            "step_cpu_median_s": round(statistics.median(c for _, c in kept), 3),
            **facts,
        }
    line |= {
        "gemm_gflops": speed,
        "load": load,
        "machine": f"{os.cpu_count()} x {cpu()}",
        "python": platform.python_version(),
        "date": str(datetime.date.today()),
    }
    with Path(args.out).open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return None if failed else line


def compare(lines: dict[str, list]):
    """Prints medians, and our ratio to each peer over the rounds in which both ran to the end."""
    for peer in TARGETS:
        pairs = [(a, b) for a, b in zip(lines["ours"], lines.get(peer, [])) if a and b]
        if not pairs:
            continue
        print(f"ours beside {peer}, {len(pairs)} rounds; target of step_median_s {TARGETS[peer]}")
        sampled = [[x["tokens_a_step"] for x in side] for side in zip(*pairs)]
        if max(map(max, sampled)) > 1.01 * min(map(min, sampled)):
            print(f"  NOT THE SAME WORK: tokens a step {sampled[0]} and {sampled[1]}")
        for key in ("step_median_s", "step_min_s", "step_cpu_median_s", "total_s", "total_cpu_s",
                    "process_s", "peak_rss_mib"):  # fmt: skip
            values = [(a[key], b[key]) for a, b in pairs]
            ratios = sorted(a / b for a, b in values)
            print(
                f"  {key:<18} ours {statistics.median(a for a, _ in values):>9.2f}   "
                f"{peer} {statistics.median(b for _, b in values):>9.2f}   ratio "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


def main(args):
    """Alternates the sides, then compares round by round."""
    work = Path(args.work).resolve()
    prepare(work, args)
    sides = {"ours": sys.executable}
    if args.peers:
        sides |= {name: str(Path(args.peers).resolve() / name / "bin/python") for name in TARGETS}
    else:
        print("no --peers: only our side runs")
    lines = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, python in sides.items():
            lines[side].append(one(side, python, work, args))
    compare(lines)
    failed = {side: found.count(None) for side, found in lines.items() if None in found}
    if failed:
        sys.exit("failed: " + ", ".join(f"{side} {n} times" for side, n in failed.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="folder with tunix/bin/python and trl/bin/python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two to warm up")
    parser.add_argument("--prompts", type=int, default=1, help="of a step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt-len", type=int, default=384, help="tokens of every prompt")
    parser.add_argument("--max-new", type=int, default=128, help="tokens of every answer")
    parser.add_argument("--work", default="runs/benchmark_grpo")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < 1 or given.answers < 2:
        parser.error("expected --steps of at least 1 and --answers of at least 2")
    if given.worker:
        SIDES[given.worker](Path(given.work), given)
    else:
        main(given)
