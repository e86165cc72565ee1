"""A Hugging Face folder into a parameter tree: safetensors only, no torch, no remote code."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core import trees
from jaxreward.models import decoder, families, heads
from jaxreward.parallel import hosts
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules

log = logging.getLogger(__name__)
PyTree = Any

# What a model folder may hold beside its weights, and what an export keeps.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)

_QWEN2_FILES = ("vocab.json", "merges.txt")
HEAD_FILE = "score.safetensors"  # a head that no class of transformers has


def read_config(folder: str | Path) -> dict:
    """The raw config.json of a model folder.

    Raises:
      FileNotFoundError: if there is no such folder or no config.json in it.
      ValueError: if it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a model folder: {path} does not exist. Expected a Hugging Face "
            "folder with config.json, *.safetensors and a tokenizer"
        )
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


@contextlib.contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def weight_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: safetensors file} of a folder, single or sharded with an index.

    Raises:
      FileNotFoundError: if there are no safetensors files, or the index names a missing one.
      ValueError: if the index points outside the folder, or a file is damaged.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = dict(json.loads(index.read_text())["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index}: expected JSON with a weight_map ({error!r})") from error
        for file in sorted(set(names.values())):
            if Path(file).name != file:
                raise ValueError(f"{index}: {file!r} leaves the folder; file names only")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{index} names {file}, which is not in {folder}")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        hint = f" (found {', '.join(other[:3])}: convert it; pickle files are not read)" * bool(
            other
        )
        raise FileNotFoundError(f"{folder} holds no model.safetensors{hint}")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def content_hash(folder: str | Path) -> str:
    """sha256 over config.json and the weight files, in name order.

    Raises:
      FileNotFoundError, ValueError: as `read_config`.
    """
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _tensor(files, name) -> np.ndarray:
    with _opened(files[name]) as file:
        return file.get_tensor(name)


def _stored(files) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that are there, read from the headers alone."""
    shapes = {}
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in set(file.keys()) & {n for n, where in files.items() if where == path}:
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _expected(table, cfg) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a checkpoint of this config has."""
    described = trees.flatten(decoder.specs(cfg), is_leaf=lambda x: isinstance(x, sp.Param))
    shapes = {}
    for entry in table:
        ours = described[entry.ours].shape[entry.layered :]
        made = jax.eval_shape(entry.to, jax.ShapeDtypeStruct(ours, np.float32))
        for layer in range(cfg.depth) if entry.layered else (0,):
            shapes[entry.theirs.format(layer=layer)] = made.shape
    return shapes


@functools.lru_cache(maxsize=256)
def _programs(shape, dtype, where):
    """(makes an empty stack, writes one layer into it in place); leaves of one shape share them."""
    empty = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)
    write = lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
    return empty, jax.jit(write, donate_argnums=0, out_shardings=where)


def _stacker(param: sp.Param, dtype, rules):
    """(an empty stack, a function that writes one layer into it in place)."""
    axes = param.axes
    where = rules and rules.sharding(axes, param.shape, layout="storage")
    part = rules and rules.sharding(axes[1:], param.shape[1:], layout="storage")
    empty, write = _programs(tuple(param.shape), dtype, where)
    return empty(), lambda stack, x, i: write(stack, hosts.put(x, part), i)


def _leaf(files, entry, param: sp.Param, depth, dtype, rules):
    """One of our leaves on its devices; the host holds one tensor of the file at a time."""
    read = lambda name: np.asarray(entry.back(_tensor(files, name)), dtype)
    if not entry.layered:
        where = rules and rules.sharding(param.axes, param.shape, layout="storage")
        return hosts.put(read(entry.theirs), where)
    stack, write = _stacker(param, dtype, rules)
    for layer in range(depth):
        stack = write(stack, read(entry.theirs.format(layer=layer)), layer)
        # Transfers are asynchronous: without a wait all layers could be on the host at once.
        stack.block_until_ready()
    return stack


def load(
    folder: str | Path, *, rules: Rules | None = None, dtype: str = "float32"
) -> tuple[decoder.Config, PyTree, PyTree | None]:
    """Reads a folder of one of the `families.FAMILIES`.

    A tensor goes from the file to its devices before the next is read, so the host holds this
    process's shards and little more, however large the checkpoint is.

    Args:
      folder: `*ForCausalLM`, `*ForSequenceClassification`, a bare model with score.safetensors, or
        a denoiser: LLaDA, Dream, or a model whose config.json says so (`families.hf_config`).
      rules: Mesh and layouts: each leaf goes to its storage sharding as soon as it is read.
      dtype: Dtype of the parameters.

    Returns:
      (config, parameters, score head or None).

    Raises:
      FileNotFoundError: if files are missing.
      ValueError: listing every missing, unknown or wrongly shaped tensor at once; or if a denoiser
        has a score head.
    """
    raw = read_config(folder)
    cfg = families.hf_config(raw)
    files = weight_files(folder)
    table = families.hf_table(cfg)
    wanted, found = _expected(table, cfg), _stored(files)
    apart = (Path(folder) / HEAD_FILE).is_file()
    scorer = apart or "score.weight" in found
    if scorer and cfg.mask != "causal":
        raise ValueError(
            f"{folder} has a score head, and config.json makes it a denoiser (mask={cfg.mask!r}); "
            "the head reads the last token of a causal model"
        )
    if scorer and not cfg.tied and "lm_head.weight" not in found:
        # Sequence classification drops the language head: an untied scorer cannot generate.
        table = tuple(e for e in table if e.theirs != "lm_head.weight")
        del wanted["lm_head.weight"]
    # A tied checkpoint may store the head again; scorers bring their own; old files carry buffers.
    untied = families.hf_table(dataclasses.replace(cfg, tied=False))
    head = next(e.theirs for e in untied if e.ours == "head/kernel")
    spare = {head, *(n for n in found if n.endswith("rotary_emb.inv_freq"))}
    if scorer and not apart:
        wanted["score.weight"] = (*found["score.weight"][:1], cfg.width)
    shaped = [f"{n} {found[n]} for {s}" for n, s in sorted(wanted.items()) if found.get(n, s) != s]
    problems = {
        "missing": sorted(set(wanted) - set(found)),
        "unknown": sorted(set(found) - set(wanted) - spare),
        "of the wrong shape": shaped,
    }
    if any(problems.values()):
        told = [
            f"{kind} {', '.join(names[:8])} ({len(names)} in all)"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(f"{folder}: the tensors do not fit config.json; " + "; ".join(told))
    described = decoder.specs(cfg)
    flat = trees.flatten(described, is_leaf=lambda x: isinstance(x, sp.Param))
    dtype = jnp.dtype(dtype)
    params = {e.ours: _leaf(files, e, flat[e.ours], cfg.depth, dtype, rules) for e in table}
    score = None
    if scorer:
        score = _head(Path(folder) / HEAD_FILE if apart else files["score.weight"], cfg, rules)
    return cfg, trees.unflatten(params), score


def _head(path: Path, cfg, rules) -> PyTree:
    """The score head of a file: `score.weight` of a model, or all of score.safetensors."""
    with _opened(path) as file:
        apart = path.name == HEAD_FILE
        stored = {n: file.get_tensor(n) for n in (file.keys() if apart else ["score.weight"])}
    names = (
        {"score.weight": "kernel"}
        if not apart
        else {
            f"{layer}.{kind}": f"{layer}/{ours}"
            for layer in ("hidden", "out")
            for kind, ours in (("weight", "kernel"), ("bias", "bias"))
        }
    )
    if set(stored) != set(names):
        raise ValueError(
            f"{path}: expected the tensors {', '.join(names)}; found {', '.join(stored)}"
        )
    flat = {ours: stored[theirs].astype(np.float32).T for theirs, ours in names.items()}
    score = trees.unflatten(flat)
    hidden = flat["hidden/bias"].shape[0] if apart else 0
    outputs = flat["out/bias" if apart else "kernel"].shape[-1]
    cfg_of = heads.Config("scores", tuple(map(str, range(outputs))), hidden=hidden)
    described = heads.specs(cfg_of, cfg.width)
    sp.check(score, described, what=f"the score head in {path}")
    flat_specs = trees.flatten(described, is_leaf=lambda x: isinstance(x, sp.Param))
    where = lambda p: rules and rules.sharding(p.axes, p.shape, layout="storage")
    return trees.unflatten({n: hosts.put(x, where(flat_specs[n])) for n, x in flat.items()})


def read_head(folder: str | Path, score: PyTree) -> heads.Config:
    """What the score head of a folder gives, from its config.json.

    An export of ours says so itself. In other folders one number is a reward; several are scores
    where `problem_type` is "regression", and classes otherwise, as transformers has it.

    Args:
      folder: The model folder. score: Its head, from `load`.

    Raises:
      ValueError: if config.json names another number of outputs than the head has.
    """
    raw = read_config(folder)
    hidden = score["hidden"]["bias"].shape[0] if "hidden" in score else 0
    count = (score["out"]["kernel"] if hidden else score["kernel"]).shape[1]
    ours = (raw.get("jaxreward") or {}).get("head")
    if ours is not None:
        cfg = heads.Config(
            ours["kind"], tuple(ours["outputs"]), tuple(ours["weights"]), hidden=hidden
        )
    elif count == 1:
        cfg = heads.Config(hidden=hidden)
    else:
        named = raw.get("id2label") or {}
        names = tuple(named.get(str(i), f"LABEL_{i}") for i in range(count))
        kind = "scores" if raw.get("problem_type") == "regression" else "classes"
        cfg = heads.Config(kind, names, hidden=hidden)
    if len(cfg.outputs) != count:
        raise ValueError(
            f"{folder}: config.json names {len(cfg.outputs)} outputs "
            f"({', '.join(cfg.outputs)}), and the score head has {count}"
        )
    return cfg


def import_folder(folder: str | Path, out: str | Path) -> Path:
    """Copies a Hugging Face folder after checking that we can read it.

    Weights, config and tokenizer files are copied and nothing else: no code, no pickle. Dream comes
    with vocab.json and merges.txt and a tokenizer class of its own, which is Qwen2's: there
    tokenizer.json is made of the two files by transformers' Qwen2 class.

    Raises:
      FileNotFoundError, ValueError: as `load`, or if `out` is not empty.
    """
    folder, out = Path(folder), Path(out)
    cfg = families.hf_config(read_config(folder))
    files = sorted({path.name for path in weight_files(folder).values()})
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose a new folder for the import")
    convertible = cfg.family == "Dream" and all((folder / n).is_file() for n in _QWEN2_FILES)
    if not convertible and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; scores need its tokenizer")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index = "model.safetensors.index.json"
    try:
        for name in ("config.json", *files, index, HEAD_FILE, *TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        if not (partial / "tokenizer.json").is_file():
            from transformers import Qwen2Tokenizer

            tokenizer = Qwen2Tokenizer.from_pretrained(str(partial), local_files_only=True)
            tokenizer.backend_tokenizer.save(str(partial / "tokenizer.json"))
            log.info("made tokenizer.json of %s", " and ".join(_QWEN2_FILES))
        load(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
