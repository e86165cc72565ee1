"""Reading what the evaluation commands wrote, of several models: one part a suite or evaluation.

What can be read is checked; what cannot is noted and left out, as in `folder`. Files of one model
are told by the path of the model that they name, so that its suites, probes and pairs stand in one
column.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxreward.data import hypotheses, sources
from jaxreward.report import folder, words

__all__ = ["read"]

BETWEEN = "between proxies"  # what proxies say of one another is of no model


def read(files: Sequence) -> dict:
    """The results of several models, by what was measured.

    Args:
        files: JSON files of `jaxreward evaluate`, of suites or of pairs, of probing and of HEAL.
            Single items are read from FILE.items.jsonl and FILE.hypotheses.jsonl beside them.

    Returns:
        dict with `models`, list of labels; `parts`, list of {id, name, kind, entries}, where kind
        is "suite", "pairs", "probing" or "hypotheses" and entries are {label: entry}; `protocols`
        list of (title, dict); `files` list of (name, bytes, sha256); `notes` list of str.
        An entry has `metrics`, a list of {name, value, low, high}, and what its kind adds: a suite
        `items` {id: row} and `scored` (by rewards); hypotheses `tree`, the metrics as written,
        `logp` {id: (float[n], int[n])}. The part of hypotheses has `proxies` {proxy: {id: list}}.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: no file is given, or none of them holds a result.
    """
    files = [Path(file) for file in files]
    if not files:
        raise ValueError("give at least one JSON file that an evaluation wrote")
    run = {"files": [], "notes": [], "found": [], "protocols": []}
    for file in dict.fromkeys(files):
        if not file.is_file():
            raise FileNotFoundError(
                f"no result at {file}; give JSON files that evaluations wrote (evaluate --output)"
            )
        found = _document(file, run)
        if found is not None:
            _add(file, found, run)
    if not run["found"]:
        raise ValueError(
            "nothing to compare: no file holds metrics of a model. " + " ".join(run["notes"])
        )
    return _by_part(run)


def _document(file: Path, run: dict) -> dict | None:
    try:
        found = json.loads(_bytes(file, run))
    except (ValueError, RecursionError) as error:
        run["notes"].append(f"{file.name} is not readable JSON ({error}): left out.")
        return None
    if not isinstance(found, dict):
        run["notes"].append(f"{file.name} holds no JSON object: left out.")
        return None
    return found


def _bytes(file: Path, run: dict) -> bytes:
    content = file.read_bytes()
    run["files"].append((file.name, len(content), hashlib.sha256(content).hexdigest()))
    return content


def _lines(file: Path, run: dict, without: str) -> list[dict]:
    if not file.is_file():
        run["notes"].append(f"No {file.name}: {without}.")
        return []
    rows, bad = [], 0
    for line in _bytes(file, run).split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        bad += not isinstance(row, dict)
        rows += [row] if isinstance(row, dict) else []
    if bad:
        run["notes"].append(f"{file.name}: {words.count(bad, 'unreadable line')} skipped.")
    return rows


def _add(file: Path, found: dict, run: dict) -> None:
    protocol = found["protocol"] if isinstance(found.get("protocol"), dict) else {}
    metrics = found.get("metrics")
    if isinstance(found.get("suites"), dict):
        _suites(file, found, protocol, run)
    elif isinstance(metrics, dict) and isinstance(protocol.get("models"), dict):
        _hypotheses(file, metrics, protocol, run)
    elif found.get("kind") == "best_of_n":
        run["notes"].append(f"{file.name} is a best-of-n evaluation, which a run's report shows.")
    elif isinstance(metrics, dict):
        rows = _rows(file, metrics, run)
        kind = "probing" if _tasks(metrics) else "pairs"
        model = str(found.get("model") or protocol.get("model") or file.stem)
        entry = {"metrics": rows, "tasks": _tasks(metrics)}
        entry["sha256"] = protocol.get("sha256") or repr(protocol.get("data"))
        run["found"].append((kind, str(found.get("name") or file.stem), model, file, entry))
    else:
        run["notes"].append(f"{file.name} holds neither metrics nor suites: left out.")
        return
    run["protocols"].append((file.name, protocol))


def _rows(file: Path, metrics: dict, run: dict) -> list[dict]:
    rows, other = folder._estimates(metrics)
    if other:
        run["notes"].append(f"{file.name}: not numbers, so not shown: {', '.join(other)}.")
    return [row | {"value": row["value"] if words.finite(row["value"]) else None} for row in rows]


def _tasks(metrics: dict, prefix: str = "") -> dict:
    """{name: metrics} of the tasks of probes: those with an interval beside a majority class."""
    tasks = {}
    for name, found in metrics.items():
        if not isinstance(found, dict):
            continue
        accuracy = found.get("accuracy")
        if words.finite(found.get("majority")) and isinstance(accuracy, dict):
            tasks[prefix + name] = found
        else:
            tasks |= _tasks(found, f"{prefix}{name}/")
    return tasks


def _suites(file: Path, found: dict, protocol: dict, run: dict) -> None:
    by = str(protocol.get("by") or "score").split(":")[0]
    # One folder may be asked as a judge and for its likelihoods.
    model = str(found.get("model") or file.stem) + ("" if by == "score" else f" ({by})")
    lines = _lines(file.with_suffix(".items.jsonl"), run, "no distributions, no paired differences")
    items: dict[str, dict] = {}
    whole = [line for line in lines if _is_item(line)]
    if len(whole) < len(lines):
        bad = words.count(len(lines) - len(whole), "line")
        run["notes"].append(f"{file.stem}.items.jsonl: {bad} without scores or verdicts skipped.")
    for line in whole:
        key = f"{line.get('subset')}/{line.get('id')}"
        items.setdefault(str(line.get("suite")), {})[key] = line
    for name, suite in found["suites"].items():
        if not isinstance(suite, dict) or not isinstance(suite.get("metrics"), dict):
            run["notes"].append(f"{file.name}: {name} has no metrics: left out.")
            continue
        metrics = dict(suite["metrics"])
        missing = metrics.pop("missing", None)
        if isinstance(missing, list) and missing:
            run["notes"].append(f"{file.name}: {name} lacks {', '.join(map(str, missing))}.")
        skipped = suite.get("skipped")
        if isinstance(skipped, dict) and skipped:
            text = ", ".join(f"{count} ({reason})" for reason, count in skipped.items())
            run["notes"].append(f"{file.name}: {name} left out rows: {text}.")
        entry = {"metrics": _rows(file, metrics, run), "items": items.get(name, {})}
        files = [f.get("sha256") for f in suite.get("files") or () if isinstance(f, dict)]
        entry["sha256"] = repr((files, protocol.get("limit")))
        entry["scored"] = by == "score"
        run["found"].append(("suite", name, model, file, entry))


def _is_item(line: dict) -> bool:
    if "verdicts" in line:
        orders = line["verdicts"]
        whole = isinstance(orders, list) and all(map(_numbers, orders))
        return whole and len(set(map(len, orders))) <= 1
    scores, right = line.get("scores"), line.get("right")
    if not _numbers(scores) or not isinstance(right, list):
        return False
    return all(type(place) is int and 0 <= place < len(scores) for place in right)


def _hypotheses(file: Path, metrics: dict, protocol: dict, run: dict) -> None:
    lines = _lines(file.with_suffix(".hypotheses.jsonl"), run, "no scatter, no paired differences")
    proxies = _proxies(file, protocol, run) if lines else {}
    logp: dict[str, dict] = {}
    for line in lines:
        step, values, tokens = line.get("step"), line.get("logp"), line.get("tokens")
        if not _numbers(values) or not _numbers(tokens) or len(values) != len(tokens):
            run["notes"].append(f"{file.stem}: a line of {line.get('id')} is not numbers: skipped.")
            continue
        name = str(line.get("model"))
        for label in {name, f"{name}@{step}"} & metrics.keys():
            one = np.asarray(values, float), np.asarray(tokens, float)
            logp.setdefault(label, {})[str(line.get("id"))] = one
    delta = protocol.get("delta") if words.finite(protocol.get("delta")) else 0.0
    # Proxies are of one file of sets: what was measured on another stands apart.
    shared = {"proxies": proxies, "delta": delta, "set": protocol.get("sha256")}
    for model, found in metrics.items():
        if model == BETWEEN or not isinstance(found, dict):
            continue
        name, *step = model.rsplit("@", 1)
        facts = protocol["models"].get(model) or protocol["models"].get(name)
        facts = facts if isinstance(facts, dict) else {}
        path = str(facts.get("model") or name)
        if model not in protocol["models"] and step:
            path += f"@{step[0]}"
        rows = _rows(file, found, run)
        entry = {"metrics": rows, "tree": found, "logp": logp.get(model, {}), **shared}
        run["found"].append(("hypotheses", file.stem, path, file, entry))


def _numbers(values) -> bool:
    return isinstance(values, list) and all(words.finite(value) for value in values)


def _proxies(file: Path, protocol: dict, run: dict) -> dict:
    """{proxy: {id: scores}} of the file of sets that a result names, if it is still that file."""
    data = Path(str(protocol.get("data")))
    there = [path for path in (data, file.parent / data.name) if path.is_file()]
    if not there or sources.data_hash(there[0]) != protocol.get("sha256"):
        why = "has changed" if there else "is not there"
        run["notes"].append(f"{data} {why}: no scatter and no paired differences of {file.name}.")
        return {}
    records = hypotheses.read(there[0])
    return {
        proxy: {r["id"]: r["scores"][proxy] for r in records if proxy in r["scores"]}
        for proxy in hypotheses.proxies(records)
    }


def _by_part(run: dict) -> dict:
    """Results of one thing that was measured side by side, under labels that are short."""
    keys, parts = {}, {}
    for kind, name, model, file, entry in run.pop("found"):
        part = parts.setdefault((kind, name, entry.get("set")), {})
        key = (model, "")
        if key in part:  # measured twice, so the file tells which
            key = (model, file.name if (model, file.name) not in part else str(file))
        keys[key] = None
        part[key] = entry
    paths = sorted({model for model, _ in keys})
    short = {path: _short(path) for path in paths}
    names = list(short.values())
    labels = {
        key: (short[key[0]] if names.count(short[key[0]]) == 1 else key[0])
        + (f" · {key[1]}" if key[1] else "")
        for key in keys
    }
    run["models"] = list(labels.values())
    run["parts"] = []
    for i, ((kind, name, _), entries) in enumerate(parts.items()):
        # Names are untrusted; ids go into the page's markup.
        part = {"id": f"part{i + 1}", "kind": kind, "name": name}
        part["entries"] = {labels[key]: entries[key] for key in keys if key in entries}
        if kind == "hypotheses":
            first = next(iter(entries.values()))
            part |= {"proxies": first["proxies"], "delta": first["delta"]}
        if len({e.get("sha256") for e in entries.values()} - {None}) > 1:
            run["notes"].append(f"{name}: the models were measured on different data.")
        run["parts"].append(part)
    return run


def _short(path: str) -> str:
    """The last name of a path, with what stands behind it in brackets or after an @."""
    folder_of, tail = re.fullmatch(r"(.*?)((?: \([a-z]+\))?)", path, re.DOTALL).groups()
    return (Path(folder_of).name or folder_of) + tail
