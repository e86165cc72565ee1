"""Records what the release of RewardBench makes of made-up scores, for tests/evals.

Run in an environment of its own; nothing of jaxreward is imported:

    python3.11 -m venv /tmp/rewardbench_venv
    /tmp/rewardbench_venv/bin/pip install --no-deps rewardbench==0.1.4
    /tmp/rewardbench_venv/bin/pip install numpy==2.4.6 pandas==3.1.1 datasets==5.2.0
    /tmp/rewardbench_venv/bin/python tests/goldens/record_rewardbench.py \
        tests/goldens/rewardbench.json

`calculate_scores_per_section`, `get_average_over_rewardbench`, `reroll_and_score_dataset` and
`process_single_model` of the installed release are called as they are, with its own tables of
subsets and counts. They use NumPy, pandas and datasets alone; what the modules import beside those
(torch, transformers, fastchat, the reward models) is an empty stand-in here. Of the formulas only
the comparison of two scores is written here, as scripts/run_rm.py of the release has it.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import types

# Beside what the release's functions use: name -> the names that are imported from it.
UNUSED = {
    "torch": (),
    "transformers": ("PreTrainedTokenizer",),
    "fastchat": (),
    "fastchat.conversation": ("Conversation",),
    "rewardbench.models": ("REWARD_MODEL_CONFIG",),
}


def load():
    """(rewardbench.utils, rewardbench.constants, analysis.get_benchmark_results), as installed."""
    importlib.import_module("datasets")  # looks for torch itself, before there is a stand-in
    package = types.ModuleType("rewardbench")
    package.__path__ = importlib.util.find_spec("rewardbench").submodule_search_locations
    sys.modules["rewardbench"] = package
    for name, members in UNUSED.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        for member in members:
            setattr(module, member, type(member, (), {}))
    names = ("rewardbench.utils", "rewardbench.constants", "analysis.get_benchmark_results")
    found = [importlib.import_module(name) for name in names]
    for name in UNUSED:  # or datasets would use them
        del sys.modules[name]
    return found


def pairs(subset, place):
    """Made-up (chosen, rejected) scores of one subset: few, some equal, all exact in float32."""
    count = 3 + place % 4
    return [
        ((7 * i + 3 * place) % 11 / 4 - 1.0, (5 * i + place * place) % 9 / 4 - 0.75)
        for i in range(count)
    ] + [(0.5, 0.5)]


def first(utils, constants, results):
    """RewardBench 1: sections, and the average with and without prior sets."""
    import pandas as pd

    prior = ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"]
    core = [s for subsets in constants.SUBSET_MAPPING.values() for s in subsets]
    scores = {subset: pairs(subset, place) for place, subset in enumerate([*core, *prior])}
    # scripts/run_rm.py: 1 if chosen > rejected else 0, and the mean over a subset.
    accuracy = {s: sum(1 if a > b else 0 for a, b in x) / len(x) for s, x in scores.items()}
    sections = utils.calculate_scores_per_section(
        constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, accuracy
    )
    frame = lambda names: pd.DataFrame(
        [{"model": "m", "model_type": "t", **{s: accuracy[s] for s in names}}]
    )
    whole = results.get_average_over_rewardbench(frame(core), frame(prior))
    none = frame(prior).assign(model="another")
    return {
        "scores": scores,
        "sections": sections,
        "average without prior sets": float(
            results.get_average_over_rewardbench(frame(core), none)["average"][0]
        ),
        "average": float(whole["average"][0]),
        "Prior Sets": float(whole["Prior Sets (0.5 weight)"][0]),
    }


BEST_OF_FOUR = [
    [1.0, 0.5, 0.25, 0.0],
    [1.0, 1.0, 0.25, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.5, 0.5, 1.0, 0.0],
    [-3.0, -3.5, -3.0, -3.0],
    [0.0, 0.25, 0.5, 1.0],
]

# name -> rows of (id, scores, how many of them are of right answers, which come first).
TIES = {
    "both kinds": [
        ("ref:0", [2.0, 1.0, 0.5], 1),
        ("tied:0", [2.0, 1.75, 1.5, 0.25, 0.0], 3),
        ("ref:1", [1.0, 0.875, -0.5], 1),
        ("tied:1", [3.0, 1.0, 0.5, 0.0], 2),
        ("ref:2", [0.5, 1.0], 1),
        ("tied:2", [1.0, 1.0, 0.5], 2),
        ("ref:3", [1.5, 1.0], 1),
        ("tied:3", [1.0, 0.0, 0.5, -1.0], 2),
    ],
    "a tie between right and wrong": [
        ("ref:5", [1.0, 1.0], 1),
        ("tied:5", [1.0, 0.5, 0.5], 2),
    ],
    "kinds without a partner": [
        ("ref:0", [2.0, 1.0], 1),
        ("tied:1", [2.0, 1.5, 1.0], 2),
    ],
    "some without a partner, in another order": [
        ("tied:4", [4.0, 3.5, 3.75, 1.0], 3),
        ("ref:9", [0.0, 1.0], 1),
        ("ref:4", [2.0, -1.0], 1),
        ("tied:7", [0.0, 0.25, 1.0], 2),
    ],
    "one right answer beside others": [
        ("ref:0", [1.0, 0.0], 1),
        ("tied:0", [1.0, 0.0, -1.0], 1),
        ("ref:1", [1.0, 0.0], 1),
        ("tied:1", [1.0, 0.75, 0.0], 2),
    ],
    "only ref": [("ref:0", [1.0, 0.0], 1), ("ref:1", [0.0, 1.0], 1)],
    "only tied": [("tied:0", [1.0, 0.5, 0.0], 2), ("tied:1", [0.0, 0.5, 1.0], 2)],
}


def second(utils):
    """RewardBench 2: best of four, and Ties."""
    from datasets import Dataset

    flat = [score for row in BEST_OF_FOUR for score in row]
    rows = Dataset.from_dict({"text": [str(i) for i in range(len(flat))], "scores": flat})
    best = utils.reroll_and_score_dataset(rows, [len(row) for row in BEST_OF_FOUR])
    ties = {}
    for name, made in TIES.items():
        rows = [{"id": i, "scores": list(s), "num_correct": n} for i, s, n in made]
        ties[name] = {"rows": rows, "score": float(utils.process_single_model(rows)[1])}
    return {"best of four": {"scores": BEST_OF_FOUR, "results": best["results"]}, "ties": ties}


def main(path):
    utils, constants, results = load()
    recorded = {
        "made by": "tests/goldens/record_rewardbench.py",
        "rewardbench": importlib.metadata.version("rewardbench"),
        "example counts": constants.EXAMPLE_COUNTS,
        "subset mapping": constants.SUBSET_MAPPING,
        "first": first(utils, constants, results),
        "second": second(utils),
    }
    recorded["second"]["best of four"]["results"] = list(
        recorded["second"]["best of four"]["results"]
    )
    pathlib.Path(path).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
