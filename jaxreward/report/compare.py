"""Several models side by side: one HTML page, and all that it shows as JSON beside it.

The page is made as `page` makes a run's: a single file in which nothing runs and nothing is
fetched. What the JSON holds is also in the page, byte for byte as values.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from jaxreward.report import comparison_charts, page, results, words

__all__ = ["write"]

ROWS = 24  # longer tables are closed at first
TITLES = {
    "suite": "Suite {}",
    "pairs": "Pairs, {}",
    "probing": "Probes, {}",
    "hypotheses": "Hypotheses, {}",
}
MARKS = {1: "▲", -1: "▼", 0: "○"}


def write(files: Sequence, out) -> Path:
    """Write a comparison of models as one self-contained HTML page, and as JSON.

    Args:
        files: JSON files that evaluations wrote; see `results.read`.
        out: path of the page, which ends in .html. The JSON has its name with .json.

    Returns:
        The path of the page. What is missing or broken is left out and named in the page.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: no result is in the files, or the JSON would replace one of them.
    """
    from markupsafe import Markup

    out = Path(out)
    values = out.with_suffix(".json")
    if out.suffix != ".html":
        raise ValueError(f"the page must be called FILE.html; received {out}")
    if values.resolve() in [Path(file).resolve() for file in files]:
        raise ValueError(
            f"the values of the page would be written over {values}; call the page something else"
        )
    if values.exists() and '"comparisons"' not in values.read_text(errors="replace"):
        raise ValueError(
            f"the values of the page would be written over {values}, which is no earlier "
            "comparison; call the page something else"
        )
    run = results.read(files)
    drawn, compared = comparison_charts.collect(run)
    data = {
        "models": run["models"],
        "parts": [
            {key: part[key] for key in ("id", "kind", "name")}
            | {"metrics": {model: entry["metrics"] for model, entry in part["entries"].items()}}
            for part in run["parts"]
        ],
        "comparisons": compared,
        "charts": drawn,
        "files": [{"name": n, "bytes": size, "sha256": digest} for n, size, digest in run["files"]],
        "notes": run["notes"],
    }
    pictures = [chart | {"svg": Markup(comparison_charts.svg(chart))} for chart in drawn]
    figures = [figure for part in run["parts"] if (figure := _figure(part))]
    content = page.render(
        "compare.html.jinja",
        data,
        name="Comparison of models" if len(run["models"]) > 1 else run["models"][0],
        summary=_summary(run, compared),
        figures=figures[:6],
        parts=[_view(part, pictures, compared) for part in run["parts"]],
        protocols=[(name, page.flat(protocol)) for name, protocol in run["protocols"]],
        files=[(name, f"{size:,}", digest) for name, size, digest in run["files"]],
        notes=run["notes"],
    )
    text = json.dumps(data, allow_nan=False, indent=1, sort_keys=True)
    page.replace(values, (text + "\n").encode("utf-8", "replace"))
    page.replace(out, content)
    return out


def _summary(run: dict, compared: list[dict]) -> str:
    names = ", ".join(run["models"])
    text = f"{words.count(len(run['models']), 'model')} ({names}) on "
    text += f"{words.count(len(run['parts']), 'evaluation')}."
    if compared:
        sure = sum(pair["sure"] for pair in compared)
        text += f" {sure} of {words.count(len(compared), 'paired difference')} "
        text += "are significant after correction for their number."
    return text


def _figure(part: dict) -> dict | None:
    """{label, value, about} of the best model in what the part is known by."""
    values = {
        model: {row["name"]: row["value"] for row in entry["metrics"]}
        for model, entry in part["entries"].items()
    }
    for metric in ("overall", "accuracy", "macro"):
        known = {m: v[metric] for m, v in values.items() if v.get(metric) is not None}
        if known:
            best = max(known, key=known.get)
            also = f", highest of {len(known)}" if len(known) > 1 else ""
            label = f"{_title(part)}, {metric}"
            return {"label": label, "value": words.percent(known[best]), "about": best + also}
    return None


def _title(part: dict) -> str:
    return TITLES[part["kind"]].format(part["name"])


def _view(part: dict, pictures: list[dict], compared: list[dict]) -> dict:
    models = list(part["entries"])
    cells = {
        model: {row["name"]: _cell(row, part["kind"]) for row in entry["metrics"]}
        for model, entry in part["entries"].items()
    }
    names = dict.fromkeys(name for of in cells.values() for name in of)
    pairs = [
        {
            "name": f"{pair['a']} − {pair['b']}",
            "mark": MARKS[_sign(pair)],
            "measure": pair["measure"],
            "common": f"{pair['items']:,}",
            "difference": words.points(pair["difference"], True),
            "interval": f"{words.points(pair['low'], True)} to {words.points(pair['high'], True)}",
            "p": _chance(pair["adjusted"]),
            "verdict": _verdict(pair),
        }
        for pair in compared
        if pair["part"] == part["id"]
    ]
    mine = [chart for chart in pictures if chart["part"] == part["id"]]
    first = [chart for chart in mine if chart["kind"] in ("grouped", "paired")]
    return {
        "id": part["id"],
        "title": _title(part),
        "charts": [group for group in (first, [c for c in mine if c not in first]) if group],
        "models": models,
        "rows": [[name, *(cells[model].get(name, "–") for model in models)] for name in names],
        "long": len(names) > ROWS,
        "pairs": pairs,
    }


def _cell(row: dict, kind: str) -> str:
    share = words.is_share(row["name"], *(row[k] for k in ("value", "low", "high")))
    share = share or (kind == "suite" and row["low"] is not None)
    value = words.reader(share)(row["value"])
    interval = words.interval(row["low"], row["high"], share)
    return value if interval == "–" else f"{value} ({interval})"


def _sign(pair: dict) -> int:
    return 0 if not pair["sure"] else 1 if pair["difference"] > 0 else -1


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _verdict(pair: dict) -> str:
    a, b = pair["a"], pair["b"]
    if pair["sure"]:
        return f"{a} is {'higher' if pair['difference'] > 0 else 'lower'} than {b}."
    return f"Undecided: {words.count(pair['items'], 'item')} do not tell {a} from {b}."
