"""The charts of a run: first as plain data, then drawn from exactly that data.

`collect` decides what is shown and holds every plotted value; the drawing functions add nothing
to it, and the page embeds the same list as JSON. Drawing uses matplotlib's figures directly: no
pyplot, so no state is shared with the caller's own plots.
"""

import contextlib
import html
import io
import math
import re
import warnings

import numpy as np

from jaxreward.report import words

__all__ = ["PALETTE", "collect", "draw", "style", "svg"]

# One table of colours for the page and the PNG; tests check its contrast.
PALETTE = {
    "light": {
        "paper": "#ffffff",
        "card": "#f5f7f9",
        "ink": "#1b2026",
        "muted": "#56606b",
        "line": "#d5dbe1",
        "grid": "#e9edf0",
        "c1": "#0b5fa5",
        "c2": "#b3480f",
        "c3": "#3f7418",
        "c4": "#7a3fa0",
    },
    "dark": {
        "paper": "#101418",
        "card": "#181d23",
        "ink": "#e4e9ee",
        "muted": "#9da8b4",
        "line": "#343d47",
        "grid": "#262d35",
        "c1": "#6fb4f8",
        "c2": "#f2a264",
        "c3": "#9ccb6a",
        "c4": "#c99ff0",
    },
}
SERIES = ("c1", "c2", "c3", "c4")
CURVES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "margin": "Score margin",
    "rollouts/reward": "Reward",
    "rollouts/outcome": "Outcome",
    "lr": "Learning rate",
}
POINTS = 400  # longer curves are drawn as bin means: more dots than pixels only cost bytes
WIDTH, HEIGHT = 4.5, 2.75  # inches of one chart; at phone width the type is still 10 px


def collect(run: dict) -> list[dict]:
    """Every chart of a run as plain JSON-ready data: exactly the values that are drawn.

    Args:
        run: what `folder.read` returned.

    Returns:
        List of dicts with `id`, `kind`, `title`, `about` and the arrays of that kind:
        "curve": `series` of {name, step, value, mean|None}; None in `value` is a gap.
        "bars": `rows` of {name, value, low, high}. "differences": `rows` of {a, b, difference,
        low, high}. "histogram": `edges` [N+1] and `groups` of {name, count, mean, share [N]}.
    """
    found = [chart for metric in CURVES if (chart := _curve(run["steps"], metric))]
    for evaluation in run["evals"]:
        if "selectors" in evaluation:
            found += _best_of_n(evaluation)
    return found + _histogram(run["samples"])


def _curve(steps: dict, metric: str) -> dict | None:
    keys = {key for row in steps.values() for key in row}
    wanted = {metric, "learning_rate"} if metric == "lr" else {metric}
    named = [k for k in keys if k.split("/")[-1] in wanted and k.split("/")[0] in ("train", "eval")]
    series, about = [], []
    for key in sorted(named, key=lambda k: (not _training(k), k)):
        part = "/".join(key.split("/")[1:-1])
        name = "/".join(filter(None, ("training", part))) if _training(key) else part or "eval"
        pairs = [(step, row[key]) for step, row in steps.items() if key in row]
        x = np.array([step for step, _ in pairs], float)
        y = np.array([value if words.finite(value) else np.nan for _, value in pairs], float)
        if not np.isfinite(y).any():
            about.append(f"{name}: no finite value.")
            continue
        if np.isnan(y).any():
            about.append(f"{name}: {words.count(int(np.isnan(y).sum()), 'value')} not finite.")
        if len(x) > POINTS:
            about.append(f"{name}: {len(x):,} points, drawn as means of {POINTS} bins.")
            x, y = _thin(x), _thin(y)
        mean = None
        if _training(key) and metric != "lr" and len(x) >= 40:
            window = 2 * (len(x) // 40) + 1
            mean = _plain(_running_mean(y, window))
            about.append(f"{name}: single values faint, running mean of {window} in full.")
        entry = {"name": name, "key": key, "step": _plain(x), "value": _plain(y), "mean": mean}
        series.append(entry)
    if not series:
        return None
    values = [v for s in series for v in s["value"] if v is not None]
    return {
        "id": metric,
        "kind": "curve",
        "title": CURVES[metric],
        "about": " ".join(about),
        "share": words.is_share(metric, *values),
        "series": series,
    }


def _training(key: str) -> bool:
    return key.startswith("train/")


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of POINTS equal bins, leaving out what is not finite: f64[N] -> f64[POINTS]."""
    bins = np.array_split(values, POINTS)
    return np.array([b[np.isfinite(b)].mean() if np.isfinite(b).any() else np.nan for b in bins])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over an odd window, of the finite values.

    Near the ends the window shrinks on both sides alike; cut on one side only, the mean would
    lag there, and a falling loss would seem to start lower than it did.
    """
    ok = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(ok, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(ok)])
    i = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(i, i[::-1]))
    low, high = i - reach, i + reach + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(ok, means, np.nan)


def _plain(values: np.ndarray) -> list:
    """Floats as JSON can hold them, seven figures; NaN becomes None."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values]


def _best_of_n(evaluation: dict) -> list[dict]:
    rows = [s for s in evaluation["selectors"] if words.finite(s["value"])]
    pairs = [p for p in evaluation["paired"] if words.finite(p["difference"])]
    share = words.all_shares(evaluation)
    title, problems, found = words.title(evaluation), evaluation.get("problems"), []
    if rows:
        over = f"Over {words.count(problems, 'problem')}, with" if problems else "With"
        chart = {"id": f"{evaluation['id']}-bars", "kind": "bars", "share": share, "rows": rows}
        found.append(
            chart | {"title": f"{title}, by selector", "about": f"{over} 95\u00a0% intervals."}
        )
    if pairs:
        about = "First minus second on the same problems, with 95\u00a0% intervals."
        chart = {"id": f"{evaluation['id']}-paired", "kind": "differences", "share": share}
        found.append(chart | {"title": "Paired differences", "about": about, "rows": pairs})
    return found


def _histogram(samples: list[dict]) -> list[dict]:
    answers = [a for s in samples for a in s["answers"]]
    known = [a for a in answers if a["correct"] is not None and words.finite(a["score"])]
    if not known:
        return []
    edges = np.histogram_bin_edges([float(a["score"]) for a in known], bins=24)
    groups = []
    for name, correct in (("right", True), ("wrong", False)):
        scores = np.array([a["score"] for a in known if a["correct"] is correct], float)
        if scores.size:
            share = np.histogram(scores, edges)[0] / scores.size
            mean = float(f"{scores.mean():.7g}")
            row = {"name": name, "count": int(scores.size), "mean": mean, "share": _plain(share)}
            groups.append(row)
    means = ", ".join(f"{words.number(g['mean'])} for {g['name']}" for g in groups)
    about = (
        f"{words.count(len(known), 'answer')}, mean score {means}. Each group sums to 100\u00a0%."
    )
    if len(known) < len(answers):
        about += f" {len(answers) - len(known):,} without a verdict or a finite score left out."
    return [
        {
            "id": "scores",
            "kind": "histogram",
            "title": "Scores of right and wrong answers",
            "about": about,
            "edges": _plain(edges),
            "groups": groups,
        }
    ]


@contextlib.contextmanager
def style(ink: dict):
    """matplotlib with its own defaults (not the user's file) and ours on top; restored after."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script the bundled font lacks: the page's own fonts draw it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",  # text stays text: small, and read by screen readers
                "svg.hashsalt": "jaxreward",  # ids depend on content, not on chance
                "path.simplify": False,  # every point that is in the JSON is in the path
                "text.parse_math": False,  # a "$" in a name is a dollar sign
                "font.size": 9.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": ink["line"],
                "axes.facecolor": "none",
                "axes.labelcolor": ink["muted"],
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.titlelocation": "left",
                "axes.titlesize": 11,
                "axes.titlecolor": ink["ink"],
                "axes.titlepad": 12,
                "axes.formatter.use_mathtext": False,
                "grid.color": ink["grid"],
                "grid.linewidth": 0.8,
                "xtick.color": ink["line"],
                "ytick.color": ink["line"],
                "xtick.labelcolor": ink["muted"],
                "ytick.labelcolor": ink["muted"],
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "text.color": ink["ink"],
                "legend.frameon": False,
                "legend.fontsize": 9.5,
                "legend.borderaxespad": 0.2,
                "legend.handlelength": 1.4,
                "legend.columnspacing": 1.2,
                "legend.labelcolor": ink["ink"],
                "lines.solid_capstyle": "round",
            }
        )
        yield


def draw(ax, chart: dict, ink: dict) -> None:
    """Draw one chart of `collect` on matplotlib axes, with the colours of a `PALETTE` entry."""
    kinds = {
        "curve": _draw_curve,
        "bars": _draw_bars,
        "differences": _draw_differences,
        "histogram": _draw_histogram,
    }
    kinds[chart["kind"]](ax, chart, ink)


def _draw_curve(ax, chart: dict, ink: dict) -> None:
    for i, series in enumerate(chart["series"]):
        training, colour = _training(series["key"]), ink[SERIES[i % len(SERIES)]]
        x, y = np.array(series["step"], float), np.array(series["value"], float)
        mark = {"marker": "os^Dvp"[i % 6], "markersize": 4.5} if not training or len(x) == 1 else {}
        faint = series["mean"] is not None
        name, look = (
            words.label(series["name"]),
            {"color": colour, "linewidth": 0.8 if faint else 1.8},
        )
        (line,) = ax.plot(x, y, alpha=0.35 if faint else 1, **look, **mark)
        line.set_gid(f"data-line-{i}")
        if faint:
            (line,) = ax.plot(x, np.array(series["mean"], float), color=colour, linewidth=1.8)
            line.set_gid(f"data-mean-{i}")
        line.set_label(name)
    ax.set_xlabel("step")
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda v, _: words.number(float(v))))
    ax.yaxis.set_major_locator(_ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(_ticks(chart["share"]))
    if len(chart["series"]) > 1:
        _legend_above(ax)


def _draw_bars(ax, chart: dict, ink: dict) -> None:
    rows = chart["rows"]
    places, values = np.arange(len(rows)), [row["value"] for row in rows]
    bars = ax.barh(places, values, height=0.62, color=ink["c1"], alpha=0.8)
    for i, (row, bar) in enumerate(zip(rows, bars)):
        bar.set_gid(f"data-bar-{i}")
        if row["low"] is not None:
            whisker = ax.plot([row["low"], row["high"]], [i, i], color=ink["ink"], linewidth=1.6)
            whisker[0].set_gid(f"data-whisker-{i}")
        end = max(row["value"], row["value"] if row["high"] is None else row["high"], 0)
        ax.annotate(
            words.reader(chart["share"])(row["value"]),
            (end, i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )
    highs = [row["value"] if row["high"] is None else row["high"] for row in rows]
    lows = [row["value"] if row["low"] is None else row["low"] for row in rows]
    top, bottom = max(0, *highs, *values), min(0, *lows, *values)
    if top > bottom:
        ax.set_xlim(bottom, top + 0.26 * (top - bottom))  # room for the printed values
    _rows_axis(ax, [words.label(row["name"]) for row in rows], ink)
    ax.xaxis.set_major_formatter(_ticks(chart["share"]))


def _draw_differences(ax, chart: dict, ink: dict) -> None:
    ax.axvline(0, color=ink["muted"], linewidth=1.2)
    for i, row in enumerate(chart["rows"]):
        sure = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
        colour = ink["c1"] if sure else ink["muted"]
        if row["low"] is not None:
            whisker = ax.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=2)
            whisker[0].set_gid(f"data-whisker-{i}")
        (dot,) = ax.plot([row["difference"]], [i], "o", color=colour, markersize=6.5)
        dot.set_gid(f"data-dot-{i}")
    ax.margins(x=0.08)
    names = [f"{words.label(row['a'], 20)}\n− {words.label(row['b'], 20)}" for row in chart["rows"]]
    _rows_axis(ax, names, ink)
    scale = 100 if chart["share"] else 1
    ax.xaxis.set_major_formatter(
        _ticker().FuncFormatter(lambda v, _: words.points(float(f"{scale * v:.3g}"), False))
    )
    ax.set_xlabel("points" if chart["share"] else "difference")


def _draw_histogram(ax, chart: dict, ink: dict) -> None:
    for group in chart["groups"]:
        right = group["name"] == "right"
        look = (
            {"fill": True, "alpha": 0.45} if right else {"linewidth": 1.8, "linestyle": (0, (4, 2))}
        )
        name = f"{group['name']} ({group['count']:,})"
        colour = ink["c1" if right else "c2"]
        steps = ax.stairs(group["share"], chart["edges"], color=colour, label=name, **look)
        steps.set_gid(f"data-{group['name']}")
    ax.set_xlabel("score")
    ax.yaxis.set_major_locator(_ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(_ticks(True))
    _legend_above(ax)


def _rows_axis(ax, names: list[str], ink: dict) -> None:
    ax.set_yticks(np.arange(len(names)), names)
    ax.set_ylim(len(names) - 0.45, -0.55)  # first row on top
    ax.tick_params(axis="y", labelcolor=ink["ink"])
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _legend_columns(labels: list[str]) -> int:
    """As many as fit: a legend wider than the axes would squeeze them."""
    lengths = [len(label) + 5 for label in labels]
    return len(lengths) if sum(lengths) <= 46 else max(1, 46 // max(lengths))


def _legend_above(ax) -> None:
    columns = _legend_columns(ax.get_legend_handles_labels()[1])
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _ticker():
    from matplotlib import ticker

    return ticker


def _ticks(share: bool):
    if share:
        return _ticker().FuncFormatter(lambda v, _: f"{100 * v:.3g} %".replace("-", "−"))
    return _ticker().FuncFormatter(lambda v, _: words.number(float(f"{v:.6g}")))


def _height(chart: dict) -> float:
    """Inches: a chart grows with its rows, or with the lines of its legend."""
    if "rows" in chart:
        return 0.75 + (0.5 if chart["kind"] == "differences" else 0.36) * len(chart["rows"])
    labels = [words.label(entry["name"]) for entry in chart.get("series", ())]
    lines = -(-len(labels) // _legend_columns(labels)) if len(labels) > 1 else 1
    return HEIGHT + 0.2 * (lines - 1)


def _spoken(chart: dict) -> str:
    """What a chart shows, in words, for those who do not see it."""
    say = words.reader(chart.get("share", False))
    if chart["kind"] == "curve":
        parts = []
        for s in chart["series"]:
            seen = [(x, v) for x, v in zip(s["step"], s["value"]) if v is not None]
            (x0, v0), (x1, v1) = seen[0], seen[-1]
            start = f"{s['name']} from {say(v0)} at step {words.number(x0)}"
            parts.append(f"{start} to {say(v1)} at step {words.number(x1)}")
        return "; ".join(parts) + "."
    if chart["kind"] == "bars":
        return "; ".join(f"{r['name']} {say(r['value'])}" for r in chart["rows"]) + "."
    if chart["kind"] == "differences":
        unit = " points" if chart["share"] else ""
        parts = []
        for row in chart["rows"]:
            difference = words.points(row["difference"], chart["share"]) + unit
            parts.append(f"{row['a']} minus {row['b']} {difference}")
        return "; ".join(parts) + "."
    return "; ".join(
        f"{g['count']:,} {g['name']}, mean {words.number(g['mean'])}" for g in chart["groups"]
    )


def svg(chart: dict, draw=draw, height=_height, spoken=_spoken) -> str:
    """One chart as inline SVG, its colours replaced by the page's CSS variables.

    Args:
        chart: as `collect` gives them, or of another kind with its own of what follows.
        draw: (axes, chart, colours) draws it.
        height: chart -> inches.
        spoken: chart -> what it shows, in words.
    """
    from matplotlib.figure import Figure

    # Colours no palette uses stand for the variables until the text is written.
    ink = {name: f"#0a0b{i:02x}" for i, name in enumerate(PALETTE["light"])}
    with style(ink):
        figure = Figure(figsize=(WIDTH, height(chart)), layout="constrained", facecolor="none")
        draw(figure.add_subplot(), chart, ink)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in ink.items():
        text = text.replace(colour, f"var(--{name})")
    # Inside HTML the namespaces are implied, and matplotlib's style would reach the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    # Ids are unique in a page: keep those that are pointed at, and our own, behind the chart's.
    pointed = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    prefix = f"chart-{chart['id']}"

    def renamed(match) -> str:
        name = match.group(1)
        return f' id="{prefix}-{name}"' if name in pointed or name.startswith("data-") else ""

    text = re.sub(r' id="([^"]*)"', renamed, text)
    text = re.sub(r"(xlink:href=\"|url\()#", rf"\1#{prefix}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    title = html.escape(f"{chart['title']}. {spoken(chart)}")
    box = re.search(r'viewBox="[^"]*"', text).group(0)
    head = f'<svg class="plot" {box} role="img" aria-labelledby="{prefix}-title">'
    head += f'<title id="{prefix}-title">{title}</title>'
    return head + text[text.index(">") + 1 :].strip()
