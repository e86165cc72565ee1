"""Reading a run folder: what can be read is checked, what cannot is noted and left out.

A report is wanted most when a run went wrong, so a half-written line or a broken evaluation
never stops it. Nothing is dropped silently: every gap becomes a note that the page prints.
"""

import difflib
import hashlib
import json
import math
import re
from pathlib import Path

from jaxreward.report import words

__all__ = ["read"]


def read(workdir) -> dict:
    """Everything of a run folder that the report shows; what is absent or broken is noted.

    Args:
        workdir: folder with metrics.jsonl and/or evals/*.json, and optionally config.json,
            environment.json, samples.jsonl and answers/NNNNNN.jsonl, one file a round.

    Returns:
        dict with `name` str, `steps` {step: {key: number}} in step order, `evals` list,
        `samples` list, `rounds` list of the first and the last round of answers, `config` and
        `environment` dict or None, `files` list of (name, bytes, sha256), `notes` list of str.

    Raises:
        FileNotFoundError: no such folder, or neither metrics nor a readable evaluation in it.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        siblings = [p.name for p in workdir.parent.glob("*") if p.is_dir()]
        near = difflib.get_close_matches(workdir.name, siblings, n=1)
        hint = f"; did you mean {workdir.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"expected a run folder, found none at {workdir}{hint}")
    run = {"files": [], "notes": []}

    def data(name: str, without: str) -> bytes | None:
        try:
            content = (workdir / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            run["notes"].append(f"No {name} in the run folder: {without}.")
            return None
        run["files"].append((name, len(content), hashlib.sha256(content).hexdigest()))
        return content

    def document(name: str, without: str) -> dict | None:
        content = data(name, without)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            run["notes"].append(f"{name} is not readable JSON ({error}): {without}.")
            return None
        if not isinstance(value, dict):
            kind = type(value).__name__
            run["notes"].append(f"{name} holds a {kind}, not a JSON object: {without}.")
            return None
        return value

    def lines(name: str, without: str) -> list[dict]:
        objects, bad = [], 0
        # Split before decoding, so a line cut inside a character spoils only itself.
        for line in (data(name, without) or b"").split(b"\n"):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            bad += not isinstance(value, dict)
            objects += [value] if isinstance(value, dict) else []
        if bad:
            run["notes"].append(f"{name}: {words.count(bad, 'unreadable line')} skipped.")
        return objects

    run["config"] = document("config.json", "no configuration table")
    run["environment"] = document("environment.json", "no environment table")
    run["steps"] = _steps(lines("metrics.jsonl", "no training curves"), run["notes"])
    run["evals"] = []
    for path in sorted((workdir / "evals").glob("*.json")):
        found = document(f"evals/{path.name}", "this evaluation is left out")
        if found is not None:
            run["evals"] += _evaluation(path.stem, found, run["notes"])
    if not any((workdir / "evals").glob("*.json")):
        run["notes"].append("No evals/*.json in the run folder: no evaluation tables.")
    if not run["steps"] and not run["evals"]:
        raise FileNotFoundError(
            f"nothing to report in {workdir}: expected readable steps in metrics.jsonl or at least "
            f"one evaluation in evals/; found: {' '.join(run['notes'])} "
            "Train or evaluate into this folder first."
        )
    files = [p for p in (workdir / "answers").glob("*.jsonl") if re.fullmatch("[0-9]+", p.stem)]
    rounds = sorted((int(p.stem), f"answers/{p.name}") for p in files)
    run["rounds"] = [
        {"number": n} | _round(name, lines(name, "no answers of that round"), run["notes"])
        for n, name in dict.fromkeys((*rounds[:1], *rounds[-1:]))
    ]
    run["rounds"] = [found for found in run["rounds"] if found["prompts"]]
    without = "no score histogram" if run["rounds"] else "no sample answers and no score histogram"
    run["samples"] = _samples(lines("samples.jsonl", without), run["notes"])
    run["evals"].sort(key=lambda e: "selectors" in e)  # best-of-n after the plain evaluations
    for i, evaluation in enumerate(run["evals"]):
        evaluation["id"] = f"eval{i + 1}"  # file names are untrusted; ids go into the page's markup
    name = (run["config"] or {}).get("name")
    run["name"] = name if isinstance(name, str) and name.strip() else workdir.resolve().name
    return run


def _steps(records: list[dict], notes: list[str]) -> dict:
    """{step: {key: number}} in step order; of a step written twice (a resumed run) the last."""
    steps, stepless, again, other = {}, 0, 0, set()
    for record in records:
        step = record.pop("step", None)
        if isinstance(step, bool) or not isinstance(step, int) or not words.finite(step):
            stepless += 1
            continue
        numbers = {key: value for key, value in record.items() if words.is_number(value)}
        other |= record.keys() - numbers.keys()
        seen = steps.setdefault(step, {})
        again += bool(seen.keys() & numbers.keys())
        seen |= numbers
    if stepless:
        notes.append(
            f"metrics.jsonl: {words.count(stepless, 'line')} without a whole-number step skipped."
        )
    if again:
        notes.append(
            f"metrics.jsonl: {words.count(again, 'line')} logged a step again (a resumed run); "
            "the later values are shown."
        )
    if other:
        notes.append(f"metrics.jsonl: not numbers, so not shown: {', '.join(sorted(other))}.")
    return dict(sorted(steps.items()))


def _evaluation(stem: str, found: dict, notes: list[str]) -> list[dict]:
    """[the evaluation with checked fields], or [] and a note when nothing in it can be shown."""
    where = f"evals/{stem}.json"
    name = found.get("name") if isinstance(found.get("name"), str) else stem
    protocol = found.get("protocol") if isinstance(found.get("protocol"), dict) else {}
    evaluation = {"name": name, "protocol": protocol}
    if found.get("kind") != "best_of_n":
        metrics, other = _estimates(found.get("metrics"))
        if other:
            notes.append(f"{where}: not numbers, so not shown: {', '.join(other)}.")
        if not metrics:
            notes.append(f"{where} has no numbers under 'metrics': this evaluation is left out.")
            return []
        return [evaluation | {"metrics": metrics}]

    def entries(field: str, value: str, *names: str) -> list[dict]:
        given = found.get(field) if isinstance(found.get(field), list) else []
        kept = []
        for entry in given:
            if (
                isinstance(entry, dict)
                and all(isinstance(entry.get(n), str) for n in names)
                and words.is_number(entry.get(value))
            ):
                kept.append({n: entry[n] for n in names} | _bounds(entry, value))
                if names[-1] == "b":
                    kept[-1]["metric"] = str(entry.get("metric") or "")
        if len(kept) < len(given):
            bad = words.count(len(given) - len(kept), "entry")
            needed = ", ".join(names)
            notes.append(f"{where}: {bad} of '{field}' without {needed} and {value} skipped.")
        return kept

    selectors = entries("selectors", "value", "name")
    if not selectors:
        notes.append(f"{where} has no 'selectors' with a value: this evaluation is left out.")
        return []
    evaluation |= {"selectors": selectors, "paired": entries("paired", "difference", "a", "b")}
    return [evaluation | {k: found[k] for k in ("n", "problems") if isinstance(found.get(k), int)}]


def _estimates(metrics, prefix: str = "") -> tuple[list[dict], list[str]]:
    """Flat list of {name, value, low, high}, and the names of what is no number.

    Nested objects give names like subset/accuracy.
    """
    rows, other = [], []
    for key, value in metrics.items() if isinstance(metrics, dict) else ():
        if words.is_number(value):
            rows.append({"name": prefix + key, "value": value, "low": None, "high": None})
        elif isinstance(value, dict) and words.is_number(value.get("value")):
            rows.append({"name": prefix + key} | _bounds(value, "value"))
        elif isinstance(value, dict):
            deeper, more = _estimates(value, f"{prefix}{key}/")
            rows, other = rows + deeper, other + more
        else:
            other.append(prefix + key)
    return rows, other


def _bounds(entry: dict, key: str) -> dict:
    """{key, low, high}; half an interval counts as none."""
    low, high = entry.get("low"), entry.get("high")
    both = words.finite(low) and words.finite(high)
    return {key: entry[key], "low": low if both else None, "high": high if both else None}


def _samples(records: list[dict], notes: list[str]) -> list[dict]:
    """[{prompt str, answers [{text, score float|None, correct bool|None}]}], best score first."""
    samples, bad = [], 0
    for record in records:
        prompt, answers = _dialogue(record.get("prompt")), record.get("answers")
        whole = isinstance(prompt, str) and isinstance(answers, list)
        if not whole or not all(
            isinstance(a, dict) and isinstance(a.get("text"), str) for a in answers
        ):
            bad += 1
            continue
        rows = [
            {
                "text": a["text"],
                "score": a["score"] if words.is_number(a.get("score")) else None,
                "correct": a["correct"] if isinstance(a.get("correct"), bool) else None,
            }
            for a in answers
        ]
        # Scores that are missing or not finite go last; ties keep the order of the file.
        rows.sort(key=lambda a: -a["score"] if words.finite(a["score"]) else math.inf)
        samples.append({"prompt": prompt, "answers": rows})
    if bad:
        notes.append(
            f"samples.jsonl: {words.count(bad, 'record')} without a prompt and answers skipped."
        )
    return samples


def _round(name: str, records: list[dict], notes: list[str]) -> dict:
    """{prompts [{prompt str, answers [{text, reward float|None, parts {name: float}, finished
    bool|None, tokens int|None}]}]}, all in the order of the file."""
    prompts, bad = {}, 0
    for record in records:
        prompt, answer, parts = (record.get(k) for k in ("prompt", "answer", "parts"))
        prompt = _dialogue(prompt)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            bad += 1
            continue
        reward, tokens, finished = (record.get(k) for k in ("reward", "tokens", "finished"))
        whole = isinstance(tokens, int) and words.is_number(tokens) and words.finite(tokens)
        parts = parts.items() if isinstance(parts, dict) else ()
        # Ids may repeat, and so may prompts.
        answers = prompts.setdefault((str(record.get("id")), prompt), [])
        answers.append(
            {
                "text": answer,
                "reward": reward if words.is_number(reward) else None,
                "parts": {part: value for part, value in parts if words.is_number(value)},
                "finished": finished if isinstance(finished, bool) else None,
                "tokens": tokens if whole else None,
            }
        )
    if bad:
        notes.append(
            f"{name}: {words.count(bad, 'record')} without a prompt and an answer skipped."
        )
    shown = [{"prompt": prompt, "answers": rows} for (_, prompt), rows in prompts.items()]
    return {"prompts": shown}


def _dialogue(prompt):
    """Messages as text; anything else as it is."""
    if not isinstance(prompt, list):
        return prompt
    return "\n\n".join(
        f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt if isinstance(m, dict)
    )
