"""Toys for tests, notebooks and `:smoke` runs: a tiny decoder, a byte tokenizer, made-up pairs.

Public: use them to test your own additions.
"""

import json
import random
from pathlib import Path

from jaxreward.core.types import PairRows
from jaxreward.models import decoder

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MASK = "<|mask|>"


def tiny_config(**changes) -> decoder.Config:
    """A decoder of 2 layers and width 32 over the byte tokenizer's 259 tokens."""
    base = {
        "vocab": 259,
        "width": 32,
        "depth": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp": 64,
        "tied": True,
        "max_len": 512,
    }
    return decoder.Config(**{**base, **changes})


def write_tokenizer(folder: str | Path, *, mask: bool = False) -> Path:
    """Writes a byte-level tokenizer with ChatML: special tokens 0 to 2, then the 256 bytes; with
    `mask` also "<|mask|>", token 259, for a denoiser."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = [MASK] if mask else []
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *more])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in [*SPECIAL, *more]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    )
    return folder


def synthetic_pairs(count: int, *, seed: int = 0) -> list[dict]:
    """Pairs that a small model can learn: the polite answer is preferred to the rude one."""
    rng = random.Random(seed)
    good, bad = ("thanks", "please", "gladly"), ("whatever", "no", "go away")
    pairs = []
    for i in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        pairs.append(
            {
                "id": f"toy-{i}",
                "prompt": f"What is {a} + {b}?",
                "chosen": f"{rng.choice(good)}: {a + b}",
                "rejected": f"{rng.choice(bad)}: {a + b}",
                "subset": "even" if i % 2 == 0 else "odd",
            }
        )
    return pairs


def synthetic_points(
    count: int, *, seed: int = 0, kind: str = "scalar", outputs: tuple[str, ...] = ("score",)
) -> list[dict]:
    """Labelled answers that a small model can learn: the polite ones get the higher numbers.

    Args:
      count: How many. seed: Of the draw.
      kind, outputs: The head they are for, as `data.points.target` takes them. Every fifth answer
        lacks its last score, where it has several.
    """
    points = []
    for i, pair in enumerate(synthetic_pairs(count, seed=seed)):
        good = i % 2 == 0
        answer = pair["chosen" if good else "rejected"]
        point = {"id": pair["id"], "prompt": pair["prompt"], "answer": answer}
        if kind == "scores":
            point["scores"] = {name: float(good) + k for k, name in enumerate(outputs)}
            if i % 5 == 0 and len(outputs) > 1:
                point["scores"][outputs[-1]] = None
        else:
            point["label"] = int(good) * (len(outputs) - 1 if kind == "classes" else 1)
        points.append(point)
    return points


def synthetic_problems(count: int, *, seed: int = 0) -> list[dict]:
    """Sums with their answers, as `data.prompts.read` gives them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        a, b = rng.randrange(10), rng.randrange(10)
        extra = {"answer": str(a + b), "label": "AB"[(a + b) % 2]}  # a letter, for judges
        made.append({"id": f"sum-{i}", "prompt": f"{a} + {b} = ?", "extra": extra})
    return made


def vowels(prompt, answer: str, record: dict) -> dict[str, float]:
    """A text reward that any model can learn: the share of an answer's characters that are vowels,
    and whether there is one."""
    del prompt, record
    share = sum(c in "aeiou" for c in answer) / max(len(answer), 1)
    return {"share": share, "some": float(share > 0)}


def empty_pair_rows(batch: int, length: int, *, answers: int = 2, pairs: int = 1) -> PairRows:
    """PairRows of padding only, as NumPy arrays; fill what a test needs with `.replace`."""
    import numpy as np

    zeros = lambda *shape, dtype=np.int32: np.zeros(shape, dtype)
    return PairRows(
        tokens=zeros(batch, length),
        mask=zeros(batch, length, dtype=bool),
        loss_mask=zeros(batch, length, dtype=bool),
        positions=zeros(batch, length, 1),
        segments=zeros(batch, length),
        trunk=zeros(batch, length),
        ends=zeros(batch, answers) - 1,
        pairs=zeros(batch, pairs, 2) - 1,
        margin=zeros(batch, pairs, dtype=np.float32),
        weight=zeros(batch, pairs, dtype=np.float32),
    )
