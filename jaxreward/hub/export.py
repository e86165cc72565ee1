"""A parameter tree into a Hugging Face folder: weights, config, tokenizer, model card."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreward import __version__
from jaxreward.core import trees
from jaxreward.hub import load
from jaxreward.models import decoder, families, heads
from jaxreward.parallel import specs as sp

log = logging.getLogger(__name__)
PyTree = Any
DTYPES = ("float32", "bfloat16", "float16")


def tensors(
    cfg: decoder.Config, params: PyTree, score: PyTree | None, *, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Checkpoint tensors by serialised name; layers unstacked.

    Args:
      cfg: The model. params: Its tree; without "head" when a score head replaces it.
      score: Tree of the score head, or None for a language model. A head with a hidden layer is
        not among the tensors: see `head_tensors`.
      dtype: Of the tensors.
    """
    flat = trees.flatten(params)
    cast = _cast(dtype)
    out = {}
    for entry in families.hf_table(cfg):
        if score is not None and entry.ours == "head/kernel":
            continue
        leaf = np.asarray(jax.device_get(flat[entry.ours]))
        for layer in range(cfg.depth) if entry.layered else (0,):
            made = entry.to(leaf[layer] if entry.layered else leaf)
            out[entry.theirs.format(layer=layer)] = np.ascontiguousarray(made, cast)
    if score is not None and "hidden" not in score:
        out |= head_tensors(score, dtype=dtype)
    return out


def _cast(dtype):
    return np.dtype(dtype) if dtype != "bfloat16" else jax.numpy.bfloat16


def head_tensors(score: PyTree, *, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A score head by serialised name, matrices as torch has them: `score.weight`, or for a head
    with a hidden layer `hidden.weight`, `hidden.bias`, `out.weight` and `out.bias`."""
    flat = trees.flatten(score)
    names = {path: path.replace("/", ".").replace("kernel", "weight") for path in flat}
    if "kernel" in flat:
        names["kernel"] = "score.weight"
    return {
        names[path]: np.ascontiguousarray(np.asarray(jax.device_get(leaf)).T, _cast(dtype))
        for path, leaf in flat.items()
    }


def _eos_ids(source: Path, raw: dict) -> set[int]:
    found: list[Any] = [raw.get("eos_token_id")]
    generation = source / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text()).get("eos_token_id"))
    flat = [i for x in found for i in (x if isinstance(x, list) else [x])]
    return {i for i in flat if isinstance(i, int)}


def pad_token(source: Path, raw: dict) -> tuple[int, str]:
    """A pad token (id, text) that ends nothing.

    transformers' sequence classification skips trailing pads to find the last token. If the pad is
    an end token, the final end token is skipped with it and another state is scored.

    Raises:
      ValueError: if the tokenizer has no special token that is free to be the pad.
    """
    ends = _eos_ids(source, raw)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", []) if t.get("special")}
    text = lambda name: (
        settings[name]["content"] if isinstance(settings.get(name), dict) else settings.get(name)
    )
    eos = {i for t, i in special.items() if t == text("eos_token")} | ends
    bos = special.get(text("bos_token"))
    preferred = [text("pad_token"), "<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", text("unk_token")]
    for name in [*preferred, *special]:
        free = name in special and special[name] not in eos and special[name] != bos
        if free and special[name] < raw["vocab_size"]:
            return special[name], name
    raise ValueError(
        f"{source}: every special token of the tokenizer is a beginning or an end token "
        f"(end ids {sorted(eos)}); add a pad token to tokenizer.json before exporting a scorer"
    )


_CARD = """---
library_name: {library}
pipeline_tag: {task}
tags:
- jaxreward
{tags}---

# {title}

{about}

Made with jaxreward {version}. {origin}

## Use

```python
{snippet}
```

{protocol}
"""

_SCORE = '''import torch
from transformers import {auto}, AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder, dtype=torch.float32).eval()
{logits}

def score(prompt, answer):
    """{what} of an answer (text) to a prompt ({prompts})."""
{inputs}
    with torch.no_grad():
        return {value}


print(score("What is 2 + 2?", {answer!r}))'''

_LOGITS = "logits = lambda inputs: model(**inputs).logits\n"
_LOGITS_HIDDEN = """from safetensors.torch import load_file

head = {k: v.float() for k, v in load_file(f"{folder}/score.safetensors").items()}


def logits(inputs):
    state = model(**inputs).last_hidden_state[:, -1]
    linear = torch.nn.functional.linear
    hidden = torch.relu(linear(state, head["hidden.weight"], head["hidden.bias"]))
    return linear(hidden, head["out.weight"], head["out.bias"])
"""
_INPUTS_CHAT = """\
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = messages + [{"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")"""
_INPUTS_PLAIN = """\
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    first = {bos!r}
    if first is not None and ids[:1] != [first]:
        ids = [first] + ids
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids = ids + [tokenizer.eos_token_id]
    inputs = {{"input_ids": torch.tensor([ids])}}"""
_VALUES = {
    "scalar": ("Reward", "logits(inputs)[0, 0].item()"),
    "scores": ("Scores by name", "dict(zip({outputs}, logits(inputs)[0].tolist()))"),
    "classes": (
        "Probabilities of the classes",
        "dict(zip({outputs}, logits(inputs)[0].softmax(-1).tolist()))",
    ),
}

_GENERATE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
inputs = tokenizer("2 + 2 =", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))"""


_DENOISE = """from jaxreward.hub import load

folder = "."  # this folder
cfg, params, _ = load.load(folder)
print(cfg.mask, cfg.predict_offset, cfg.mask_id)"""


def _snippet(head: heads.Config, template: str, adds_bos: int | None) -> str:
    """Python that scores an answer with transformers alone."""
    chat = template == "chat"
    what, value = _VALUES[head.kind]
    return _SCORE.format(
        auto="AutoModel" if head.hidden else "AutoModelForSequenceClassification",
        logits=_LOGITS_HIDDEN if head.hidden else _LOGITS,
        what=what,
        prompts="text, or a list of messages" if chat else "text",
        inputs=_INPUTS_CHAT if chat else _INPUTS_PLAIN.format(bos=adds_bos),
        value=value.format(outputs=list(head.outputs)),
        answer="4" if chat else " 4",
    )


def _head_config(head: heads.Config, family: str) -> dict:
    """What config.json says of a score head: transformers' names, and ours beside them."""
    classes = families.FAMILIES[family].classes
    # transformers' own name for the one number of a scorer.
    names = ("score_0",) if head.kind == "scalar" else head.outputs
    raw = {
        "architectures": [f"{classes}{'Model' if head.hidden else 'ForSequenceClassification'}"],
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if head.kind != "scalar":
        kinds = {"scores": "regression", "classes": "single_label_classification"}
        raw["problem_type"] = kinds[head.kind]
    return raw


def _settle_tokenizer(path: Path, pad: str | None) -> None:
    """Gives the tokenizer its pad, and takes out a class that would need code of the source."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text())
    settled = {k: v for k, v in settings.items() if k != "auto_map"}
    if settled != settings:
        settled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if pad is not None:
        settled["pad_token"] = pad
    if settled != settings:
        path.write_text(json.dumps(settled, indent=2, ensure_ascii=False))


def write(
    out: str | Path,
    cfg: decoder.Config,
    params: PyTree,
    *,
    source: str | Path,
    score: PyTree | None = None,
    head: heads.Config = heads.SCALAR,
    template: str = "chat",
    max_len: int | None = None,
    adds_bos: int | None = None,
    dtype: str = "float32",
    title: str | None = None,
    about: str = "",
    origin: str = "",
    facts: dict | None = None,
) -> Path:
    """Writes `*ForSequenceClassification` (with `score`), `*ForCausalLM` (without) or a denoiser.

    transformers has no class for a head with a hidden layer: there the folder is the bare model,
    with the head in score.safetensors and in the card the lines that put the two together. The
    tokenizer, its chat template and the generation settings are copied from `source`. A scorer
    gets a pad id that differs from every end id. The folder appears whole or not at all, and names
    no code of others: `auto_map` of the source is left out.

    transformers has no class for a denoiser. LLaDA and Dream folders are those of their own code;
    one that began as a causal model keeps that model's names, and config.json says under
    "jaxreward" what it is: transformers alone would run it as the causal model that it is not.

    Args:
      out: New folder.
      cfg, params: The model, adapters merged.
      source: Folder whose tokenizer belongs to it.
      score: Tree of the score head, or None. head: What it gives; ignored without `score`.
      template: How a conversation becomes text, "chat" or "plain"; recorded in config.json.
      max_len: Longest input the scores were trained on; recorded.
      adds_bos: Beginning-of-sequence id that plain text gets in front, or None.
      dtype: float32, bfloat16 or float16.
      title, about, origin: For the model card.
      facts: Where the weights come from, for provenance.json; None writes none.

    Raises:
      ValueError: on an unknown dtype, if `out` is not empty, or if a denoiser has a score head.
    """
    from safetensors.numpy import save_file

    out, source = Path(out), Path(source)
    if dtype not in DTYPES:
        raise ValueError(f"cannot export dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; export into a new folder")
    if score is not None and cfg.mask != "causal":
        raise ValueError(
            f"a score head reads the last token of a causal model; this one is a denoiser "
            f"(mask={cfg.mask!r}), which is exported without `score`"
        )
    if score is not None:
        made = {k: x.shape[-1] for k, x in trees.flatten(score).items() if k.endswith("kernel")}
        if made.get("out/kernel", made.get("kernel")) != len(head.outputs):
            raise ValueError(
                f"the score head has kernels of widths {made}, and gives the outputs "
                f"{', '.join(head.outputs)}; pass the `head` that belongs to it"
            )
    raw = load.read_config(source)
    alike = raw.get("model_type", "llama") == cfg.family
    raw = {
        # Of another family's file only the token ids mean the same; code of others stays behind.
        **{
            name: value
            for name, value in raw.items()
            if name not in ("jaxreward", "auto_map") and (alike or name.endswith("token_id"))
        },
        **families.to_hf_config(cfg),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    pad_text = None
    if score is not None:
        pad, pad_text = pad_token(source, raw)
        ours = {"template": template, "max_len": max_len}
        if head != heads.SCALAR:
            ours["head"] = {"kind": head.kind, "outputs": head.outputs, "weights": head.weights}
        if head.hidden:
            ours["pooling"] = "last token"
        raw |= {**_head_config(head, cfg.family), "pad_token_id": pad, "jaxreward": ours}
    snippet = _GENERATE
    protocol = ""
    if score is not None:
        snippet = _snippet(head, template, adds_bos)
        protocol = (
            "The score is read at the last token of the conversation as the chat template renders "
            "it."
            if template == "chat"
            else "The score is read at the end token after prompt and answer, joined as they are."
        )
        if head.kind == "scalar":
            protocol += " Only differences between answers to one prompt have a meaning."
        if max_len:
            protocol += f" It was trained on inputs of at most {max_len} tokens."
    if cfg.mask != "causal":
        snippet = _DENOISE
        protocol = (
            "This is a denoiser, a masked diffusion language model: attention is "
            + ("not causal" if cfg.mask == "full" else f"causal by blocks of {cfg.block} positions")
            + (f", token {cfg.mask_id} stands for a masked position" if cfg.mask_id >= 0 else "")
            + ", and the state at a position predicts "
            + ("the token after it." if cfg.predict_offset else "the token there.")
            + " transformers has no class for it, and would run a model of this `model_type`, if "
            "it knows one, as the causal model that this is not."
        )
    card = _CARD.format(
        library="transformers" if cfg.mask == "causal" else "jaxreward",
        task="text-classification" if score is not None else "text-generation",
        tags="- reward-model\n" * (score is not None) + "- diffusion\n" * (cfg.mask != "causal"),
        title=title or out.name,
        about=about or ("A scalar reward model." if score is not None else "A language model."),
        version=__version__,
        origin=origin,
        snippet=snippet,
        protocol=protocol,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in load.TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        _settle_tokenizer(partial / "tokenizer_config.json", pad_text)
        save_file(
            tensors(cfg, params, score, dtype=dtype),
            partial / "model.safetensors",
            metadata={"format": "pt"},
        )
        if score is not None and "hidden" in score:
            save_file(
                head_tensors(score, dtype=dtype),
                partial / load.HEAD_FILE,
                metadata={"format": "pt"},
            )
        (partial / "config.json").write_text(json.dumps(raw, indent=2))
        if facts is not None:
            (partial / "provenance.json").write_text(json.dumps(facts, indent=1, default=str))
        (partial / "README.md").write_text(card)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def write_tiny(folder: str | Path, *, seed: int = 0, denoiser: bool = False, **sizes) -> Path:
    """A random model with a byte tokenizer, as a Hugging Face folder; `init="tiny"` is this.

    Args:
      folder: Where it goes; one that is there already is left as it is.
      seed: Of the weights.
      denoiser: Sees the whole text and has a token "<|mask|>", its last.
      **sizes: Fields of `decoder.Config` beside those of `testing.tiny_config`.
    """
    from jaxreward import testing

    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if denoiser:
        sizes = dict(vocab=260, mask="full", mask_id=259, predict_offset=0) | sizes
    cfg = testing.tiny_config(**sizes)
    source = folder.with_name(folder.name + ".tokenizer")
    testing.write_tokenizer(source, mask=denoiser)
    raw = families.to_hf_config(cfg) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (source / "config.json").write_text(json.dumps(raw))
    params = sp.init(decoder.specs(cfg), jax.random.key(seed))
    write(folder, cfg, params, source=source, about="A random toy model.")
    shutil.rmtree(source)
    return folder


def init_folder(init: str, workdir: str | Path, *, denoiser: bool = False) -> Path:
    """The model folder that `config.models.<role>.init` names: "hf:<folder>" or "tiny".

    `denoiser` says which of the two toys "tiny" is.

    Raises:
      ValueError: on any other form.
      FileNotFoundError: if the folder is not a model folder.
    """
    if init == "tiny":
        return write_tiny(Path(workdir) / "tiny_model", denoiser=denoiser)
    if not init.startswith("hf:"):
        raise ValueError(
            f"models.*.init must be hf:<folder> or tiny; received {init!r}. To start from a local "
            f"Hugging Face folder write hf:{init}"
        )
    folder = Path(init.removeprefix("hf:"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"models.*.init names {folder}, which does not exist. Put a Hugging Face folder there, "
            f"for example with `jaxreward import --from smollm2 --out {folder}`, or name another"
        )
    load.read_config(folder)
    return folder
