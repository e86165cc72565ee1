"""The report page: what it shows, what it refuses to run, and that its plots tell the truth."""

import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxreward.report import charts, folder, page

HOSTILE = (
    '</script><script>alert(1)</script><img src="http://evil.test/x.png" onerror=alert(1)> & $x$'
)
STEPS = 60


def synthetic_run(root):
    """A made-up run: every number here comes from a formula, none from a training."""
    root.mkdir()
    noise = np.random.default_rng(0)
    lines = []
    for i in range(STEPS):
        step = 20 * (i + 1)
        progress = 1 - math.exp(-step / 400)
        row = {
            "step": step,
            "train/loss": 0.70 - 0.22 * progress + 0.03 * noise.normal(),
            "train/accuracy": float(np.clip(0.5 + 0.24 * progress + 0.05 * noise.normal(), 0, 1)),
            "train/margin": 1.4 * progress + 0.1 * noise.normal(),
            "train/lr": 2e-5 * min(step / 100, 1) * 0.5 * (1 + math.cos(math.pi * step / 1200)),
            "train/grad_norm": 2.0 - progress,
            "train/tokens_per_second": 41_000.0 + 500 * noise.normal(),
        }
        if step % 200 == 0:
            row["eval/heldout/accuracy"] = 0.5 + 0.21 * progress
            row["eval/heldout/loss"] = 0.69 - 0.15 * progress
            row["eval/shifted_prompts/accuracy"] = 0.5 + 0.13 * progress
            row["eval/heldout/margin"] = 0.9 * progress
        lines.append(json.dumps(row))
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "name": "synthetic reward model",
        "model": {"depth": 2, "width": 32, "adapters": None},
        "optim": {"lr": 2e-5, "betas": [0.9, 0.98], "clip": 1.0},
        "data": {"path": "pairs.jsonl", "max_len": 512, "pack": True},
        "note": HOSTILE,
    }
    (root / "config.json").write_text(json.dumps(config))
    environment = {
        "versions": {"jax": "0.10.2", "numpy": "2.3.0"},
        "platform": "cpu",
        "command": "jaxreward train --config reward_model/pairs",
        "data": {"train": {"sha256": "ab" * 32}},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    }
    (root / "environment.json").write_text(json.dumps(environment))
    (root / "evals").mkdir()
    heldout = {
        "name": "heldout",
        "protocol": {"pairs": 1000, "interval": "Wilson, 95 %"},
        "metrics": {
            "accuracy": {"value": 0.712, "low": 0.683, "high": 0.739},
            "loss": 0.561,
            "subset": {"chat": {"accuracy": 0.74}, "maths": {"accuracy": 0.68}},
        },
    }
    (root / "evals" / "heldout.json").write_text(json.dumps(heldout))
    best = {
        "name": "best_of_4",
        "kind": "best_of_n",
        "n": 4,
        "problems": 250,
        "protocol": {"temperature": 0.8},
        "selectors": [
            {"name": "reward model", "value": 0.412, "low": 0.352, "high": 0.474},
            {"name": "majority vote", "value": 0.396, "low": 0.337, "high": 0.458},
            {"name": "longest answer", "value": 0.304, "low": 0.250, "high": 0.364},
            {"name": "random answer", "value": 0.321, "low": 0.281, "high": 0.363},
            {"name": "oracle", "value": 0.588, "low": 0.526, "high": 0.647},
        ],
        "paired": [
            {
                "a": "reward model",
                "b": "random answer",
                "metric": "solved",
                "difference": 0.091,
                "low": 0.042,
                "high": 0.140,
            },
            {
                "a": "reward model",
                "b": "majority vote",
                "metric": "solved",
                "difference": 0.016,
                "low": -0.028,
                "high": 0.060,
            },
            {
                "a": "longest answer",
                "b": "reward model",
                "metric": "solved",
                "difference": -0.108,
                "low": -0.167,
                "high": -0.049,
            },
        ],
    }
    (root / "evals" / "best_of_4.json").write_text(json.dumps(best))
    samples = []
    for i in range(60):
        answers = []
        for k in range(4):
            right = (i * 7 + k * 3) % 5 < 2
            text = f"There are {i} boxes of {k + 2} pens, so {i * (k + 2)} pens in all."
            score = float(noise.normal(0.9 if right else -0.3, 1.0))
            answers.append({"text": text, "score": score, "correct": right})
        samples.append(
            {"prompt": f"A shop has {i} boxes. How many pens are there?"} | {"answers": answers}
        )
    samples[0]["answers"][2]["text"] = HOSTILE
    samples[1]["prompt"] = HOSTILE
    samples[2]["answers"][0]["text"] = "word " * 60 + "unbroken" * 60
    (root / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return root


@pytest.fixture
def run_folder(tmp_path):
    return synthetic_run(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The page of the synthetic run, written once, for tests that only read it."""
    return page.write(synthetic_run(tmp_path_factory.mktemp("finished") / "run"))


class Page(html.parser.HTMLParser):
    """Tags with attributes, visible text, the embedded JSON, and what the charts draw."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.unclosed = [], [], []
        self.text, self.script = "", ""
        self.paths, self.dots = {}, {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id", "")))
        if tag == "path" and "d" in attributes:
            owners = [name for _, name in self.open if "-data-" in name]
            if owners:
                self.paths.setdefault(owners[-1], attributes["d"])
        if tag == "use" and "-data-dot-" in "".join(name for _, name in self.open):
            owner = [name for _, name in self.open if "-data-dot-" in name][-1]
            self.dots[owner] = float(attributes["x"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.unclosed.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data):
        if any(tag == "script" for tag, _ in self.open):
            self.script += data
        elif not any(tag == "style" for tag, _ in self.open):
            self.text += data

    def vertices(self, name):
        """[N, 2] corner points of one drawn path."""
        return np.array(re.findall(r"[ML] (\S+) (\S+)", self.paths[name]), float)


def parsed(path):
    return Page(path.read_text("utf-8"))


def assert_affine(values, pixels):
    """Pixels are a straight-line function of values: the picture is to scale."""
    values, pixels = np.asarray(values, float), np.asarray(pixels, float)
    fit = np.polynomial.Polynomial.fit(values, pixels, 1)
    np.testing.assert_allclose(fit(values), pixels, atol=2e-3)
    assert np.ptp(pixels) > 10


def test_the_page_is_well_formed_and_fetches_and_runs_nothing(finished):
    """Catches an external font, image or script, an inline handler, and an unclosed tag."""
    assert finished.name == "report.html" and finished.parent.name == "run"
    found = parsed(finished)
    assert not found.unclosed and not found.open
    for tag, attributes in found.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "report-data"}]
    style = re.search(r"<style>(.*?)</style>", finished.read_text(), re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style


def test_ids_are_unique_and_every_reference_has_its_target(finished):
    """Catches two charts sharing a clip path, or an id that was stripped though pointed at."""
    text = finished.read_text()
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = re.findall(r'(?:href="|url\()#([^")]+)', text)
    pointed += re.findall(r'aria-labelledby="([^"]+)"', text)
    assert pointed and set(pointed) <= set(ids)


def test_hostile_text_is_shown_and_not_run(run_folder):
    """Catches an answer, prompt or setting that reaches the page unescaped."""
    best = json.loads((run_folder / "evals" / "best_of_4.json").read_text())
    best["name"] = best["selectors"][0]["name"] = best["paired"][0]["a"] = HOSTILE
    best["paired"][0]["metric"] = HOSTILE
    (run_folder / "evals" / "best_of_4.json").write_text(json.dumps(best))
    text = page.write(run_folder).read_text("utf-8")
    assert "<img" not in text and text.count("<script") == 1 and text.count("</script") == 1
    found = Page(text)
    assert found.text.count(HOSTILE) >= 6
    shown = json.loads(found.script)["charts"]
    assert HOSTILE in [row["name"] for c in shown if c["kind"] == "bars" for row in c["rows"]]


def test_text_without_a_utf8_form_and_odd_names_are_survived(run_folder):
    """Catches a crash on a lone surrogate, a control character or a glyph no font here has."""
    odd = {
        "prompt": "\ud800 \u202e",
        "answers": [{"text": "\udfff\x00", "score": 1.0, "correct": True}],
    }
    with (run_folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(odd) + "\n")
    best = json.loads((run_folder / "evals" / "best_of_4.json").read_text())
    best["selectors"][0]["name"] = "報酬\n\ud800$\\frac{"
    (run_folder / "evals" / "best_of_4.json").write_text(json.dumps(best))
    assert "報酬" in page.write(run_folder).read_text("utf-8")
    page.picture(run_folder, run_folder / "picture.png")


def test_the_plots_are_to_scale_with_the_embedded_values(finished):
    """Catches a plot of other numbers than the JSON block holds: the SVG paths are read back."""
    found = parsed(finished)
    shown = {chart["id"]: chart for chart in json.loads(found.script)["charts"]}
    assert set(shown) == {
        "loss",
        "accuracy",
        "margin",
        "lr",
        "eval2-bars",
        "eval2-paired",
        "scores",
    }
    for name in ("loss", "accuracy", "margin", "lr"):
        x, y, pixels_x, pixels_y = [], [], [], []
        for i, series in enumerate(shown[name]["series"]):
            for part, kind in (("value", "line"), ("mean", "mean")):
                if series[part] is None:
                    continue
                vertices = found.vertices(f"chart-{name}-data-{kind}-{i}")
                assert len(vertices) == len(series["step"])
                x, y = x + series["step"], y + series[part]
                pixels_x, pixels_y = pixels_x + [*vertices[:, 0]], pixels_y + [*vertices[:, 1]]
        assert_affine(x, pixels_x)  # all series of a chart on one scale
        assert_affine(y, pixels_y)
    bars, dots = shown["eval2-bars"]["rows"], shown["eval2-paired"]["rows"]
    values, pixels = [0.0], [found.vertices("chart-eval2-bars-data-bar-0")[:, 0].min()]
    for i, row in enumerate(bars):
        ends = found.vertices(f"chart-eval2-bars-data-whisker-{i}")[:, 0]
        values += [row["value"], row["low"], row["high"]]
        pixels += [found.vertices(f"chart-eval2-bars-data-bar-{i}")[:, 0].max(), *ends]
    assert_affine(values, pixels)
    values, pixels = [], []
    for i, row in enumerate(dots):
        values += [row["low"], row["high"]]
        pixels += [*found.vertices(f"chart-eval2-paired-data-whisker-{i}")[:, 0]]
        values += [row["difference"]]
        pixels += [found.dots[f"chart-eval2-paired-data-dot-{i}"]]
    assert_affine(values, pixels)
    heights, tops = [], []
    for group in shown["scores"]["groups"]:
        vertices = found.vertices(f"chart-scores-data-{group['name']}")
        assert math.isclose(sum(group["share"]), 1, rel_tol=1e-5)
        # A step outline: base, then two corners a bin, then base.
        heights += group["share"]
        tops += [*vertices[1 : 1 + 2 * len(group["share"]) : 2, 1]]
    assert_affine(heights, tops)


def test_the_embedded_values_are_those_of_the_files(finished):
    """Catches a curve that is shifted, re-ordered or silently smoothed."""
    shown = {c["id"]: c for c in json.loads(parsed(finished).script)["charts"]}
    lines = [
        json.loads(line) for line in (finished.parent / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("loss", "accuracy", "margin", "lr"):
        training = shown[name]["series"][0]
        assert training["step"] == [line["step"] for line in lines]
        np.testing.assert_allclose(
            training["value"], [x[f"train/{name}"] for x in lines], rtol=1e-6
        )
    names = [series["name"] for series in shown["accuracy"]["series"]]
    assert names == ["training", "heldout", "shifted_prompts"]
    assert shown["accuracy"]["series"][1]["step"] == [200, 400, 600, 800, 1000, 1200]
    best = json.loads((finished.parent / "evals" / "best_of_4.json").read_text())
    assert shown["eval2-bars"]["rows"] == best["selectors"]
    answers = [
        answer
        for line in (finished.parent / "samples.jsonl").read_text().splitlines()
        for answer in json.loads(line)["answers"]
    ]
    right = [a["score"] for a in answers if a["correct"]]
    group = shown["scores"]["groups"][0]
    assert (group["name"], group["count"]) == ("right", len(right))
    counted = np.histogram(right, shown["scores"]["edges"])[0]
    np.testing.assert_allclose(np.array(group["share"]) * len(right), counted, atol=1)


def test_writing_twice_gives_the_same_bytes(run_folder, tmp_path):
    """Catches a date, a random id or a dictionary order in the page or the picture."""
    first = page.write(run_folder, tmp_path / "one.html").read_bytes()
    assert page.write(run_folder, tmp_path / "two.html").read_bytes() == first
    picture = page.picture(run_folder, tmp_path / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert page.picture(run_folder, tmp_path / "two.png").read_bytes() == picture
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.html",
        "one.png",
        "run",
        "two.html",
        "two.png",
    ]  # no half-written neighbour is left


def test_the_callers_matplotlib_settings_are_neither_used_nor_changed(
    run_folder, tmp_path, monkeypatch
):
    """Catches rcParams that leak in (another page) or out (another's plots restyled)."""
    import matplotlib

    # Another test may have imported it; the page must not.
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plain = page.write(run_folder, tmp_path / "one.html").read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "path.simplify": True}):
        assert page.write(run_folder, tmp_path / "two.html").read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 30.0
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("config.json", "<summary>Configuration"),
        ("environment.json", "<summary>Environment"),
        ("samples.jsonl", "Sample answers"),
        ("metrics.jsonl", '<h2 id="training">'),
    ],
)
def test_a_missing_part_is_left_out_and_named(run_folder, finished, missing, gone):
    """Catches a report that fails, or is silent, when a part of the run was never written."""
    assert gone in finished.read_text("utf-8")
    (run_folder / missing).unlink()
    found = page.write(run_folder)
    assert gone not in found.read_text("utf-8")
    assert f"No {missing} in the run folder" in parsed(found).text


def test_metrics_alone_and_evaluations_alone_are_enough(run_folder, tmp_path):
    """Catches a report that needs more than the one part the contract asks for."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.7}\n')
    text = parsed(page.write(alone)).text
    assert text.count("in the run folder") == 4 and "alone" in text
    (run_folder / "metrics.jsonl").unlink()
    assert "Best of 4" in parsed(page.write(run_folder)).text


def test_unreadable_lines_are_skipped_and_counted(run_folder):
    """Catches a run killed mid-write whose last line makes the report fail or goes unmentioned."""
    with (run_folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"train/loss": 1.0}\n{"step": 700, "train/lo\xc3')
    before = len(folder.read(run_folder)["steps"])
    assert before == STEPS
    text = parsed(page.write(run_folder)).text
    assert "metrics.jsonl: 2 unreadable lines skipped." in text
    assert "metrics.jsonl: 1 line without a whole-number step skipped." in text


def test_a_broken_evaluation_is_named_and_the_rest_is_shown(run_folder):
    """Catches one bad file in evals/ taking the whole report down."""
    (run_folder / "evals" / "cut.json").write_text('{"name": "cut", "metr')
    (run_folder / "evals" / "list.json").write_text("[]")
    (run_folder / "evals" / "words.json").write_text('{"metrics": {"accuracy": "high"}}')
    best = json.loads((run_folder / "evals" / "best_of_4.json").read_text())
    best["selectors"][1]["value"] = None
    (run_folder / "evals" / "best_of_4.json").write_text(json.dumps(best))
    text = parsed(page.write(run_folder)).text
    assert "evals/cut.json is not readable JSON" in text
    assert "evals/list.json holds a list, not a JSON object" in text
    assert "evals/words.json: not numbers, so not shown: accuracy." in text
    assert "evals/best_of_4.json: 1 entry of 'selectors' without name and value skipped." in text
    assert "Heldout" in text


def test_a_resumed_run_shows_the_later_values(tmp_path):
    """Catches a curve that goes back in time where a resumed run logged the same steps again."""
    rows = [
        {"step": s, "train/loss": v} for s, v in ((1, 0.7), (2, 0.6), (3, 9.0), (2, 0.5), (3, 0.4))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = folder.read(tmp_path)
    (loss,) = charts.collect(run)
    assert loss["series"][0]["step"] == [1, 2, 3]
    assert loss["series"][0]["value"] == [0.7, 0.5, 0.4]
    assert any("2 lines logged a step again" in note for note in run["notes"])


def test_values_that_are_not_finite_become_gaps_and_are_counted(tmp_path):
    """Catches NaN in the JSON block (not JSON) and a diverged loss that looks healthy."""
    text = '{"step": 1, "train/loss": 0.7}\n{"step": 2, "train/loss": NaN}\n'
    text += '{"step": 3, "train/loss": Infinity}\n{"step": 4, "train/loss": 0.6}\n'
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "train/margin": NaN}\n')
    found = parsed(page.write(tmp_path))
    (loss,) = json.loads(found.script, parse_constant=pytest.fail)["charts"]
    assert loss["series"][0]["value"] == [0.7, None, None, 0.6]
    assert "2 values not finite" in found.text


def test_long_curves_are_drawn_as_bin_means(tmp_path):
    """Catches thinning that drops points, and a page that grows with the length of the run."""
    rows = [{"step": s, "train/loss": float(s % 2)} for s in range(4000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (loss,) = charts.collect(folder.read(tmp_path))
    series = loss["series"][0]
    assert series["value"] == [0.5] * charts.POINTS and series["mean"] == [0.5] * charts.POINTS
    assert series["step"][0] == 4.5 and series["step"][-1] == 3994.5
    assert "4,000 points, drawn as means of 400 bins" in loss["about"]


def test_the_running_mean_is_a_centred_mean():
    """Catches a mean that lags at the ends: a falling loss would seem to start lower."""
    values = np.array([0.0, 3.0, 6.0, np.nan, 1.0])
    np.testing.assert_allclose(charts._running_mean(values, 3), [0.0, 3.0, 4.5, np.nan, 1.0])


def test_answers_are_sorted_by_score(run_folder):
    """Catches samples in file order, and a missing or NaN score that breaks the sort."""
    answers = [
        {"text": "low", "score": -2.5},
        {"text": "none"},
        {"text": "high", "score": 3, "correct": True},
        {"text": "nan", "score": math.nan},
        {"text": "middle", "score": 0.25, "correct": False},
    ]
    line = json.dumps({"prompt": [{"role": "user", "content": "Say"}], "answers": answers})
    (run_folder / "samples.jsonl").write_text(line + '\n{"prompt": "no answers"}\n')
    run = folder.read(run_folder)
    order = [a["text"] for a in run["samples"][0]["answers"]]
    assert order == ["high", "middle", "low", "none", "nan"]
    text = parsed(page.write(run_folder)).text
    assert "user: Say" in text and "−2.5" in text
    assert "samples.jsonl: 1 record without a prompt and answers skipped." in text
    assert "3 without a verdict or a finite score left out" in text


def answers(root, number, *lines):
    (root / "answers").mkdir(exist_ok=True)
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (root / "answers" / f"{number:06d}.jsonl").write_text(text)


def answer(text, reward=0.25, finished=True, prompt="1 + 1?", **more):
    known = {"round": 0, "id": "7", "prompt": prompt, "answer": text, "reward": reward}
    parts = {"math/accuracy": 0.0, "length/tail": reward}
    return known | {"parts": parts, "tokens": 12, "finished": finished} | more


def test_answers_of_the_first_and_the_last_round_are_shown(tmp_path):
    """Catches answers of a round between, another order, a lost reward, part or cut, and more of
    them than can be read; HTML in an answer, a prompt or the name of a part must be text."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.7}\n')
    chat = [{"role": "user", "content": "2 + 2?"}]
    first = [answer(f"first {i}", reward=i) for i in range(5)]
    answers(tmp_path, 0, *first, answer("four", prompt=chat), answer("six", prompt="3 + 3?"))
    answers(tmp_path, 1, answer("between"))
    answers(
        tmp_path,
        10,
        answer(HOSTILE, prompt=HOSTILE, parts={HOSTILE: 1.5}, finished=False),
        answer("bare", parts=None, tokens=None, finished=None, reward=None, prompt=HOSTILE),
        {"prompt": "no answer"},
        '{"cut',
    )
    (tmp_path / "answers" / "mine.jsonl").write_text("{}\n")
    file = page.write(tmp_path)
    found, text = parsed(file), file.read_text("utf-8")
    flat = " ".join(found.text.split())
    for part in (
        "Answers in training",
        "First round, number 0 Prompt 1 1 + 1? 0 finished first 0 math/accuracy 0 · length/tail 0 "
        "· 12 tokens 1 finished first 1 math/accuracy 0 · length/tail 1 · 12 tokens 2 finished",
        "2 more answers in the file. Prompt 2 user: 2 + 2? 0.25 finished four",
        f"Last round, number 10 Prompt 1 {HOSTILE} 0.25 cut off {HOSTILE} {HOSTILE} 1.5 · 12 tokens"
        " – bare",
        "answers/000010.jsonl: 1 unreadable line skipped.",
        "answers/000010.jsonl: 1 record without a prompt and an answer skipped.",
        "No samples.jsonl in the run folder: no score histogram.",
    ):
        assert part in flat, part
    for gone in ("first 3", "six", "between", "mine.jsonl", "000001"):
        assert gone not in flat, gone
    assert "<img" not in text and text.count("<script") == 1 and not found.unclosed
    read = [name for name, *_ in folder.read(tmp_path)["files"]]
    assert read[-2:] == ["answers/000000.jsonl", "answers/000010.jsonl"]
    for number in (0, 1):
        (tmp_path / "answers" / f"{number:06d}.jsonl").unlink()
    assert "Only round, number 10" in parsed(page.write(tmp_path)).text


def test_key_figures_provenance_and_tables_are_in_the_page(finished):
    """Catches a headline taken from the wrong place and a page that does not say what it shows."""
    found = parsed(finished)
    text = re.sub(r"[ \n]+", " ", found.text)  # keeps the spaces that do not break
    for wanted in (
        "synthetic reward model",
        "71.2\u00a0%",
        "95\u00a0% interval 68.3 to 73.9\u00a0%",
        "against 32.1\u00a0% for random answer",
        "ab" * 32,
        "0123456789abcdef0123456789abcdef01234567",
        "optim.betas",
        "[0.9, 0.98]",
        "2e-05",
        "subset/maths/accuracy",
        "+9.1",
    ):
        assert wanted in text, wanted
    tables = sum(tag == "table" for tag, _ in found.tags)
    assert tables == sum(tag == "caption" for tag, _ in found.tags) >= 6
    cells = [attributes for tag, attributes in found.tags if tag == "th"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in cells)
    pictures = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(pictures) == 7 and all(a["role"] == "img" and a["aria-labelledby"] for a in pictures)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_have_contrast(theme):
    """Catches a colour that cannot be read: 4.5 for text and 3 for lines (WCAG 2.2, 1.4)."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    colours = charts.PALETTE[theme]
    for surface in ("paper", "card"):
        for name in ("ink", "muted", *charts.SERIES):
            low, high = sorted([luminance(colours[surface]), luminance(colours[name])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (surface, name)
    assert charts.PALETTE["light"].keys() == charts.PALETTE["dark"].keys()


def test_a_folder_that_holds_nothing_is_refused_by_name(tmp_path):
    """Catches an empty page where the path was wrong, and an error that does not help."""
    (tmp_path / "run_one").mkdir()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*run_one"):
        page.write(tmp_path / "run_on")
    with pytest.raises(FileNotFoundError, match=r"nothing to report .* No metrics\.jsonl"):
        page.write(tmp_path / "run_one")
    (tmp_path / "run_one" / "metrics.jsonl").write_text('{"step": 1, "train/grad_norm": 1.0}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        page.picture(tmp_path / "run_one", tmp_path / "picture.png")
    assert "train/grad_norm" in parsed(page.write(tmp_path / "run_one")).text


def test_importing_the_report_loads_nothing_heavy():
    """Catches matplotlib or jax at the top of the module: the command line would start slowly."""
    code = (
        "import sys, jaxreward.report.page\n"
        "print(sorted({'jax', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
