"""MRMBench: six dimensions of preference, each as the class of an answer, easy (2) or hard (3).

Wang et al., "Probing Preference Representations" (arXiv:2511.12464); code wangclnlp/MRMBench. Its
own files are JSON arrays of {"input", "output", "label"} (`data/README.md` there). Their sources
are HelpSteer2 (five dimensions; test is its validation split) and PKU-SafeRLHF (harmlessness).

What is from where:

  harmlessness                 severity 0 is harmless, 1 minor, 2 and 3 harmful: said of the paper
  the five others              *inferred*. The cuts are not published. They are rebuilt from the
                               README's tables, in which several models have one and the same
                               accuracy, as a constant prediction has: that is a share of a class.
                               Those of helpfulness and correctness, hard, are the least certain.

Field `response_{0,1}_severity_level` (0 to 3) of PKU-SafeRLHF is from other people's code.

*Unverified: not yet run on the real files.* `check_split` compares a real split with the shares.
"""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import numpy as np

from jaxreward.data import formats, points, sources, tokenize
from jaxreward.data.corpora import helpsteer2
from jaxreward.data.formats import Bad

TASKS = ("harmlessness", *helpsteer2.ATTRIBUTES)
LEVELS = ("easy", "hard")
FORMS = ("paper", "template")
LABELS = {
    "easy": {
        "harmlessness": ("harmful", "harmless"),
        "helpfulness": ("unhelpful", "helpful"),
        "correctness": ("incorrect", "correct"),
        "coherence": ("incoherent", "coherent"),
        "complexity": ("basic", "expert"),
        "verbosity": ("succinct", "verbose"),
    },
    "hard": {
        "harmlessness": ("harmful", "minorly harmful", "harmless"),
        "helpfulness": ("unhelpful", "partially helpful", "helpful"),
        "correctness": ("incorrect", "partially correct", "correct"),
        "coherence": ("incoherent", "somewhat coherent", "coherent"),
        "complexity": ("basic", "minorly complex", "expert"),
        "verbosity": ("succinct", "intermediate", "verbose"),
    },
}
# The class of each raw value 0, 1, ...
_BINS = {
    "easy": {
        "harmlessness": (1, 0, 0, 0),
        "helpfulness": (0, 0, 0, 1, 1),
        "correctness": (0, 0, 0, 1, 1),
        "coherence": (0, 0, 0, 0, 1),
        "complexity": (0, 0, 0, 1, 1),
        "verbosity": (0, 0, 0, 1, 1),
    },
    "hard": {
        "harmlessness": (2, 1, 0, 0),
        "helpfulness": (0, 0, 1, 2, 2),
        "correctness": (0, 0, 0, 1, 2),
        "coherence": (0, 0, 0, 1, 2),
        "complexity": (0, 0, 1, 2, 2),
        "verbosity": (0, 0, 1, 2, 2),
    },
}
# Test answers, of the repository's figure of sizes; and {class: share of them}, inferred as above.
TEST_SIZES = {task: 1000 if task == "harmlessness" else 1038 for task in TASKS}
SHARES = {
    "easy": {
        "harmlessness": {0: 0.545},
        "helpfulness": {1: 0.717},
        "correctness": {1: 0.745},
        "coherence": {1: 0.725},
        "complexity": {0: 0.909},
        "verbosity": {0: 0.822},
    },
    "hard": {
        "harmlessness": {2: 0.455},
        "helpfulness": {2: 0.717},
        "correctness": {1: 0.272},
        "coherence": {1: 0.215},
        "complexity": {0: 0.382},
        "verbosity": {1: 0.621},
    },
}
TOLERANCE = 0.003  # of a share: the tables have three digits, and rows disagree in the last


# Labels


def bin_labels(raw, task, level):
    """The class of each raw rating.

    Args:
      raw: Whole numbers: 0 to 4 of an attribute of HelpSteer2, 0 to 3 of PKU-SafeRLHF's severity.
      task: One of `TASKS`. level: "easy" or "hard".

    Returns:
      int32 of the shape of `raw`, indices into `LABELS[level][task]`.

    Raises:
      ValueError: for an unknown task or level, or a rating that is none.

    References: see the top of this file for what of this is inferred.
    """
    _known(task, level)
    bins = np.asarray(_BINS[level][task], np.int32)
    raw = np.asarray(raw)
    values = raw.astype(np.float64)
    if not np.isin(values, np.arange(len(bins))).all():
        wrong = values[~np.isin(values, np.arange(len(bins)))][0]
        raise ValueError(
            f"{task}: ratings are whole numbers from 0 to {len(bins) - 1}; received {wrong:g}"
        )
    return bins[values.astype(np.int64)]


def check_split(labels, task, level):
    """Makes sure that test labels are those of the benchmark: how many, and the share of a class.

    Only for a whole real test split, that of the benchmark or HelpSteer2's validation split.

    Args:
      labels: Classes, int[N]. task, level: As `bin_labels`.

    Raises:
      ValueError: saying what was expected and what came.
    """
    _known(task, level)
    labels = np.asarray(labels)
    if len(labels) != TEST_SIZES[task]:
        raise ValueError(
            f"{task}: the test split has {TEST_SIZES[task]} answers; received {len(labels)}. "
            "Give the whole split, or do not say that it is whole"
        )
    for label, share in SHARES[level][task].items():
        found = float(np.mean(labels == label))
        if abs(found - share) > TOLERANCE:
            raise ValueError(
                f"{task}, {level}: {found:.1%} of the test answers are "
                f"{LABELS[level][task][label]!r}; the published tables imply {share:.1%}. The "
                "cut points are inferred from them, so look at `_BINS` before the data"
            )


def _known(task, level):
    if task not in TASKS or level not in LEVELS:
        raise ValueError(
            f"expected a task of {', '.join(TASKS)} and a level of {', '.join(LEVELS)}; received "
            f"{task!r} and {level!r}"
        )


# Rows to items


def rated(rows, level):
    """Items of rows of HelpSteer2, one for each attribute that a row has.

    An item is dict(id, task, input, prompt, answer, label): `input` is the prompt as it stands in
    the file, `prompt` the same as messages where it has several turns.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them. level: "easy" or "hard".

    Yields:
      (number, item or Bad).
    """
    for number, row in rows:
        try:
            ((_, point),) = helpsteer2.points([(number, row)])
            if isinstance(point, Bad):
                raise point
            text = _plain(row, "prompt")
            for task, raw in point["scores"].items():
                if raw is not None:
                    made = _item(row, number, task, text, point["completion"])
                    yield (
                        number,
                        {**made, "prompt": point["prompt"], "label": _bin(raw, task, level)},
                    )
        except Bad as bad:
            yield number, bad


def graded(rows, level):
    """Items of rows of PKU-SafeRLHF, as `rated`: two a row, of harmlessness.

    Args:
      rows: (number, dict or Bad). level: "easy" or "hard".

    Yields:
      (number, item or Bad).
    """
    for number, row in rows:
        for index in (0, 1):
            try:
                if isinstance(row, Bad):
                    raise row
                field = f"response_{index}_severity_level"
                raw = sources.number_of(row, field)
                answer = _plain(row, f"response_{index}")
                made = _item(row, number, "harmlessness", _plain(row, "prompt"), answer)
                label = _bin(raw, "harmlessness", level, field)
                yield number, {**made, "id": f"{made['id']}-{index}", "label": label}
            except Bad as bad:
                yield number, bad


def labelled(rows, task, level):
    """Items of the benchmark's own rows, {"input", "output", "label"}, as `rated`.

    Args:
      rows: (number, dict or Bad). task, level: What the file is of.

    Yields:
      (number, item or Bad).
    """
    _known(task, level)
    count = len(LABELS[level][task])
    for number, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            label = row.get("label")
            if isinstance(label, bool) or label not in range(count):
                raise Bad(
                    f"must be a whole number from 0 to {count - 1}",
                    field="label",
                    came=formats.show(label),
                )
            made = _item(row, number, task, _plain(row, "input"), _plain(row, "output"))
            yield number, {**made, "label": int(label)}
        except Bad as bad:
            yield number, bad


def _item(row, number, task, text, answer):
    found = {"id": sources.id_of(row, number), "task": task, "input": text, "prompt": text}
    if not isinstance(answer, str):
        raise Bad("must be str", field="response", came=formats.show(answer))
    return {**found, "answer": answer}


def _plain(row, field):
    text = sources.text_of(row, field)
    if not isinstance(text, str):
        raise Bad("must be str", field=field, came=formats.show(text))
    return text


def _bin(raw, task, level, field=None):
    try:
        return int(bin_labels(raw, task, level))
    except ValueError as error:
        raise Bad(str(error), field=field or task) from None


# Files


def read(path, items, *args):
    """Items of one file.

    Args:
      path: A JSON array, or what `formats.rows` reads.
      items: `rated`, `graded` or `labelled`. *args: Its further arguments.

    Returns:
      list of items.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:row:field, what was expected and what came.
    """
    found = []
    for number, item in items(_rows(path), *args):
        if isinstance(item, Bad):
            field = f":{item.field}" if item.field else ""
            raise ValueError(f"{formats.name(path)}:{number}{field}: {item}") from item
        found.append(item)
    return found


def _rows(path):
    formats.exists(path)
    if Path(path).suffix != ".json":
        return formats.rows(path)
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return formats.rows(path)  # JSON Lines under another name, or the reader says what is wrong
    if not isinstance(rows, list):
        rows = [rows]
    bad = lambda row: Bad("row must be a JSON object", came=formats.show(row))
    return [(i, row if isinstance(row, dict) else bad(row)) for i, row in enumerate(rows, start=1)]


def load(folder, level, *, tasks=(), whole=False):
    """The benchmark, from its own files or from its sources.

    A folder holds

        mrm_easy/TASK/{train,test}.json, mrm_hard/TASK/{train,test}.json     the benchmark's own
        helpsteer2/{train,validation}*        rows of HelpSteer2; several files count as one
        pku_saferlhf/{train,test}*            rows of PKU-SafeRLHF; the benchmark draws from these

    and for each task what is named first above is taken.

    Args:
      folder: Folder. level: "easy" or "hard".
      tasks: Tasks that must be there; () takes those that are.
      whole: The test files are the real ones and whole: `check_split` each, but for harmlessness
        from its source, of which the benchmark's sample is not known.

    Returns:
      ({task: {"train": items, "test": items}}, files read).

    Raises:
      FileNotFoundError: naming what is not there.
      ValueError: naming a row that cannot be used, or a split that is not the benchmark's.
    """
    folder, found, seen = Path(folder), {}, {}
    for task in tasks or TASKS:
        _known(task, level)
        own = folder / f"mrm_{level}" / task
        harm = task == "harmlessness"
        source = folder / ("pku_saferlhf" if harm else "helpsteer2")
        if own.is_dir():
            form = labelled, task, level
            names = {split: [own / f"{split}.json"] for split in ("train", "test")}
        elif source.is_dir():
            form = graded if harm else rated, level
            last = "test" if harm else "validation"
            names = {
                "train": sorted(source.glob("train*")),
                "test": sorted(source.glob(f"{last}*")),
            }
        elif tasks:
            raise FileNotFoundError(f"{task}: neither {own} nor {source} is there")
        else:
            continue
        found[task] = {}
        for split, paths in names.items():
            if not paths:
                raise FileNotFoundError(f"{source} holds no file of the {split} split of {task}")
            for path in paths:
                if path not in seen:  # five tasks have one file
                    seen[path] = read(path, *form)
            every = [item for path in paths for item in seen[path] if item["task"] == task]
            if not every:
                raise ValueError(f"{task}: no answer with a label in {', '.join(map(str, paths))}")
            found[task][split] = every
        if whole and (own.is_dir() or not harm):
            check_split([item["label"] for item in found[task]["test"]], task, level)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds none of mrm_{level}/, helpsteer2/ and pku_saferlhf/; see "
            "jaxreward.data.corpora.mrmbench.load"
        )
    return found, list(seen)


def sample(items, most, seed=0):
    """At most so many items, drawn by their text: tasks on the same texts keep the same ones.

    Args:
      items: Items. most: How many, or None for all. seed: Of the draw.
    """
    if most is None or len(items) <= most:
        return items
    draw = lambda i: hashlib.sha256(
        json.dumps([seed, items[i]["input"], items[i]["answer"]]).encode()
    ).digest()
    return [items[i] for i in sorted(sorted(range(len(items)), key=draw)[:most])]


# Items to tokens


def encode(tokenizer, items, *, form="paper", template="auto", max_len=2048):
    """Tokens of the items, each text once, and answers to one prompt together.

    "paper": input and output joined with nothing between, no template, BOS where the tokenizer
    adds one, and EOS. "template": as `tokenize.encode_conversation` renders prompt and answer.

    Args:
      tokenizer: Tokenizer.
      items: Of `rated`, `graded` or `labelled`.
      form: "paper" or "template". template: "auto", "chat" or "plain", for "template".
      max_len: Texts of more tokens are left out, not cut; None leaves out none.

    Returns:
      (trees, index): index int[N] numbers, in the order of the trees, the answer that each item is
      of; -1 where its text was too long.

    Raises:
      ValueError: for another form, or when no text is left.

    References: wangclnlp/MRMBench, `TextDataset`. There the tokenizer adds EOS for some models
      only, and the state before the first padding token is read, which is not the EOS where that is
      the padding token too. Here EOS is always there, and what is read.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; received {form!r}")
    plain = form == "paper"
    texts, numbers, which = [], {}, []
    for item in items:
        text = {"prompt": item["input" if plain else "prompt"], "answer": item["answer"]}
        number = numbers.setdefault(json.dumps(text), len(texts))
        if number == len(texts):
            texts.append({**text, "id": item["id"]})
        which.append(number)
    trees, slot, used = [], np.full(len(texts), -1), 0
    for members in points.group(texts):
        first = texts[members[0]]
        tree = tokenize.encode_tree(
            tokenizer,
            first["prompt"],
            [texts[i]["answer"] for i in members],
            template="plain" if plain else template,
            id=first["id"],
        )
        size = len(tree.prompt)
        fit = [max_len is None or size + len(answer) <= max_len for answer in tree.answers]
        if any(fit):
            keep = lambda values: [value for value, ok in zip(values, fit) if ok]
            trees.append(
                dataclasses.replace(tree, answers=keep(tree.answers), loss=keep(tree.loss))
            )
            for i in keep(members):
                slot[i], used = used, used + 1
    if not trees:
        raise ValueError(f"no text is left of {len(items)}: all take more than {max_len} tokens")
    return trees, slot[which]


# A toy


_RAW = {  # of the classes 0, 1, 2 of the hard level
    "harmlessness": (3, 1, 0),
    "helpfulness": (1, 2, 4),
    "correctness": (1, 3, 4),
    "coherence": (1, 3, 4),
    "complexity": (0, 2, 3),
    "verbosity": (1, 2, 4),
}


def toy(count, *, seed=0):
    """Answers whose six dimensions are known by construction and drawn apart from each other.

    Args:
      count: How many. seed: Of the draw.

    Returns:
      list of dict(prompt, response, and a raw rating for each of `TASKS`).
    """
    rng, made = random.Random(seed), []
    for i in range(count):
        level = {task: rng.randrange(3) for task in TASKS}
        if i % 2 == 0:  # two answers to a prompt, as in the sources
            a, b, word = rng.randrange(2, 9), rng.randrange(2, 9), rng.choice(("fig", "oak", "elm"))
        parts = [
            f"{a} plus {b}",
            ("so", "thus", "consequently")[level["complexity"]],
            f"is {a + b + (5, 1, 0)[level['correctness']]}",
        ]
        if level["coherence"] == 1:
            parts = [parts[1], parts[0], parts[2]]
        elif level["coherence"] == 0:
            parts = parts[::-1]
        text = " ".join(parts)
        text += ("", f" {word[0]}", f" {word}")[level["helpfulness"]]
        text += " as i say" * (0, 1, 3)[level["verbosity"]]
        text += (" i hit you", " fool", "")[level["harmlessness"]]
        raw = {task: _RAW[task][level[task]] for task in TASKS}
        made.append({"prompt": f"{i // 2}: {a} + {b}? Then say {word}.", "response": text, **raw})
    return made


def write_toy(folder, *, train=96, test=48, seed=0):
    """Writes toys as files of HelpSteer2 and PKU-SafeRLHF, in the folder that `load` reads.

    Args:
      folder: Folder. train, test: Answers of each split, even. seed: Of the draw.

    Returns:
      The folder.
    """
    rows = toy(train + test, seed=seed)
    for split, last, some in (
        ("train", "train", rows[:train]),
        ("test", "validation", rows[train:]),
    ):
        rated_rows = [{k: v for k, v in row.items() if k != "harmlessness"} for row in some]
        graded_rows = [
            {
                "prompt": one["prompt"],
                "response_0": one["response"],
                "response_1": two["response"],
                "response_0_severity_level": one["harmlessness"],
                "response_1_severity_level": two["harmlessness"],
            }
            for one, two in zip(some[::2], some[1::2])
        ]
        for path, made in (
            (Path(folder) / "helpsteer2" / f"{last}.jsonl", rated_rows),
            (Path(folder) / "pku_saferlhf" / f"{split}.jsonl", graded_rows),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            sources.write_jsonl(path, made)
    return Path(folder)
