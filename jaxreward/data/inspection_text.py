"""A report of `inspection.inspect` as text for a terminal, at most 100 columns wide."""

import itertools
import textwrap

from jaxreward.data import inspection

WIDTH = 100
_INDENT = "  "
_NAME = 16  # columns of a fact's name
_FEW = 5  # places or ids that are named of many
_VALUES = 12  # of a field that are counted one by one
_BAR = 40
# Lines shown of a text that is longer: its beginning and its end.
_HEAD, _TAIL = 14, 6
_BOLD, _DIM, _GREEN, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[0m"
_ONE = {
    "pairs": "pair",
    "points": "labelled answer",
    "chats": "conversation",
    "prompts": "prompt",
}
_PARTS = {
    "pairs": {"longest": "prompt + longer answer"},
    "points": {"longest": "prompt + answer"},
    "chats": {"longest": "prompt + completion"},
    "prompts": {},
}


def render(report, *, colour=False):
    """The report as text. Supervised tokens stand in ⟦ ⟧, a newline shows as ↵, and characters that
    do not print, such as a terminal's escapes, as their codes.

    Args:
      report: From `inspection.inspect`.
      colour: Also tell supervised tokens and headings by colour, with a terminal's escapes.

    Returns:
      str, ending in a newline.
    """
    blocks = [_read(report), _examples(report, colour)]
    if report["unit"] == "tokens":
        blocks.append(_cut(report))
    blocks += [_lengths(report), _repeats(report)]
    if report["counts"] or report["numbers"]:
        blocks.append(_values(report))
    if "overlap" in report:
        blocks.append(_overlap(report))
    text = []
    for title, *lines in blocks:
        text += [f"{_BOLD}{title}{_PLAIN}" if colour else title, *lines, ""]
    return "\n".join(text)


def _fact(name, value):
    """A name and its value, wrapped beside it."""
    return textwrap.wrap(
        _printable(str(value)),
        WIDTH,
        initial_indent=f"{_INDENT}{name:<{_NAME}}",
        subsequent_indent=" " * (len(_INDENT) + _NAME),
        break_long_words=False,  # a path stays whole
        break_on_hyphens=False,
    ) or [f"{_INDENT}{name}"]


def _count(number, what):
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _percent(share):
    return f"{100 * share:.1f} %"


def _few(names, of):
    """The first names, and how many there are beside them."""
    names = [str(name) for name in names]
    more = of - min(len(names), _FEW)
    return ", ".join(names[:_FEW]) + (f" and {more:,} more" if more else "")


def _read(report):
    read, kind = report["read"], report["kind"]
    why = f", as the rows have {', '.join(report['fields'])}" if report["fields"] else ""
    if why and kind == "prompts":
        why += f" and none of {', '.join(itertools.chain(*inspection.SIGNS.values()))}"
    if kind == "points" and "completion" in report["fields"]:
        why += "; --kind chats takes them as conversations to imitate"
    stopped = report["limit"] == read["kept"]
    lines = [
        *_fact("kind", kind + why),
        *_fact("sha256", report["sha256"]),
        *_fact("read", _kept(read) + f"; --limit {report['limit']} stopped it there" * stopped),
    ]
    for reason, count in read["skipped"].items():
        where = f"{report['path']}:{_few(read['places'][reason], count)}"
        lines += _fact("", f"{count:,} × {reason}  ({where})")
    given = ", ".join(f"{name} {count:,}" for name, count in report["given"].items() if count)
    if kind == "pairs":
        lines += _fact("pairs with", given or "neither margin, weight nor scores")
    if kind == "points":
        lines += _fact("answers with", given)
    if report["unit"] == "tokens":
        lines += _fact("tokens", f"{report['template']} template, tokenizer of {report['folder']}")
        refused = report["encoded"]["refused"]
        if refused:
            lines += _fact(
                "refused",
                f"{_count(len(refused), 'row')} cannot be rendered, and training stops there: ids "
                f"{_few([name for name, _ in refused], len(refused))}; the first: {refused[0][1]}",
            )
    else:
        lines += _fact("tokens", "none: lengths are in characters; --model HF_FOLDER counts tokens")
    return [f"{report['path']}: {_count(read['kept'], _ONE[kind])}", *lines]


def _kept(read):
    skipped = read["read"] - read["kept"]
    rows = _count(read["read"], "row")
    return f"{rows}, {read['kept']:,} kept, {f'{skipped:,}' if skipped else 'none'} skipped"


# Examples


def _examples(report, colour):
    examples = report["examples"]
    if not examples:
        return ["Examples: none asked for"]
    tokens = report["unit"] == "tokens"
    title = "Examples, as trained on" if tokens else "Examples, as they stand in the file"
    if tokens and report["kind"] == "prompts":
        title = "Examples, as sampled from"
    marks = ["⟦supervised⟧"] * (tokens and report["kind"] != "prompts") + ["↵ newline"]
    if tokens and report["kind"] in ("pairs", "points"):
        marks.append("a reward model reads its score at an answer's last token")
    lines = [f"{_INDENT}({', '.join(marks)})"]
    for number, example in enumerate(examples, start=1):
        facts = [f"{number}.", f"id {example['id']}"]
        facts += [
            f"{k} {example[k]}" for k in ("subset", "margin", "weight", "label") if k in example
        ]
        if "scores" in example:
            facts.append(f"scores {_scores(example['scores'])}")
        lines += ["", *_wrapped("  ".join(facts))]
        if example["too_long"]:
            what = "skipped in training: an answer alone"
            if report["kind"] == "prompts":
                what = "refused, or skipped with data.on_bad=skip: the prompt"
            lines += _wrapped(f"{what} exceeds max_len {report['max_len']}; whole:")
        lines += _answers(example["answers"], colour)
    return [title, *lines]


def _scores(scores):
    """Those of a pair's answers, or those of one answer by name."""
    if not isinstance(scores, dict):
        return " and ".join(map(_number, scores))
    return ", ".join(f"{name} {_number(value)}" for name, value in scores.items())


def _number(value):
    if value is None:
        return "null"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _wrapped(text):
    return textwrap.wrap(_printable(text), WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _answers(answers, colour):
    """Each answer, after the prompt if that is another one than before."""
    lines, shown = [], None
    for answer in answers:
        spans = answer["spans"]
        head = spans[:1] if spans and not spans[0][1] else []
        if head and head[0][0] and head != shown:
            label = "prompt"
            if answer["prompt"] is not None:
                label += f", {_count(answer['prompt'], 'token')}"
            if answer["dropped"]:
                label += f" ({answer['dropped']:,} before them are cut off)"
            # The next one differs only in what is cut off, or in the turns that came before.
            lines += [f"{_INDENT}{label}", *_boxed(head, colour, *((2, 2) if shown else ()))]
            shown = head
        if spans[len(head) :]:
            label = answer["name"]
            if answer["answer"] is not None:
                label += f", {_count(answer['answer'], 'token')}"
                label += f", {answer['supervised']:,} of them supervised"
            lines += [f"{_INDENT}{label}", *_boxed(spans[len(head) :], colour)]
    return lines


def _boxed(spans, colour, head=_HEAD, tail=_TAIL):
    """Lines of text behind a bar, with what is supervised marked."""
    gutter = f"{_INDENT}  │ "
    cells = []
    for text, supervised in spans:
        text = "".join("↵\n" if c == "\n" else _printable(c) for c in text)
        cells += [(c, supervised) for c in (f"⟦{text}⟧" if supervised else text)]
    lines = [gutter + _painted(line, colour) for line in _folded(cells, WIDTH - len(gutter))]
    gone = len(lines) - head - tail
    if gone > 1:
        lines[head : head + gone] = [f"{_INDENT}  … {gone:,} lines …"]
    return lines


def _printable(text):
    """The text with what does not print, or would steer a terminal, as its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _folded(cells, width):
    """Cells as lines: broken at newlines, and at a space where a line is too long."""
    line = []
    for cell in cells:
        if cell[0] == "\n":
            yield line
            line = []
            continue
        line.append(cell)
        if len(line) > width:
            space = max((i for i, (c, _) in enumerate(line) if c == " "), default=0)
            at = space if space > width // 2 else width
            yield line[:at]
            line = line[at + (at == space) :]
    if line:
        yield line


def _painted(line, colour):
    text = ""
    for supervised, run in itertools.groupby(line, key=lambda cell: cell[1]):
        part = "".join(c for c, _ in run)
        text += f"{_GREEN if supervised else _DIM}{part}{_PLAIN}" if colour else part
    return text


# Numbers


def _cut(report):
    encoded, packed, kind = report["encoded"], report["packing"], report["kind"]
    longest = max(report["lengths"][_longest(report)])
    lines = []
    if kind == "prompts":
        return _too_long(report, longest)
    if report["max_len"] is None:
        title = f"Cut off: nothing, as no --max_len is given; the longest takes {longest:,} tokens"
    else:
        title = f"Cut off at --max_len {report['max_len']}"
        cut, of, gone = encoded["truncated"], encoded["kept"], encoded["dropped_tokens"]
        lines += _fact(
            "beginnings",
            f"{cut:,} of {_count(of, 'prompt')} lose theirs ({_percent(cut / of if of else 0)}), "
            f"{_count(gone, 'token')} over all answers",
        )
        of = _count(report["read"]["kept"], _ONE[kind])
        lines += _fact("skipped", f"{encoded['skipped']:,} of {of}: an answer alone is longer")
    if packed:
        lines += _fact(
            "packing",
            f"{_count(packed['trees'], 'prompt')} with their answers in "
            f"{_count(packed['rows'], 'row')} of {packed['row_len']:,} slots; "
            f"{_percent(packed['efficiency'])} of the slots hold tokens",
        )
    return [title, *lines]


def _too_long(report, longest):
    """Of prompts to answer: none is cut, as what a cut prompt asks is another question."""
    if report["max_len"] is None:
        return [f"Too long: none, as no --max_len is given; the longest takes {longest:,} tokens"]
    many, of = report["encoded"]["skipped"], report["read"]["kept"]
    share = f"{many:,} of {_count(of, 'prompt')} ({_percent(many / of)})"
    what = f"none of {_count(of, 'prompt')}; the longest takes {longest:,} tokens"
    if many:
        what = (
            f"{share}; none is cut: training stops at the first of them, or with data.on_bad=skip "
            f"leaves them out and says how many. The longest takes {longest:,} tokens"
        )
    return [f"Too long for --max_len {report['max_len']}", *_fact("prompts", what)]


def _longest(report):
    return "longest" if "longest" in report["lengths"] else "prompt"


def _lengths(report):
    names = _PARTS[report["kind"]]
    columns = ("min", "median", "mean", "p95", "max")
    lines = [f"{_INDENT}{'':<22}" + "".join(f"{column:>10}" for column in columns)]
    for part, values in report["lengths"].items():
        row = inspection.summary(values)
        shown = "".join(
            f"{row[c]:>10,.1f}" if c == "mean" else f"{row[c]:>10,.0f}" for c in columns
        )
        lines.append(f"{_INDENT}{names.get(part, part):<22}{shown}")
    part = _longest(report)
    table = inspection.histogram(report["lengths"][part])
    most = max(count for _, _, count in table)
    edge = max(len(f"{high:,}") for _, high, _ in table)
    lines += ["", f"{_INDENT}{names.get(part, part)}"]
    for low, high, count in table:
        bar = "█" * round(_BAR * count / most) or "▏" * bool(count)
        lines.append(f"{_INDENT}{low:>{edge},} – {high:>{edge},} {count:>10,}  {bar}".rstrip())
    if "bias" in report:
        bias, unit = report["bias"], report["unit"]
        lines.append("")
        lines += _fact(
            "length bias",
            f"chosen {bias['chosen']:,.1f} {unit}, rejected {bias['rejected']:,.1f}, difference "
            f"{bias['difference']:+,.1f}; chosen is the longer one in {_percent(bias['longer'])} "
            f"of the pairs and the shorter in {_percent(bias['shorter'])}",
        )
    return [f"Lengths in {report['unit']}", *lines]


def _repeats(report):
    found = report["duplicates"]
    lines = []
    prompts = f"{found['prompts']:,} different"
    if found["repeated"]:
        prompts += f"; {found['repeated']:,} of them in several rows, up to {found['most']:,}"
    lines += _fact("prompts", prompts)
    copies = "none"
    if found["copies"]:
        sets = _few((" = ".join(ids[:_FEW]) for ids in found["copied"]), len(found["copied"]))
        said = (
            "says what an earlier one says" if found["copies"] == 1 else "say what earlier ones say"
        )
        copies = f"{_count(found['copies'], 'row')} {said}: ids {sets}"
    lines += _fact("copies", copies)
    of = {
        "pairs": "two answers preferred in both orders",
        "points": "one answer labelled in several ways",
    }
    if report["kind"] in of:
        against = "none"
        if found["contradictions"]:
            sets = _few(
                (" against ".join(ids[0] for ids in sides) for sides in found["contradicted"]),
                found["contradictions"],
            )
            against = f"{found['contradictions']:,} × {of[report['kind']]}: ids {sets}"
        lines += _fact("contradictions", against)
    return ["What stands twice", *lines]


def _values(report):
    lines = []
    for field, values in report["counts"].items():
        shown = [f"{value} {count:,}" for value, count in values.items()]
        rest = len(shown) - _VALUES
        listed = ", ".join(shown[:_VALUES]) + (f" and {rest:,} more values" if rest > 0 else "")
        lines += _fact(field, listed)
    if report["numbers"]:
        columns = ("min", "mean", "max", "known", "null")
        wide = max(20, *map(len, report["numbers"]))
        lines.append(f"{_INDENT}{'':<{wide}}" + "".join(f"{column:>10}" for column in columns))
        for field, row in report["numbers"].items():
            shown = "".join(f"{_number(row[column]):>10}" for column in columns)
            lines.append(f"{_INDENT}{_printable(field):<{wide}}{shown}")
    return ["Values", *lines]


def _overlap(report):
    found = report["overlap"]
    lines = _fact("file", f"{found['path']}, read as {found['kind']}: {_kept(found['read'])}")
    lines += _fact("prompts", f"{found['prompts']:,} different")
    for name, count, pairs in (
        ("exactly here", found["exact"], found["exact_ids"]),
        ("nearly here", found["normalised"] - found["exact"], found["more_ids"]),
    ):
        text = f"{count:,} ({_percent(count / max(found['prompts'], 1))})"
        if pairs:
            text += f", ids there = here: {_few((f'{a} = {b}' for a, b in pairs), count)}"
        lines += _fact(name, text)
    lines += _fact("", "(nearly: but for case, punctuation, whitespace and Unicode form)")
    return ["Prompts of another file that stand in this one", *lines]
