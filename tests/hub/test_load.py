"""Checkpoints written by hand are read tensor by tensor; what does not fit is told at once."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreward import testing
from jaxreward.core import trees
from jaxreward.data import tokenize
from jaxreward.hub import export, load
from jaxreward.models import decoder, families
from jaxreward.parallel import mesh, rules
from jaxreward.parallel import specs as sp

V, D, L, N, K, H, F = 259, 32, 2, 4, 2, 8, 64


def weights(*, seed=0, tied=True, score=0, dtype=np.float32):
    """The tensors of a tiny Llama, named and shaped as the format has them: [out, in]."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    out = {"model.embed_tokens.weight": draw(V, D), "model.norm.weight": draw(D)}
    for i in range(L):
        layer = f"model.layers.{i}."
        out[layer + "self_attn.q_proj.weight"] = draw(N * H, D)
        out[layer + "self_attn.k_proj.weight"] = draw(K * H, D)
        out[layer + "self_attn.v_proj.weight"] = draw(K * H, D)
        out[layer + "self_attn.o_proj.weight"] = draw(D, N * H)
        out[layer + "mlp.gate_proj.weight"] = draw(F, D)
        out[layer + "mlp.up_proj.weight"] = draw(F, D)
        out[layer + "mlp.down_proj.weight"] = draw(D, F)
        out[layer + "input_layernorm.weight"] = draw(D)
        out[layer + "post_attention_layernorm.weight"] = draw(D)
    if not tied:
        out["lm_head.weight"] = draw(V, D)
    if score:
        out["score.weight"] = draw(score, D)
    return out


def write(folder, tensors, *, tied=True, shards=1, **config):
    """A model folder with these tensors, single or in shards with an index."""
    testing.write_tokenizer(folder)
    raw = families.to_hf_config(testing.tiny_config(tied=tied)) | config
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file)
        names |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))
    return folder


def same(params, tensors, *, tied=True):
    """Every element of ours is the element of theirs that the format says it is."""
    layers = params["layers"]
    leaf = lambda *path: np.asarray(
        layers[path[0]]["scale"] if len(path) == 1 else layers[path[0]][path[1]]["kernel"]
    )
    for i in range(L):
        theirs = lambda name: tensors[f"model.layers.{i}.{name}.weight"].astype(np.float32)
        for name, heads in (("q", N), ("k", K), ("v", K)):
            rows = theirs(f"self_attn.{name}_proj")
            for n in range(heads):  # row n * H + h of theirs is head n, element h of ours
                np.testing.assert_array_equal(
                    leaf("attn", name)[i][:, n, :].T, rows[n * H : (n + 1) * H]
                )
        for n in range(N):
            np.testing.assert_array_equal(
                leaf("attn", "o")[i][n].T, theirs("self_attn.o_proj")[:, n * H : (n + 1) * H]
            )
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(leaf("mlp", name)[i].T, theirs(f"mlp.{name}_proj"))
        np.testing.assert_array_equal(leaf("attn_norm")[i], theirs("input_layernorm"))
        np.testing.assert_array_equal(leaf("mlp_norm")[i], theirs("post_attention_layernorm"))
    at = lambda name: tensors[name].astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["table"], at("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["norm"]["scale"], at("model.norm.weight"))
    if tied:
        assert "head" not in params
    else:
        np.testing.assert_array_equal(params["head"]["kernel"].T, at("lm_head.weight"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_lands_where_it_belongs(tmp_path, shards, tied):
    """Catches swapped projections, a wrong head layout, mixed-up layers or shards."""
    tensors = weights(tied=tied)
    cfg, params, score = load.load(write(tmp_path / "m", tensors, tied=tied, shards=shards))
    assert (cfg.vocab, cfg.width, cfg.depth, cfg.tied, score) == (V, D, L, tied, None)
    same(params, tensors, tied=tied)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_checkpoints(tmp_path, dtype):
    """Catches a reader without bfloat16, and one that takes its bits for float16."""
    tensors = weights(dtype=dtype, score=1)
    _, params, score = load.load(write(tmp_path / "m", tensors))
    same(params, tensors)
    np.testing.assert_array_equal(score["kernel"].T, tensors["score.weight"].astype(np.float32))
    _, small, _ = load.load(tmp_path / "m", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(small)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("tied", [True, False])
def test_score_head(tmp_path, tied):
    """A scorer without lm_head loads, tied or not: classification checkpoints never store it."""
    tensors = weights(score=1)
    folder = write(
        tmp_path / "m", tensors, tied=tied, architectures=["LlamaForSequenceClassification"]
    )
    cfg, params, score = load.load(folder)
    assert cfg.tied == tied and score["kernel"].shape == (D, 1)
    same(params, tensors)
    np.testing.assert_array_equal(score["kernel"][:, 0], tensors["score.weight"][0])


def test_extra_tensors_that_are_known(tmp_path):
    """A tied checkpoint may store its head again, and old ones carry rotary buffers."""
    tensors = weights(tied=False)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _, params, _ = load.load(write(tmp_path / "m", tensors, tied=True))
    same(params, tensors, tied=True)


def test_sharded_over_a_mesh(tmp_path):
    """The values do not depend on the mesh; catches a leaf put on one device."""
    tensors = weights(score=1)
    where = rules.Rules(mesh.make_mesh({"fsdp": 2, "tensor": 2}))
    _, params, score = load.load(write(tmp_path / "m", tensors), rules=where)
    same(params, tensors)
    for leaf in [*jax.tree.leaves(params), *jax.tree.leaves(score)]:
        assert leaf.sharding.mesh.shape == where.mesh.shape
    assert params["layers"]["attn"]["q"]["kernel"].addressable_shards[0].data.shape == (L, 16, 2, H)


def test_all_misfits_at_once(tmp_path):
    """Catches a loader that stops at the first problem, or broadcasts or reshapes what it finds."""
    tensors = weights(score=1)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(N * H, np.float32)
    # One element too few, one that NumPy would broadcast, and one with the same number of elements.
    tensors["model.embed_tokens.weight"] = np.zeros((V - 1, D), np.float32)
    tensors["model.layers.1.input_layernorm.weight"] = np.zeros(1, np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((F, D), np.float32)
    tensors["score.weight"] = np.zeros((1, D + 1), np.float32)
    folder = write(tmp_path / "m", tensors)
    with pytest.raises(ValueError) as caught:
        load.load(folder)
    text = str(caught.value)
    assert str(folder) in text
    missing, unknown, shape = (text.index(w) for w in ("missing", "unknown", "wrong shape"))
    assert missing < unknown < shape
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        assert missing < text.index(name) < unknown
    assert unknown < text.index("model.layers.0.self_attn.q_proj.bias") < shape
    for name, have, want in (
        ("model.embed_tokens.weight", (V - 1, D), (V, D)),
        ("model.layers.1.input_layernorm.weight", (1,), (D,)),
        ("model.layers.0.mlp.down_proj.weight", (F, D), (D, F)),
        ("score.weight", (1, D + 1), (1, D)),
    ):
        assert f"{name} {have} for {want}" in text[shape:]
    assert "(2 in all)" in text and "(1 in all)" in text and "(4 in all)" in text


def test_untied_language_model_needs_its_head(tmp_path):
    """Only a scorer may lack lm_head; catches a model that would answer with noise."""
    folder = write(tmp_path / "m", weights(), tied=False)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight \(1 in all\)"):
        load.load(folder)


def test_files_that_are_not_there(tmp_path):
    """No folder, no weights, pickle only, a missing shard: each is told by name."""
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load.content_hash(tmp_path / "nowhere")
    folder = write(tmp_path / "m", weights(), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-00002-of-00002"):
        load.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors$"):
        load.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"found pytorch_model\.bin: convert it; pickle"):
        load.load(folder)


@pytest.mark.parametrize("where", ["../other/model.safetensors", "/etc/passwd", "sub/a", ".."])
def test_an_index_cannot_leave_the_folder(tmp_path, where):
    """Catches reading a file that the index points to outside the folder."""
    write(tmp_path / "other", weights())
    folder = write(tmp_path / "m", weights(), shards=2)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = where
    index.write_text(json.dumps(raw))
    with pytest.raises((ValueError, FileNotFoundError), match=r"leaves the folder|is not in"):
        load.load(folder)


def test_damaged_files_are_named(tmp_path):
    """A cut download is a ValueError with the file's name, not a foreign exception."""
    folder = write(tmp_path / "m", weights())
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:5], whole[: len(whole) // 2]):
        (folder / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            load.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index\.json: expected JSON with a weight_map"):
        load.load(folder)
    for text, what in (("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=what):
            load.load(folder)


def test_an_index_that_names_what_a_shard_lacks(tmp_path):
    """The header of the shard decides what is there, not the index."""
    folder = write(tmp_path / "m", weights(), shards=2)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    file = raw["weight_map"]["model.norm.weight"]
    held = load_file(folder / file)
    del held["model.norm.weight"]
    save_file(held, folder / file)
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight \(1 in all\)"):
        load.load(folder)


def test_content_hash(tmp_path):
    """Any byte of the config or of any shard changes it; a copy and other files do not."""
    folder = write(tmp_path / "m", weights(), shards=2)
    before = load.content_hash(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("x")
    assert load.content_hash(tmp_path / "copy") == before and len(before) == 64
    seen = {before}
    for name in ("config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))):
        path = folder / name
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if name == "config.json":  # a flipped byte is no JSON: change a number instead
                path.write_text(whole.decode() + " " * (at + 1))
            seen.add(load.content_hash(folder))
        path.write_bytes(whole)
    assert len(seen) == 10 and load.content_hash(folder) == before


@pytest.mark.parametrize("shards", [1, 2])
def test_import_copies_known_files_only(tmp_path, shards):
    """Catches code or pickle files that come along, and a copy that is not the original."""
    tensors = weights()
    folder = write(tmp_path / "m", tensors, shards=shards)
    for name in ("modeling_evil.py", "pytorch_model.bin", "optimizer.pt", ".env", "README.md"):
        (folder / name).write_text("x")
    (folder / "adapter.safetensors").write_bytes(b"not ours")
    (tmp_path / "out").mkdir()  # an empty folder may be there already
    out = load.import_folder(folder, tmp_path / "out")
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    expected |= {p.name for p in folder.glob("model*.safetensors*")}
    assert {p.name for p in out.iterdir()} == expected
    assert all((out / n).read_bytes() == (folder / n).read_bytes() for n in expected)
    same(load.load(out)[1], tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_import_leaves_nothing_half_done(tmp_path):
    """Catches a folder, or its .partial, that stays after an import that failed."""
    tensors = weights()
    del tensors["model.norm.weight"]
    folder = write(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        load.import_folder(folder, tmp_path / "out")
    write(folder, weights())
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load.import_folder(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_import_keeps_what_is_there(tmp_path):
    """A folder with something in it is never overwritten."""
    folder = write(tmp_path / "m", weights())
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        load.import_folder(folder, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def random_params(cfg):
    rng = np.random.default_rng(4)
    flat = trees.flatten(decoder.specs(cfg), is_leaf=lambda x: isinstance(x, sp.Param))
    return trees.unflatten(
        {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    )


def denoiser(kind, *, tied=False):
    """A tiny denoiser: of a family of denoisers, or one that began as a causal model."""
    cfg = testing.tiny_config(family=kind, tied=tied, **families.FAMILIES[kind].fixed)
    if cfg.mask != "causal":
        return dataclasses.replace(cfg, mask_id=5)
    return families.as_denoiser(cfg, mask_id=5)


@pytest.mark.parametrize(
    ("kind", "tied", "first"),
    [
        ("llada", True, "LLaDAModelLM"),
        ("Dream", False, "DreamModel"),
        ("llama", True, "LlamaForCausalLM"),
    ],
)
def test_a_denoiser_goes_out_and_in(tmp_path, kind, tied, first):
    """Catches a denoiser that returns as a causal model, weights that change, code of others that
    is named, and fields of another family's config.json that stay."""
    cfg = denoiser(kind, tied=tied)
    source = write(tmp_path / "source", weights(), auto_map={"AutoModel": "evil.Model"})
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "E"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    params = random_params(cfg)
    out = export.write(tmp_path / "out", cfg, params, source=source)
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == [first] and raw["model_type"] == kind
    assert "auto_map" not in raw and ("hidden_size" in raw) == (kind != "llada")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    card = (out / "README.md").read_text()
    assert "token 5 stands for a masked position" in card and "library_name: jaxreward" in card
    assert ("the token there." in card) == (kind == "llada")
    copy = load.import_folder(out, tmp_path / "copy")
    again, back, score = load.load(copy)
    assert again == cfg and score is None
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if kind == "llada":
        stored = load_file(out / "model.safetensors")
        gate = stored["model.transformer.blocks.1.ff_proj.weight"]
        np.testing.assert_array_equal(gate.T, params["layers"]["mlp"]["gate"]["kernel"][1])
        # A tied model of LLaDA's own code stores its table twice.
        stored["model.transformer.ff_out.weight"] = stored["model.transformer.wte.weight"]
        save_file(stored, copy / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, load.load(copy)[1], params)


def test_a_denoiser_has_no_score_head(tmp_path):
    """Catches a reward model that reads the last token of a model that sees the whole text."""
    cfg = denoiser("llama", tied=True)
    source = write(tmp_path / "source", weights(score=1))
    with pytest.raises(ValueError, match="this one is a denoiser"):
        score = {"kernel": np.zeros((D, 1), np.float32)}
        export.write(tmp_path / "out", cfg, random_params(cfg), source=source, score=score)
    assert not (tmp_path / "out").exists()
    (source / "config.json").write_text(json.dumps(families.to_hf_config(cfg)))
    with pytest.raises(ValueError, match=r"score head, and config\.json makes it a denoiser"):
        load.load(source)


def test_import_makes_the_tokenizer_of_dream(tmp_path):
    """Dream has a tokenizer class of its own over Qwen2's files; catches ids that move, and a
    folder of another family that is taken without its tokenizer."""
    cfg = denoiser("Dream")
    source = write(tmp_path / "source", weights())
    folder = export.write(tmp_path / "m", cfg, random_params(cfg), source=source)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    plain = sorted((t for t in vocab if t not in testing.SPECIAL), key=vocab.get)
    ids = {token: i for i, token in enumerate([*plain, "ab"])}
    added = {
        str(len(ids) + i): dict(content=t, special=True, normalized=False)
        for i, t in enumerate(["<|endoftext|>", "<|mask|>"])
    }
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load.import_folder(folder, tmp_path / "out")
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = tokenize.load_tokenizer(load.import_folder(folder, tmp_path / "out"))
    assert made.ids("abc<|mask|>") == [ids["ab"], ids["c"], 258]
    assert made.hf.mask_token_id == 258 and 257 in made.eos_ids


@pytest.mark.parity
def test_shards_that_transformers_wrote(tmp_path, require):
    """A checkpoint of save_pretrained(max_shard_size=...), tied head and all, loads as it is."""
    require("torch")
    import torch
    import transformers

    raw = families.to_hf_config(testing.tiny_config())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).to(torch.bfloat16)
    folder = tmp_path / "m"
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    cfg, params, _ = load.load(folder)
    assert cfg == testing.tiny_config()
    same(params, {k: v.float().detach().numpy() for k, v in model.state_dict().items()})


MEMORY = """
import sys, jax
from jaxreward.hub import load
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules

def peak():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith("VmHWM")) / 1024

rules = Rules(make_mesh({"fsdp": 2}))
load.load(sys.argv[1], rules=rules)  # compiles; what it takes is in both peaks
before = peak()
_, params, _ = load.load(sys.argv[2], rules=rules)
held = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20
print(before, peak(), held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_the_shards_and_little_more(tmp_path):
    """Catches a loader that holds the checkpoint, or a stack of layers, beside its result."""
    # 24 layers of 3 MiB: the parameters are 93 MiB, the largest tensor 9 MiB.
    cfg = testing.tiny_config(width=256, mlp=1024, depth=24, vocab=9000)
    for name, depth in (("small", 2), ("large", 24)):
        made = dataclasses.replace(cfg, depth=depth)
        rng = np.random.default_rng(0)
        tensors = {}
        described = trees.flatten(decoder.specs(made), is_leaf=lambda x: isinstance(x, sp.Param))
        for entry in families.hf_table(made):
            shape = described[entry.ours].shape[entry.layered :]
            for layer in range(depth) if entry.layered else (0,):
                x = entry.to(rng.normal(size=shape).astype(np.float32))
                tensors[entry.theirs.format(layer=layer)] = np.ascontiguousarray(x)
        folder = testing.write_tokenizer(tmp_path / name)
        (folder / "config.json").write_text(json.dumps(families.to_hf_config(made)))
        save_file(tensors, folder / "model.safetensors")
    env = dict(
        os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu"
    )
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    before, after, held = map(float, done.stdout.split()[-3:])
    assert held > 80
    # safetensors maps the file: pages of a tensor that was read may stay, one more at a time.
    largest = 9000 * 256 * 4 / 2**20
    assert after - before <= held + 2 * largest + 8
