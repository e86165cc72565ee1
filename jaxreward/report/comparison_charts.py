"""The charts of a comparison of models: first as plain data, then drawn from exactly that data.

As in `charts`, whose bars, histograms and look are used here: `collect` decides what is shown and
holds every plotted value, and the drawing functions add nothing to it.
"""

import itertools

import numpy as np

from jaxreward.report import charts, paired, words

__all__ = ["collect", "svg"]

ROWS = 16  # of bars, in charts of half as many; the table has all
POINTS = 1000  # points of one scatter
SCATTERS = 6  # of one part
BINS = 8  # of calibration, of at least PER_BIN comparisons each
PER_BIN = 20
SIDES = ("wrong", "right")


def collect(run: dict) -> tuple[list[dict], list[dict]]:
    """Charts and paired comparisons of all parts, as plain JSON-ready data.

    Args:
        run: what `results.read` returned.

    Returns:
        (charts, comparisons). Charts have `id`, `part`, `kind`, `title`, `about` and the values of
        their kind:
        "grouped": `series` of {name, place} and `rows` of {name, values}, one {value, low, high} or
        None a series, and `reference`, where rows have one, its name. "histogram": as in `charts`.
        "calibration": `bins` of {gap, share, low, high, count}, `curve` {gap, share} or None.
        "scatter": `x`, `y`, `slope`. "matrix": `cells` [2][2], rows before and columns after, wrong
        first. "paired": `rows` of comparisons.
        Comparisons are {part, measure, a, b, items, difference, low, high, p, adjusted, sure}: a
        less b, with `adjusted` after Holm over all of the page and `sure` where it is below 0.05.
    """
    collectors = {"suite": _suite, "hypotheses": _hypotheses}
    places: dict[str, int] = {}
    drawn, compared = [], []
    for part in run["parts"]:
        # A model keeps its colour; one that is new takes the first that is free in its part.
        taken = {places[model] for model in part["entries"] if model in places}
        free = (place for place in itertools.count() if place not in taken)
        places |= {model: next(free) for model in part["entries"] if model not in places}
        found, pairs = collectors.get(part["kind"], _plain)(part, places)
        drawn += [chart | {"part": part["id"]} for chart in found]
        compared += [pair | {"part": part["id"]} for pair in pairs]
    for pair, adjusted in zip(compared, paired.holm([pair["p"] for pair in compared])):
        pair |= {"adjusted": adjusted, "sure": adjusted < paired.LEVEL}
    if len(compared) >= paired.LEVEL * (paired.DRAWS + 1):
        run["notes"].append(
            f"{len(compared)} differences are too many for {paired.DRAWS} draws: after correction "
            "none can be told. Compare fewer models or checkpoints at once."
        )
    keys = list(dict.fromkeys((pair["part"], pair["measure"]) for pair in compared))
    for part, measure in keys:
        rows = [pair for pair in compared if (pair["part"], pair["measure"]) == (part, measure)]
        about = "First minus second on common items, with 95\u00a0% intervals. Filled: significant."
        chart = {"part": part, "kind": "paired", "title": f"Differences in {measure}"}
        drawn.append(chart | {"about": about, "share": True, "rows": rows})
    for i, chart in enumerate(drawn):
        chart["id"] = f"chart{i + 1}"
    return drawn, compared


def _grouped(title: str, rows: list[dict], models: list[str], places: dict, **more) -> list[dict]:
    """Charts of a bar a row and model; rows are {name, values} and may have a `reference`."""
    rows = [row for row in rows if any(row["values"])]
    about = "With 95\u00a0% intervals."
    if len(rows) > ROWS:
        about += f" The first {ROWS} of {len(rows)} measures; all are in the table."
        rows = rows[:ROWS]
    series = [{"name": name, "place": places[name]} for name in models]
    # Two short charts stand side by side where one would be a tower.
    parts = np.array_split(np.arange(len(rows)), 2) if 2 * len(rows) > ROWS else [range(len(rows))]
    chart = {"kind": "grouped", "about": about, "share": True, "reference": None, "series": series}
    return [
        chart
        | {"title": title if part[0] == 0 else f"{title}, continued"}
        | {"rows": [rows[i] for i in part]}
        | more
        for part in parts
        if len(part)
    ]


def _shares(entries: dict, kind: str) -> list[dict]:
    """Rows of the metrics that are shares: by their name, or of a suite with an interval."""
    by_model = [{row["name"]: row for row in e["metrics"]} for e in entries.values()]
    rows = []
    for name in dict.fromkeys(name for each in by_model for name in each):
        found = [each.get(name) for each in by_model]
        known = [row for row in found if row is not None and row["value"] is not None]
        bounds = [row[k] for row in known for k in ("value", "low", "high") if row[k] is not None]
        named = words.is_share(name) or (
            kind == "suite" and any(row["low"] is not None for row in known)
        )
        if known and named and all(0 <= bound <= 1 for bound in bounds):
            rows.append({"name": name, "values": [_value(row) for row in found]})
    return rows


def _value(row: dict | None) -> dict | None:
    if row is None or not words.finite(row["value"]):
        return None
    return {"value": row["value"]} | {
        key: row[key] if whole else None
        for whole in [words.finite(row.get("low")) and words.finite(row.get("high"))]
        for key in ("low", "high")
    }


def _pairs(values: dict, measure: str) -> list[dict]:
    """Comparisons of all pairs of models with common items; values are {model: {item: value}}."""
    found = []
    for a, b in itertools.combinations(values, 2):
        result = paired.compare(values[a], values[b])
        if result is not None:
            found.append({"measure": measure, "a": a, "b": b} | result)
    return found


# What is shown of each kind of part


def _plain(part: dict, places: dict) -> tuple[list[dict], list[dict]]:
    """Pairs, and probes: a bar a measure, or a task with what the majority class would give."""
    entries, models = part["entries"], list(part["entries"])
    if part["kind"] == "pairs":
        return _grouped("Shares by measure", _shares(entries, part["kind"]), models, places), []
    names = list(dict.fromkeys(task for entry in entries.values() for task in entry["tasks"]))
    rows, above = [], []
    for name in names:
        tasks = [entry["tasks"].get(name) for entry in entries.values()]
        rows.append({"name": name, "values": [_value(t and t["accuracy"]) for t in tasks]})
        rows[-1]["reference"] = next(task["majority"] for task in tasks if task)
        better = [_difference(task) for task in tasks]
        above.append({"name": name, "values": better})
    title, reference = "Accuracy of probes by task", "majority class"
    found = _grouped(title, rows, models, places, reference=reference)
    found += _grouped("Accuracy above the majority class", above, models, places)
    return found, []


def _difference(task: dict | None) -> dict | None:
    above = (task or {}).get("above_majority")
    if not isinstance(above, dict):
        return None
    return _value(above | {"value": above.get("difference")})


def _suite(part: dict, places: dict) -> tuple[list[dict], list[dict]]:
    entries, models = part["entries"], list(part["entries"])
    found, values = (
        _grouped("Shares by dimension", _shares(entries, part["kind"]), models, places),
        {},
    )
    for model, entry in entries.items():
        # What a judge says of PandaLM is which answer came first, not which is right.
        if entry["scored"] or part["name"] != "pandalm":
            each = {key: paired.won(row) for key, row in entry["items"].items()}
            values[model] = {key: value for key, value in each.items() if value is not None}
        rows = [row for row in entry["items"].values() if "scores" in row]
        found += _distributions(model, rows) + _calibration(model, rows, entry["scored"])
    return found, _pairs(values, "comparisons won")


def _distributions(model: str, rows: list[dict]) -> list[dict]:
    answers = []
    for row in rows:
        good, bad = paired.sides(row)
        if good.size and bad.size:
            answers += [{"score": x, "correct": True} for x in good.tolist()]
            answers += [{"score": x, "correct": False} for x in bad.tolist()]
    charted = charts._histogram([{"answers": answers}])
    return [chart | {"title": f"Scores, {model}"} for chart in charted]


def _calibration(model: str, rows: list[dict], scored: bool) -> list[dict]:
    """How often the higher score is the right answer's, by how far the two are apart."""
    gaps, groups = [], []
    for i, row in enumerate(rows):
        good, bad = paired.sides(row)
        gaps.append((good[:, None] - bad).ravel())
        groups.append(np.full(gaps[-1].size, i))
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    count = min(BINS, gap.size // PER_BIN)
    if count < 2:
        return []
    right, size = 0.5 * (1 + np.sign(gap)), np.abs(gap)
    order = np.argsort(size, kind="stable")
    bins = np.empty(gap.size, int)
    for k, members in enumerate(np.array_split(order, count)):
        bins[members] = k
    low, high = paired.resample(right, bins, np.concatenate(groups))
    counts = np.bincount(bins)
    mean = lambda values: np.bincount(bins, values) / counts
    names = ("gap", "share", "low", "high")
    columns = zip(*map(charts._plain, (mean(size), mean(right), low, high)))
    made = [dict(zip(names, row)) | {"count": int(n)} for row, n in zip(columns, counts)]
    about = f"{words.count(gap.size, 'comparison')} in {count} bins of one size; ties count half."
    curve = None
    if scored:
        sure = 1 / (1 + np.exp(-size))
        off = float(np.abs(mean(right) - mean(sure)) @ counts / gap.size)
        about += " Dashed: what the scores claim if they are Bradley-Terry rewards; the bins are "
        about += f"{100 * off:.1f} points off on average."
        x = np.linspace(0, made[-1]["gap"], 33)
        curve = {"gap": charts._plain(x), "share": charts._plain(1 / (1 + np.exp(-x)))}
    title = f"Right by size of the gap, {model}"
    chart = {"kind": "calibration", "title": title, "about": about, "share": True}
    return [chart | {"bins": made, "curve": curve}]


def _hypotheses(part: dict, places: dict) -> tuple[list[dict], list[dict]]:
    entries, models = part["entries"], list(part["entries"])
    found, scatters, compared = [], [], []
    proxies = dict.fromkeys(
        proxy for e in entries.values() for proxy, kinds in e["tree"].items() if _is_tree(kinds)
    )
    for proxy in proxies:
        trees = [entry["tree"].get(proxy) or {} for entry in entries.values()]
        # "a - b": how much better the model agrees with a than with b.
        name = proxy.replace(" - ", " less that against ") if " - " in proxy else proxy
        kinds = dict.fromkeys(kind for tree in trees for kind in tree)
        for measure, title in (("ranking_accuracy", "Ranking accuracy"), ("strength", "Strength")):
            rows = [
                {"name": kind, "values": [_measure(tree.get(kind), measure) for tree in trees]}
                for kind in kinds
            ]
            share, title = measure == "ranking_accuracy", f"{title} against {name}"
            found += _grouped(title, rows, models, places, share=share)
        for model, tree in zip(models, trees):
            found += _flips(model, proxy, tree.get("change"))
        wins = {}
        for model, entry in entries.items():
            sets = _sets(entry["logp"], part["proxies"].get(proxy, {}))
            each = {key: paired.ordered(s, r, part["delta"]) for key, (s, r) in sets.items()}
            wins[model] = {key: value for key, value in each.items() if value is not None}
            scatters += _scatter(model, proxy, sets)
        compared += _pairs(wins, f"ranking accuracy against {proxy}")
    if len(scatters) > SCATTERS:
        scatters[SCATTERS - 1]["about"] += f" {len(scatters) - SCATTERS} more are not drawn."
    return found + scatters[:SCATTERS], compared


def _is_tree(kinds) -> bool:
    return isinstance(kinds, dict) and all(isinstance(kind, dict) for kind in kinds.values())


def _measure(found: dict | None, name: str) -> dict | None:
    value = (found or {}).get(name)
    return _value(value if isinstance(value, dict) or value is None else {"value": value})


def _flips(model: str, proxy: str, change: dict | None) -> list[dict]:
    names = (("kept_wrong", "repaired"), ("broken", "kept_right"))
    cells = [[_measure(change, name) for name in row] for row in names]
    if not all(cell for row in cells for cell in row):
        return []
    title = f"Pairs that training turned, {model} against {proxy}"
    about = "Shares of pairs that the model orders as the proxy does, before and after training."
    chart = {"kind": "matrix", "title": title, "about": about, "share": True}
    return [chart | {"cells": [[cell["value"] for cell in row] for row in cells]}]


def _sets(logp: dict, scores: dict) -> dict:
    """{id: (s, r)} with s the log-probability a token and r the proxy's score, NaN where none."""
    found = {}
    for key, (values, tokens) in logp.items():
        r = scores.get(key)
        if r is not None and len(r) == len(values):
            s = np.where(tokens > 0, values / np.maximum(tokens, 1), np.nan)
            found[key] = s, np.array([np.nan if x is None else x for x in r], float)
    return found


def _scatter(model: str, proxy: str, sets: dict) -> list[dict]:
    """Both scores, standardised within each prompt."""
    x, y, used = [], [], 0
    for s, r in sets.values():
        live = np.isfinite(s) & np.isfinite(r)
        if live.any() and np.ptp(s[live]) > 0 and np.ptp(r[live]) > 0:
            standard = [(v[live] - v[live].mean()) / v[live].std() for v in (r, s)]
            x, y, used = [*x, standard[0]], [*y, standard[1]], used + 1
    if not used:
        return []
    x, y = np.concatenate(x), np.concatenate(y)
    slope = float(np.mean(x * y))
    about = f"{x.size:,} hypotheses of {words.count(used, 'prompt')}, scores standardised within "
    about += "each; the model's is its log-probability a token. Line: their correlation, "
    about += f"{words.number(float(f'{slope:.3f}'))}."
    if x.size > POINTS:
        at = np.linspace(0, x.size - 1, POINTS).round().astype(int)
        x, y, about = x[at], y[at], f"{about} Every so many drawn, {POINTS:,} points."
    chart = {"kind": "scatter", "title": f"Strength, {model} against {proxy}", "about": about}
    values = {"x": charts._plain(x), "y": charts._plain(y), "slope": float(f"{slope:.7g}")}
    return [chart | values]


# Drawing


def svg(chart: dict) -> str:
    """One chart of `collect` as inline SVG, as `charts.svg`."""
    if chart["kind"] not in _KINDS:
        return charts.svg(chart)
    draw, height, spoken = _KINDS[chart["kind"]]
    return charts.svg(chart, draw, height, spoken)


def _look(place: int, ink: dict) -> dict:
    """Colour of a model, the same in all charts, and beyond four of them a hatch too."""
    colour = ink[charts.SERIES[place % len(charts.SERIES)]]
    hatch = ("", "///", "...", "xxx")[place // len(charts.SERIES) % 4]
    return {"color": colour, "hatch": hatch, "edgecolor": ink["paper"], "linewidth": 0}


def _draw_grouped(ax, chart: dict, ink: dict) -> None:
    rows, series, say = chart["rows"], chart["series"], words.reader(chart["share"])
    thick = 0.8 / len(series)
    ends = [0.0]
    for s, one in enumerate(series):
        label = words.label(one["name"])
        for i, row in enumerate(rows):
            value = row["values"][s]
            if value is None:
                continue
            y = i + (s - (len(series) - 1) / 2) * thick
            look = _look(one["place"], ink)
            (bar,) = ax.barh(y, value["value"], height=0.86 * thick, alpha=0.8, **look)
            bar.set_gid(f"data-bar-{i}-{s}")
            bar.set_label(label)
            label = "_"  # one entry in the legend
            bounds = [value["value"]]
            if value["low"] is not None and value["high"] is not None:
                bounds += [value["low"], value["high"]]
                (line,) = ax.plot(bounds[1:], [y, y], color=ink["ink"], linewidth=1.3)
                line.set_gid(f"data-whisker-{i}-{s}")
            ends += bounds
            at = (max(0, *bounds) if value["value"] >= 0 else max(0, bounds[-1]), y)
            said = say(float(f"{value['value']:.4f}"))
            text = ax.annotate(said, at, xytext=(5, 0), textcoords="offset points")
            text.set(va="center", annotation_clip=False)
    for i, row in enumerate(rows if chart["reference"] else ()):
        at = row["reference"]
        (line,) = ax.plot([at, at], [i - 0.46, i + 0.46], color=ink["ink"], linewidth=1.6)
        line.set(linestyle=(0, (2, 1.5)), gid=f"data-reference-{i}")
        line.set_label(chart["reference"] if i == 0 else "_")
        ends.append(at)
    low, high = min(ends), max(ends)
    if high > low:
        ax.set_xlim(low - (0.04 * (high - low) if low < 0 else 0), high + 0.24 * (high - low))
    charts._rows_axis(ax, [words.label(row["name"]) for row in rows], ink)
    ax.xaxis.set_major_formatter(charts._ticks(chart["share"]))
    charts._legend_above(ax)


def _draw_paired(ax, chart: dict, ink: dict) -> None:
    ax.axvline(0, color=ink["muted"], linewidth=1.2)
    for i, row in enumerate(chart["rows"]):
        colour = ink["c1"] if row["sure"] else ink["muted"]
        (line,) = ax.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=2)
        line.set_gid(f"data-whisker-{i}")
        (dot,) = ax.plot([row["difference"]], [i], "o", color=colour, markersize=6.5)
        dot.set(gid=f"data-dot-{i}", markeredgewidth=1.6)
        if not row["sure"]:
            dot.set_markerfacecolor(ink["paper"])
    ax.margins(x=0.08)
    names = [f"{words.label(row['a'], 20)}\n− {words.label(row['b'], 20)}" for row in chart["rows"]]
    charts._rows_axis(ax, names, ink)
    tick = lambda v, _: words.points(float(f"{100 * v:.3g}"), False)
    ax.xaxis.set_major_formatter(charts._ticker().FuncFormatter(tick))
    ax.set_xlabel("points")


def _draw_calibration(ax, chart: dict, ink: dict) -> None:
    bins = chart["bins"]
    if chart["curve"] is not None:
        (line,) = ax.plot(
            chart["curve"]["gap"], chart["curve"]["share"], color=ink["c2"], linewidth=1.6
        )
        line.set(linestyle=(0, (4, 2)), gid="data-curve")
    for i, one in enumerate(bins):
        (line,) = ax.plot(
            [one["gap"]] * 2, [one["low"], one["high"]], color=ink["c1"], linewidth=1.6
        )
        line.set_gid(f"data-whisker-{i}")
    (line,) = ax.plot([b["gap"] for b in bins], [b["share"] for b in bins], "o", color=ink["c1"])
    line.set(linestyle="-", linewidth=0.9, markersize=5.5, gid="data-line-0")
    ax.set_xlabel("gap of the two scores")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(charts._ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(charts._ticks(False))
    ax.yaxis.set_major_locator(charts._ticker().MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(charts._ticks(True))


def _draw_scatter(ax, chart: dict, ink: dict) -> None:
    (points,) = ax.plot(chart["x"], chart["y"], "o", color=ink["c1"], markersize=3, alpha=0.4)
    points.set(markeredgewidth=0, gid="data-dots")
    reach = max(map(abs, chart["x"]))
    (line,) = ax.plot([-reach, reach], [-reach * chart["slope"], reach * chart["slope"]])
    line.set(color=ink["c2"], linewidth=1.8, gid="data-slope")
    ax.set_xlabel("proxy's score")
    ax.set_ylabel("model's score")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(charts._ticker().MaxNLocator(5, integer=True))
        axis.set_major_formatter(charts._ticks(False))


def _draw_matrix(ax, chart: dict, ink: dict) -> None:
    from matplotlib.patches import Rectangle

    for i, row in enumerate(chart["cells"]):
        for j, value in enumerate(row):
            # Pale enough for its text at any share.
            cell = Rectangle((j, i), 0.96, 0.94, alpha=0.06 + 0.34 * min(max(value, 0), 1))
            cell.set(facecolor=ink["c1" if j else "c2"], linewidth=0, gid=f"data-cell-{i}-{j}")
            ax.add_patch(cell)
            text = ax.text(j + 0.48, i + 0.47, words.percent(value), ha="center", va="center")
            text.set_fontsize(13)
    ax.set(xlim=(0, 2), ylim=(2, 0))
    ax.set_xticks([0.48, 1.48], [f"{side} after" for side in SIDES])
    ax.set_yticks([0.47, 1.47], [f"{side} before" for side in SIDES])
    ax.tick_params(labelcolor=ink["ink"])
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _height_grouped(chart: dict) -> float:
    labels = [words.label(one["name"]) for one in chart["series"]]
    labels += [chart["reference"]] if chart["reference"] else []
    lines = -(-len(labels) // charts._legend_columns(labels))
    return 0.7 + 0.2 * lines + len(chart["rows"]) * (0.14 + 0.2 * len(chart["series"]))


def _height_paired(chart: dict) -> float:
    return 0.75 + 0.5 * len(chart["rows"])


def _height_plain(chart: dict) -> float:
    return 2.2 if chart["kind"] == "matrix" else charts.HEIGHT


def _speak_grouped(chart: dict) -> str:
    say = words.reader(chart["share"])
    parts = []
    for row in chart["rows"]:
        pairs = zip(chart["series"], row["values"])
        parts.append(
            f"{row['name']}: " + ", ".join(f"{s['name']} {say(v['value'])}" for s, v in pairs if v)
        )
    return "; ".join(parts) + "."


def _speak_paired(chart: dict) -> str:
    parts = [
        f"{row['a']} minus {row['b']} {words.points(row['difference'], True)} points, "
        f"{'' if row['sure'] else 'not '}significant"
        for row in chart["rows"]
    ]
    return "; ".join(parts) + "."


def _speak_calibration(chart: dict) -> str:
    parts = [f"gap {words.number(b['gap'])}, {words.percent(b['share'])}" for b in chart["bins"]]
    return "; ".join(parts) + "."


def _speak_scatter(chart: dict) -> str:
    return f"{len(chart['x']):,} points, correlation {words.number(chart['slope'])}."


def _speak_matrix(chart: dict) -> str:
    return "; ".join(
        f"{SIDES[i]} before and {SIDES[j]} after {words.percent(value)}"
        for i, row in enumerate(chart["cells"])
        for j, value in enumerate(row)
    )


_KINDS = {
    "grouped": (_draw_grouped, _height_grouped, _speak_grouped),
    "paired": (_draw_paired, _height_paired, _speak_paired),
    "calibration": (_draw_calibration, _height_plain, _speak_calibration),
    "scatter": (_draw_scatter, _height_plain, _speak_scatter),
    "matrix": (_draw_matrix, _height_plain, _speak_matrix),
}
