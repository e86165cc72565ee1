"""Public suites for reward models: their rows as items, and where their files lie.

An item is a dict of `id` (str, its own within its subset), `subset` and `section` (str), `prompt`
(str or messages), `answers` (list of str) and `right` (places of the answers that should win); what
else a suite says of it stands in the function of the suite. `evals.reward_bench` makes numbers of
items and scores.

Each function says where its field names come from, and on which form it has run. *Verified* means
run on rows of the public files, brought into JSON Lines with the fields of the source; *unverified*
means written from the card or the code alone.
"""

import collections
import json
import math
import warnings
from pathlib import Path

from jaxreward.data import formats, sources
from jaxreward.data.formats import Bad

# RewardBench 1: sections, subsets, and what a subset counts in its section. math-prm has 447 rows
# and counts as much as the six languages of code together. From rewardbench/constants.py, 0.1.4.
REWARD_BENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
PRIOR = "Prior Sets"
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
_OTHER_PRIOR = ("anthropic_harmless", "mtbench_gpt4", "mtbench_human")
_SECTION = {subset: name for name, subsets in REWARD_BENCH.items() for subset in subsets}
_SECTION |= dict.fromkeys((*PRIOR_SETS, *_OTHER_PRIOR), PRIOR)
REWARD_BENCH_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
RM_BENCH = ("chat", "code", "math", "safety-refuse", "safety-response")
JUDGEBENCH = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
LLMBAR = (
    "LLMBar/Natural",
    *(f"LLMBar/Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")),
)
HHH = ("helpful", "honest", "harmless", "other")
RMB = ("Helpfulness", "Harmlessness")
# A folder of a suite is read from the files of the first of these names that it holds, at any
# depth; other files there hold parts of the same rows again, or what others said of them.
_WHOLE = ("pairs.jsonl", "total_dataset.json", "testset-v1.json", "dataset.json")
_ENDS = (".jsonl", ".json", ".parquet", ".jsonl.gz")


def reward_bench(row, number, part):
    """RewardBench 1, and the prior preference sets beside it; answers chosen and rejected.

    Data: allenai/reward-bench, split `filtered` (2985 rows), and allenai/pref-test-sets; ODC-BY.
    Lambert et al. 2024, arXiv:2403.13787. Fields from the card: `prompt`, `chosen`, `rejected`,
    `subset` (str), `id` (int); of the prior sets from `map_conversations_testsets` of
    rewardbench/utils.py: `prompt` (messages), `chosen`, `rejected` (str), the subset by the name of
    the file. *Unverified.*

    Args:
      row: dict. number: Of the row. part: Where in the suite's folder the file lies, or "".

    Returns:
      An item. Raises `formats.Bad`, as all functions here.
    """
    # Of a shard, "shp-00000-of-00001", the set's name is what stands in front.
    places = [p.split("-")[0] for p in part.split("/")]
    subset = next((p for p in places if _SECTION.get(p) == PRIOR), None)
    subset = subset or _known(row, "subset", _SECTION)
    answers = [_text(row, "chosen"), _text(row, "rejected")]
    return _item(row, number, subset, _SECTION[subset], sources.text_of(row, "prompt"), answers)


def reward_bench_2(row, number, part):
    """RewardBench 2: best of 4, and Ties, where several answers are right; right ones first.

    Data: allenai/reward-bench-2, split `test` (1865 rows); ODC-BY. Malik et al. 2025,
    arXiv:2506.01937. Fields from the card: `id`, `prompt`, `subset` (str), `chosen`, `rejected`
    (lists of str), `num_correct`, `total_completions` (int). Ids of Ties are "ref:N" and "tied:N"
    (`process_single_model` of rewardbench/utils.py), which the item has as `tie` = (kind, N).
    *Unverified.*

    Args:
      row, number, part: As `reward_bench`.
    """
    spelt = {name.lower(): name for name in REWARD_BENCH_2}
    subset = spelt[_known(row, "subset", spelt, str.lower).lower()]
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    for field, found in (
        ("num_correct", len(chosen)),
        ("total_completions", len(chosen) + len(rejected)),
    ):
        if row.get(field) is not None and row[field] != found:
            raise Bad("disagrees with the answers", field=field, came=f"{row[field]}, not {found}")
    item = _item(row, number, subset, subset, _text(row, "prompt"), chosen + rejected)
    item["right"] = list(range(len(chosen)))
    if subset == "Ties":
        kind, _, place = item["id"].partition(":")
        if kind not in ("ref", "tied") or not place.isdigit():
            raise Bad("must be ref:N or tied:N in Ties", field="id", came=formats.show(item["id"]))
        item["tie"] = (kind, int(place))
    elif len(chosen) != 1:
        raise Bad("must hold one answer outside of Ties", field="chosen", came=str(len(chosen)))
    return item


def rm_bench(row, number, part):
    """RM-Bench: three right and three wrong answers, each concise, detailed, and with Markdown.

    Data: THU-KEG/RM-Bench, `total_dataset.json` or the five `*_filtered.json`; ODC-BY. Liu et al.
    2024, arXiv:2410.16184. Fields from the README: `id`, `prompt` (str), `chosen`, `rejected`
    (three str each), `domain`; without one it is `file`, or the name of the file before
    "_filtered". *Verified* on 286 rows of chat and safety-response as JSON Lines; the files of the
    repository as they are, arrays of JSON, *unverified*.

    Args:
      row, number, part: As `reward_bench`.
    """
    named = {"domain": row.get("domain") or row.get("file") or part.split("/")[-1].split("_")[0]}
    domain = _known(named, "domain", RM_BENCH)
    answers = _texts(row, "chosen", 3) + _texts(row, "rejected", 3)
    item = _item(row, number, domain, domain.split("-")[0], _text(row, "prompt"), answers)
    return item | {"right": [0, 1, 2]}


def judgebench(row, number, part):
    """JudgeBench: pairs of which one answer is right by an objective check; answers A and B.

    Data: ScalerLab/JudgeBench, splits `gpt` and `claude`; MIT. Tan et al. 2024, arXiv:2410.12784.
    Fields from the README: `pair_id`, `source`, `question`, `response_model`, `response_A`,
    `response_B` (str), `label` ("A>B" or "B>A"). The item keeps `response_model`. Sections are the
    groups of sources that the repository reports. *Verified* on 330 rows of both splits.

    Args:
      row, number, part: As `reward_bench`.
    """
    source = sources.label_of(row, "source") or ""
    section = next((name for head, name in JUDGEBENCH.items() if source.startswith(head)), None)
    if section is None:
        raise Bad(
            f"must begin with one of {', '.join(JUDGEBENCH)}", field="source", came=repr(source)
        )
    label = _known(row, "label", ("A>B", "B>A"))
    answers = [_text(row, "response_A"), _text(row, "response_B")]
    item = _item(row, number, source, section, _text(row, "question"), answers, field="pair_id")
    model = sources.label_of(row, "response_model") or ""
    return item | {"right": [0 if label == "A>B" else 1], "response_model": model}


def llmbar(row, number, part):
    """LLMBar: which of two outputs follows the instruction; answers output_1 and output_2.

    Data: princeton-nlp/LLMBar, `Dataset/**/dataset.json`; MIT. Zeng et al. 2023, arXiv:2310.07641.
    Fields from the README: `input`, `output_1`, `output_2` (str), `label` (1 or 2). The subset is
    `subset` or the folder below Dataset; ids are the numbers of rows. *Verified* on 366 rows of
    Natural, MT-Bench and FairEval as JSON Lines; the arrays of JSON of the repository *unverified*.

    Args:
      row, number, part: As `reward_bench`.
    """
    subset = sources.label_of(row, "subset") or part.rpartition("/")[0]
    if not subset:
        raise Bad("missing; or put the file into the folder of its subset", field="subset")
    section, _, _ = subset.partition("/")
    if section not in ("LLMBar", "Processed", "CaseStudy"):
        subset, section = f"LLMBar/{subset}", "LLMBar"
    if section == "LLMBar" and subset not in LLMBAR:
        raise Bad(f"must be one of {', '.join(LLMBAR)}", field="subset", came=formats.show(subset))
    label = _known(row, "label", (1, 2))
    answers = [_text(row, "output_1"), _text(row, "output_2")]
    item = _item({}, number, subset, section, _text(row, "input"), answers)
    return item | {"right": [label - 1]}


def hhh(row, number, part):
    """HHH alignment: helpful, honest, harmless and other; answers in the order of the file.

    Data: HuggingFaceH4/hhh_alignment, of BIG-bench; Apache-2.0. Askell et al. 2021,
    arXiv:2112.00861. Either `idx`, `dimension`, `prompt`, `chosen`, `rejected` (str), as Prometheus
    cuts it: *verified* on 109 rows of all four; or `input` and `targets` with `choices` (two str)
    and `labels` (1 for the right one), the dimension by the name of the file or folder, as people
    read the data set: *unverified*.

    Args:
      row, number, part: As `reward_bench`.
    """
    place = next((d for d in part.split("/") if d in HHH), "")
    dimension = _known({"dimension": row.get("dimension") or place}, "dimension", HHH)
    if row.get("targets") is None:
        answers = [_text(row, "chosen"), _text(row, "rejected")]
        prompt = _text(row, "prompt")
        return _item(row, number, dimension, dimension, prompt, answers, field="idx")
    targets = row["targets"]
    if not isinstance(targets, dict) or targets.get("labels") not in ([1, 0], [0, 1]):
        raise Bad("must have labels [1, 0] or [0, 1]", field="targets", came=formats.show(targets))
    answers = _texts(targets, "choices", 2)
    item = _item({}, number, dimension, dimension, _text(row, "input"), answers)
    return item | {"right": [targets["labels"].index(1)]}


def pandalm(row, number, part):
    """PandaLM's test set: three people's verdicts on two answers; answers response1 and response2.

    Data: WeOpenML/PandaLM, `data/testset-v1.json` (999 rows); Apache-2.0. Wang et al. 2023,
    arXiv:2306.05087. Fields as in the file: `idx` (int), `instruction`, `input` (str, NaN for
    none), `response1`, `response2` (str, here and there a boolean, which is refused), `annotator1`
    to `annotator3` (0 tie, 1 or 2 the better one). The prompt is the instruction, an empty line and
    the input. The item has `labels`, and no `right`. *Verified* on 724 rows as JSON Lines; the
    file's own array, with its NaN, *unverified*.

    Args:
      row, number, part: As `reward_bench`.
    """
    labels = [_known(row, f"annotator{i}", (0, 1, 2)) for i in (1, 2, 3)]
    given = row.get("input")
    empty = given is None or given == "" or (isinstance(given, float) and math.isnan(given))
    prompt = _text(row, "instruction") + ("" if empty else f"\n\n{_text(row, 'input')}")
    answers = [_text(row, "response1"), _text(row, "response2")]
    item = _item(row, number, "test", "test", prompt, answers, field="idx")
    return item | {"right": [], "labels": labels}


def rmb(row, number, part):
    """RMB, the pairwise set; answers chosen and rejected.

    Data: Zhou-Zoey/RMB-Reward-Model-Benchmark, `RMB_dataset/Pairwise_set/**.json`. Zhou et al.
    2024, arXiv:2410.09893. Fields as in the files: `pair_uid` (str), `conversation_input`
    (messages), `chosen` and `reject` with `answer` (str), `category_path`
    ("Pairwise_set/Harmlessness/S1"). *Unverified*: seen, not run.

    Args:
      row, number, part: As `reward_bench`.
    """
    path = sources.label_of(row, "category_path") or part
    _, _, subset = path.rpartition("Pairwise_set/")
    goal = _known({"category_path": subset.partition("/")[0]}, "category_path", RMB)
    answers = []
    for side in ("chosen", "reject"):
        said = row.get(side)
        if not isinstance(said, dict):
            raise Bad("must be an object with answer", field=side, came=formats.show(said))
        answers.append(_text({f"{side}.answer": said.get("answer")}, f"{side}.answer"))
    prompt = sources.text_of(row, "conversation_input")
    prompt = [{"role": m["role"], "content": m["content"]} for m in prompt]
    return _item(row, number, subset, goal, prompt, answers, field="pair_uid")


SUITES = {
    "reward_bench": reward_bench,
    "reward_bench_2": reward_bench_2,
    "rm_bench": rm_bench,
    "judgebench": judgebench,
    "llmbar": llmbar,
    "hhh": hhh,
    "pandalm": pandalm,
    "rmb": rmb,
}
_FOLDERS = {"hhh": ("hhh_alignment",), "pandalm": ("pandalm_human",)}


def files(data, suite):
    """Where the rows of a suite lie.

    Args:
      data: A file, or a folder that holds `<suite>.jsonl` (.json, .parquet, .jsonl.gz) or a folder
        `<suite>`: of that `pairs.jsonl`, `total_dataset.json`, `testset-v1.json` or all
        `dataset.json` at any depth, whichever there is first, else every file of these kinds.
      suite: A name of `SUITES`.

    Returns:
      list of (path, part): `part` is the path below the suite's folder without its ending.

    Raises:
      KeyError: for an unknown suite. FileNotFoundError: saying where was looked.
    """
    if suite not in SUITES:
        raise KeyError(f"no suite {suite!r}; suites: {', '.join(SUITES)}")
    data = Path(data)
    if data.is_file():
        return [(data, "")]
    names = (suite, *_FOLDERS.get(suite, ()))
    for name in names:
        for end in _ENDS:
            if (data / f"{name}{end}").is_file():
                return [(data / f"{name}{end}", "")]
        folder = data / name
        found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(_ENDS))
        if suite == "reward_bench":  # its repository holds the rows before filtering, too
            found = [p for p in found if p.name.split("-")[0] not in ("raw", "train")]
        whole = next((n for n in _WHOLE if any(p.name == n for p in found)), None)
        found = [p for p in found if whole is None or p.name == whole]
        if found:
            return [(p, p.relative_to(folder).as_posix().split(".")[0]) for p in found]
    raise FileNotFoundError(
        f"{data} holds no files of the suite {suite}; expected {suite}.jsonl, .json or .parquet, "
        f"or a folder {' or '.join(names)} with such files"
    )


def read(suite, data, *, on_bad="error", limit=None):
    """Reads the items of a suite.

    Args:
      suite: A name of `SUITES`. data: As `files`.
      on_bad: "error" stops at the first row that cannot be used, "skip" leaves such rows out,
        counts them by reason and warns once. A second row of one id and subset is such a row.
      limit: The first so many items; None reads all.

    Returns:
      (items, report): dict(read=int, kept=int, skipped={reason: int}, files=[path]).

    Raises:
      KeyError, FileNotFoundError: as `files`.
      ValueError: naming file:row:field, what was expected and what came; or when no item is left.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip"; received {on_bad!r}')
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None; received {limit}")
    items, seen, skipped, count = [], {}, collections.Counter(), 0
    found = files(data, suite)
    for path, part in found:
        for number, row in _rows(path):
            if len(items) == limit:
                break
            count += 1
            try:
                if isinstance(row, Bad):
                    raise row
                item = SUITES[suite](row, number, part)
                key = item["subset"], item["id"]
                if key in seen:
                    raise Bad("second row with this id", came=f"{key}, already at {seen[key]}")
                seen[key] = f"{path}:{number}"
                items.append(item)
            except Bad as bad:
                if on_bad == "error":
                    place = f"{path}:{number}" + (f":{bad.field}" if bad.field else "")
                    raise ValueError(f"{place}: {bad}") from bad
                skipped[f"{bad.field}: {bad.reason}" if bad.field else bad.reason] += 1
    counts = "; ".join(f"{reason} ({n})" for reason, n in skipped.items())
    where = ", ".join(str(path) for path, _ in found[:3]) + (", ..." if len(found) > 3 else "")
    if not items:
        raise ValueError(f"{where}: no usable item of {suite} in {count} rows: {counts}")
    if skipped:
        warnings.warn(f"{where}: skipped {skipped.total()} of {count} rows: {counts}", stacklevel=2)
    report = {"read": count, "kept": len(items), "skipped": dict(skipped)}
    return items, report | {"files": [str(path) for path, _ in found]}


def _rows(path):
    """As `formats.rows`, and arrays of JSON, as repositories keep them."""
    if path.suffix != ".json":
        yield from formats.rows(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a whole array of JSON in UTF-8 ({error}); download it again"
        ) from error
    if rows is None:
        yield from formats.rows(path)
        return
    for number, row in enumerate(rows, start=1):
        is_row = isinstance(row, dict)
        yield number, row if is_row else Bad("must be a JSON object", came=formats.show(row))


def _item(row, number, subset, section, prompt, answers, *, field="id"):
    given = row.get(field, number)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise Bad("must be str or int", field=field, came=formats.show(given))
    return {
        "id": str(given),
        "subset": subset,
        "section": section,
        "prompt": prompt,
        "answers": answers,
        "right": [0],
    }


def _text(row, field):
    text = sources.text_of(row, field)
    if not isinstance(text, str):
        raise Bad("must be str", field=field, came=formats.show(text))
    return text


def _texts(row, field, count=None):
    texts = row.get(field)
    expected = "a list of str" if count is None else f"a list of {count} str"
    if not isinstance(texts, list) or not texts or count not in (None, len(texts)):
        raise Bad(f"must be {expected}", field=field, came=formats.show(texts))
    return [_text({f"{field}[{i}]": x}, f"{field}[{i}]") for i, x in enumerate(texts)]


def _known(row, field, names, spelt=lambda x: x):
    value = row.get(field)
    fits = isinstance(value, type(next(iter(names)))) and not isinstance(value, bool)
    if not fits or spelt(value) not in names:
        raise Bad(
            f"must be one of {', '.join(map(str, names))}", field=field, came=formats.show(value)
        )
    return value
