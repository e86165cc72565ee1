"""A model's numbers on public suites as a table of Markdown, with the protocol in one JSON line.

Claim (docs/evaluation.md): none; suites are measured as described there, and a number stands beside
how it came about. Suites of which only a part is at hand are measured with --limit. Prints the
table; appends one JSON line, with machine and date, to --lines.

    python benchmarks/suites.py --model models/bt --data suites --suite rm_bench,hhh --out bt.json
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

from jaxreward.recipes import suites

HERE = Path(__file__).parent
# What a table shows of a suite, where it is there.
SHOWN = {
    "reward_bench": ("overall", "Chat", "Chat Hard", "Safety", "Reasoning"),
    "reward_bench_2": ("overall", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"),
    "rm_bench": (
        "overall",
        *("easy", "normal", "hard"),
        *(f"{d}/{k}" for d in ("chat", "safety") for k in ("easy", "normal", "hard")),
    ),
    "judgebench": ("accuracy", "Knowledge", "Reasoning", "Math", "Coding"),
    "llmbar": ("accuracy", "LLMBar/Natural", "Adversarial", "Processed/MT-Bench"),
    "hhh": ("accuracy", "macro", "helpful", "honest", "harmless", "other"),
    "pandalm": ("accuracy", "matched/accuracy", "accuracy/no_ties", "agreement/people"),
    "rmb": ("accuracy", "macro", "Helpfulness", "Harmlessness"),
}


def rows(found):
    """Lines of a Markdown table of the result's suites."""
    yield "| suite | items | metric | value | 95 % |"
    yield "|---|---|---|---|---|"
    for suite, result in found.items():
        metrics = result["metrics"]
        for kind in ("", "single_accuracy/", "pair_accuracy/"):
            for name in SHOWN[suite]:
                got = metrics.get(kind + name)
                if isinstance(got, dict):
                    span = f"{got['low']:.3f} to {got['high']:.3f}"
                    yield (
                        f"| {suite} | {result['items']} | {kind}{name} | {got['value']:.3f} "
                        f"| {span} |"
                    )


def main(args):
    """Measures, prints, appends."""
    got = suites.run(
        args.model, args.suite.split(","), args.data, args.out, limit=args.limit, by=args.by
    )
    print("\n".join(rows(got["suites"])))
    line = {
        "date": datetime.date.today().isoformat(),
        "machine": args.machine or platform.processor() or platform.machine(),
        "model": Path(got["model"]).name,
        "protocol": got["protocol"],
        "environment": {k: v for k, v in got["environment"].items() if k != "command"},
        "suites": {
            name: {
                "items": each["items"],
                "skipped": each["skipped"],
                "sha256": [file["sha256"] for file in each["files"]],
                "metrics": each["metrics"],
            }
            for name, each in got["suites"].items()
        },
    }
    with args.lines.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suite", default="rm_bench,judgebench,llmbar,hhh,pandalm")
    parser.add_argument("--by", default="score")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("suites.json"))
    parser.add_argument("--machine", help="its name, where the system's own says too little")
    parser.add_argument("--lines", type=Path, default=HERE / "suites.jsonl")
    main(parser.parse_args())
