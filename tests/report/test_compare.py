"""The comparison page: its plots tell what its JSON says, and a browser shows it quietly."""

import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess

import numpy as np
import pytest

from jaxreward.report import compare, comparison_charts, paired, results

HOSTILE = '</script><img src=x onerror=alert(1)> & "$x$"'
MODELS = {"runs/large": 1.6, "runs/small": 0.5}


# Made-up results: every number comes from a draw, none from a model


def suite_file(folder, model, skill, items=120):
    """A result of suites, as `recipes.suites` writes them, with its items beside it."""
    rng, lines, wins = np.random.default_rng(7), [], []
    for i in range(items):
        scores = rng.normal(size=3) + np.array([skill, 0, 0])
        name = ("honest", "harmless")[i % 2]
        row = {"suite": "hhh", "id": str(i), "subset": name, "right": [0]}
        lines.append(json.dumps(row | {"scores": scores.tolist()}))
        wins.append(np.mean(scores[0] > scores[1:]))
    estimate = lambda x: (
        {"value": float(np.mean(x)), "low": float(np.mean(x) - 0.04)}
        | {"high": float(min(1, np.mean(x) + 0.04))}
    )
    metrics = {"accuracy": estimate(wins), "ties": 0, "items": items, "missing": ["helpful"]}
    metrics |= {"honest": estimate(wins[::2]), "harmless": estimate(wins[1::2])}
    found = {"metrics": metrics, "items": items, "skipped": {"cannot be encoded": 1}, "files": []}
    protocol = {"by": "score: the reward of the head", "limit": None, "note": HOSTILE}
    result = {"model": model, "protocol": protocol, "environment": {}, "suites": {"hhh": found}}
    file = folder / f"{model.split('/')[-1]}-suites.json"
    file.write_text(json.dumps(result))
    file.with_suffix(".items.jsonl").write_text("\n".join(lines) + "\n")
    return file


def probing_file(folder, model, skill):
    """A result of `evals.probing.probe` on two tasks."""
    tasks = {}
    for name, majority in (("safety", 0.55), ("style", 0.7)):
        value = min(0.95, majority + 0.1 * skill)
        tasks[name] = {
            "accuracy": {"value": value, "low": value - 0.03, "high": value + 0.03},
            "majority": majority,
            "above_majority": {"difference": value - majority, "low": 0.01, "high": 0.2},
            "balanced_accuracy": value,
            "shuffled": {"accuracy": majority, "majority": majority},
        }
    metrics = {"accuracy": 0.7, "majority": 0.6} | tasks
    result = {"name": "mrmbench-easy-strong", "protocol": {"model": model}, "metrics": metrics}
    file = folder / f"{model.split('/')[-1]}-probes.json"
    file.write_text(json.dumps(result))
    return file


def pairs_file(folder, model, skill):
    """A result of `recipes.evaluate.evaluate`."""
    value = {"value": 0.6 + 0.1 * skill, "low": 0.55 + 0.1 * skill, "high": 0.65 + 0.1 * skill}
    metrics = {"accuracy": value, "margin": {"value": 0.4, "low": 0.3, "high": 0.5}, "pairs": 90.0}
    result = {"name": "heldout", "protocol": {"model": model, "sha256": "a"}, "metrics": metrics}
    file = folder / f"{model.split('/')[-1]}-heldout.json"
    file.write_text(json.dumps(result))
    return file


def hypotheses_file(folder, sets=40):
    """A result of HEAL, with the sets and the log-probabilities that it names."""
    rng, records, lines = np.random.default_rng(3), [], []
    for i in range(sets):
        rewards = rng.normal(size=4)
        hyps = [{"text": f"{i} {k}", "source": "a"} for k in range(4)]
        records.append({"id": str(i), "prompt": "Q", "hyps": hyps, "scores": {"rm": [*rewards]}})
        for name, skill in (("base", 0.0), ("dpo", 2.0)):
            logp = [float(x) for x in 5 * (skill * rewards + rng.normal(size=4))]
            row = {"model": name, "step": None, "id": str(i), "logp": logp, "tokens": [5] * 4}
            lines.append(json.dumps(row))
    data = folder / "sets.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    value = lambda x: {"value": x, "low": x - 0.05, "high": x + 0.05}
    order = lambda x: {"mean": {"ranking_accuracy": value(x), "strength": value(2 * x - 1)}}
    change = {"kept_right": 0.45, "kept_wrong": 0.05, "broken": 0.1, "repaired": 0.4}
    change = {name: value(x) for name, x in change.items()} | {"captures": 1.0}
    metrics = {
        "base": {"rm": order(0.51)},
        "dpo": {"rm": order(0.85) | {"change": change}},
        "between proxies": {},
    }
    models = {"base": {"model": "models/base"}, "dpo": {"model": "runs/dpo"}}
    protocol = {"data": "sets.jsonl", "sha256": digest, "delta": 0.0, "models": models}
    file = folder / "heal.json"
    file.write_text(json.dumps({"name": "heal", "protocol": protocol, "metrics": metrics}))
    file.with_suffix(".hypotheses.jsonl").write_text("\n".join(lines) + "\n")
    return file


def all_files(folder):
    made = [hypotheses_file(folder)]
    for model, skill in MODELS.items():
        made += [make(folder, model, skill) for make in (suite_file, probing_file, pairs_file)]
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(path of the page, its text, the values beside it), made once for tests that only read."""
    folder = tmp_path_factory.mktemp("compare")
    path = compare.write(all_files(folder), folder / "out" / "page.html")
    return path, path.read_text("utf-8"), json.loads(path.with_suffix(".json").read_text())


def drawn(text, chart, name):
    """[N, 2] corners of one drawn path of a chart."""
    part = text[text.index(f'id="chart-{chart["id"]}-data-{name}"') :]
    path = re.search(r'<path d="([^"]*)"', part).group(1)
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)


def markers(text, chart, name):
    """[N, 2] places of the markers of one line of a chart."""
    part = text[text.index(f'id="chart-{chart["id"]}-data-{name}"') :]
    part = part[: part.index("</g>\n</g>")]
    return np.array(re.findall(r'<use [^>]*?x="(\S+?)" y="(\S+?)"', part), float)


def assert_to_scale(values, pixels):
    """Pixels are a straight-line function of values."""
    values, pixels = np.asarray(values, float), np.asarray(pixels, float)
    fit = np.polynomial.Polynomial.fit(values, pixels, 1)
    np.testing.assert_allclose(fit(values), pixels, atol=2e-3)
    assert np.ptp(pixels) > 10


def of_kind(values, kind):
    found = [chart for chart in values["charts"] if chart["kind"] == kind]
    assert found, kind
    return found


def test_the_page_embeds_the_values_that_stand_beside_it(finished):
    """Catches a JSON file that drifts from the page, and values that are no JSON."""
    _, text, values = finished
    blob = re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(blob, parse_constant=pytest.fail) == values
    assert {chart["kind"] for chart in values["charts"]} == {
        "grouped",
        "histogram",
        "calibration",
        "scatter",
        "matrix",
        "paired",
    }
    assert len({chart["id"] for chart in values["charts"]}) == len(values["charts"])
    assert text.count('class="plot"') == len(values["charts"])


def test_bars_and_intervals_are_to_scale(finished):
    """Catches bars of another row or model than the JSON says."""
    _, text, values = finished
    for chart in of_kind(values, "grouped"):
        wanted, pixels = [], []
        for i, row in enumerate(chart["rows"]):
            for s, value in enumerate(row["values"]):
                if value is None:
                    continue
                ends = drawn(text, chart, f"bar-{i}-{s}")[:, 0]
                # A bar goes from zero to its value.
                wanted += sorted([0.0, value["value"]])
                pixels += [ends.min(), ends.max()]
                wanted += [value["low"], value["high"]]
                pixels += [*drawn(text, chart, f"whisker-{i}-{s}")[:, 0]]
            if chart["reference"]:
                wanted.append(row["reference"])
                pixels.append(drawn(text, chart, f"reference-{i}")[0, 0])
        assert_to_scale(wanted, pixels)


def test_differences_calibration_and_scatter_are_to_scale(finished):
    """Catches a dot, an interval, a curve or a point that is drawn elsewhere than the JSON says."""
    _, text, values = finished
    for chart in of_kind(values, "paired"):
        wanted, pixels = [], []
        for i, row in enumerate(chart["rows"]):
            wanted += [row["low"], row["high"], row["difference"]]
            pixels += [*drawn(text, chart, f"whisker-{i}")[:, 0]]
            pixels += [*markers(text, chart, f"dot-{i}")[:1, 0]]
        assert_to_scale(wanted, pixels)
    for chart in of_kind(values, "calibration"):
        bins, curve = chart["bins"], chart["curve"]
        whiskers = [drawn(text, chart, f"whisker-{i}") for i in range(len(bins))]
        line, dashed = drawn(text, chart, "line-0"), drawn(text, chart, "curve")
        x = [b["gap"] for b in bins] * 2 + curve["gap"]
        assert_to_scale(x, [*line[:, 0], *(w[0, 0] for w in whiskers), *dashed[:, 0]])
        y = [b["share"] for b in bins] + [b[k] for b in bins for k in ("low", "high")]
        tops = [*line[:, 1], *(y for w in whiskers for y in w[:, 1]), *dashed[:, 1]]
        assert_to_scale(y + curve["share"], tops)
    for chart in of_kind(values, "scatter"):
        points = markers(text, chart, "dots")
        assert len(points) == len(chart["x"]) == 160
        line, reach = drawn(text, chart, "slope"), max(map(abs, chart["x"]))
        assert_to_scale(chart["x"] + [-reach, reach], [*points[:, 0], *line[:, 0]])
        ends = [-reach * chart["slope"], reach * chart["slope"]]
        assert_to_scale(chart["y"] + ends, [*points[:, 1], *line[:, 1]])
    for chart in of_kind(values, "matrix"):
        picture = text[text.index(f'id="chart-{chart["id"]}-data-cell-0-0"') :]
        shown = re.findall(r">(\d+\.\d)\u00a0%<", picture[: picture.index("</svg>")])
        assert [float(x) for x in shown] == [5.0, 40.0, 10.0, 45.0]
        assert chart["cells"] == [[0.05, 0.4], [0.1, 0.45]]


def test_charts_hold_what_the_files_say(finished):
    """Catches rows of another model, controls of probes taken for tasks, and a wrong bin."""
    path, _, values = finished
    assert values["models"] == ["base", "dpo", "large", "small"]
    by_title = {chart["title"]: chart for chart in values["charts"]}
    file = json.loads((path.parents[1] / "small-suites.json").read_text())
    shares = by_title["Shares by dimension"]
    assert [row["name"] for row in shares["rows"]] == ["accuracy", "honest", "harmless"]
    metric = file["suites"]["hhh"]["metrics"]["harmless"]
    assert shares["rows"][2]["values"][1] == metric
    assert [one["name"] for one in shares["series"]] == ["large", "small"]
    probes = by_title["Accuracy of probes by task"]
    assert [row["name"] for row in probes["rows"]] == ["safety", "style"]
    assert [row["reference"] for row in probes["rows"]] == [0.55, 0.7]
    assert [r["name"] for r in by_title["Shares by measure"]["rows"]] == ["accuracy"]  # no margin
    bins = by_title["Right by size of the gap, small"]["bins"]
    lines = (path.parents[1] / "small-suites.items.jsonl").read_text().splitlines()
    scores = np.array([json.loads(line)["scores"] for line in lines])
    gaps = (scores[:, :1] - scores[:, 1:]).ravel()
    nearest = np.argsort(abs(gaps))[: bins[0]["count"]]
    assert bins[0]["count"] == gaps.size / 8 == 30
    assert math.isclose(bins[0]["share"], np.mean(gaps[nearest] > 0), rel_tol=1e-6)
    assert math.isclose(bins[0]["gap"], np.mean(abs(gaps[nearest])), rel_tol=1e-6)
    scatter = by_title["Strength, dpo against rm"]
    assert math.isclose(
        scatter["slope"], np.mean(np.multiply(scatter["x"], scatter["y"])), rel_tol=1e-5
    )
    assert scatter["slope"] > 0.8 > 0.3 > abs(by_title["Strength, base against rm"]["slope"])


def test_significance_is_marked_and_said(finished):
    """Catches a mark on an undecided difference, and a comparison over other items."""
    _, text, values = finished
    (suite,) = [pair for pair in values["comparisons"] if pair["measure"] == "comparisons won"]
    assert (suite["a"], suite["b"], suite["items"]) == ("large", "small", 120)
    assert suite["sure"] and suite["low"] > 0 and suite["adjusted"] == 2 * suite["p"]
    (heal,) = [pair for pair in values["comparisons"] if "ranking accuracy" in pair["measure"]]
    assert heal["difference"] < 0 and heal["items"] == 40
    assert "▲ large is higher than small." in text and "▼ base is lower than dpo." in text
    assert "2 of 2 paired differences are significant" in text
    assert '<td class="num">120</td><td class="num">+' in text
    pair = suite | {"sure": False, "adjusted": 0.2}
    assert compare._verdict(pair) == "Undecided: 120 items do not tell large from small."
    assert compare.MARKS[compare._sign(pair)] == "○"


def test_untrusted_text_stays_text(finished):
    """Catches a setting that reaches the page as markup."""
    _, text, _ = finished
    assert "<img" not in text and text.count("<script") == 1
    assert "default-src 'none'" in text


def test_a_difference_counts_common_items_and_few_of_them_prove_nothing():
    """Catches a bootstrap's p-value: of three items that all say the same it would be 0."""
    a = {str(i): 1.0 for i in range(3)} | {"only": 0.0}
    found = paired.compare(a, {str(i): 0.0 for i in range(3)} | {"other": 1.0})
    assert found["items"] == 3 and found["difference"] == found["low"] == found["high"] == 1.0
    assert abs(found["p"] - 0.25) < 0.02  # 2 of the 8 ways to flip three signs
    assert paired.compare(a, {"else": 1.0}) is None
    same = paired.compare(a, a)
    assert same["difference"] == 0 and same["p"] == 1
    big = {str(i): float(i % 4 > 0) for i in range(400)}
    found = paired.compare(big, {str(i): float(i % 4 > 1) for i in range(400)})
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose([found["low"], found["high"]], [0.25 - half, 0.25 + half], atol=0.01)
    assert found["p"] < 0.001


def test_holm_is_the_textbooks():
    """Catches Bonferroni, a lost order, and adjusted values that fall."""
    assert paired.holm([]) == []
    np.testing.assert_allclose(paired.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(paired.holm([0.9, 0.5]), [1.0, 1.0])


def test_what_an_item_is_worth():
    """Catches an equal score that wins, and items without a right answer that count as lost."""
    assert paired.won({"right": [0], "scores": [1.0, 1.0, 0.0]}) == 0.5
    assert paired.won({"right": [0, 2], "scores": [3.0, 2.0, 1.0]}) == 0.5
    assert paired.won({"right": [], "scores": [3.0, 2.0]}) is None
    assert paired.won({"verdicts": [[0], [1]]}) == 0.5
    assert paired.won({"verdicts": [[-1], [0]]}) == 0.5
    assert paired.won({"verdicts": [[0], [-2]]}) == 1.0
    assert paired.won({"verdicts": [[-2], [-2]]}) is None
    r = np.array([1.0, 2.0, 3.0, np.nan])
    assert paired.ordered(np.array([1.0, 3.0, 2.0, 9.0]), r) == 2 / 3
    assert paired.ordered(np.zeros(4), r) == 0.5 and paired.ordered(r, np.zeros(4)) is None
    assert paired.ordered(np.array([1.0, 3.0, 2.0, 9.0]), r, delta=1.0) == 1.0


def test_broken_and_missing_files_are_named(tmp_path):
    """Catches one bad file that takes the page down, and a gap that goes unsaid."""
    good = suite_file(tmp_path, "runs/large", 1.0, items=30)
    lines = good.with_suffix(".items.jsonl").read_text()
    good.with_suffix(".items.jsonl").write_text(lines + '{"suite": "hhh", "right": [0]}\n{"cut')
    alone = suite_file(tmp_path, "runs/alone", 1.0, items=30)
    alone.with_suffix(".items.jsonl").unlink()
    heal = hypotheses_file(tmp_path, sets=2)
    (tmp_path / "sets.jsonl").write_text("{}\n")
    (tmp_path / "cut.json").write_text('{"metr')
    (tmp_path / "best.json").write_text('{"kind": "best_of_n", "metrics": {}}')
    (tmp_path / "none.json").write_text("{}")
    more = [tmp_path / f"{name}.json" for name in ("cut", "best", "none")]
    notes = results.read([good, alone, heal, *more])["notes"]
    for wanted in (
        "hhh lacks helpful.",
        "left out rows: 1 (cannot be encoded).",
        "large-suites.items.jsonl: 1 unreadable line skipped.",
        "large-suites.items.jsonl: 1 line without scores or verdicts skipped.",
        "No alone-suites.items.jsonl: no distributions, no paired differences.",
        "sets.jsonl has changed: no scatter and no paired differences of heal.json.",
        "cut.json is not readable JSON",
        "best.json is a best-of-n evaluation",
        "none.json holds neither metrics nor suites",
    ):
        assert any(wanted in note for note in notes), wanted
    with pytest.raises(ValueError, match=r"nothing to compare.*cut\.json"):
        results.read(more)
    with pytest.raises(FileNotFoundError, match=r"no result at .*gone\.json"):
        results.read([tmp_path / "gone.json"])
    with pytest.raises(ValueError, match="would be written over"):
        compare.write([good], good.with_suffix(".html"))
    with pytest.raises(ValueError, match=r"FILE\.html"):
        compare.write([good], tmp_path / "page")


def test_models_of_one_name_and_files_of_one_model_are_told_apart(tmp_path):
    """Catches columns that are overwritten."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one = suite_file(tmp_path / "a", "a/model", 1.0, items=5)
    two = suite_file(tmp_path / "b", "b/model", 1.0, items=5)
    assert results.read([one, two, one])["models"] == ["a/model", "b/model"]
    again = tmp_path / "again.json"
    again.write_text(one.read_text())
    assert results.read([one, again])["models"] == ["model", "model · again.json"]
    judged = json.loads(one.read_text()) | {"protocol": {"by": "judge: the letter"}}
    again.write_text(json.dumps(judged))
    assert results.read([one, again])["models"] == ["model", "model (judge)"]


def test_points_and_rows_beyond_the_limit_are_counted():
    """Catches a page that grows with the data, and a thinned plot that does not say so."""
    rng = np.random.default_rng(0)
    sets = {str(i): (rng.normal(size=4), rng.normal(size=4)) for i in range(500)}
    (chart,) = comparison_charts._scatter("m", "p", sets)
    assert len(chart["x"]) == len(chart["y"]) == comparison_charts.POINTS
    assert "2,000 hypotheses of 500 prompts" in chart["about"] and "1,000 points" in chart["about"]
    rows = [
        {"name": str(i), "values": [{"value": 0.5, "low": None, "high": None}]} for i in range(40)
    ]
    found = comparison_charts._grouped("t", rows, ["m"], {"m": 0})
    assert [row["name"] for chart in found for row in chart["rows"]] == [str(i) for i in range(16)]
    assert len(found) == 2 and all("16 of 40" in chart["about"] for chart in found)


# A browser


class Browser:
    """Headless Chromium over a pipe, in its own protocol: one page, and what it complained of."""

    def __init__(self, program, folder):
        ours, theirs = os.pipe(), os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        flags += " --disable-background-networking --disable-dev-shm-usage"
        flags += " --disable-component-update --disable-sync"
        # The protocol's pipe is descriptors 3 and 4.
        run = f'exec "$0" {flags} --remote-debugging-pipe "$1" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", run, program, f"--user-data-dir={folder}"],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.source = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb", 0)
        self.number, self.buffer, self.events = 0, b"", []
        self.session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.source], [], [], 60)
            assert ready, "the browser says nothing for a minute"
            more = self.source.read(65536)
            assert more, "the browser went away"
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def __call__(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        call |= {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def value(self, script):
        return self("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def close(self):
        for pipe in (self.to, self.source):
            pipe.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll *, svg *')
  && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + '.' + e.className)"""

SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(t => Math.hypot(
  t.getScreenCTM().a, t.getScreenCTM().b) * parseFloat(getComputedStyle(t).fontSize)))"""


def test_a_browser_shows_it_offline_and_on_a_phone(finished, tmp_path):
    """Catches an error on the console, anything fetched, a page wider than a phone's screen, and
    type too small to read there."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs the program chromium (apt-get install chromium)")
    url = finished[0].resolve().as_uri()
    browser = Browser(program, tmp_path / "profile")
    try:
        rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser("Network.emulateNetworkConditions", offline=True, **rates)
        for width, theme in ((360, "light"), (1280, "dark")):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser("Emulation.setDeviceMetricsOverride", **size)
            feature = {"name": "prefers-color-scheme", "value": theme}
            browser("Emulation.setEmulatedMedia", features=[feature])
            browser.open(url)
            assert browser.value("innerWidth") == width
            assert browser.value("document.documentElement.scrollWidth") <= width
            browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.value(OVERFLOWING) == []
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.querySelectorAll('svg.plot').length") == len(
                finished[2]["charts"]
            )
            assert browser.value(SMALLEST) >= 9
            fetched = {
                e["params"]["request"]["url"]
                for e in browser.events
                if e.get("method") == "Network.requestWillBeSent"
            }
            assert {u for u in fetched if not u.startswith("data:")} == {url}
            said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            assert [e["params"] for e in browser.events if e.get("method") in said] == []
    finally:
        browser.close()


def test_lines_that_would_stop_the_page_are_no_items():
    """Catches places that point nowhere, or at the last answer, and orders of unequal length."""
    good = {"scores": [0.5, 1.0], "right": [0]}
    assert results._is_item(good) and results._is_item({"verdicts": [[0, 1], [1, -1]]})
    for right in ([2], [-1], [0.0], [True], None):
        assert not results._is_item(good | {"right": right})
    assert not results._is_item({"verdicts": [[0, 1], [0]]})


def test_another_result_is_not_overwritten(finished, tmp_path):
    """Catches the values of the page written over a result that happens to have its name."""
    other = tmp_path / "heal.json"
    other.write_text('{"name": "heal"}')
    with pytest.raises(ValueError, match="no earlier comparison"):
        compare.write([tmp_path / "missing.json"], tmp_path / "heal.html")
    assert other.read_text() == '{"name": "heal"}'
