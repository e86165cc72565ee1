r"""Reasoning anchors, answer-stable tails, and rewards that tax only the tail, in the style of APR.

    segment -> candidate_answers -> find_anchor -> tail_stats     of one answer, on the host
    apr                                                           all of that as a text reward
    apr_reward, tail_mask, process                                of a batch, arrays in and out

Baselines that tax whole lengths are in `length`.

What is the paper's and what is ours. The abstract of APR (arXiv:2602.00760) says: the reasoning
anchor is where the answer first stabilises; the answer-stable tail is the repeated verification
after it; only the tail is penalised, in an RL whose optimiser suits length penalties. Nothing else
of it could be read and there is no public code. So how text is cut into chunks, which words count
as an answer, every formula and coefficient, the grace, and that wrong answers carry no tail term
are this project's. Results are "APR-style" and do not reproduce the paper's.

Array functions take NumPy arrays or JAX arrays and compute in float32 with the library of what they
get; so the text reward and a jitted step share one formula, and processes that grade texts need
no JAX.
"""

import dataclasses
import functools
import itertools
import re
from typing import NamedTuple

import numpy as np

from jaxreward.core.resolve import resolve
from jaxreward.rewards import length, math_answer

KINDS = ("ratio", "tokens", "group", "token_level")
FORCED = "</think>\n\nFinal answer: \\boxed{"  # what a `forced` function puts after each prefix

_CLOSING = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_OPENING = re.compile(r"\$\$|\\.|\$")
_CUT = re.compile(r"(?P<blank>\n[^\S\n]*\n)|[.!?][\"')\]*_]*(?=\s)")
_NOT_AN_END = re.compile(  # "2." and "b." in front of a list's item; abbreviations
    r"(?:^|\n)[^\S\n]*(?:\d{1,3}|[A-Za-z])\.$|(?:^|[\s(])(?:e\.g|i\.e|vs|cf|Eq|Dr|Mr|Mrs)\.$"
)
_SPACE = re.compile(r"\s*")
_GOES_ON = re.compile(r"\b(?:and|or|but|so|then|which|that|as|if|because|since|when|where|is|we)\b")
_EQUALS = re.compile(r"(?<![=<>!:≠≤≥])=(?![=>])")


def token_spans(ids, decode):
    """Which characters each token stands for, exactly, in the text of a byte-level tokenizer.

    A character whose bytes are spread over several tokens belongs to each of them. A token without
    text (a special token that `decode` skips) has an empty span.

    Args:
      ids: Token ids of the answer, ints.
      decode: ids -> str, the function that made the answer's text, such as
        `lambda ids: tokenizer.decode(ids, skip_special=False)`. Bytes that are no UTF-8 must become
        U+FFFD, as they do in Hugging Face tokenizers.

    Returns:
      list of (start, end) per token: starts and ends never fall, the last end is the text's length.

    Raises:
      ValueError: if decoding in pieces gives another text than decoding at once, as with tokenizers
        that are not byte-level.
    """
    ids = [int(i) for i in ids]
    spans, done, first, pieces = [], 0, 0, []
    while first < len(ids):
        # One token, and as many more as it takes until no character is left half finished.
        prefixes = []
        for last in range(first, len(ids)):
            prefixes.append(decode(ids[first : last + 1]))
            if not prefixes[-1].endswith("\ufffd"):
                break
        whole, at = prefixes[-1], 0
        for prefix in prefixes:
            agreed = len(prefix) if whole.startswith(prefix) else len(prefix) - 1
            while not whole.startswith(prefix[:agreed]):
                agreed -= 1
            end = agreed + (agreed < len(prefix))
            start = at if end > at else max(0, end - prefix.endswith("\ufffd"))
            spans.append((done + start, done + end))
            at = agreed
        pieces.append(whole)
        done, first = done + len(whole), first + len(prefixes)
    text = decode(ids)
    if "".join(pieces) != text:
        raise ValueError(
            f"token_spans needs a byte-level tokenizer: {len(ids)} tokens decode to {text[:60]!r} "
            f"at once, but to {''.join(pieces)[:60]!r} in pieces; record offsets while tokenising"
        )
    return spans


def word_spans(text):
    """Character spans of the words of a text, for counting where there are no tokens.

    Args:
      text: str.

    Returns:
      list of (start, end), one for each run of characters other than white space; "</think>" is one
      of its own, whatever it touches.
    """
    return [match.span() for match in re.finditer(r"</?think>|(?:(?!</?think>)\S)+", text)]


@dataclasses.dataclass(frozen=True)
class Segments:
    """The thinking part of an answer in chunks.

    Attributes:
      chunks: Texts of the chunks, list of str; joined they are the thinking part.
      ends: How many tokens of the answer precede the end of each chunk, list of int, rising; the
        last is think_end.
      think_end: Index of the first token of "</think>", which is also the number of tokens before
        it; None if the answer does not hold exactly one "</think>" (cut off, or malformed).
    """

    chunks: list
    ends: list
    think_end: int | None


def segment(text, offsets, *, min_tokens=16):
    r"""Cuts the thinking part of an answer into chunks that end at tokens.

    Cuts at blank lines and lets chunks of fewer than `min_tokens` tokens join the next; then cuts
    at sentence ends, where both sides keep `min_tokens`. Never inside $…$, $$…$$, \(…\) or \[…\].
    White space after a chunk belongs to it, and so does a token that holds its last character.

    Args:
      text: The answer. What precedes "</think>" is thinking, without a leading "<think>" (which the
        prompt may hold instead).
      offsets: (start, end) characters of each token of the answer (`token_spans`, `word_spans`).
      min_tokens: Least size of a chunk, unless the thinking part is shorter.

    Returns:
      Segments.

    Raises:
      ValueError: if the offsets are not those of this text, or min_tokens is below 1.

    References: ours. How APR cuts its traces is not public.
    """
    if min_tokens < 1:
        raise ValueError(f"segment needs min_tokens >= 1; received {min_tokens}")
    starts = np.asarray([start for start, _ in offsets], np.int64)
    stops = np.asarray([end for _, end in offsets], np.int64)
    last = int(stops[-1]) if len(stops) else 0
    rising = (
        (np.diff(starts) >= 0).all() and (np.diff(stops) >= 0).all() and (stops >= starts).all()
    )
    if not rising or not len(text.rstrip()) <= last <= len(text):
        raise ValueError(
            f"offsets must rise and reach the end of the answer; received {len(offsets)} that end "
            f"at character {last} of {len(text)}"
        )
    close = text.find("</think>")
    begin = re.match(r"\s*<think>", text)
    begin = begin.end() if begin else 0
    if close < begin or text.count("</think>") != 1 or text.count("<think>") > bool(begin):
        return Segments([], [], None)

    def before(position):
        return int(np.searchsorted(stops, position, side="right"))

    think_end = before(close)

    def tokens_until(position):
        """Tokens up to a cut: those that end there, or that hold the last character before it."""
        content = begin + len(text[begin:position].rstrip())
        held = int(np.searchsorted(starts, content, side="left"))
        return min(max(before(position), held), think_end)

    blanks, sentences = [], []
    for position, blank in _cuts(text, begin, close):
        (blanks if blank else sentences).append((position, tokens_until(position)))
    start, paragraphs = before(begin), []
    for position, count in (*blanks, (close, think_end)):
        if count - (paragraphs[-1][1] if paragraphs else start) >= min_tokens:
            paragraphs.append((position, count))
    if paragraphs and paragraphs[-1][1] < think_end:  # a short rest joins what precedes it
        paragraphs.pop()
    if not paragraphs or paragraphs[-1][1] < think_end:
        paragraphs.append((close, think_end))
    ends, left = [(begin, start)], iter(sentences)
    cut = next(left, None)
    for position, count in paragraphs:
        while cut is not None and cut[0] < position:
            if min(cut[1] - ends[-1][1], count - cut[1]) >= min_tokens:
                ends.append(cut)
            cut = next(left, None)
        if count > ends[-1][1]:
            ends.append((position, count))
    edges = [begin, *(position for position, _ in ends[1:-1]), close][: len(ends)]
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    return Segments(chunks, [count for _, count in ends[1:]], think_end)


def _cuts(text, begin, close):
    """(where the next content begins, whether a blank line is between) for each possible cut."""
    math = _math_spans(text[:close])
    inside, found = 0, []
    for match in _CUT.finditer(text, begin, close):
        while inside < len(math) and math[inside][1] <= match.start():
            inside += 1
        if inside < len(math) and math[inside][0] <= match.start():
            continue
        blank = match["blank"] is not None
        if not blank and _NOT_AN_END.search(text, max(begin, match.start() - 6), match.start() + 1):
            continue
        rest = _SPACE.match(text, match.end(), close).end()
        if rest < close:
            blank = blank or bool(re.search(r"\n[^\S\n]*\n", text[match.start() : rest]))
            found.append((rest, blank))
    return found


def _math_spans(text):
    """(start, end) of closed mathematics; an opening that is never closed opens nothing."""
    spans, unclosed, end = [], set(), 0
    for match in _OPENING.finditer(text):
        closing = _CLOSING.get(match.group())
        if match.start() < end or closing is None or closing in unclosed:
            continue
        at = text.find(closing, match.end())
        if at < 0:
            unclosed.add(closing)
        elif closing != "$" or "\n" not in text[match.end() : at]:  # "$5" need not open anything
            end = at + len(closing)
            spans.append((match.start(), end))
    return spans


def candidate_answers(chunks, mode="explicit", *, problem="", forced=None):
    r"""The answer that the reasoning is committed to after each chunk.

    explicit: the last answer stated so far, in \boxed{X}, "the answer is X" or its kin
    (`math_answer.statements`). Before there is any, "= X" at the end of a chunk counts too, unless
    X is a number of the problem, which the reasoning may only repeat. After one it does not: who
    has answered and works it out again passes through results that are no new answers. A number
    that merely occurs never counts.

    forced: what a model answers when it is made to stop after each chunk. That needs a model, so
    the caller gives the function.

    Args:
      chunks: Texts, from `segment`.
      mode: "explicit" or "forced".
      problem: The problem's text, whose numbers "= X" may not claim.
      forced: For mode "forced": list of prefixes -> list of answers (str or None), in one call. It
        should append `FORCED` to each prefix, decode greedily a few tokens and parse.

    Returns:
      list of str or None (nothing stated yet), one a chunk, in canonical spelling.

    Raises:
      ValueError: for another mode, a missing function, or one that returns another number.

    References: both modes are ours; LC-R1 (arXiv:2506.14755) trains an extractor instead.
    """
    if mode == "explicit":
        numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", problem)
        given = {math_answer.canonical(sign + number) for number in numbers for sign in ("", "-")}
        found, answer, said = [], None, False
        for chunk in chunks:
            statements = [math_answer.canonical(s[2]) for s in math_answer.statements(chunk)]
            if any(statements):
                said = True
                answer = next(filter(None, reversed(statements)))
            elif not said:
                answer = _result(chunk, given) or answer
            found.append(answer)
        return found
    if mode != "forced" or forced is None:
        raise ValueError(
            f"candidate_answers takes mode 'explicit', or 'forced' with a function `forced`; "
            f"received mode {mode!r} and forced {forced!r}"
        )
    prefixes = ["".join(chunks[: i + 1]) for i in range(len(chunks))]
    answers = forced(prefixes)
    if len(answers) != len(chunks):
        raise ValueError(
            f"forced must return one answer a prefix; received {len(answers)} for {len(chunks)}"
        )
    return [None if a is None else (math_answer.canonical(a) or None) for a in answers]


def _result(chunk, given):
    """X of the "= X" that a chunk ends with, if it is not given."""
    equals = list(_EQUALS.finditer(chunk, chunk.rstrip().rfind("\n") + 1))
    if not equals:
        return None
    rest = re.sub(r"(?:\\[)\]]|[$.*_\s])+$", "", chunk[equals[-1].end() :])
    rest = re.sub(r"^(?:\\[(\[]|[$*_\s])+", "", rest)
    value = None if _GOES_ON.search(rest) else math_answer.leading_value(rest)
    value = value and math_answer.canonical(value)
    return value if value and value not in given else None


def find_anchor(cands, final, equiv=math_answer.same, mode="stable"):
    """The chunk at which the final answer is reached.

    .. math:: j^* = \\min \\{ j : a_k \\equiv a^* \\text{ for all } k \\ge j \\}

    Args:
      cands: Candidate answers, list of str or None.
      final: The final answer, str or None. Whether it is right does not matter.
      equiv: (final, candidate) -> bool.
      mode: "stable" as above: a later, different candidate moves the anchor behind it. "first": the
        first chunk with the final answer, whatever follows.

    Returns:
      Index of the chunk, int; None if there is none.

    Raises:
      ValueError: for another mode.

    References: APR, abstract: where the answer first stabilises. This formula, and "first" as the
    variant, are ours.
    """
    if mode not in ("stable", "first"):
        raise ValueError(f"find_anchor takes mode 'stable' or 'first'; received {mode!r}")
    holds = _holds(cands, final, equiv)
    if mode == "first":
        return holds.index(True) if True in holds else None
    anchor = len(holds)
    while anchor and holds[anchor - 1]:
        anchor -= 1
    return anchor if anchor < len(holds) else None


def excursions(cands, final, equiv=math_answer.same):
    """How often the reasoning leaves the final answer after having held it.

    Args:
      cands, final, equiv: As in `find_anchor`.

    Returns:
      int; 0 for a trace whose first and stable anchors are one.
    """
    holds = _holds(cands, final, equiv)
    return sum(a and not b for a, b in itertools.pairwise(holds))


def _holds(cands, final, equiv):
    return [final is not None and c is not None and bool(equiv(final, c)) for c in cands]


class Tail(NamedTuple):
    """Lengths in tokens: `tau` up to where the tail begins, `think`, `tail`; `rho` = tail/think."""

    tau: int
    think: int
    tail: int
    rho: float


def tail_stats(ends, anchor, think_end, grace=0):
    """Where the answer-stable tail lies.

    .. math:: \\tau = \\min(e_{j^*} + g, e_{end}), \\quad L_{tail} = e_{end} - \\tau, \\quad
              \\rho = L_{tail} / \\max(e_{end}, 1)

    The first `grace` tokens of a tail count as reasoning, so that one check is free. tau + tail is
    think, and rho is in [0, 1).

    Args:
      ends: Ends of the chunks, list of int.
      anchor: Index of the anchor's chunk, or None: then there is no tail.
      think_end: Number of tokens before "</think>".
      grace: g, in tokens.

    Returns:
      Tail (tau, think, tail, rho).

    References: APR has the tail in its abstract; the ratio and the grace are ours.
    """
    tau = think_end if anchor is None else min(ends[anchor] + grace, think_end)
    tail = think_end - tau
    return Tail(tau, think_end, tail, tail / max(think_end, 1))


@functools.cache
def _function(name):
    return resolve("rewards", name)


def apr(
    prompt,
    answer,
    record,
    *,
    kind="ratio",
    lam=0.5,
    reference=4096,
    grace=64,
    min_tokens=16,
    anchor="stable",
    equiv="math_answer.same",
    verify=None,
):
    """Text reward: right answers lose for what they go on checking after they have the answer.

    Tokens are counted by `record["offsets"]`, the (start, end) characters of each token of the
    answer (`token_spans`). Without them words are counted (`word_spans`), which needs no tokenizer;
    the part `in_tokens` says which, and `reference`, `grace` and `min_tokens` are then in words.

    An answer without exactly one "</think>", or whose record says `truncated`, gets reward 0 and no
    tail. A right answer whose reasoning never states it has no tail either: watch `anchor`.

    Args:
      prompt: The problem, str or messages.
      answer: The model's answer: thinking, "</think>", final answer.
      record: Has "answer" (unless `verify` needs none), and optionally "offsets" and "truncated".
      kind: Formula of `apr_reward`. "group" and "token_level" cannot be computed from one answer:
        `reward` is then the accuracy, and the other parts are what the array functions need.
      lam, reference: As in `apr_reward`.
      grace: Tail tokens that are free.
      min_tokens: As in `segment`.
      anchor: "stable" or "first".
      equiv: (reference, answer) -> bool, or its name. "math_answer.equivalent" compares with sympy.
      verify: Text reward whose part "accuracy" decides what is right, or its name; None compares
        the final answer with `record["answer"]` by `equiv`.

    Returns:
      dict of float: reward; accuracy; format (exactly one "</think>"); anchor (1 if found); with
      grace tau and charged (the tail); without it think, tail, pre (= think - tail) and rho, all 0
      where there is no "</think>"; excursions; chunks; tokens of the whole answer; in_tokens.

    Raises:
      KeyError: if the record has no "answer".
      ValueError: for offsets that are not the answer's, or a misspelt option.

    References: see the top of the file.
    """
    if kind not in KINDS:
        raise ValueError(f"apr takes kind {', '.join(map(repr, KINDS))}; received {kind!r}")
    equiv = _function(equiv) if isinstance(equiv, str) else equiv
    verify = _function(verify) if isinstance(verify, str) else verify
    offsets = record.get("offsets")
    spans = word_spans(answer) if offsets is None else offsets
    parts = segment(answer, spans, min_tokens=min_tokens)
    final, _ = math_answer.final_answer(answer)
    whole = parts.think_end is not None and not record.get("truncated")
    if verify is None:
        gold = math_answer.reference(record)
        right = float(final is not None and equiv(gold, final))
    else:
        right = float(verify(prompt, answer, record)["accuracy"])
    right *= whole
    raw = charged = Tail(0, 0, 0, 0.0)
    found, left = None, 0
    if whole:
        problem = (
            prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
        )
        cands = candidate_answers(parts.chunks, problem=problem)
        found = find_anchor(cands, final, equiv, anchor)
        left = excursions(cands, final, equiv)
        raw = tail_stats(parts.ends, found, parts.think_end)
        charged = tail_stats(parts.ends, found, parts.think_end, grace)
    reward = right
    if kind in ("ratio", "tokens"):
        row = [np.float32([x]) for x in (right, charged.think, charged.tail, found is not None)]
        reward = apr_reward(*row, kind=kind, lam=lam, reference=reference)[0]
    return {
        "reward": float(reward),
        "accuracy": right,
        "format": float(parts.think_end is not None),
        "anchor": float(found is not None),
        "tau": float(charged.tau),
        "charged": float(charged.tail),
        "think": float(raw.think),
        "tail": float(raw.tail),
        "pre": float(raw.tau),
        "rho": raw.rho,
        "excursions": float(left),
        "chunks": float(len(parts.chunks)),
        "tokens": float(len(spans)),
        "in_tokens": float(offsets is not None),
    }


def apr_reward(
    correct, think, tail, found, *, kind="ratio", lam=0.5, reference=4096.0, group=None, groups=None
):
    """Rewards of a batch: right answers minus a share of their tail, wrong answers 0.

    .. math:: R = c (1 - \\lambda s)

    with s = tail / think ("ratio"), min(tail / reference, 1) ("tokens"), or tail / the longest tail
    among the right answers of the group ("group"); s = 0 without an anchor and for "token_level",
    where `process` has the tail. Any right answer beats any wrong one, since lambda < 1.

    "ratio" is raised by padding in front of the anchor; "tokens" is blind to it. Watch the length
    before the anchor.

    Args:
      correct: c, 1 for right and 0 for wrong, [B].
      think: Tokens before "</think>", [B].
      tail: Tokens of the tail, after grace, [B].
      found: Whether there is an anchor, [B].
      kind: One of `KINDS`.
      lam: lambda in [0, 1).
      reference: Tail in tokens that costs all of lambda, for "tokens".
      group: Group of each answer, int[B] in 0..groups-1, for "group".
      groups: Number of groups, int.

    Returns:
      float32[B].

    Raises:
      ValueError: for another kind, lambda outside [0, 1), or missing groups.

    References: ours, not APR's: its formula and coefficient are not public. The scaling of "group"
    is like LC-R1's (arXiv:2506.14755).
    """
    if kind not in KINDS:
        raise ValueError(f"apr_reward takes kind {', '.join(map(repr, KINDS))}; received {kind!r}")
    if not 0 <= lam < 1:
        raise ValueError(
            f"apr_reward needs 0 <= lam < 1, or a wrong answer could win; received {lam}"
        )
    xp, (correct, think, tail, found) = length.in_float32(correct, think, tail, found)
    tail = xp.where((found > 0) & (correct > 0), tail, 0.0)
    if kind == "ratio":
        share = tail / xp.maximum(think, 1.0)
    elif kind == "tokens":
        share = xp.minimum(tail / reference, 1.0)
    elif kind == "group":
        longest = length.group_max(xp, tail, correct > 0, group, groups)
        share = tail / xp.maximum(longest, 1.0)
    else:
        share = xp.zeros_like(tail)
    return xp.where(correct > 0, correct * (1 - lam * share), 0.0)


def tail_mask(tau, think_end, slots):
    """Which tokens are tail: tau <= t < think_end, counted from 0.

    tau is how many tokens come before the tail, so the anchor's last token is tau - 1; the first
    token of "</think>" is think_end. A row has exactly think_end - tau of them. Where there is no
    anchor `tail_stats` gives tau = think_end, and none.

    Args:
      tau, think_end: int[B].
      slots: T.

    Returns:
      bool[B, T].
    """
    xp, _ = length.in_float32(tau, think_end)
    t = xp.arange(slots)[None, :]
    return (t >= xp.asarray(tau)[:, None]) & (t < xp.asarray(think_end)[:, None])


def process(correct, tau, think, found, *, slots, penalty, bonus=0.0, scale=1.0):
    """What single tokens get beside their answer's advantage: less on tails, more for stopping.

    .. math:: - \\lambda_t z [t \\in tail, c > 0]
              + \\lambda_e [t = t_{\text{</think>}}, c > 0, \text{anchor, no tail}]

    Args:
      correct: c, [B].
      tau: Tokens before the tail, after grace, [B].
      think: Tokens before "</think>", which is the index of its first token, [B].
      found: Whether there is an anchor, [B].
      slots: T, tokens of the longest answer.
      penalty: lambda_t >= 0.
      bonus: lambda_e >= 0.
      scale: z, one number or float[B], such as rho after grace.

    Returns:
      float32[B, T], to be added to advantages (`config.process`).

    Raises:
      ValueError: for a negative penalty or bonus.

    References: ours, after the words "process reward" in APR's title; LC-R1 (arXiv:2506.14755) adds
    its compression bonus at "</think>" too, with another formula.
    """
    if penalty < 0 or bonus < 0:
        raise ValueError(f"process needs penalty and bonus >= 0; received {penalty} and {bonus}")
    xp, (correct, found, scale) = length.in_float32(correct, found, scale)
    right = ((correct > 0) & (found > 0))[:, None]
    tail = tail_mask(tau, think, slots) & right
    stops = right & ~xp.any(tail, axis=1)[:, None]
    closing = xp.arange(slots)[None, :] == xp.asarray(think)[:, None]
    each = xp.broadcast_to(scale, correct.shape)[:, None]
    extra = xp.where(closing & stops, bonus, 0.0) - xp.where(tail, penalty * each, 0.0)
    return xp.asarray(extra, dtype=xp.float32)
