"""A run, its export and transformers give one and the same score; files keep their lines."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.data import sources
from jaxreward.hub import export as hub_export
from jaxreward.hub import load
from jaxreward.recipes import evaluate

# Longer than the 64 tokens of training: scored whole, as transformers scores it.
LONG = "three, or maybe four, " * 4
LINES = [
    {"prompt": "Hi", "chosen": "Thanks: 3", "rejected": "go", "note": {"a": [1, None]}},
    {"id": 7, "prompt": "What is 1 + 1?", "answer": "2", "score_of_another": 0.5},
    {
        "prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Né?"}],
        "completion": [{"role": "assistant", "content": "“ja”"}],
    },
    {
        "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B."}],
    },
    {"prompt": "What is 1 + 1?", "response": LONG},
]


def conversations():
    """(line, field of the score, messages) of every answer in LINES, written out by hand."""
    chat = lambda *turns: [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]
    return [
        (0, "chosen_score", chat("Hi", "Thanks: 3")),
        (0, "rejected_score", chat("Hi", "go")),
        (1, "score", chat("What is 1 + 1?", "2")),
        (2, "score", [{"role": "system", "content": "Be."}, *chat("Né?", "“ja”")]),
        (3, "chosen_score", chat("Q", "A")),
        (3, "rejected_score", chat("Q", "B.")),
        (4, "score", chat("What is 1 + 1?", LONG)),
    ]


def read(path):
    return [row for _, row in sources.read_jsonl(path)]


@pytest.fixture(scope="module")
def workdir(finished):
    return finished[1]


@pytest.fixture(scope="module")
def base(finished):
    """Folder of the initial model."""
    return finished[1].parent / "base"


@contextlib.contextmanager
def hidden(folder):
    """The folder is away for a moment."""
    away = folder.with_name("hidden")
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run as a Hugging Face folder."""
    return evaluate.export(workdir, tmp_path_factory.mktemp("exported") / "scorer")


@pytest.fixture(scope="module")
def scored(workdir, tmp_path_factory):
    """LINES with the run's scores."""
    folder = tmp_path_factory.mktemp("scored")
    sources.write_jsonl(folder / "in.jsonl", LINES)
    evaluate.score(workdir, folder / "in.jsonl", folder / "out.jsonl")
    return read(folder / "out.jsonl")


def test_lines_keep_order_and_fields(scored):
    """Catches sorted or packed order leaking out, and fields lost or renamed on the way."""
    new = {"score", "chosen_score", "rejected_score"}
    assert [{k: v for k, v in row.items() if k not in new} for row in scored] == LINES
    assert [sorted(row.keys() & new) for row in scored] == [
        ["chosen_score", "rejected_score"],
        ["score"],
        ["score"],
        ["chosen_score", "rejected_score"],
        ["score"],
    ]
    values = [scored[i][field] for i, field, _ in conversations()]
    assert len(set(values)) == 7 and np.isfinite(values).all()


def test_the_export_stands_alone(exported, base, scored, tmp_path):
    """The exported folder gives the run's scores after the initial model is gone."""
    sources.write_jsonl(tmp_path / "in.jsonl", LINES)
    with hidden(base):
        evaluate.score(exported, tmp_path / "in.jsonl", tmp_path / "out.jsonl", batch=4)
    for row, expected in zip(read(tmp_path / "out.jsonl"), scored, strict=True):
        for name in ("score", "chosen_score", "rejected_score"):
            assert row.get(name) == pytest.approx(expected.get(name), abs=1e-5)
    model = json.loads((exported / "config.json").read_text())
    assert model["jaxreward"] == {"template": "chat", "max_len": 64}
    assert model["pad_token_id"] == 0 and model["num_labels"] == 1
    card = (exported / "README.md").read_text()
    assert "Initial weights: base. What was trained: lora." in card


def test_the_export_says_where_it_comes_from(exported, workdir):
    """Catches weights nobody can trace, and a path or command of this machine that is published."""
    text = (exported / "provenance.json").read_text()
    facts = json.loads(text)
    assert facts["trained"]["step"] == 4
    assert facts["trained"]["data"]["path"] == "pairs.jsonl"
    assert len(facts["trained"]["data"]["sha256"]) == len(facts["trained"]["init_sha256"]) == 64
    for made in (facts["exported"], facts["trained"]["environment"]):
        assert made["jax"] == jax.__version__ and "commit" in made and "command" not in made
    assert str(workdir.parent) not in text


@pytest.mark.parity
def test_scores_equal_transformers(exported, scored, require):
    """Adapters merged, frozen layers put back, template and last token the same: within 1e-4."""
    require("torch")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32)
    for i, field, messages in conversations():
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            got = model.eval()(**inputs).logits[0, 0].item()
        assert scored[i][field] == pytest.approx(got, abs=1e-4)


def test_training_moved_the_scores(exported, base):
    """Catches an export that forgets the adapters: then its layers are the initial ones."""
    _, after, _ = load.load(exported)
    _, before, _ = load.load(base)
    for name in ("q", "o"):
        a, b = (np.asarray(x["layers"]["attn"][name]["kernel"]) for x in (after, before))
        np.testing.assert_array_equal(a[0], b[0])  # the lower layer is frozen
        assert np.abs(a[1] - b[1]).max() > 1e-4
    np.testing.assert_array_equal(after["embed"]["table"], before["embed"]["table"])


def test_standard_streams_and_a_line_alone(exported, scored, monkeypatch, capsysbinary):
    """A line scored alone, from stdin to stdout, has the score it has among others; nothing but the
    record is on stdout."""
    text = json.dumps(LINES[2], ensure_ascii=False).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    evaluate.score(exported, "-", "-")
    (line,) = capsysbinary.readouterr().out.splitlines()
    got = json.loads(line)
    assert got.pop("score") == pytest.approx(scored[2]["score"], abs=1e-5)
    assert got == LINES[2]


def test_long_and_broken_records(exported, tmp_path, capsys):
    """Long inputs are told; a record that cannot be scored is named before anything is written."""
    sources.write_jsonl(tmp_path / "in.jsonl", [LINES[4], LINES[1]])
    evaluate.score(exported, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "1 of 2 prompts with their answers take more than the 64" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    sources.write_jsonl(tmp_path / "in.jsonl", [LINES[1], {"id": "b", "prompt": "Hi"}])
    with pytest.raises(ValueError, match=r"in\.jsonl:2:answer: needs exactly one of answer"):
        evaluate.score(exported, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_evaluate(workdir, pairs_file, tmp_path):
    """Every figure against the scores themselves, in float64; intervals over prompts around it."""
    result = evaluate.evaluate(workdir, pairs_file, name="mine")
    path = workdir / "evals" / "mine.json"
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]
    assert result["name"] == "mine"
    evaluate.score(workdir, pairs_file, tmp_path / "scores.jsonl")
    rows = read(tmp_path / "scores.jsonl")
    gap = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
    weight = np.array([row.get("weight", 1.0) for row in rows])
    even = np.array([row["subset"] == "even" for row in rows])
    mean = lambda x, w=weight: (x * w).sum() / w.sum()
    metrics = result["metrics"]
    for name, value in {
        "accuracy": mean(gap > 0),
        "margin": mean(gap),
        "loss": mean(np.log1p(np.exp(-gap))),
        "accuracy/even": mean(gap > 0, weight * even),
        "accuracy/odd": mean(gap > 0, weight * ~even),
    }.items():
        found = metrics[name]
        assert found["value"] == pytest.approx(value, abs=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
    assert metrics["margin"]["low"] < metrics["margin"]["high"]
    assert metrics["pairs"] == 40
    protocol = result["protocol"]
    assert protocol["sha256"] == hashlib.sha256(pairs_file.read_bytes()).hexdigest()
    assert (protocol["read"], protocol["longer than in training"]) == (40, 0)
    assert (protocol["template"], protocol["max_len"]) == ("chat", 64)
    path.unlink()
    path.parent.rmdir()


def test_evaluate_a_folder(exported, pairs_file, tmp_path):
    """A Hugging Face folder is not written into; --output is."""
    before = sorted(p.name for p in exported.iterdir())
    result = evaluate.evaluate(exported, pairs_file, output=tmp_path / "deep" / "result.json")
    assert sorted(p.name for p in exported.iterdir()) == before
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == result
    assert result["name"] == "heldout" and result["metrics"]["pairs"] == 40


def test_template_can_be_overridden(exported):
    """What the model recorded, unless another is asked for."""
    assert evaluate.load_model(exported).template == "chat"
    assert evaluate.load_model(exported, template="plain").protocol["template"] == "plain"
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        evaluate.load_model(exported, template="plane")


def test_what_is_no_reward_model(base, tmp_path):
    """A language model, a head of another size than it says, no folder, no checkpoint."""
    with pytest.raises(ValueError, match=r"no score head .*language model, not a reward"):
        evaluate.load_model(base)
    cfg, params, _ = load.load(base)
    two = {"kernel": jnp.ones((32, 2))}
    with pytest.raises(ValueError, match="gives the outputs score; pass the `head` that belongs"):
        hub_export.write(tmp_path / "two", cfg, params, source=base, score=two)
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        evaluate.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a workdir"):
        evaluate.export(base, tmp_path / "out")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"recipe": "preference"}')
    with pytest.raises(FileNotFoundError, match="no finished checkpoint; train first"):
        evaluate.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_needs_the_model_it_was_trained_from(workdir, base, tmp_path):
    """Missing or changed, the frozen layers would be others: refused, with the way out."""
    with hidden(base), pytest.raises(FileNotFoundError, match=r"base, which does not exist any"):
        evaluate.load_model(workdir)
    path = base / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"base has changed since .* put the old folder back"):
            evaluate.export(workdir, tmp_path / "out")
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()
    assert evaluate.load_model(workdir).plan.train == "lora"


def test_a_run_of_an_older_config_is_scored(workdir, base, tmp_path):
    """Catches a workdir that can no longer be used because its config lacks a newer key."""
    old = shutil.copytree(workdir, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["train"]["ema"]
    (old / "config.json").write_text(json.dumps(config))
    assert evaluate.load_model(old).template == evaluate.load_model(workdir).template
