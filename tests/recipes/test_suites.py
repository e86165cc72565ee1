"""Public suites end to end: files in, one JSON with the protocol and one line an item out."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxreward.data import sources, tokenize
from jaxreward.hub import export, load
from jaxreward.models import heads, trainable
from jaxreward.recipes import evaluate, suites

HHH = [
    {"idx": i, "dimension": name, "prompt": f"Q{i}?", "chosen": "Yes " * i, "rejected": "no"}
    for i, name in enumerate(("helpful", "honest", "harmless", "other"), start=1)
]
PANDA = {"idx": 1, "instruction": "Do.", "input": "", "response1": "a", "response2": "b"}
PANDA |= {f"annotator{i}": 1 for i in (1, 2, 3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with three suites; PandaLM has a row with a boolean, RM-Bench one domain."""
    folder = tmp_path_factory.mktemp("suites")
    sources.write_jsonl(folder / "hhh.jsonl", HHH)
    broken = {**PANDA, "idx": 2, "response1": False}
    sources.write_jsonl(folder / "pandalm.jsonl", [PANDA, broken])
    styles = {"id": 1, "prompt": "Q", "chosen": ["a", "ab", "abc"], "rejected": ["b", "ba", "bac"]}
    sources.write_jsonl(folder / "rm_bench.jsonl", [{**styles, "domain": "chat"}])
    return folder


@pytest.fixture(scope="module")
def scorer(tiny_folder, tmp_path_factory):
    """A reward model of three outputs, as a folder."""
    cfg, params, _ = load.load(tiny_folder)
    head = heads.Config("scores", ("a", "b", "c"), weights=(1.0, -2.0, 0.5))
    plan = trainable.Plan(cfg, "all", head=head)
    whole, score = trainable.join(plan, *trainable.init(plan, params, jax.random.key(1)))
    out = tmp_path_factory.mktemp("scorer") / "model"
    kw = {"source": tiny_folder, "score": score, "head": head, "about": "Toy."}
    return export.write(out, cfg, whole, **kw)


@pytest.fixture(scope="module")
def model(scorer):
    """The reward model, loaded once for all tests."""
    return evaluate.load_model(scorer, batch=2)


@pytest.fixture
def loaded(scorer, model, monkeypatch):
    """Has the recipe take `model` where it loads the folder."""
    take = {(scorer, 2): model}
    monkeypatch.setattr(suites.evaluate, "load_model", lambda folder, batch: take[folder, batch])
    return scorer


def lines(out):
    return [row for _, row in sources.read_jsonl(out.with_suffix(".items.jsonl"))]


def test_scores_are_rewards_and_the_protocol_stands_beside_them(loaded, model, data, tmp_path):
    """Catches outputs compared in place of rewards, items in another order, facts left out."""
    out = tmp_path / "new" / "result.json"
    with pytest.warns(UserWarning, match="skipped 1 of 2 rows: response1: must be str"):
        got = suites.run(loaded, ["hhh", "pandalm"], data, out, batch=2)
    assert json.loads(out.read_text()) == got
    rows = lines(out)
    assert [(row["suite"], row["id"]) for row in rows] == [
        *(("hhh", str(i)) for i in range(1, 5)),
        ("pandalm", "1"),
    ]
    assert rows[4]["labels"] == [1, 1, 1] and rows[0]["right"] == [0]
    trees = [
        tokenize.encode_tree(model.tokenizer, r["prompt"], [r["chosen"], r["rejected"]])
        for r in HHH
    ]
    want = np.array(model.predict(trees))
    np.testing.assert_allclose([row["scores"] for row in rows[:4]], want, atol=1e-5)
    metrics = got["suites"]["hhh"]["metrics"]
    assert metrics["accuracy"]["value"] == np.mean(want[:, 0] > want[:, 1])
    assert metrics["items"] == got["suites"]["hhh"]["items"] == 4
    facts = got["protocol"]
    assert (facts["template"], facts["truncation"], facts["limit"]) == ("chat", "none", None)
    assert facts["compute"] == "float32" and facts["weights"] == [1.0, -2.0, 0.5]
    assert facts["order"] == "each answer alone" and facts["by"].startswith("score:")
    assert facts["model_sha256"] == load.content_hash(loaded)
    (file,) = got["suites"]["pandalm"]["files"]
    assert file["sha256"] == sources.data_hash(data / "pandalm.jsonl")
    assert sum(got["suites"]["pandalm"]["skipped"].values()) == 1
    assert got["suites"]["hhh"]["longest"] == max(
        len(t.prompt) + max(map(len, t.answers)) for t in trees
    )


def test_one_output_of_several_is_what_answers_are_compared_by(loaded, model, data, tmp_path):
    """Catches the reward in place of the output, a wrong one, and a name that nobody explains."""
    out = tmp_path / "b.json"
    got = suites.run(loaded, ["hhh"], data, out, batch=2, by="b")
    trees = [
        tokenize.encode_tree(model.tokenizer, r["prompt"], [r["chosen"], r["rejected"]])
        for r in HHH
    ]
    want = np.array(model.outputs(trees))[:, :, 1]
    np.testing.assert_allclose([row["scores"] for row in lines(out)], want, atol=1e-5)
    assert got["suites"]["hhh"]["metrics"]["accuracy"]["value"] == np.mean(want[:, 0] > want[:, 1])
    assert got["protocol"]["by"].startswith("b: this output")
    assert got["protocol"]["weights"] == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"score, likelihood, judge, or .*: a, b, c.*'d'"):
        suites.run(loaded, ["hhh"], data, batch=2, by="d")


def test_a_missing_part_needs_a_limit(loaded, data):
    """Catches RM-Bench's number from one domain, and a limit that is ignored."""
    with pytest.raises(ValueError, match="rm_bench lacks code, math"):
        suites.run(loaded, ["hhh", "rm_bench"], data)
    got = suites.run(loaded, ["hhh"], data, limit=2, batch=2)["suites"]["hhh"]
    assert got["items"] == 2 and got["metrics"]["missing"] == ["harmless", "other"]
    assert (
        set(got["metrics"]) >= {"accuracy", "helpful", "honest"} and "macro" not in got["metrics"]
    )


def test_a_language_model_is_measured_by_likelihood(tiny_folder, data, tmp_path):
    """Against transformers, one answer at a time: catches a sum for a mean, a prompt counted."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "lm.json"
    got = suites.run(tiny_folder, ["hhh"], data, out, by="likelihood")
    assert got["protocol"]["by"].startswith("likelihood: mean log-probability a token")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = tokenize.load_tokenizer(tiny_folder)
    for row, record in zip(lines(out), HHH, strict=True):
        for score, answer in zip(row["scores"], (record["chosen"], record["rejected"])):
            text = tokenize.encode_conversation(tokenizer, record["prompt"], answer)
            with torch.no_grad():
                logits = model(torch.tensor([text.tokens])).logits[0]
            logps = torch.log_softmax(logits[:-1], -1).numpy()
            where = np.flatnonzero(text.loss_mask)
            want = np.mean([logps[t - 1, text.tokens[t]] for t in where])
            assert score == pytest.approx(want, abs=1e-4)


def test_a_misspelt_by_is_said_of_a_language_model_too(tiny_folder, data):
    """Catches the advice to train a reward model where a word is wrong."""
    with pytest.raises(ValueError, match=r"by='likelyhood' is none of score, likelihood, judge"):
        suites.run(tiny_folder, ["hhh"], data, batch=2, by="likelyhood")


def test_a_judge_is_asked_in_both_orders(tiny_folder, data, tmp_path, monkeypatch):
    """Catches verdicts under another pair, an order that is lost, and letters not swapped back."""
    with pytest.raises(ValueError, match="every question to the judge is longer than the 256"):
        suites.run(tiny_folder, ["hhh"], data, tmp_path / "o.json", by="judge")
    folder = shutil.copytree(tiny_folder, tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    asked = []

    def answer(model, source, out, **kw):
        rows = [row for _, row in sources.read_jsonl(source)]
        asked.extend(rows)
        # Right about harmless and honest, always A elsewhere, and nothing about "other".
        said = {"honest": None, "harmless": None, "helpful": "A", "other": "neither"}
        texts = [said[row["subset"]] or row["label"] for row in rows]
        full = lambda text: f"<think>So.</think><answer>{text}</answer>"
        sources.write_jsonl(out, [{"answers": [{"text": full(t)}]} for t in texts])

    monkeypatch.setattr(suites.generate, "run", answer)
    out = tmp_path / "judge.json"
    got = suites.run(folder, ["hhh"], data, out, by="judge")
    assert len(asked) == 8 and {row["label"] for row in asked} == {"A", "B"}
    metrics = got["suites"]["hhh"]["metrics"]
    value = lambda name: metrics[name]["value"]
    assert value("pair_accuracy/macro") == 0.5 and value("pair_accuracy/honest") == 1
    assert value("single_accuracy/helpful") == 0.5 and value("consistency/helpful") == 0
    assert value("unparseable") == 0.25
    assert [row["verdicts"] for row in lines(out)] == [
        [[0], [1]],
        [[0], [0]],
        [[0], [0]],
        [[-1], [-1]],
    ]
    assert got["protocol"]["order"] == "both"
    assert (tmp_path / "judge.hhh.asked.jsonl").is_file()


def test_what_does_not_fit_is_said_before_a_model_is_loaded(tiny_folder, data, tmp_path):
    """Catches an hour of scoring that ends in a usage error."""
    none = tmp_path / "no_model"
    for error, text, args, kw in (
        (KeyError, "no suite 'hh'", (["hh"], data), {}),
        (ValueError, "different suites", (["hhh", "hhh"], data), {}),
        (ValueError, "is one file and 2 suites", (["hhh", "rmb"], data / "hhh.jsonl"), {}),
        (ValueError, "kept beside the result", (["hhh"], data), {"by": "judge"}),
        (FileNotFoundError, "no files of the suite rmb", (["rmb"], data), {}),
    ):
        with pytest.raises(error, match=text):
            suites.run(none, *args, **kw)
    with pytest.raises(ValueError, match="no score head"):
        suites.run(tiny_folder, ["hhh"], data / "hhh.jsonl")


def test_items_of_the_training_data_are_counted_and_left_out(loaded, data, tmp_path):
    """Catches an overlap of other items than those measured, metrics that keep what was seen."""
    pairs = [{"prompt": "q1", "chosen": "a", "rejected": "b"}, dict(HHH[3], id="x")]
    path = tmp_path / "train.jsonl"
    sources.write_jsonl(path, pairs)
    got = suites.run(loaded, ["hhh"], data, batch=2, overlap=path)
    found = got["suites"]["hhh"]["overlap"]
    assert got["protocol"]["overlap"]["sha256"] == sources.data_hash(path)
    assert found["subsets"][""] == dict(items=4, exact=2, ngram=0, any=2, short=4)
    assert found["subsets"]["other"]["any"] == found["subsets"]["helpful"]["any"] == 1
    # The two that are left: their accuracy is what all four give less the two that were seen.
    rest = [HHH[1], HHH[2]]
    sources.write_jsonl(tmp_path / "rest.jsonl", rest)
    alone = suites.run(loaded, ["hhh"], tmp_path / "rest.jsonl", batch=2, limit=9)["suites"]["hhh"]
    assert found["without"] == alone["metrics"]
    sources.write_jsonl(path, HHH)
    assert (
        suites.run(loaded, ["hhh"], data, batch=2, overlap=path)["suites"]["hhh"]["overlap"][
            "without"
        ]
        is None
    )


def test_verdicts_of_seen_items_are_left_out_with_all_their_comparisons():
    """Catches verdicts that are cut by items where an item has nine of them."""
    items = []
    for i, prompt in enumerate(("seen", "new")):
        items.append(dict(id=str(i), subset="chat", section="chat", prompt=prompt))
        items[-1] |= dict(answers=list("abcdef"), right=[0, 1, 2])
    values = np.zeros((18, 2, 1), np.int8)
    values[:9] = 1  # all wrong of the item that was seen
    known = suites.seen_in.Training([{"prompt": "Seen."}])
    measure = suites.reward_bench.from_verdicts
    found = suites._overlap("rm_bench", items, values, known, measure)
    right = [v["value"] for k, v in found["without"].items() if k.startswith("pair_accuracy")]
    assert right and set(right) == {1.0}


def test_what_a_judge_is_not_asked_is_refused_before_it_writes(data, tmp_path):
    """Catches an hour of a judge's answers lost to a suite that has no pairs."""
    with pytest.raises(ValueError, match="no pairs for a judge"):
        suites.run("m", ["hhh", "reward_bench_2"], data, tmp_path / "o.json", by="judge")


def test_a_suite_that_fails_loses_none_before_it(loaded, data, tmp_path, monkeypatch):
    """Catches results that are written when all suites are through."""
    measure = suites.reward_bench.measure

    def fails(name, *args, **kw):
        if name == "rm_bench":
            raise ValueError("no")
        return measure(name, *args, **kw)

    monkeypatch.setattr(suites.reward_bench, "measure", fails)
    out = tmp_path / "o.json"
    with pytest.raises(ValueError, match="no"):
        suites.run(loaded, ["hhh", "rm_bench"], data, out, batch=2, limit=9)
    assert list(json.loads(out.read_text())["suites"]) == ["hhh"] and len(lines(out)) == 4
