"""A denoiser's log-likelihoods: the formula by hand, the same in any company, what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_denoiser import PROMPT, A, B, pair_model

from jaxreward import cli
from jaxreward.core.types import Rows
from jaxreward.data import sources
from jaxreward.hub import export, load
from jaxreward.models import decoder, trainable
from jaxreward.recipes import likelihood

FILE = [
    {"id": "a", "prompt": "Hi", "answer": "yes", "note": [1]},
    {"id": "b", "prompt": "Q", "chosen": "long and good", "rejected": "no"},
    {"prompt": "What is 1 + 1? Think, and then say it", "completion": "2"},
]
KINDS = [(0, 0.0), (1, 1.5)]  # where a token is predicted, and guidance


def made(folder, offset):
    """A tiny denoiser with larger weights, whose predictions are neither certain nor uniform, and
    that says it was trained on 3 tokens."""
    sizes = dict(width=16, depth=1, mlp=32, heads=2, kv_heads=1)
    export.write_tiny(folder, denoiser=True, predict_offset=offset, **sizes)
    weights = load_file(folder / "model.safetensors")
    grown = {k: v if v.ndim == 1 else 8 * v for k, v in weights.items()}
    save_file(grown, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["jaxreward"]["max_len"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("likelihood")
    return {offset: made(root / str(offset), offset) for offset, _ in KINDS}


def scored(model, rows, folder, *, mesh=False, **kw):
    """The lines that the command writes for these rows."""
    sources.write_jsonl(folder / "in.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        if not mesh:
            patch.setattr(likelihood.rules, "on_mesh", lambda: None)
        likelihood.score(model, folder / "in.jsonl", folder / "out.jsonl", template="plain", **kw)
    return [row for _, row in sources.read_jsonl(folder / "out.jsonl")]


def logps(model, tokens, masks, guidance):
    """Log-probabilities of one text's tokens under each of some masks, from all logits."""
    cfg, params, _ = load.load(model)
    plan, (B, n) = trainable.Plan(cfg, head=None), masks.shape
    seen = np.where(masks, cfg.mask_id, tokens)
    seen = np.concatenate([seen, np.where(np.arange(n) < 2, cfg.mask_id, seen)])

    @jax.jit
    def logits(params, seen):
        ones = jnp.ones((2 * B, n), jnp.int32)
        place = jnp.broadcast_to(jnp.arange(n), seen.shape)[..., None]
        rows = Rows(seen, ones > 0, ones > 0, place, ones, 0 * ones)
        states = trainable.states(plan, {"model": params}, {}, rows)
        return decoder.logits(states, decoder.head_matrix(params, cfg), cfg)

    full, bare = np.split(np.asarray(logits(params, jnp.asarray(seen)), np.float64), 2)
    found = bare + (1 + guidance) * (full - bare)
    found -= np.log(np.exp(found).sum(axis=-1, keepdims=True))
    return found[:, np.arange(n) - cfg.predict_offset, tokens]


@pytest.mark.parametrize("offset, guidance", KINDS)
def test_the_bound_of_an_answer_of_two_tokens(models, tmp_path, capsys, offset, guidance):
    """A prompt of two, a letter and the end: of 64 masks 32 hide both, the others either of the
    two. Catches a wrong factor, shift or mixture, the prompt or the end left out, a wrong error,
    and a text cut to what the model was trained on."""
    model, N = models[offset], 64
    kw = dict(samples=N, guidance=guidance)
    (row,) = scored(model, [{"prompt": "ab", "answer": "c"}], tmp_path, **kw)
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [vocab["a"], vocab["b"], vocab["c"], 2]
    masks = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    found = logps(model, tokens, masks, guidance)
    both, letter, end = found[0, 2:].sum(), found[1, 2], found[2, 3]
    assert row["logp_tokens"] == 2
    assert (
        "1 of 1 prompts with their answers take more than the 3 tokens" in capsys.readouterr().err
    )
    hidden = (N * row["logp"] - N / 2 * both - N * end) / (2 * letter - 2 * end)
    assert hidden == pytest.approx(round(hidden), abs=0.02) and 3 < hidden < 29
    each = np.repeat([both, 2 * letter, 2 * end], [N // 2, round(hidden), N // 2 - round(hidden)])
    assert row["logp_error"] == pytest.approx(each.std(ddof=1) / math.sqrt(N), rel=1e-3)


def test_what_is_known_exactly_is_found_exactly(monkeypatch):
    """Of a model whose texts "aa" and "bb" have probability 1/2 each. Catches masks that are not
    spread over the counts, and a mask that is run as often as it comes up."""
    run, lay = [], likelihood._laid_out
    monkeypatch.setattr(likelihood, "_laid_out", lambda some, *a: run.extend(some) or lay(some, *a))
    params, cfg = pair_model()
    plan = trainable.Plan(cfg, head=None)
    texts = [
        likelihood.Text(str(i), np.array([PROMPT, *two], np.int32), np.array([False, True, True]))
        for i, two in enumerate([(A, A), (B, B), (A, B)])
    ]
    found = likelihood.make_estimates(plan, samples=64)({"model": params}, {}, texts)
    for each in found[:2]:
        assert sorted(each.round(4)) == [-1.3863] * 32 + [0.0] * 32
        assert each.mean() == pytest.approx(-math.log(2), abs=1e-4)
    assert found[2].mean() < -20
    assert len(run) == 3 * 3


def test_a_row_is_the_same_in_any_company(models, tmp_path):
    """Catches masks drawn by place in the file or batch, padding that is seen, lost fields.
    The whole file runs on one device, part of it on four."""
    whole = scored(models[0], FILE, tmp_path, samples=64)
    names = ("logp", "logp_error", "logp_tokens")
    added = {*names, *(f"{a}_{n}" for a in ("chosen", "rejected") for n in names)}
    assert [{k: v for k, v in row.items() if k not in added} for row in whole] == FILE
    assert [row.keys() & added for row in whole] == [{*names}, added - {*names}, {*names}]
    assert whole[0]["logp_tokens"] == 4 and whole[1]["rejected_logp_tokens"] == 3
    alone = scored(models[0], [FILE[1], FILE[0]], tmp_path, samples=64, batch=1, mesh=True)
    for got, want in zip(alone, (whole[1], whole[0])):
        assert got.keys() == want.keys()
        for name in got.keys() & added:
            assert got[name] == pytest.approx(want[name], rel=1e-4)


def test_one_mask_has_no_error_and_a_seed_its_own_masks(models, tmp_path):
    """Catches a NaN that JSON cannot hold, and a seed that is dropped."""
    one, other = (scored(models[0], FILE[:1], tmp_path, samples=1, seed=s)[0] for s in (0, 1))
    assert one["logp_error"] is None
    assert abs(one["logp"] - other["logp"]) > 1e-3


def test_row_lengths_are_few_and_waste_at_most_a_third():
    sizes = [likelihood.slots(n) for n in range(1, 2049)]
    assert sorted(set(sizes))[:4] == [32, 48, 64, 96] and len(set(sizes)) == 13
    assert all(n <= size and (size == 32 or 3 * n > 2 * size) for n, size in enumerate(sizes, 1))


def test_what_has_no_such_bound_is_refused(models, tiny_folder, tmp_path, capsys):
    """Catches a causal model or a bad number that runs, and an error that names no remedy."""
    for model, row, kw, said in (
        (tiny_folder, FILE[0], {}, "model is a causal model, and --likelihood N"),
        (models[0], FILE[0], dict(samples=0), r"samples \(--likelihood\) must be a positive"),
        (models[0], FILE[0], dict(samples=True), "received True"),
        (models[0], FILE[0], dict(guidance=math.nan), "guidance must be a finite number"),
        (models[1], {"prompt": "", "answer": "a"}, {}, "record '1': this model predicts a token"),
    ):
        with pytest.raises(ValueError, match=said):
            scored(model, [row], tmp_path, **kw)
    assert not (tmp_path / "out.jsonl").exists()
    run = tmp_path / "run"
    run.mkdir()
    config = {"recipe": "sft", "models": {"policy": {"from_causal": False}}}
    (run / "config.json").write_text(json.dumps(config))
    for model in (models[0], run):
        argv = ["score", "--model", model, "--input", tmp_path / "in.jsonl", "--output", "-"]
        assert cli.main([*map(str, argv)]) == 1
        said = capsys.readouterr().err
        assert f"{model} is a denoiser, which has no head" in said
        assert "--likelihood N gives a bound" in said
    likelihood.refuse(tiny_folder)
