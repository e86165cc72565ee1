"""Text to tokens, in one place: whatever trains, scores or samples goes through here.

A conversation is rendered whole and tokenised once, so a token never depends on where prompt and
answer were cut. Several answers to one prompt become a `Tree`: the tokens they share, once, and
each answer's own.
"""

import dataclasses
import difflib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxreward.data import templates
from jaxreward.data.corpora import hh_rlhf

TEMPLATES = ("auto", "chat", "plain")


class AnswerTooLong(ValueError):
    """An answer that does not fit into max_len even without its prompt."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer from a local folder.

    Attributes:
      folder: Where it came from.
      eos_ids: Every id that ends an answer: of the tokenizer, config.json and
        generation_config.json.
      eos_id: The one that closes a plain answer, or None.
      bos_id: Or None.
      adds_bos: True if the tokenizer puts BOS before plain text.
      pad_id: Or None.
      template: Source of the chat template, or None.
      vocab_size: Number of ids, added tokens included.
      hf: The `transformers.PreTrainedTokenizerFast`.
      backend: A copy of its `tokenizers.Tokenizer` without post-processor: no special tokens are
        added and character offsets are not trimmed.
    """

    folder: str
    eos_ids: frozenset
    eos_id: int | None
    bos_id: int | None
    adds_bos: bool
    pad_id: int | None
    template: str | None
    vocab_size: int
    hf: Any = dataclasses.field(repr=False, compare=False)
    backend: Any = dataclasses.field(repr=False, compare=False)

    def ids(self, text):
        """Token ids of a text as list[int], no special tokens added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special=True):
        """Text of token ids (any sequence of ints)."""
        return self.hf.decode(
            [int(i) for i in ids],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )


def load_tokenizer(folder):
    """Loads a tokenizer from a Hugging Face folder; no network, no code from the folder.

    Args:
      folder: Holds tokenizer.json, and where known tokenizer_config.json, config.json,
        generation_config.json and chat_template.jinja.

    Returns:
      Tokenizer.

    Raises:
      FileNotFoundError: if the folder or its tokenizer.json is missing.
      ValueError: if a JSON file there is damaged, or names an EOS id that is no token id.
    """
    import tokenizers
    import transformers

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} must hold tokenizer.json; it "
            + (f"holds {', '.join(held) or 'nothing'}" if folder.is_dir() else "is no folder")
        )
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()

    eos_ids = {hf.eos_token_id} - {None}
    for name in ("config.json", "generation_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / name} must be JSON: {error}") from error
        value = settings.get("eos_token_id")
        for eos in value if isinstance(value, list) else [value]:
            if eos is None:
                continue
            if isinstance(eos, bool) or not isinstance(eos, int) or eos < 0:
                raise ValueError(f"{folder / name}: eos_token_id must hold ids; received {eos!r}")
            eos_ids.add(eos)
    template = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(
        folder=str(folder),
        eos_ids=frozenset(eos_ids),
        eos_id=hf.eos_token_id if hf.eos_token_id is not None else min(eos_ids, default=None),
        bos_id=hf.bos_token_id,
        adds_bos=hf.bos_token_id is not None and hf("").input_ids[:1] == [hf.bos_token_id],
        pad_id=hf.pad_token_id,
        template=template,
        vocab_size=len(hf),
        hf=hf,
        backend=backend,
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
      tokens: list[int].
      prompt_len: How many leading tokens lie wholly inside the prompt.
      loss_mask: list[bool]: True on answer tokens and on the EOS that closes the answer.
      text: The whole rendered text, before truncation.
      truncated: Prompt tokens dropped to fit max_len.
    """

    tokens: list
    prompt_len: int
    loss_mask: list
    text: str
    truncated: int = 0


def encode_conversation(tokenizer, prompt, answer=None, *, template="auto", max_len=None):
    """Renders and tokenises a prompt and its answer, together and once.

    chat: the text is the chat template's rendering of the whole conversation, tokenised without
    added special tokens, so the ids are those of transformers' `apply_chat_template`.
    plain: prompt and answer joined as they are, BOS in front if the tokenizer adds one and it is
    not there, and EOS at the end if it is not there (and there is an answer). Message lists become
    a dialogue in the style of HH-RLHF, except a lone assistant message after a str prompt.

    prompt_len counts tokens by character offsets against the rendered prompt (with generation
    prompt). Where the prompt's rendering is no prefix of the whole, as in templates that rewrite
    earlier turns, it counts what the two have in common, in characters and in tokens.

    Of an answer of several messages the assistant's are supervised, each with its closing EOS.
    Template text after that EOS is not. Without any EOS all of the turn is.

    Truncation drops tokens from the left of the prompt and keeps a leading BOS.

    Args:
      tokenizer: Tokenizer.
      prompt: str or list of messages.
      answer: str, list of messages, or None for a prompt to sample from.
      template: "chat", "plain", or "auto": chat if the tokenizer has a template.
      max_len: Most tokens, or None.

    Returns:
      Encoded.

    Raises:
      ValueError: for an unknown template, a missing chat template, or one that fails.
      AnswerTooLong: (a ValueError) if the answer alone exceeds max_len.
    """
    if chosen_template(tokenizer, template) == "chat":
        whole = _chat(tokenizer, prompt, answer)
    else:
        whole = _plain(tokenizer, prompt, answer)
    if max_len is None or len(whole.tokens) <= max_len:
        return whole
    return _shortened(tokenizer, whole, len(whole.tokens) - max_len, max_len)


def chosen_template(tokenizer, template):
    """Resolves "auto": "chat" if the tokenizer has a chat template, else "plain".

    Args:
      tokenizer: Tokenizer.
      template: "auto", "chat" or "plain".

    Returns:
      "chat" or "plain".

    Raises:
      ValueError: for another name, or "chat" where there is no template.
    """
    if template not in TEMPLATES:
        near = difflib.get_close_matches(str(template), TEMPLATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"template must be one of {TEMPLATES}; received {template!r}{hint}")
    if template == "chat" and tokenizer.template is None:
        raise ValueError(
            f"the tokenizer in {tokenizer.folder} has no chat template; use template='plain', or "
            "put a chat_template.jinja into the folder"
        )
    if template == "auto":
        return "chat" if tokenizer.template is not None else "plain"
    return template


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt and its answers, as tokens.

    Attributes:
      id: Name of the record.
      prompt: Tokens that all answers begin with, int32[Tp]; Tp may be 0.
      answers: Each answer's own tokens, list of int32[Ti], Ti >= 1.
      loss: Supervised answer tokens, list of bool[Ti].
      pairs: (chosen, rejected) as indices into answers.
      margin: Margin of each pair, list of float.
      weight: Weight of each pair, list of float.
      scores: (chosen, rejected) score of each pair from elsewhere, or None where it has none; an
        empty list where no pair has any.
      targets: What each answer's outputs should be, list of float32[C], NaN where it is not known;
        an empty list where no answer has any.
      answer_weight: Weight of each answer with targets, list of float.
      subset: Part of the data it belongs to, or None.
      features: Inputs of the first trained layer, [float[Tp, D], float[T0, D], …], or None.
      ref_logps: Log-probability of each answer by a reference policy, float32[answers], or None.
      truncated: Prompt tokens dropped, over all answers.
    """

    id: str
    prompt: np.ndarray
    answers: list
    loss: list
    pairs: list = dataclasses.field(default_factory=list)
    margin: list = dataclasses.field(default_factory=list)
    weight: list = dataclasses.field(default_factory=list)
    scores: list = dataclasses.field(default_factory=list)
    targets: list = dataclasses.field(default_factory=list)
    answer_weight: list = dataclasses.field(default_factory=list)
    subset: str | None = None
    features: list | None = None
    ref_logps: np.ndarray | None = None
    truncated: int = 0

    @property
    def size(self):
        """Slots it takes in a row."""
        return len(self.prompt) + sum(len(answer) for answer in self.answers)


def encode_tree(tokenizer, prompt, answers, *, template="auto", max_len=None, id=""):
    """Encodes several answers to one prompt, sharing what they share.

    Each answer is encoded together with the prompt by `encode_conversation`. The shared prompt is
    the longest common token prefix, but no longer than any prompt_len, and leaves every answer at
    least one token. So prompt + answers[i] is exactly answer i's own encoding.

    With max_len each answer loses its own tokens from the left of the prompt. Answers that lose
    differently share little or nothing, which costs slots and keeps every score independent of
    the other answers.

    Args:
      tokenizer: Tokenizer.
      prompt: str or messages.
      answers: list of str or messages, at least one.
      template: As `encode_conversation`.
      max_len: Most tokens of prompt and one answer, or None.
      id: Name of the tree, for messages.

    Returns:
      Tree without pairs.

    Raises:
      ValueError: as `encode_conversation`, or without answers or tokens.
    """
    if not answers:
        raise ValueError(f"tree {id!r} needs at least one answer; received none")
    rows = [
        encode_conversation(tokenizer, prompt, answer, template=template, max_len=max_len)
        for answer in answers
    ]
    if not all(row.tokens for row in rows):
        raise ValueError(
            f"tree {id!r}: prompt and answer are empty and the tokenizer has no EOS, so that there "
            "is no token to score; leave such rows out"
        )
    trunk = min(min(row.prompt_len, len(row.tokens) - 1) for row in rows)
    trunk = _common([row.tokens[:trunk] for row in rows])
    return Tree(
        id=id,
        prompt=np.asarray(rows[0].tokens[:trunk], np.int32),
        answers=[np.asarray(row.tokens[trunk:], np.int32) for row in rows],
        loss=[np.asarray(row.loss_mask[trunk:], np.bool_) for row in rows],
        truncated=sum(row.truncated for row in rows),
    )


def shortened(trees, skipped, max_len, *, total, what):
    """What `max_len` did to a set of trees.

    Args:
      trees: What is left. skipped: How many records were too long.
      max_len: Most tokens, or None. total: How many records there were.
      what: What a record is, for messages.

    Returns:
      dict(trees, truncated = trees that lost prompt tokens, dropped_tokens, skipped). Warns once,
      with counts, if anything was truncated or skipped.

    Raises:
      ValueError: when no tree is left.
    """
    if not trees:
        raise ValueError(
            f"no {what} is left of {total}: {skipped} were longer than max_len {max_len}; raise "
            "data.max_len"
        )
    cut = [tree.truncated for tree in trees if tree.truncated]
    if cut or skipped:
        warnings.warn(
            f"max_len {max_len}: {len(cut)} of {len(trees)} prompts lost their beginning "
            f"({sum(cut)} tokens), {skipped} {what}s were skipped as too long",
            stacklevel=3,
        )
    return {
        "trees": len(trees),
        "truncated": len(cut),
        "dropped_tokens": sum(cut),
        "skipped": skipped,
    }


def _chat(tokenizer, prompt, answer):
    before, after = templates.as_messages(prompt, answer)
    opens = not after or after[0]["role"] == "assistant"
    if not after:
        (head,) = _render(tokenizer, (before, True))
        ids = tokenizer.ids(head)
        return Encoded(ids, len(ids), [False] * len(ids), head)
    if before:
        head, text = _render(tokenizer, (before, opens), (before + after, False))
    else:
        head, (text,) = "", _render(tokenizer, (after, False))
    tokens, offsets = _tokens(tokenizer, text)
    prompt_len = _inside(tokenizer, head, text, tokens, offsets)
    loss = [False] * len(tokens)
    for turn, message in enumerate(after):
        if message["role"] != "assistant":
            continue
        start, stop = prompt_len, len(tokens)
        if turn:
            (head,) = _render(tokenizer, (before + after[:turn], True))
            start = _inside(tokenizer, head, text, tokens, offsets)
        if turn + 1 < len(after):
            (head,) = _render(tokenizer, (before + after[: turn + 1], False))
            stop = _inside(tokenizer, head, text, tokens, offsets)
        closing = [slot for slot in range(start, stop) if tokens[slot] in tokenizer.eos_ids]
        if closing:
            stop = closing[-1] + 1
        loss[start:stop] = [True] * (stop - start)
    return Encoded(tokens, prompt_len, loss, text)


def _render(tokenizer, *conversations):
    special = dict(tokenizer.hf.special_tokens_map)
    return templates.render_all(
        tokenizer.template,
        list(conversations),
        bos_token=special.pop("bos_token", None),
        eos_token=special.pop("eos_token", None),
        variables=special,
    )


def _plain(tokenizer, prompt, answer):
    head, body = prompt, answer or ""
    if isinstance(prompt, str) and isinstance(answer, list) and len(answer) == 1:
        body = answer[0]["content"]
    elif not isinstance(prompt, str) or isinstance(answer, list):
        before, after = templates.as_messages(prompt, answer)
        opens = not after or after[0]["role"] == "assistant"
        head = hh_rlhf.to_text(before, add_generation_prompt=opens)
        text = hh_rlhf.to_text(before + after, add_generation_prompt=not after)
        body = text[len(head) :]
    text = head + body
    tokens, offsets = _tokens(tokenizer, text)
    prompt_len = _inside(tokenizer, head, text, tokens, offsets)
    if tokenizer.adds_bos and tokens[:1] != [tokenizer.bos_id]:
        tokens, prompt_len = [tokenizer.bos_id, *tokens], prompt_len + 1
    if answer is None:
        return Encoded(tokens, len(tokens), [False] * len(tokens), text)
    if tokenizer.eos_id is not None and (
        len(tokens) == prompt_len or tokens[-1] not in tokenizer.eos_ids
    ):
        tokens = [*tokens, tokenizer.eos_id]
    return Encoded(tokens, prompt_len, [slot >= prompt_len for slot in range(len(tokens))], text)


def _tokens(tokenizer, text):
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _inside(tokenizer, head, text, tokens, offsets):
    """How many leading tokens of text lie wholly in head, or in what both begin with."""
    shared = len(head)
    if not text.startswith(head):
        shared = _common([head, text])
    count = 0
    while count < len(tokens) and offsets[count][1] <= shared:
        count += 1
    if shared < len(head):
        count = min(count, _common([tokenizer.ids(head), tokens]))
    return count


def _common(sequences):
    """Length of the longest common prefix."""
    length = 0
    for items in zip(*sequences):
        if any(item != items[0] for item in items[1:]):
            break
        length += 1
    return length


def _shortened(tokenizer, whole, drop, max_len):
    keep = int(whole.tokens[:1] == [tokenizer.bos_id])  # BOS, which is None in no token list
    if keep > whole.prompt_len:
        keep = 0
    if drop > whole.prompt_len - keep:
        raise AnswerTooLong(
            f"the answer takes {len(whole.tokens) - whole.prompt_len} tokens"
            f"{' and BOS one' if keep else ''}, more than max_len {max_len}; raise max_len, or "
            "skip such rows"
        )
    cut = slice(keep, keep + drop)
    tokens, loss = list(whole.tokens), list(whole.loss_mask)
    del tokens[cut], loss[cut]
    return dataclasses.replace(
        whole,
        tokens=tokens,
        loss_mask=loss,
        prompt_len=whole.prompt_len - drop,
        truncated=whole.truncated + drop,
    )
