"""What is exported gives the same numbers in transformers, and in the snippet of its own card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreward import testing
from jaxreward.core import trees
from jaxreward.data import tokenize
from jaxreward.hub import export, load
from jaxreward.models import decoder, heads
from jaxreward.parallel import specs as sp
from jaxreward.recipes import evaluate

CASES = [
    ("What is 2 + 2?", "4"),
    ("Hi", "A much longer answer, with words — and signs — that no other answer here has."),
    ("Name a colour.", "Blue."),
]


def drawn(described, seed):
    """Random parameters: norms near one, weights large enough that a lost digit shows."""
    rng = np.random.default_rng(seed)
    flat = trees.flatten(described, is_leaf=lambda x: isinstance(x, sp.Param))
    for path, leaf in flat.items():
        mean, scale = (1.0, 0.3) if path.endswith("scale") else (0.0, 0.08)
        flat[path] = jnp.asarray(mean + scale * rng.normal(size=leaf.shape), jnp.float32)
    return trees.unflatten(flat)


@pytest.fixture(scope="module")
def base(tiny_folder):
    """A tiny language model: (folder of its tokenizer, config, parameters)."""
    cfg = testing.tiny_config()
    return tiny_folder, cfg, drawn(decoder.specs(cfg), 3)


@pytest.fixture(scope="module")
def score():
    """A random scalar head."""
    return jax.tree.map(lambda x: 2 * x, drawn(heads.scalar_specs(32), 9))


@pytest.fixture(scope="module")
def chat(base, score, tmp_path_factory):
    """The scorer, exported with the chat template."""
    folder, cfg, params = base
    out = tmp_path_factory.mktemp("export_chat") / "scorer"
    return export.write(
        out, cfg, params, source=folder, score=score, max_len=512, title="A title", origin="By us."
    )


@pytest.fixture(scope="module")
def plain(base, score, tmp_path_factory):
    """The scorer, exported with the plain template and a tokenizer that adds BOS and has no chat
    template."""
    folder, cfg, params = base
    out = tmp_path_factory.mktemp("export_plain")
    source = testing.write_tokenizer(out / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "config.json").write_text((folder / "config.json").read_text())
    return export.write(
        out / "scorer", cfg, params, source=source, score=score, template="plain", adds_bos=1
    )


def ours(folder, cases=CASES):
    """Scores as our own loader and packed scorer give them."""
    model = evaluate.load_model(folder)
    made = [
        tokenize.encode_tree(model.tokenizer, prompt, [answer], template=model.template)
        for prompt, answer in cases
    ]
    return np.array([scores[0] for scores in model.predict(made)])


def theirs(folder, **kw):
    """Scores of transformers: each conversation alone, and all as one right-padded batch."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **kw).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": a}], tokenize=False
        )
        for p, a in CASES
    ]
    encode = lambda texts: tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    with torch.no_grad():
        alone = [model(**encode([t])).logits[0, 0].item() for t in texts]
        batch = model(**encode(texts)).logits[:, 0].float().numpy()
    return np.array(alone), batch


@pytest.mark.parity
def test_scores_equal_transformers(chat, require):
    """Catches a wrong layout, a lost final norm, a head at the wrong token, padding that counts."""
    require("torch")
    import torch

    alone, batch = theirs(chat, dtype=torch.float32)
    mine = ours(chat)
    assert np.ptp(mine) > 0.1
    np.testing.assert_allclose(alone, mine, atol=1e-5)
    np.testing.assert_allclose(batch, mine, atol=1e-5)


@pytest.mark.parity
def test_final_end_token_is_scored(base, score, tmp_path, require):
    """Text that ends in EOS, in a padded batch: a pad id equal to EOS would score another token."""
    require("torch")
    import torch
    from transformers import AutoModelForSequenceClassification

    folder, cfg, params = base
    out = export.write(tmp_path / "m", cfg, params, source=folder, score=score)
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    pad = json.loads((out / "config.json").read_text())["pad_token_id"]
    rows = [[1, 40, 41, 2], [1, 40, 41, 42, 43, 44, 2]]
    padded = torch.tensor([rows[0] + [pad] * 3, rows[1]])
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    with torch.no_grad():
        got = model(padded, attention_mask=mask).logits[:, 0].numpy()
        # The state at EOS itself, by hand: the backbone's last state times the head.
        ends = [model.model(torch.tensor([r])).last_hidden_state[0, -1].numpy() for r in rows]
    expected = np.array(ends) @ np.asarray(score["kernel"])[:, 0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    before = np.array(
        [model.model(torch.tensor([r[:-1]])).last_hidden_state[0, -1].detach() for r in rows]
    )
    assert np.abs(before @ np.asarray(score["kernel"])[:, 0] - expected).min() > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_exports(base, score, tmp_path, dtype, close, require):
    """The weights are rounded and nothing else is lost, in our loader and in transformers."""
    require("torch")
    import torch

    folder, cfg, params = base
    out = export.write(tmp_path / "m", cfg, params, source=folder, score=score, dtype=dtype)
    stored = load_file(out / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    alone, batch = theirs(out, dtype=torch.float32)
    mine = ours(out)
    np.testing.assert_allclose(alone, mine, atol=1e-5)
    np.testing.assert_allclose(batch, mine, atol=1e-5)
    _, _, head = load.load(out)
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(head["kernel"], score["kernel"], rtol=rounding, atol=1e-7)
    default, _ = theirs(out)  # in the dtype of the file
    np.testing.assert_allclose(default, mine, atol=close)


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_language_model_round_trip(base, tmp_path, tied, require):
    """Equal logits in transformers, with a tied and with an own head."""
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    folder, _, _ = base
    cfg = testing.tiny_config(tied=tied)
    params = drawn(decoder.specs(cfg), 1)
    out = export.write(tmp_path / "m", cfg, params, source=folder)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = np.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    # Positions and segments of one unpadded row.
    x = jnp.take(params["embed"]["table"], ids, axis=0)
    hidden = decoder.backbone(
        params,
        cfg,
        x,
        positions=np.arange(12, dtype=np.int32)[None, :, None],
        segments=np.ones((1, 12), np.int32),
        trunk=np.zeros((1, 12), np.int32),
    )
    got = np.asarray(hidden.states @ decoder.head_matrix(params, cfg))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-4)
    reloaded, back, head = load.load(out)
    assert reloaded == cfg and head is None
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert not (json.loads((out / "config.json").read_text()).keys() & {"jaxreward", "num_labels"})


def test_reload_is_bit_equal(base, score, chat):
    """Catches any arithmetic on the way out or in."""
    _, cfg, params = base
    reloaded, back, head = load.load(chat)
    assert reloaded == cfg
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    np.testing.assert_array_equal(head["kernel"], score["kernel"])


def test_a_hidden_head_lies_in_a_file_of_its_own(base, tmp_path):
    """Catches a transposed layer, a head that an import loses, and names that do not return."""
    folder, cfg, params = base
    head = heads.Config("scores", ("a", "b"), (2.0, 1.0), hidden=5)
    score = drawn(heads.specs(head, cfg.width), 4)
    out = export.write(tmp_path / "m", cfg, params, source=folder, score=score, head=head)
    assert "score.weight" not in load_file(out / "model.safetensors")
    assert load_file(out / "score.safetensors")["hidden.weight"].shape == (5, cfg.width)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaModel"]
    copy = load.import_folder(out, tmp_path / "copy")
    _, back, again = load.load(copy)
    jax.tree.map(np.testing.assert_array_equal, (back, again), (params, score))
    assert load.read_head(copy, again) == head
    short = load_file(out / "score.safetensors")
    del short["out.bias"]
    save_file(short, copy / "score.safetensors")
    with pytest.raises(ValueError, match=r"score\.safetensors: expected the tensors .*out\.bias"):
        load.load(copy)


def test_untied_scorer_drops_the_language_head(base, score, tmp_path):
    """transformers warns of an lm_head it does not know; ours reads the folder without one."""
    folder, _, _ = base
    cfg = testing.tiny_config(tied=False)
    params = drawn(decoder.specs(cfg), 1)
    out = export.write(tmp_path / "m", cfg, params, source=folder, score=score)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    _, back, _ = load.load(out)
    del params["head"]
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_folder_of_a_scorer(base, chat):
    """Pad id and token agree and end nothing; template and settings come along."""
    folder, _, _ = base
    config = json.loads((chat / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_labels"] == 1 and config["id2label"].keys() == {"0"}
    assert config["jaxreward"] == {"template": "chat", "max_len": 512}
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    # The source pads with its end token; <|endoftext|> is free.
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 2
    assert config["pad_token_id"] == 0
    tokenizer = tokenize.load_tokenizer(chat)
    assert tokenizer.pad_id == 0 and tokenizer.hf.pad_token == "<|endoftext|>"
    assert tokenizer.template == testing.CHATML and 2 in tokenizer.eos_ids
    for name in ("tokenizer.json", "generation_config.json"):
        assert (chat / name).read_bytes() == (folder / name).read_bytes()
    card = (chat / "README.md").read_text()
    assert "# A title" in card and "By us." in card and "at most 512 tokens" in card
    assert "pipeline_tag: text-classification" in card and "- reward-model" in card


@pytest.mark.parametrize(
    ("extra", "vocab", "expected"),
    [
        ({"<|endoftext|>": 3, "<spare>": 4}, 259, (3, "<|endoftext|>")),
        ({"<spare>": 4}, 259, (4, "<spare>")),
        ({"<spare>": 300, "<last>": 5}, 259, (5, "<last>")),  # 300 has no embedding
        ({"<pad>": 6, "<end>": 7}, 259, (6, "<pad>")),
        ({"<end>": 7}, 259, None),
        ({}, 259, None),
        ({"<spare>": 300}, 259, None),
    ],
)
def test_choice_of_the_pad(tmp_path, extra, vocab, expected):
    """Never a beginning, an end (of config, tokenizer or generation settings), or an id out of the
    vocabulary; and words that help when none is left."""
    special = {"<s>": 1, "</s>": 2, **extra}
    added = [{"id": i, "content": t, "special": True} for t, i in special.items()]
    added.append({"id": 8, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    raw = {"vocab_size": vocab, "eos_token_id": 2}
    if expected is not None:
        assert export.pad_token(tmp_path, raw) == expected
        return
    with pytest.raises(ValueError, match=r"every special token .* add a pad token to tokenizer"):
        export.pad_token(tmp_path, raw)


def bare(folder, base):
    """A source folder whose tokenizer has BOS and EOS as its only special tokens."""
    testing.write_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["id"] in (1, 2)]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def test_failed_exports_leave_nothing(base, score, tmp_path, monkeypatch):
    """Whether refused, broken or interrupted: neither the folder nor its .partial is there."""
    folder, cfg, params = base
    source = bare(tmp_path / "source", folder)
    write = lambda **kw: export.write(tmp_path / "out", cfg, params, **{"source": folder, **kw})
    with pytest.raises(ValueError, match="every special token"):
        write(source=source, score=score)
    with pytest.raises(ValueError, match="cannot export dtype 'float8'; use one of float32"):
        write(dtype="float8")
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        write(source=tmp_path / "nowhere")
    for error in (OSError("disk full"), KeyboardInterrupt()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("safetensors.numpy.save_file", fail)
        with pytest.raises(type(error)):
            write(score=score)
        monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert write(source=source).is_dir()  # a language model needs no pad of its own
    with pytest.raises(ValueError, match=r"out is not empty; export into a new folder"):
        write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_an_old_partial_is_replaced(base, tmp_path):
    """A .partial that a killed export left does not leak into the next one."""
    folder, cfg, params = base
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / "model.safetensors.index.json").write_text("{}")
    out = export.write(tmp_path / "out", cfg, params, source=folder)
    assert not (out / "model.safetensors.index.json").exists() and not stale.exists()


def test_init_folder(tiny_folder, tmp_path):
    """hf:FOLDER, tiny (kept where it is there, as a resumed run needs), and what a user may write
    instead."""
    assert [p.name for p in tiny_folder.parent.iterdir()] == ["model"]
    assert load.load(tiny_folder)[0] == testing.tiny_config()
    made = tmp_path / "run" / "tiny_model"
    shutil.copytree(tiny_folder, made)
    assert export.init_folder("tiny", tmp_path / "run") == made
    assert load.content_hash(made) == load.content_hash(tiny_folder)
    assert export.init_folder(f"hf:{made}", tmp_path) == made
    with pytest.raises(ValueError, match="write hf:models/x"):
        export.init_folder("models/x", tmp_path)
    with pytest.raises(FileNotFoundError, match="models/x, which does not exist"):
        export.init_folder("hf:models/x", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        export.init_folder(f"hf:{tmp_path}", tmp_path)


def snippet(folder):
    """The Python of the card's Use section."""
    (found,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    return found


DRIVER = """
import json, os, sys
cases = json.loads(sys.argv[1])
out = []
for folder in sys.argv[2:]:
    os.chdir(folder)
    names = {}
    exec(open("snippet.py").read(), names)
    out.append([names["score"](p, a) for p, a in cases] if "score" in names else None)
print("RESULT" + json.dumps(out))
"""


@pytest.mark.parity
def test_the_cards_snippets(base, chat, plain, tmp_path, require):
    """The Python of each card runs as it stands, in its folder, and scores as we do."""
    require("torch")
    model = evaluate.load_model(plain)
    assert model.template == "plain" and model.tokenizer.adds_bos
    assert model.tokenizer.ids("<|im_start|>") == [1]
    cases = [*CASES, ("<|im_start|>Hello", " again"), ("Bye", "!<|im_end|>")]
    language = tmp_path / "lm"
    folder, cfg, params = base
    export.write(language, cfg, params, source=folder)
    for out in (chat, plain, language):
        (out / "snippet.py").write_text(snippet(out))
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "driver.py", json.dumps(cases), chat, plain, language],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
    got = json.loads(line.removeprefix("RESULT"))
    np.testing.assert_allclose(got[0], ours(chat, cases), atol=1e-5)
    np.testing.assert_allclose(got[1], ours(plain, cases), atol=1e-5)
    assert got[2] is None
    assert not np.allclose(got[0], got[1])
    for out in (chat, plain):
        Path(out / "snippet.py").unlink()
