"""HEAL's evaluation end to end at toy size: likelihoods are those of a loop over tokens, sets and
proxies are what the files say, and a model whose own scores are the proxy agrees fully."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreward import presets, testing
from jaxreward.core.types import TrainState
from jaxreward.data import hypotheses as data
from jaxreward.data import sources, tokenize
from jaxreward.hub import export, load
from jaxreward.models import decoder
from jaxreward.recipes import evaluate
from jaxreward.recipes import hypotheses as heal
from jaxreward.train import checkpoint

PROMPTS = [{"id": i, "prompt": f"What is {i} + 1?", "domain": "math"} for i in range(4)]


def altered(folder, source, name="config.json", **changes):
    """A copy of a model's folder with other entries in one of its JSON files."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**raw, **changes}))
    return folder


def grown(folder, source, factor):
    """A copy of a tiny model with larger weights: another model that is sure of something."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v if v.ndim == 1 else factor * v for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    """Folders of two language models, and of a reward model."""
    folder = tmp_path_factory.mktemp("models")
    cfg, weights, _ = load.load(tiny_folder)
    score = {"kernel": np.random.default_rng(1).normal(size=(cfg.width, 1)).astype(np.float32)}
    weights = {k: v for k, v in weights.items() if k != "head"}
    return {
        "base": grown(folder / "base", tiny_folder, 3),
        "tuned": grown(folder / "tuned", tiny_folder, 4),
        "rm": export.write(folder / "rm", cfg, weights, source=tiny_folder, score=score),
    }


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """A file of sets, generated, referred to, spoilt and scored; the report of building it."""
    folder = tmp_path_factory.mktemp("sets")
    said, gold, out = (folder / f"{name}.jsonl" for name in ("said", "gold", "hyps"))
    answer = lambda text: {"text": text, "tokens": 9, "logp": -1.0, "finished": text[0] != "u"}
    texts = lambda i: ["no", f"perhaps {i}", f"unless it is {i * i} or é"]
    rows = [{**row, "answers": [*map(answer, texts(i))]} for i, row in enumerate(PROMPTS)]
    sources.write_jsonl(said, rows)
    told = [
        {**row, "answer": f"That is {i + 1}. You are welcome."} for i, row in enumerate(PROMPTS)
    ]
    sources.write_jsonl(gold, told)
    kinds = ("truncated", "off_topic")
    parts = [(said, "base", 1.0), (gold, "gold", None)]
    report = heal.build(parts, out, corruptions=kinds, spoil="gold", keep_unfinished=True)
    heal.proxies(out, out, {"rm": models["rm"], "length": lambda prompt, text: -len(text)})
    return out, report


@pytest.fixture(scope="module")
def measured(models, made, tmp_path_factory):
    """(result, raw rows) of both language models, one the other's reference."""
    out = tmp_path_factory.mktemp("result") / "heal.json"
    result = heal.run([models["tuned"]], made[0], out, reference=models["base"], samples=20)
    assert json.loads(out.read_text()) == result
    return result, [row for _, row in sources.read_jsonl(out.with_suffix(".hypotheses.jsonl"))]


@jax.jit
def logits(weights, tokens, segments):
    """All logits of the tiny model, [1, T, V]; its config is that of every model here."""
    cfg = testing.tiny_config()
    positions = jnp.arange(tokens.shape[1])[None, :, None]
    x = weights["embed"]["table"][tokens]
    x = decoder.backbone(
        weights, cfg, x, positions=positions, segments=segments, trunk=0 * segments
    )
    return x.states @ decoder.head_matrix(weights, cfg)


def alone(folder, prompt, text, template="chat"):
    """(log-probability, tokens) of one answer: one row, all logits, a loop over its tokens."""
    weights = load.load(folder)[1]
    tokenizer = tokenize.load_tokenizer(folder)
    whole = tokenize.encode_conversation(tokenizer, prompt, text, template=template)
    n = len(whole.tokens)
    pad = lambda x: np.pad(np.asarray(x, np.int32), (0, 128 - n))[None]
    found = logits(weights, pad(whole.tokens), pad(np.ones(n)))[0]
    logps = np.asarray(jax.nn.log_softmax(found, axis=-1))
    total, count = 0.0, 0
    for t in range(1, n):
        if whole.loss_mask[t]:
            total, count = total + float(logps[t - 1, whole.tokens[t]]), count + 1
    return total, count


# Building and proxies


def test_sets_are_built_of_all_parts(made):
    """Catches a part that is lost, answers of another prompt, and counts that do not add up."""
    path, report = made
    records = data.read(path)
    assert [record["id"] for record in records] == ["0", "1", "2", "3"]
    assert {record["domain"] for record in records} == {"math"}
    for i, record in enumerate(records):
        assert [hyp["text"] for hyp in record["hyps"][:4]] == [
            "no",
            f"perhaps {i}",
            f"unless it is {i * i} or é",
            f"That is {i + 1}. You are welcome.",
        ]
        assert [hyp["temp"] for hyp in record["hyps"]] == [1.0] * 3 + [None] * 3
    assert report == {
        "sets": 4,
        "hypotheses": 24,
        "sources": {"base": 12, "gold": 4, "off_topic": 4, "truncated": 4},
        "dropped": {},
        "not spoilt": {},
    }


def test_what_is_too_long_or_unfinished_goes(models, made, tmp_path):
    """Catches a limit in characters where tokens were asked for, and a file without any set."""
    folder, out = made[0].parent, tmp_path / "x.jsonl"
    parts = [(folder / "said.jsonl", "base", 1.0), (folder / "gold.jsonl", "gold", None)]
    assert heal.build(parts, out)["dropped"] == {"unfinished": 4}
    # "unless it is 0 or é" has 19 characters and 20 bytes, which are the toy's tokens.
    build = lambda **kw: heal.build(parts, out, most=19, keep_unfinished=True, **kw)["dropped"]
    assert build() == {"too long": 4}  # the references
    assert build(tokenizer=models["base"]) == {"too long": 8}
    out.unlink()
    with pytest.raises(ValueError, match=r"no set .* is left; dropped: .*'too few left': 4"):
        heal.build(parts, out, most=2)
    assert not out.exists()


def test_proxies_score_every_hypothesis_in_its_place(made, monkeypatch, tmp_path):
    """Catches scores that end up with another set, in sets of two sizes, or in another order."""
    records = data.read(made[0])
    for record in records:
        assert np.isfinite(record["scores"]["rm"]).all()
        assert record["scores"]["length"] == [-len(hyp["text"]) for hyp in record["hyps"]]
    assert len({x for record in records for x in record["scores"]["rm"]}) > 12
    known = {}

    def scorer_of(model, *, batch):
        assert (model, batch) == ("runs/rm", 3)

        def scores(prompts, groups):
            assert len({len(group) for group in groups}) == 1
            number = lambda *key: known.setdefault(key, float(len(known)))
            return np.array([[number(p, x) for x in group] for p, group in zip(prompts, groups)])

        return scores

    short = [{**records[1], "hyps": records[1]["hyps"][:2], "scores": {}}]
    sources.write_jsonl(tmp_path / "a.jsonl", [records[0], *short, *records[2:]])
    monkeypatch.setattr(evaluate, "scorer_of", scorer_of)
    heal.proxies(tmp_path / "a.jsonl", tmp_path / "b.jsonl", {"new": "runs/rm"}, batch=3)
    for record in data.read(tmp_path / "b.jsonl"):
        texts = [hyp["text"] for hyp in record["hyps"]]
        assert record["scores"]["new"] == [known[record["prompt"], text] for text in texts]
    assert len(known) == 20


def test_a_score_that_cannot_be_given_is_null(made, tmp_path):
    """Catches a NaN in the file, which JSON has not, and a proxy scored anew that is kept twice."""
    out = tmp_path / "hyps.jsonl"
    heal.proxies(made[0], out, {"length": lambda prompt, text: np.nan if "1" in text else 1})
    records = data.read(out)
    assert data.proxies(records) == ["rm", "length"]
    values, valid = data.proxy_scores(records, "length")
    assert 0 < valid.sum() < sum(len(record["hyps"]) for record in records)
    assert set(values[valid]) == {1.0}


# Likelihoods


def test_likelihoods_are_those_of_a_loop_over_tokens(models, made, measured):
    """Catches prompt tokens or another answer's in the sum, a shift, a forgotten end token, and
    answers whose shared prompt changes them."""
    records, (_, rows) = data.read(made[0]), measured
    assert [(row["model"], row["id"]) for row in rows] == [
        (model, record["id"]) for model in ("base", "tuned") for record in records
    ]
    for row, record in zip(rows[::3], (records * 2)[::3]):
        for i, hyp in enumerate(record["hyps"]):
            total, count = alone(models[row["model"]], record["prompt"], hyp["text"])
            assert row["logp"][i] == pytest.approx(total, abs=2e-4)
            # The toy's tokens are bytes, and the end token is one more.
            assert row["tokens"][i] == count == len(hyp["text"].encode()) + 1
    assert all("reference" not in row for row in rows[:4])
    for base, tuned in zip(rows[:4], rows[4:]):
        assert tuned["reference"] == base["logp"] != tuned["logp"]


def test_large_sets_are_cut_into_rows_that_fit():
    """Catches an answer that is lost, doubled or moved at a cut, a row that is too long, and a
    prompt that is left behind; an answer longer than a row stands alone."""
    answers = [np.arange(n, dtype=np.int32) for n in (3, 4, 9, 1, 1, 2)]
    tree = tokenize.Tree("1", np.arange(2), answers, [x > 0 for x in answers])
    parts = heal.cut(tree, room=9)
    assert [[len(x) for x in part.answers] for part in parts] == [[3, 4], [9], [1, 1, 2]]
    for part in parts:
        np.testing.assert_array_equal(part.prompt, tree.prompt)
        assert all(np.array_equal(a > 0, loss) for a, loss in zip(part.answers, part.loss))
    assert [len(part.answers) for part in heal.cut(tree)] == [6]


# Measuring


def test_what_is_measured(measured):
    """Catches a measure, a proxy or a model that is left out, and facts that are not recorded."""
    result, _ = measured
    assert result["name"] == "heal" and result["protocol"]["sets"] == 4
    assert result["protocol"]["models"]["tuned"]["template"] == "chat"
    metrics = result["metrics"]
    assert set(metrics) == {"base", "tuned", heal.BETWEEN}
    assert set(metrics["tuned"]["rm"]) == {*heal.hypothesis.KINDS, "change"}
    assert set(metrics["base"]["rm"]) == {"sum", "mean"}  # compared with itself it says nothing
    mean = metrics["tuned"]["rm"]["mean"]
    assert {"ranking_accuracy", "ranking_accuracy/math", "strength", "strength_gain"} <= set(mean)
    for name in ("ranking_accuracy", "strength"):
        before = metrics["base"]["rm"]["mean"][name]["value"]
        gain = mean[f"{name}_gain"]
        assert gain["value"] == pytest.approx(mean[name]["value"] - before)
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert set(metrics["tuned"]["rm"]["change"]) >= {"promotion", "suppression", "repaired"}
    assert set(metrics[heal.BETWEEN]) == {"rm, length"}


def test_a_model_whose_scores_are_the_proxy_agrees_fully(models, made, measured, tmp_path):
    """Catches arrays of a proxy and of a model that are laid out differently, kinds mixed up, and a
    sign; the annotator's lead over another proxy; and a proxy that leaves gaps."""
    records, (_, rows) = data.read(made[0]), measured
    for record, row in zip(records, rows[4:]):
        lp, ref, n = (np.array(row[k]) for k in ("logp", "reference", "tokens"))
        record["scores"] = {
            "mean": (lp / n).tolist(),
            "worst": (-lp / n).tolist(),
            "implicit": (5 * (lp - ref) + 2).tolist(),
            "gaps": [None, *(lp / n).tolist()[1:]],
        }
    sources.write_jsonl(tmp_path / "own.jsonl", records)
    result = heal.run(
        [models["tuned"]],
        tmp_path / "own.jsonl",
        reference=models["base"],
        annotator="mean",
        samples=0,
    )
    got = result["metrics"]["tuned"]
    for proxy, kind, accuracy, strength in (
        ("mean", "mean", 1, 1),
        ("gaps", "mean", 1, 1),
        ("worst", "mean", 0, -1),
        ("implicit", "implicit", 1, 1),
    ):
        found = got[proxy][kind]
        assert found["ranking_accuracy"] == accuracy, proxy
        assert found["strength"] == pytest.approx(strength, abs=1e-4), proxy
    assert got["mean"]["mean"]["top1"] == 1 and got["mean"]["sum"]["strength"] < 1 - 1e-3
    lead = got["mean - worst"]["mean"]
    assert lead["ranking_accuracy"] == 1 and lead["strength"] == pytest.approx(2, abs=1e-4)
    between = result["metrics"][heal.BETWEEN]["mean, worst"]
    assert between["ranking_accuracy"] == 0
    json.dumps(result, allow_nan=False)


@pytest.fixture(scope="module")
def workdir(models, tmp_path_factory):
    """A run of the base model with two checkpoints: the base itself, and the tuned one."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = presets.load("sft/chat:smoke", [f"models.policy.init=hf:{models['base']}"])
    workdir.mkdir()
    presets.save(config, workdir / "config.json")
    meta = {"init": str(models["base"]), "init_sha256": load.content_hash(models["base"])}
    meta |= {"template": "plain", "max_len": 64}
    with checkpoint.Checkpoints(workdir) as checkpoints:
        for step, name in ((1, "base"), (12, "tuned")):
            params = {"model": load.load(models[name])[1]}
            state = TrainState(jnp.int32(step), params, {"n": jnp.zeros(1)}, {}, jax.random.key(0))
            checkpoints.save(state, data={}, meta=meta)
    return workdir


def test_checkpoints_of_a_run_are_a_curve(models, made, workdir, tmp_path):
    """Catches steps in the order of their names, one checkpoint measured twice, and a template that
    is not the run's own; also for the reference."""
    out = tmp_path / "curve.json"
    result = heal.run(
        [workdir], made[0], out, reference=models["base"], every_checkpoint=True, samples=0
    )
    assert list(result["metrics"])[:3] == ["base", "run@1", "run@12"]
    assert result["protocol"]["models"]["run"]["template"] == "plain"
    rows = [row for _, row in sources.read_jsonl(out.with_suffix(".hypotheses.jsonl"))]
    first, last = ([r for r in rows if r["step"] == step] for step in (1, 12))
    record = data.read(made[0])[0]
    for row, name in ((first[0], "base"), (last[0], "tuned")):
        want = alone(models[name], record["prompt"], record["hyps"][0]["text"], "plain")
        assert (row["logp"][0], row["tokens"][0]) == pytest.approx(want, abs=2e-4)
    change = result["metrics"]["run@1"]["rm"]["change"]
    assert change["promotion"] == pytest.approx(0, abs=1e-6)
    assert list(heal.language_model(workdir).steps) == [12]  # the newest alone


# What does not fit


def test_models_that_do_not_fit(models, made, tiny_folder, tmp_path):
    """Catches scores of a head taken for likelihoods, a bound for a likelihood, a reference with
    another tokenizer, and a text beyond what the model reads."""
    with pytest.raises(ValueError, match=r"rm is a reward model; its scores are those of a proxy"):
        heal.run([models["rm"]], made[0])
    with pytest.raises(ValueError, match="is a denoiser"):
        made_so = {"mask": "full", "block": 0, "predict_offset": 0, "mask_id": 258}
        denoiser = altered(tmp_path / "denoiser", models["base"], jaxreward={"denoiser": made_so})
        heal.run([denoiser], made[0])
    short = altered(tmp_path / "short", models["base"], max_position_embeddings=20)
    with pytest.raises(ValueError, match=r"tokens with its prompt; .*short reads 20"):
        heal.run([short], made[0])
    template = testing.CHATML.replace("\n", "")
    other = altered(
        tmp_path / "other", models["base"], "tokenizer_config.json", chat_template=template
    )
    for path in other.glob("chat_template*"):
        path.write_text(template)
    with pytest.raises(ValueError, match="make other tokens of set '0'; a reference is the model"):
        heal.run([other], made[0], reference=models["base"])


def test_requests_that_do_not_fit(models, made, tmp_path):
    """Catches a misspelt kind or proxy, a reference that is missing, and one model under two
    names."""
    base = models["base"]
    bare = tmp_path / "bare.jsonl"
    sources.write_jsonl(bare, [{"prompt": "p", "hyps": [{"text": "x"}, {"text": "y"}]}])
    with pytest.raises(ValueError, match="no scores of any proxy"):
        heal.run([base], bare)
    with pytest.raises(KeyError, match=r"annotator 'gold' is no proxy of .* rm, length"):
        heal.run([base], made[0], annotator="gold")
    with pytest.raises(ValueError, match="unknown kind of score 'logp'; use sum, mean"):
        heal.run([base], made[0], kinds=["logp"])
    with pytest.raises(ValueError, match="implicit kinds of score need a reference"):
        heal.run([base], made[0], kinds=["implicit"])
    for models_ in ([], [base, str(base)]):
        with pytest.raises(ValueError, match="must be different, and at least one"):
            heal.run(models_, made[0])
