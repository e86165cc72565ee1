"""A run folder's metrics, evaluations and samples as one HTML page, or one PNG.

The page is a single file: inline SVG, inline style, no script that runs, nothing fetched. Every
number that is drawn is also embedded as JSON. Writing the same folder twice gives the same bytes.

What is read here is untrusted, the model's answers above all: text reaches the page only through
the template's escaping, and a content policy in the page forbids scripts and any fetch.
"""

import io
import json
import os
import re
from importlib import resources
from pathlib import Path

import numpy as np

from jaxreward import __version__
from jaxreward.report import charts, folder, words

__all__ = ["flat", "picture", "render", "replace", "write"]

PROMPTS = 8  # sample prompts shown
ANSWERS = 8  # answers shown per prompt
TEXT = 1500  # characters of one prompt or answer shown
TAKEN = 2, 3  # prompts of a round of training, and answers to each, shown


def write(workdir, out=None) -> Path:
    """Write the report of a run folder as one self-contained HTML page.

    Args:
        workdir: a run folder; see `folder.read` for what it may hold.
        out: path of the page; `workdir`/report.html when None.

    Returns:
        The path written. Parts that are missing or broken are left out and named in the page.

    Raises:
        FileNotFoundError: no such folder, or nothing in it to report.
    """
    from markupsafe import Markup

    run = folder.read(workdir)
    drawn = charts.collect(run)
    pictures = [chart | {"svg": Markup(charts.svg(chart))} for chart in drawn]
    figures = _headlines(run)
    content = render(
        "page.html.jinja",
        {"charts": drawn},
        name=run["name"],
        summary=_summary(figures),
        figures=figures[:6],
        curves=[c for c in pictures if c["kind"] == "curve"],
        measures=_measures(run["steps"]),
        evaluations=[_evaluation_view(e, pictures) for e in run["evals"]],
        histogram=next((c for c in pictures if c["kind"] == "histogram"), None),
        samples=[_sample_view(s) for s in run["samples"][:PROMPTS]],
        sample_count=len(run["samples"]),
        rounds=[_round_view(r, i, run["rounds"]) for i, r in enumerate(run["rounds"])],
        config=flat(run["config"] or {}),
        environment=flat(run["environment"] or {}),
        provenance=_provenance(run),
        files=[(name, f"{size:,}", digest) for name, size, digest in run["files"]],
        notes=run["notes"],
    )
    out = Path(workdir) / "report.html" if out is None else Path(out)
    replace(out, content)
    return out


def render(template: str, data: dict, **values) -> bytes:
    """Fill a template of this folder.

    Args:
        template: its file name.
        data: what its charts draw, which the page embeds as JSON.
        values: what the template names beside; all text among them is escaped.
    """
    import jinja2
    from markupsafe import Markup

    read = lambda name: resources.files("jaxreward.report").joinpath(name).read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blob = json.dumps(data, allow_nan=False, sort_keys=True, separators=(",", ":"))
    # "</script>" and "<!--" cannot occur once these are escapes; JSON reads them back unchanged.
    for character in "<>&":
        blob = blob.replace(character, f"\\u{ord(character):04x}")
    ours = {"palette": charts.PALETTE, "version": __version__, "blob": Markup(blob)}
    text = environment.get_template(template).render(**ours, **values)
    # A lone surrogate in a model's answer has no UTF-8 form; it becomes "?".
    return text.encode("utf-8", "replace")


def replace(path: Path, content: bytes) -> None:
    """Write through a neighbour, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _headlines(run: dict) -> list[dict]:
    """[{label, value, about}], the most telling first; at most two of a kind."""
    plain = [e for e in run["evals"] if "selectors" not in e]
    judged = [e for e in run["evals"] if "selectors" in e]
    last = {key: (step, value) for step, row in run["steps"].items() for key, value in row.items()}
    found = []
    for e in plain[:2]:
        first = next((m for m in e["metrics"] if m["name"] == "accuracy"), e["metrics"][0])
        share = words.is_share(first["name"], first["value"])
        about = words.interval(first["low"], first["high"], share)
        value = words.reader(share)(first["value"])
        about = "" if about == "–" else f"95\u00a0% interval {about}"
        found.append({"label": f"{e['name']} {first['name']}", "value": value, "about": about})
    for e in judged[:2]:
        values = {s["name"]: s["value"] for s in e["selectors"]}
        say = words.reader(words.all_shares(e))
        pair = next((p for p in e["paired"] if p["a"] in values and p["b"] in values), None)
        name = pair["a"] if pair else e["selectors"][0]["name"]
        about = f"against {say(values[pair['b']])} for {pair['b']}" if pair else ""
        found.append({"label": f"{e['name']}, {name}", "value": say(values[name]), "about": about})
    curves = {key for key in last if re.fullmatch(r"eval/(.+/)?accuracy", key)}
    for key in sorted(curves - {f"eval/{e['name']}/accuracy" for e in plain})[:2]:
        step, value = last[key]
        value = words.reader(words.is_share(key, value))(value)
        label = key.removeprefix("eval/").replace("/", " ")
        found.append({"label": label, "value": value, "about": f"at step {step:,}"})
    losses = [row["train/loss"] for row in run["steps"].values() if "train/loss" in row][-10:]
    if losses:
        known = [loss for loss in losses if words.finite(loss)]
        value = words.number(sum(known) / len(known) if known else losses[-1])
        about = f"mean of the last {len(known)} logged" if len(known) > 1 else ""
        found.append({"label": "training loss", "value": value, "about": about})
    if run["steps"]:
        about = f"{len(run['steps']):,} logged"
        found.append({"label": "steps", "value": f"{max(run['steps']):,}", "about": about})
    speeds = [row.get("train/tokens_per_second") for row in run["steps"].values()]
    speeds = [speed for speed in speeds if words.finite(speed)]
    if speeds:
        middle = float(np.median(np.array(speeds, float)))
        value = f"{middle:,.0f}" if middle >= 10 else words.number(middle)
        found.append({"label": "tokens a second", "value": value, "about": "median of the run"})
    return [figure | {"label": figure["label"].replace("_", " ")} for figure in found]


def _summary(figures: list[dict]) -> str:
    parts = []
    for figure in figures[:4]:
        about = f" {figure['about']}" if figure["about"].startswith("against") else ""
        parts.append(f"{figure['label']} {figure['value']}{about}")
    text = "; ".join(parts) + "."
    return text[:1].upper() + text[1:]


def _measures(steps: dict) -> list[tuple]:
    """Rows (key, points, first, last, lowest, highest) of everything that was logged."""
    columns = {}
    for row in steps.values():
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    rows = []
    for key in sorted(columns):
        values = columns[key]
        say = words.reader(words.is_share(key, *values))
        real = [v for v in values if words.finite(v)]
        span = (say(min(real)), say(max(real))) if real else ("–", "–")
        rows.append((key, f"{len(values):,}", say(values[0]), say(values[-1]), *span))
    return rows


def _evaluation_view(evaluation: dict, pictures: list[dict]) -> dict:
    view = {"title": words.title(evaluation), "protocol": flat(evaluation["protocol"])}
    if "selectors" not in evaluation:
        rows = []
        for m in evaluation["metrics"]:
            share = words.is_share(m["name"], *[m[k] for k in ("value", "low", "high")])
            value = words.reader(share)(m["value"])
            rows.append((m["name"], value, words.interval(m["low"], m["high"], share)))
        return view | {"charts": [], "head": "Measure", "rows": rows, "paired": []}
    share, problems = words.all_shares(evaluation), evaluation.get("problems")
    say = words.reader(share)
    rows = [
        (s["name"], say(s["value"]), words.interval(s["low"], s["high"], share))
        for s in evaluation["selectors"]
    ]
    paired = [
        {
            "a": p["a"],
            "b": p["b"],
            "metric": p["metric"],
            "difference": words.points(p["difference"], share),
            "interval": "–"
            if p["low"] is None
            else f"{words.points(p['low'], share)} to {words.points(p['high'], share)}",
            "verdict": words.verdict(p, problems),
        }
        for p in evaluation["paired"]
    ]
    mine = {f"{evaluation['id']}-{kind}" for kind in ("bars", "paired")}
    shown = [c for c in pictures if c["id"] in mine]
    view["protocol"] += flat({k: evaluation[k] for k in ("n", "problems") if k in evaluation})
    heads = {"head": "Selector", "unit": "points" if share else ""}
    return view | heads | {"charts": shown, "rows": rows, "paired": paired}


def _sample_view(sample: dict) -> dict:
    answers = [
        {
            "text": _cut(a["text"]),
            "score": words.number(a["score"]),
            "verdict": {True: "right", False: "wrong", None: ""}[a["correct"]],
        }
        for a in sample["answers"]
    ]
    return {
        "prompt": _cut(sample["prompt"]),
        "answers": answers[:ANSWERS],
        "more": len(answers) - ANSWERS if len(answers) > ANSWERS else 0,
    }


def _round_view(found: dict, place: int, rounds: list[dict]) -> dict:
    said = {True: "finished", False: "cut off", None: ""}
    which = "Only" if len(rounds) == 1 else ("First", "Last")[place]
    prompts, answers = TAKEN
    shown = []
    for prompt in found["prompts"][:prompts]:
        rows = [
            {
                "text": _cut(a["text"]),
                "reward": words.number(a["reward"]),
                "ended": said[a["finished"]],
                "about": [f"{name} {words.number(value)}" for name, value in a["parts"].items()]
                + [words.count(n, "token") for n in [a["tokens"]] if n is not None],
            }
            for a in prompt["answers"][:answers]
        ]
        more = len(prompt["answers"]) - len(rows)
        shown.append({"prompt": _cut(prompt["prompt"]), "answers": rows, "more": more})
    return {"title": f"{which} round, number {found['number']:,}", "prompts": shown}


def _cut(text: str) -> str:
    if len(text) <= TEXT:
        return text
    return f"{text[:TEXT]} […{len(text) - TEXT:,} more characters]"


def flat(tree, prefix: str = "") -> list[tuple[str, str]]:
    """Rows (dotted key, value in words) of nested JSON; lists stay one value."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            rows.append((prefix + key, value))
        elif words.is_number(value):
            # A setting is shown as it was set: rounding or separators would misquote it.
            rows.append((prefix + key, repr(value)))
        else:
            rows.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return rows


def _provenance(run: dict) -> list[tuple[str, str]]:
    """The settings that pin the run to its data and code."""
    pins = re.compile(r"sha256|hash|commit|revision|dirty", re.IGNORECASE)
    rows = []
    for origin in ("environment", "config"):
        for key, value in flat(run[origin] or {}):
            if pins.search(key):
                rows.append((f"{origin}: {key}", value))
    return rows


def picture(workdir, out_png) -> Path:
    """Write the key charts of a run (curves, best-of-n, score histogram) as one PNG.

    Args:
        workdir: a run folder; see `folder.read`.
        out_png: path of the image.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: no such folder, or nothing in it to report.
        ValueError: the folder holds nothing that can be drawn.
    """
    from matplotlib.figure import Figure

    run = folder.read(workdir)
    drawn = [chart for chart in charts.collect(run) if chart["kind"] != "differences"]
    if not drawn:
        raise ValueError(
            f"nothing to draw in {workdir}: expected {', '.join(charts.CURVES)} in metrics.jsonl, "
            "a best_of_n evaluation or judged samples; the tables are in the HTML report (write)"
        )
    columns = min(len(drawn), 3 if len(drawn) > 4 else 2)
    rows = -(-len(drawn) // columns)
    ink = charts.PALETTE["light"]
    with charts.style(ink):
        figure = Figure(
            figsize=(charts.WIDTH * columns, 3.1 * rows),
            layout="constrained",
            facecolor=ink["paper"],
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for i, chart in enumerate(drawn):
            ax = figure.add_subplot(rows, columns, i + 1)
            charts.draw(ax, chart, ink)
            ax.set_title(words.label(chart["title"], 40), pad=24 if ax.get_legend() else 12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    out_png = Path(out_png)
    replace(out_png, buffer.getvalue())
    return out_png
