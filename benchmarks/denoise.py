"""Our sampler of denoisers beside a loop in torch, alternating in one process; same weights.

Claims (docs/performance.md): the exact sampler beside LLaDA's loop in torch; what the two
approximations, a threshold and a cache, save beside the exact sampler, and how far they agree.

Both sides fill the canvas as LLaDA does, semi-autoregressively by low confidence: in each step a
candidate for every open position of the block, of which the likeliest are kept. The torch side is
transformers' model under full attention: a whole batch at once, `inference_mode`, SDPA (without a
mask where nothing is padded), no cache of keys, float32, a thread a core:

    torch         as LLaDA's generate.py: logits and softmax of the whole canvas
    torch_tuned   the head on the block alone, as ours; what one would write for speed
    ours          `sampling.denoise`, exact
    threshold     ours, a step commits all of at least --threshold (0.9)
    dual          ours, keys and values of all but the block are kept within a block
    both

Two things differ from generate.py, on both sides: the mask is no candidate (random weights would
choose it), and Gumbel noise is added to logits in float32, which the original multiplies in
float64, slower. torch.compile was not tried. First all exact sides must give the same tokens.

    tiny      a random Llama, 4 layers, width 256, vocabulary 32000
    smollm2   a random Llama of the shape of SmolLM2-135M
    toy       only shows that the script runs

    python benchmarks/denoise.py [--sizes tiny,smollm2] [--batch 8] [--length 128] [--steps 64]
    python benchmarks/denoise.py --model FOLDER --prompts FILE

Random weights are never sure of anything: of the fast modes only the cost of a pass is reported.
`--model` takes a trained denoiser, and then agreement (the share of tokens that are those of the
exact sampler) and the time of an answer are too. FILE has one {"prompt": text} a line; the first
`--batch` are taken. Appends a JSON line per model, temperature and side to `--out` and prints them;
`first_s` has the compilation.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from reward_model import cpu, gemm

os.environ.setdefault("JAX_PLATFORMS", "cpu")
PAUSE = 0.5
SHAPES = {
    "toy": dict(vocab=64, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=64),
    "tiny": dict(
        vocab=32_000, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, mlp=1024
    ),
    "smollm2": dict(
        vocab=49_152,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        rope_theta=1e5,
        tied=True,
        max_len=8192,
    ),
}  # fmt: skip
EXACT, FAST = ("torch", "torch_tuned", "ours"), ("threshold", "dual", "both")


# Models and prompts


def random_denoiser(size: str):
    """(config, parameters): the last token of the vocabulary is the mask.

    Weights have a standard deviation of 1 / sqrt(width). With the usual 0.02 attention would be
    even, all masked positions nearly alike, and which is the most confident a matter of rounding.
    """
    import jax

    from jaxreward.models import decoder, families
    from jaxreward.parallel import specs as sp

    shape = SHAPES[size]
    cfg = families.as_denoiser(
        decoder.Config(**shape), mask_id=shape["vocab"] - 1, predict_offset=0
    )
    wide = lambda p: dataclasses.replace(p, scale=cfg.width**-0.5)
    specs = jax.tree.map(wide, decoder.specs(cfg), is_leaf=lambda x: isinstance(x, sp.Param))
    return cfg, sp.init(specs, jax.random.key(0))


def torch_model(cfg, params):
    """transformers' model with these weights, through a folder, seeing the whole text."""
    import torch
    import transformers

    from jaxreward.hub import export
    from jaxreward.models import families

    twins = {"llada": "llama", "Dream": "qwen2"}
    causal = dict(mask="causal", block=0, predict_offset=1, mask_id=-1)
    twin = dataclasses.replace(cfg, family=twins.get(cfg.family, cfg.family), **causal)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(families.to_hf_config(twin)))
        written = export.write(Path(folder) / "model", twin, params, source=source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            written, dtype=torch.float32, attn_implementation="sdpa"
        )
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model.eval()


def prompts_of(args, cfg):
    """(tokens, mask), padded on the left: those of `--prompts`, or random ones of equal length."""
    import numpy as np

    from jaxreward.data import tokenize
    from jaxreward.sampling import autoregressive

    if not args.model:
        drawn = np.random.default_rng(0).integers(3, cfg.vocab - 1, (args.batch, args.prompt_len))
        return autoregressive.padded(list(drawn), rows=args.batch, length=args.prompt_len)
    tokenizer = tokenize.load_tokenizer(args.model)
    with Path(args.prompts).open() as file:
        texts = [json.loads(line)["prompt"] for line in file][: args.batch]
    if len(texts) < args.batch:
        raise SystemExit(f"{args.prompts} has {len(texts)} prompts; --batch asks for {args.batch}")
    template = tokenize.chosen_template(tokenizer, args.template)
    encode = lambda text: tokenize.encode_conversation(tokenizer, text, template=template)
    found = [encode(text).tokens for text in texts]
    return autoregressive.padded(found, rows=args.batch, length=max(map(len, found)))


# The two sides: each returns a function of a seed to (answers [B, L], passes, whole passes)


def torch_side(model, cfg, tokens, mask, schedule, temperature, tuned):
    """LLaDA's loop. `tuned` takes logits of the block alone."""
    import torch

    (B, P), L, K, hidden = tokens.shape, schedule.length, schedule.size, cfg.mask_id
    prompts = torch.tensor(tokens, dtype=torch.long)
    how = {"use_cache": False}
    if not mask.all():
        seen = torch.cat([torch.tensor(mask), torch.ones(B, L, dtype=torch.bool)], dim=1)
        how["attention_mask"] = seen[:, None, None]
        how["position_ids"] = (seen.cumsum(dim=1) - 1).clamp(min=0)

    def logits_of(canvas, first):
        if tuned:
            begin = first - cfg.predict_offset
            states = model.model(canvas, **how).last_hidden_state
            return model.lm_head(states[:, begin : begin + K])
        logits = model(canvas, **how).logits
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if cfg.predict_offset else logits

    @torch.inference_mode()
    def run(seed):
        torch.manual_seed(seed)
        canvas = torch.full((B, P + L), hidden)
        canvas[:, :P] = prompts
        for first in range(P, P + L, K):
            # The slots that candidates are drawn for; a view, which commits write through.
            slots = canvas[:, first : first + K] if tuned else canvas
            for turn in range(schedule.turns):
                logits = logits_of(canvas, first)
                logits[..., hidden] = -torch.inf
                drawn = logits
                if temperature:
                    noise = torch.empty_like(logits).exponential_().log_()
                    drawn = torch.sub(logits, noise, alpha=temperature)
                token = drawn.argmax(dim=-1)
                picked = lambda x: x.gather(-1, token[..., None])[..., 0]
                if tuned:
                    confidence = (picked(logits) - logits.logsumexp(dim=-1)).exp()
                else:
                    confidence = picked(logits.softmax(dim=-1))
                    confidence[:, first + K :] = -torch.inf
                confidence = confidence.masked_fill(slots != hidden, -torch.inf)
                count = K // schedule.turns + (turn < K % schedule.turns)
                best = confidence.topk(count, dim=1).indices
                slots.scatter_(1, best, token.gather(1, best))
        return canvas[:, P:].numpy(), schedule.steps, schedule.steps

    return run


def our_side(params, cfg, tokens, mask, schedule):
    """`denoise.sample`."""
    import jax
    import numpy as np

    from jaxreward.sampling import denoise

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), len(tokens))
        got = denoise.sample(params, cfg, tokens, mask, keys, schedule=schedule)
        answers = np.asarray(got.tokens[:, tokens.shape[1] :])
        return answers, int(got.step), int(got.whole)

    return run


def sides_of(params, cfg, tokens, mask, args) -> dict:
    """{(temperature, side): function of a seed}; the fast modes are greedy."""
    from jaxreward.sampling import denoise

    model, found = torch_model(cfg, params), {}
    for temperature in (0.0, args.temperature):
        exact = denoise.llada(args.length, args.steps, block=args.block, temperature=temperature)
        peer = lambda tuned: torch_side(model, cfg, tokens, mask, exact, temperature, tuned)
        found[temperature, "torch"] = peer(False)
        found[temperature, "torch_tuned"] = peer(True)
        found[temperature, "ours"] = our_side(params, cfg, tokens, mask, exact)
        if temperature == 0:
            changes = (dict(threshold=args.threshold), dict(cache="dual"))
            for side, change in zip(FAST, (*changes, changes[0] | changes[1])):
                schedule = dataclasses.replace(exact, **change)
                found[temperature, side] = our_side(params, cfg, tokens, mask, schedule)
    return found


# Measuring


def timed(run, seed):
    """(seconds, what `run` returned)."""
    began = time.perf_counter()
    out = run(seed)
    return time.perf_counter() - began, out


def check(name: str, out: dict):
    """Stops unless the exact sides gave the same tokens greedily."""
    want = out[0.0, "ours"][0]
    for side in EXACT:
        differ = int((out[0.0, side][0] != want).sum())
        if differ:
            raise SystemExit(
                f"{name}: {differ} of {want.size} greedy tokens of {side} are not those of ours; "
                "nothing was timed. Where a model hardly prefers one token to another, rounding "
                "decides: try other prompts, or a model that is surer"
            )
    print(f"{name}: {', '.join(EXACT)} give the same {want.size} greedy tokens", flush=True)


def measure(name: str, cfg, params, args):
    """Runs every side once, compares, times them in turn, and writes a line for each."""
    import jax
    import torch
    import transformers

    tokens, mask = prompts_of(args, cfg)
    sides = sides_of(params, cfg, tokens, mask, args)
    first, out = {}, {}
    # The exact greedy sides stand first, so that nothing else is run where they differ.
    for key in sides:
        if len(first) == len(EXACT):
            check(name, out)
            if not args.repeats:
                return
        first[key], out[key] = timed(sides[key], 0)
    speed, load = gemm(), round(os.getloadavg()[0], 1)
    seconds = {key: [] for key in sides}
    for turn in range(args.repeats):
        for key, run in sides.items():
            # Threads of the side before spin for a while.
            time.sleep(PAUSE)
            took, out[key] = timed(run, 1 + turn)
            seconds[key].append(took)
    for (temperature, side), took in seconds.items():
        answers, passes, whole = out[temperature, side]
        meaningful = bool(args.model) or side not in FAST
        line = {
            "benchmark": "denoise",
            "model": name,
            "side": side,
            "temperature": temperature,
            **{key: getattr(args, key) for key in ("batch", "length", "steps", "block")},
            "prompt": tokens.shape[1],
            **({"threshold": args.threshold} if side in ("threshold", "both") else {}),
            "padded": not bool(mask.all()),
            "first_s": round(first[temperature, side], 3),
            "passes": passes,
            "whole": whole,
            "pass_median_s": round(statistics.median(took) / passes, 5),
        }
        if meaningful:
            peers = {peer: seconds[temperature, peer] for peer in EXACT}
            line |= {
                "tokens_a_pass": round(args.length / passes, 2),
                "median_s": round(statistics.median(took), 3),
                "seconds": [round(x, 3) for x in took],
                "ratios": {
                    peer: round(statistics.median(a / b for a, b in zip(took, theirs)), 3)
                    for peer, theirs in peers.items()
                    if peer != side
                },
            }
        if meaningful and temperature == 0:
            line["agreement"] = round(float((answers == out[0.0, "ours"][0]).mean()), 4)
        line |= {
            "gemm_gflops": speed,
            "load": load,
            "versions": {x.__name__: x.__version__ for x in (jax, torch, transformers)},
            "machine": f"{os.cpu_count()} x {cpu()}",
            "python": platform.python_version(),
            "date": str(datetime.date.today()),
        }
        with Path(args.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def main(args):
    """The models of `--sizes`, or that of `--model`."""
    import torch

    from jaxreward.hub import load

    torch.set_num_threads(os.cpu_count())
    if args.model:
        cfg, params, _ = load.load(args.model)
        if cfg.mask != "full":
            raise SystemExit(f"{args.model} has mask={cfg.mask!r}; expected a denoiser with 'full'")
        return measure(Path(args.model).name, cfg, params, args)
    for size in args.sizes.split(","):
        measure(size, *random_denoiser(size), args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="tiny,smollm2", help=", ".join(SHAPES))
    parser.add_argument("--model", help="folder of a trained denoiser, instead of --sizes")
    parser.add_argument("--prompts", help="JSONL with the prompts for it")
    parser.add_argument("--template", default="auto", help="of the prompts: auto, chat or plain")
    parser.add_argument("--threshold", type=float, default=0.9, help="of the fast modes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=64, help="of the random prompts")
    parser.add_argument("--length", type=int, default=128, help="positions of an answer")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0, help="beside greedy")
    parser.add_argument("--repeats", type=int, default=5, help="0 only compares the tokens")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".jsonl"))
    given = parser.parse_args()
    if bool(given.model) != bool(given.prompts):
        parser.error("--model and --prompts go together")
    if unknown := set(given.sizes.split(",")) - set(SHAPES):
        parser.error(f"unknown size {', '.join(sorted(unknown))}; use {', '.join(SHAPES)}")
    if given.temperature <= 0 or given.repeats < 0:
        parser.error("expected a positive --temperature and --repeats of at least 0")
    main(given)
