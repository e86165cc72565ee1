"""Stop strings as a table over tokens, which a decode loop reads without ever seeing text.

A string may begin and end inside tokens, so it is looked for in their bytes: an automaton over
bytes (Aho-Corasick) is run over every token of the vocabulary, from each of its states. What is
left is one row a state and one column a token id.

A match is exact for text that is valid UTF-8: the string is then in the bytes if and only if it is
in what the tokenizer decodes. Tokens that decode skips (special ones) are skipped. A tokenizer that
drops a space in front of the whole text (Llama, Mistral) has a state of its own for the first
token. What differs is output that is no text: decoded, broken bytes are replacement characters, and
around single-byte tokens such a replacement may swallow bytes that a string was found in.
"""

import json
import re
from collections import deque

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN = "ByteLevel, or Metaspace, Replace, ByteFallback, Fuse and Strip of a leading space"


def matcher(tokenizer, strings, vocab=None):
    """The table that finds any of `strings` in a sequence of tokens.

    Row 0 is the state before the first token. Row s, column v holds the state after token v in
    state s, or S + j (with S rows) if that token completes strings[j]: the first to end, and of
    those that end together the first listed.

    Args:
      tokenizer: data.tokenize.Tokenizer.
      strings: list of str, none empty.
      vocab: Columns; None = tokenizer.vocab_size. A model may have more ids than its tokenizer:
        they carry no text.

    Returns:
      Unsigned integers [S, V] of the smallest type that holds them; S is at most 1 more than the
      bytes of all strings.

    Raises:
      ValueError: for an empty string, a vocab smaller than the tokenizer's, or a tokenizer whose
        tokens cannot be turned into bytes one by one.
    """
    texts = not isinstance(strings, str) and all(isinstance(s, str) and s for s in strings)
    if not strings or not texts:
        raise ValueError(f"stop strings must be a list of texts, none empty; received {strings!r}")
    vocab = tokenizer.vocab_size if vocab is None else vocab
    if vocab < tokenizer.vocab_size:
        raise ValueError(
            f"vocab={vocab} is less than the {tokenizer.vocab_size} ids of the tokenizer in "
            f"{tokenizer.folder}"
        )
    first, later = token_bytes(tokenizer)
    silent = [b""] * (vocab - len(later))
    step = _automaton([s.encode() for s in strings])
    states = len(step) - len(strings)
    table = _run(step, states, later + silent)
    if first != later:
        # One more state in front, which the first token that carries text leaves for good.
        table = np.concatenate([table[:1], table]) + 1
        opening = _run(step, 1, first + silent)[0] + 1
        table[0] = np.where([not text for text in later + silent], 0, opening)
        states += 1
    return table.astype(np.min_scalar_type(states + len(strings) - 1))


def token_bytes(tokenizer):
    """What each token id adds to the decoded text, as UTF-8 bytes.

    Args:
      tokenizer: data.tokenize.Tokenizer.

    Returns:
      (first, later): lists of bytes, one an id, for the first token of a text and for all others.
      Special tokens and ids without a token are b"".

    Raises:
      ValueError: naming the decoder of tokenizer.json, if it is not one of those that work token by
        token.
    """
    raw = json.loads(tokenizer.backend.to_str())
    parts = _parts(raw.get("decoder"))
    kinds = [part.get("type") for part in parts]
    special = {token["id"] for token in raw.get("added_tokens") or () if token["special"]}
    names = {i: token for token, i in tokenizer.backend.get_vocab().items() if i not in special}
    if kinds == ["ByteLevel"]:
        byte = _alphabet()
        # A token with any other character is text as it stands.
        later = {
            i: bytes(map(byte.get, token)) if byte.keys() >= set(token) else token.encode()
            for i, token in names.items()
        }
        first = later
    elif kinds and all(_by_token(part, kinds) for part in parts):
        later = {i: _piece(token, parts) for i, token in names.items()}
        first = {i: _opening(token, later[i], parts) for i, token in names.items()}
    else:
        raise ValueError(
            f"stop strings need a tokenizer that decodes token by token ({_KNOWN}); the decoder of "
            f"{tokenizer.folder} is {kinds or 'missing'}. Stop at token ids instead"
        )
    return tuple([of.get(i, b"") for i in range(tokenizer.vocab_size)] for of in (first, later))


def _parts(decoder):
    if not decoder:
        return []
    inner = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
    return [decoder] if inner is None else [part for d in inner for part in _parts(d)]


def _by_token(part, kinds):
    kind = part["type"]
    if kind == "Replace":
        return "String" in part["pattern"]
    if kind == "Strip":
        # Of the whole text, which only a Fuse before it makes of the tokens.
        return "Fuse" in kinds[: kinds.index(kind)] and part["start"] <= 1 and part["stop"] == 0
    return kind in ("Metaspace", "ByteFallback", "Fuse")


def _piece(token, parts):
    for part in parts:
        if part["type"] == "Replace":
            token = token.replace(part["pattern"]["String"], part["content"])
        elif part["type"] == "Metaspace":
            token = token.replace(part["replacement"], " ")
        elif part["type"] == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
    return token.encode()


def _opening(token, text, parts):
    for part in parts:
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return _piece(token.replace(part["replacement"], ""), parts)
        if part["type"] == "Strip" and part["start"]:
            return text.removeprefix(part["content"].encode())
    return text


def _alphabet():
    """Byte of each character that byte-level tokenizers write for it: printable bytes as they are,
    the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _automaton(strings):
    """Next state by state and byte, int32[S + J, 256]; S + j once string j has been seen.

    References: Aho and Corasick 1975, Efficient string matching; the failure links are folded into
    the table, and nodes at which a string ends are left out.
    """
    children, ends = [{}], [None]
    for j, string in enumerate(strings):
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(None)
            node = children[node][byte]
        ends[node] = j if ends[node] is None else ends[node]
    step = np.zeros((len(children), 256), np.int32)
    queue = deque([(0, 0)])
    while queue:
        # `back` is where the longest end of this node's text that begins a string leads.
        node, back = queue.popleft()
        if node:
            ends[node] = min((j for j in (ends[node], ends[back]) if j is not None), default=None)
            step[node] = step[back]
        for byte, child in children[node].items():
            queue.append((child, step[back, byte] if node else 0))
            step[node, byte] = child
    inner = [node for node, end in enumerate(ends) if end is None]
    number = np.array([len(inner) if end is None else len(inner) + end for end in ends])
    number[inner] = np.arange(len(inner))
    seen = len(inner) + np.arange(len(strings))
    return np.concatenate([number[step[inner]], np.repeat(seen[:, None], 256, axis=1)])


def _run(step, states, texts):
    """States after each text from each of the first `states`, int64[states, len(texts)]."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    lengths = np.array([len(texts[i]) for i in order])
    at = np.repeat(np.arange(states)[:, None], len(texts), axis=1)
    for column in range(lengths.max(initial=0)):
        count = int(np.searchsorted(-lengths, -column))  # texts that have this byte
        byte = np.array([texts[i][column] for i in order[:count]])
        at[:, :count] = step[at[:, :count], byte]
    table = np.empty_like(at)
    table[:, order] = at
    return table
