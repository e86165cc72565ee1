"""Answers depend on prompt, number and seed alone, and a run that was cut off goes on as it was."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreward.data import sources
from jaxreward.hub import export
from jaxreward.recipes import generate

PROMPTS = [
    {"prompt": "Hi", "key": [1, {"a": 2}]},
    {"id": "second", "prompt": "What is 1 + 1?"},
    {"prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Né?"}]},
    {"prompt": "a"},
    {"prompt": "b", "answers": "replaced"},
]
SETTINGS = dict(n=3, temperature=1.0, max_new=5, batch=6)


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """The tiny model with larger weights: its next token is neither certain nor uniform."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    grown = {k: v if v.ndim == 1 else 6 * v for k, v in weights.items()}
    save_file(grown, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    sources.write_jsonl(path, PROMPTS)
    return path


@pytest.fixture(scope="module")
def expected(model, prompts, tmp_path_factory):
    """The output file of an uninterrupted run, as bytes."""
    out = tmp_path_factory.mktemp("expected") / "out.jsonl"
    generate.run(model, prompts, out, **SETTINGS)
    assert [p.name for p in out.parent.iterdir()] == ["out.jsonl"]
    return out.read_bytes()


def rows(data):
    return [json.loads(line) for line in data.decode().splitlines()]


def texts(data):
    return [[answer["text"] for answer in row["answers"]] for row in rows(data)]


def test_n_answers_per_prompt(expected):
    """Order and other fields stay; catches answers given to another prompt or counted wrongly."""
    found = rows(expected)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in PROMPTS]
    assert [row["id"] for row in found] == ["1", "second", "3", "4", "5"]
    assert found[0]["key"] == [1, {"a": 2}]
    for row in found:
        assert len(row["answers"]) == 3
        for answer in row["answers"]:
            assert set(answer) == {"text", "tokens", "logp", "finished"}
            assert 1 <= answer["tokens"] <= 5 and answer["logp"] < 0
            assert answer["finished"] or answer["tokens"] == 5
    assert len({text for row in texts(expected) for text in row}) > 12


def test_deterministic_in_the_seed(model, prompts, expected, tmp_path):
    """The same seed gives the same bytes, another seed other answers."""
    generate.run(model, prompts, tmp_path / "a.jsonl", **SETTINGS)
    assert (tmp_path / "a.jsonl").read_bytes() == expected
    generate.run(model, prompts, tmp_path / "b.jsonl", **SETTINGS, seed=1)
    other = texts((tmp_path / "b.jsonl").read_bytes())
    assert all(a != b for a, b in zip(other, texts(expected)))


def test_independent_of_the_batch(model, prompts, expected, tmp_path):
    """One prompt at a time gives the answers of two at a time, where the last of the five prompts
    has a filler row beside it."""
    out = tmp_path / "out.jsonl"
    generate.run(model, prompts, out, **{**SETTINGS, "batch": 1})
    assert texts(out.read_bytes()) == texts(expected)
    logps = lambda data: [a["logp"] for row in rows(data) for a in row["answers"]]
    np.testing.assert_allclose(logps(out.read_bytes()), logps(expected), atol=1e-4)


def interrupted(model, prompts, out, monkeypatch, **kw):
    """The .partial file of a run that was stopped before its output was written."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "write_jsonl", stop)
        with pytest.raises(KeyboardInterrupt):
            generate.run(model, prompts, out, **{**SETTINGS, **kw})
    assert not out.exists()
    (partial,) = out.parent.iterdir()
    return partial


def test_goes_on_where_it_stopped(model, prompts, expected, tmp_path, monkeypatch, capsys):
    """Whole records are kept, the one that was cut in half is made again: the same bytes."""
    out = tmp_path / "out.jsonl"
    partial = interrupted(model, prompts, out, monkeypatch)
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    # A mark in a finished record shows that it is read and not made again.
    lines[1] = lines[1].replace('"key": [1,', '"key": [99,')
    partial.write_text("".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    capsys.readouterr()
    generate.run(model, prompts, out, **{**SETTINGS, "batch": 3})
    assert "going on after 2 prompts" in capsys.readouterr().err
    found, want = rows(out.read_bytes()), rows(expected)
    assert found[0].pop("key")[0] == 99 and want[0].pop("key")[0] == 1
    assert found[:2] == want[:2] and texts(out.read_bytes()) == texts(expected)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_other_settings_start_again(model, prompts, expected, tmp_path, monkeypatch, capsys):
    """Answers of another seed, model or prompt file are not mixed in, and that is told."""
    out = tmp_path / "out.jsonl"
    interrupted(model, prompts, out, monkeypatch, seed=1)
    capsys.readouterr()
    generate.run(model, prompts, out, **SETTINGS)
    assert out.read_bytes() == expected
    assert "made with other settings; starting again" in capsys.readouterr().err
    partial = tmp_path / "out.jsonl.partial"
    for field in ("model", "n", "temperature", "top_p", "stop_strings", "max_new", "prompts"):
        settings, *done = _partial(model, prompts, expected)
        settings[field] = "another"
        partial.write_text("".join(json.dumps(x) + "\n" for x in [settings, *done]))
        assert generate._resume(partial, _partial(model, prompts, expected)[0]) == []


def _partial(model, prompts, expected):
    settings = {k: v for k, v in SETTINGS.items() if k != "batch"}
    more = {"model": "m", "prompts": "p", "seed": 0, "top_p": 1.0, "stop_strings": []}
    return [{**settings, **more}, *rows(expected)]


@pytest.mark.parity
def test_greedy_equals_transformers(model, prompts, tmp_path, require):
    """Tokens and log-probabilities of transformers' own greedy loop, prompt by prompt."""
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    generate.run(model, prompts, tmp_path / "out.jsonl", n=2, temperature=0, max_new=5, batch=4)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for row in rows((tmp_path / "out.jsonl").read_bytes()):
        first, second = row["answers"]
        assert first["text"] == second["text"]
        messages = row["prompt"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer, logp = [], 0.0
        while len(answer) < 5 and answer[-1:] != [2]:
            with torch.no_grad():
                logits = torch_model(torch.tensor([ids + answer])).logits[0, -1].double()
            answer.append(int(logits.argmax()))
            logp += float(logits.log_softmax(-1)[answer[-1]])
        assert first["tokens"] == len(answer) and first["finished"] == (answer[-1] == 2)
        assert first["text"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert first["logp"] == pytest.approx(logp, abs=1e-4)


def test_stop_strings(model, prompts, expected, tmp_path):
    """Catches an answer that goes on after a stop string, ends in front of it, or keeps it; and one
    that changes before it, since its tokens are drawn as without stop strings."""
    free = [answer for row in rows(expected) for answer in row["answers"]]
    whole = [a["text"] for a in free if len(a["text"]) == 5]
    strings = ["never said", whole[0][1], whole[1][:2]]
    out = tmp_path / "out.jsonl"
    generate.run(model, prompts, out, **SETTINGS, stop_strings=strings)
    found = [answer for row in rows(out.read_bytes()) for answer in row["answers"]]
    stopped = 0
    for answer, whole in zip(found, free):
        text = whole["text"]
        ends = [(text.find(s) + len(s), j) for j, s in enumerate(strings) if s in text]
        said = strings[min(ends)[1]] if ends else None
        assert answer["stop"] == said
        if ends:
            stopped += 1
            assert answer["text"] == text[: min(ends)[0] - len(said)]
            assert answer["finished"] and answer["tokens"] <= whole["tokens"]
            assert answer["logp"] >= whole["logp"]
        else:
            assert {k: v for k, v in answer.items() if k != "stop"} == whole
    assert 0 < stopped < len(found)


def test_filters_reach_the_sampler(model, prompts, tmp_path, monkeypatch):
    """Catches a filter that is dropped or changes places with another on its way."""

    def sample(*_, choose, **__):
        assert choose == generate.choose.Filtered(2.0, 7, 0.8, 0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.autoregressive, "sample", sample)
    filters = dict(temperature=2.0, top_k=7, top_p=0.8, min_p=0.1)
    with pytest.raises(KeyboardInterrupt):
        generate.run(model, prompts, tmp_path / "out.jsonl", n=1, max_new=5, **filters)


def test_standard_output(model, prompts, expected, tmp_path, monkeypatch, capfdbinary):
    """Nothing but the records on stdout, and no file anywhere."""
    monkeypatch.chdir(tmp_path)
    generate.run(model, prompts, "-", **SETTINGS)
    assert capfdbinary.readouterr().out == expected
    assert list(tmp_path.iterdir()) == []


def test_errors(model, tiny_folder, prompts, tmp_path):
    """What a user can get wrong, told before anything is sampled."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"max_new is 500: together more than the model's 512"):
        generate.run(model, prompts, out, n=1, max_new=500)
    for bad in (dict(n=0), dict(max_new=0), dict(batch=0)):
        with pytest.raises(ValueError, match="must be positive; received"):
            generate.run(model, prompts, out, **bad)
    with pytest.raises(ValueError, match="temperature must be positive"):
        generate.run(model, prompts, out, temperature=-1.0)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        generate.run(model, prompts, out, top_p=0.0)
    with pytest.raises(ValueError, match="stop_strings must be a list of texts; received 'ab'"):
        generate.run(model, prompts, out, stop_strings="ab")
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        generate.run(tmp_path / "nowhere", prompts, out)
    assert not out.exists()


def test_a_reward_model_has_no_language_head(model, prompts, tmp_path):
    """An untied scorer lost its head on export; catches a KeyError in the middle of sampling."""
    folder = tmp_path / "scorer"
    shutil.copytree(model, folder)
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = np.ones((1, 32), np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no language head .*: it is a reward model"):
        generate.run(folder, prompts, tmp_path / "out.jsonl", **SETTINGS)


def test_no_end_token(model, prompts, tmp_path):
    """Answers of a model that names no end would never end."""
    folder = tmp_path / "endless"
    shutil.copytree(model, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        raw = json.loads((folder / name).read_text())
        raw = {k: v for k, v in raw.items() if k not in ("eos_token_id", "eos_token")}
        (folder / name).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        generate.run(folder, prompts, tmp_path / "out.jsonl", **SETTINGS)


def test_a_denoiser_fills_in(model, prompts, tmp_path):
    """Its answers too depend on prompt, number and seed alone; what does not apply is refused."""
    folder = export.write_tiny(tmp_path / "denoiser", denoiser=True)
    kw = dict(n=2, temperature=1.0, max_new=4, steps=2)
    found = []
    for batch in (2, 20):
        generate.run(folder, prompts, tmp_path / f"{batch}.jsonl", batch=batch, **kw)
        found.append((tmp_path / f"{batch}.jsonl").read_bytes())
    assert texts(found[0]) == texts(found[1])
    answers = [answer for row in rows(found[0]) for answer in row["answers"]]
    assert len(answers) == 10
    assert all(1 <= a["tokens"] <= 4 and a["logp"] < 0 for a in answers)
    with pytest.raises(ValueError, match="stop strings do not end them"):
        generate.run(folder, prompts, tmp_path / "a.jsonl", stop_strings=["x"], **kw)
    with pytest.raises(ValueError, match="is no denoiser: steps, block and threshold"):
        generate.run(model, prompts, tmp_path / "b.jsonl", **kw)
