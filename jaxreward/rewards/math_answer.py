r"""The final answer of a worked solution, and whether it equals the reference.

Reading is regular expressions and one pass over the braces; comparing is plain strings and exact
fractions first, and then the package math-verify (extra `real`), which compares with sympy.

sympy may take for ever on an answer as short as 9^{9^{9}}, so an answer goes there only if
`tame` says that it is small. math-verify has time limits of its own, but they work by SIGALRM: they
raise in threads, cancel an alarm that the caller has set, and do not stop one long multiplication.
They are switched off here. `tame` stops what is known to hang; a run should have a hard limit
around its rewards as well, since what sympy needs cannot be told from looking.
"""

import functools
import logging
import re
from fractions import Fraction

from jaxreward.rewards.final_number import final_number

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(r"[\s$]*(?:[,;]|and|or|\\text\{\s*(?:and|or)\s*\})[\s$]*(?:and|or)?[\s$]*")
_SAYS = re.compile(
    r"\banswers?\b(?:\s+(?:to|for|of)\s[^.\n:=?!]{0,80}?)?[*_\s]*"
    r"(?:\b(?:is|are|(?:should|must|would) be)\b|=|:)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^####", re.MULTILINE)
_FILLER = re.compile(
    r"(?:\b(?:definitely|indeed|simply|just|still|therefore|then|thus|exactly|now|clearly|equal to"
    r"|given by)\b|[:=*_\s])*",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$?(?P<a>[^$\n]+?)\$\$?|\\\((?P<b>.+?)\\\)|\\\[(?P<c>.+?)\\\]")
_STOP = re.compile(r"[.!?;](?=\s|$)")
_NUMBER = (
    r"[-−+]?(?:\\?\$|[€£])?[-−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/\d+)?(?:\s*\\?%)?"
)
_NUMBERS = re.compile(rf"{_NUMBER}(?:\s*(?:,\s*and|,|and|or)\s*{_NUMBER})*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_OPTION = re.compile(r"\(?([A-Ja-j])(?:\)|$|(?=[.:]))")
_TRUTH = re.compile(r"(?:yes|no|true|false)(?=$|[,;:])", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|textit)\s*\{([^{}]*)\}")


def answer_part(text):
    """What a reader takes for the answer: the text after the thinking.

    Args:
      text: A model's whole answer.

    Returns:
      str: all after the last "</think>"; the whole text if it holds no such tag; "" if thinking was
      opened and never closed, since such a text was cut off before it answered.
    """
    _, closed, rest = text.rpartition("</think>")
    return "" if not closed and "<think>" in text else rest


def boxed(text):
    r"""The contents of all \boxed{…} and \fbox{…}, whose braces match, in one pass.

    Args:
      text: Any text.

    Returns:
      list of (start, end, content) by position; of nested boxes only the outermost. Boxes with
      nothing but a comma, "and" or "or" between them are one answer of several parts, joined by
      ", ".
    """
    found, stack = [], []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.startswith(("\\boxed", "\\fbox")):
            stack.append((match.start(), match.end()))
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack:
            opened = stack.pop()
            if opened is None:
                continue
            while found and found[-1][0] > opened[0]:
                found.pop()
            found.append((opened[0], match.end(), text[opened[1] : match.start()].strip()))
    joined = []
    for start, end, content in found:
        content = _unboxed(content)
        if joined and _BETWEEN.fullmatch(text, joined[-1][1], start):
            first, _, parts = joined.pop()
            joined.append((first, end, parts if content in parts else [*parts, content]))
        else:
            joined.append((start, end, [content]))
    return [(start, end, ", ".join(parts)) for start, end, parts in joined]


def _unboxed(content):
    inner = boxed(content) if "box" in content else []
    return inner[0][2] if len(inner) == 1 and inner[0][:2] == (0, len(content)) else content


def statements(text):
    r"""Every place where the text commits itself to an answer.

    Three forms count: \boxed{X}; "the answer is X" with its kin ("Answer: X", "the answer to the
    first part should be X"); a line "#### X". X must look like an answer: mathematics, a number, an
    option letter, yes, no, true or false. A question ("is the answer 5?") commits to nothing, nor
    does a number that merely occurs.

    Args:
      text: Any text.

    Returns:
      list of (start, end, answer, "boxed" or "stated"), in the order of their ends.
    """
    found = [(start, end, answer, "boxed") for start, end, answer in boxed(text) if answer]
    for opening in (*_SAYS.finditer(text), *_HASHES.finditer(text)):
        value = leading_value(text[opening.end() : opening.end() + 300].partition("\n")[0])
        if value is not None:
            at = text.index(value, opening.end())
            found.append((opening.start(), at + len(value), value, "stated"))
    return sorted(found, key=lambda item: item[1])


def leading_value(line):
    """The answer that a line begins with, as after "the answer is" or "=".

    Args:
      line: Rest of a line, str. Of "18 dollars" the number is taken, of "$5x+3$, so" the formula.

    Returns:
      str; None if the line begins with no number, formula, option letter or yes or no, if it is
      a question, or if it begins with a box, which `boxed` finds.
    """
    line = line[_FILLER.match(line).end() :]
    if re.match(r"\$*\s*\\(?:boxed|fbox)\b", line):
        return None
    math = _MATH.match(line)
    if math:
        content = next(group for group in math.groups() if group)
        if not _WORD.search(_TEXT.sub("", content)):
            return content.strip()
    stop = _STOP.search(line)
    if stop:
        if stop.group() == "?":
            return None
        line = line[: stop.start()]
    line = line.rstrip(" \t*_.,;:$")
    for pattern in (_OPTION, _TRUTH):
        match = pattern.match(line)
        if match:
            return match.group(1) if match.groups() else match.group()
    numbers = _NUMBERS.match(line)
    if numbers and re.match(r"$|\s+[A-Za-z(]|[,;:)]", line[numbers.end() :]):
        return numbers.group()
    mathematics = not _WORD.search(_TEXT.sub("", line)) and re.search(r"[0-9\\]|^[A-Za-z]$", line)
    return line if mathematics else None


def final_answer(text, *, last_number=True):
    r"""The answer that a text ends up with.

    Of the part after the thinking: the last \boxed{}; else the last answer stated in words or
    after "####"; else, if allowed, the last number.

    Args:
      text: A model's whole answer.
      last_number: Fall back to the last number, as graders of GSM8K do.

    Returns:
      (answer, how): str and "boxed", "stated" or "number"; or (None, "none").
    """
    text = answer_part(text)
    found = statements(text)
    for kind in ("boxed", "stated"):
        of_kind = [answer for _, _, answer, how in found if how == kind]
        if of_kind:
            return of_kind[-1], kind
    number = final_number(text) if last_number else None
    return (None, "none") if number is None else (number, "number")


_DROP = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\(?:quad|qquad|displaystyle)\b|\\?[$%]"
    r"|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|°|[€£]|[.,;]+$"
)
_FRAC = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))(?![\d{])"
)
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_RATIONAL = re.compile(
    r"([-+]?)((?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,2})?)(?:/(\d{1,40}))?"
)
_ASSIGNED = re.compile(r"[A-Za-z]\s*=(?!=)")
_UNITS = re.compile(r"([-+]?[\d.,/\s]*\d)\s*[A-Za-z][A-Za-z .]*(?:\^?[23])?")


def canonical(answer):
    r"""One spelling for answers that differ in dress only.

    Drops LaTeX spacing, dollar and percent signs, degrees, thousands separators, units after a
    number and a single "x =" in front; writes numbers as exact fractions ("0.50" and \frac12 are
    both "1/2"); sorts the parts of a list or set, but not those of a tuple (…) or interval [...];
    words lose their case. 50% is 50, and not 0.5 (`equivalent` takes both). What is longer than 500
    characters stays as it is.

    Args:
      answer: str.

    Returns:
      str; "" where nothing is left.
    """
    if len(answer) > 500:
        return answer.strip()
    text = answer.replace("−", "-").replace("{,}", ",").strip()
    text = _TEXT.sub(lambda match: f" {match.group(1).strip()} ", text)
    text = _DROP.sub("", text.strip()).strip()
    text = _FRAC.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    text = _THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)
    assigned = _ASSIGNED.match(text)
    if assigned and "=" not in text[assigned.end() :]:
        text = text[assigned.end() :].strip()
    return _spelled(text)


def _spelled(text, depth=0):
    parts, kind = _parts(text)
    if depth > 4 or (len(parts) == 1 and not kind):
        return _single(text)
    parts = [_spelled(part, depth + 1) for part in parts]
    if kind in ("(", "["):
        return f"{text[0]}{','.join(parts)}{text[-1]}"
    return ",".join(sorted(parts))


def _parts(text):
    """(parts at top level, opening bracket of the whole or "")."""
    kind, inner = "", text
    for opening, closing in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2:
            kind, inner = opening, text[len(opening) : -len(closing)]
            break
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|,|;|\b(?:and|or)\b", inner):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
            if depth < 0:  # "(1)(2)" is no pair of brackets around all
                return [text], ""
        elif depth == 0:
            parts.append(inner[start : match.start()])
            start = match.end()
    parts = [part.strip() for part in (*parts, inner[start:]) if part.strip()]
    if kind in ("(", "[") and len(parts) == 1 and not re.fullmatch(r"[A-Za-z]|[-\d./]+", inner):
        return [text], ""
    return (parts or [text]), (kind if len(parts) > 1 or kind == "\\{" else "")


def _single(text):
    text = text.strip()
    option = re.match(r"\(([A-Ja-j])\)\s*\w", text)
    if option:  # "(B) 12 cm"
        return option[1].casefold()
    if re.fullmatch(r"\([A-Za-z]\)|\([-\d./]+\)|\{[^{}]*\}", text):
        text = text[1:-1]
    units = None if _RATIONAL.fullmatch(text) else _UNITS.fullmatch(text)
    if units:
        text = units.group(1)
    if re.fullmatch(r"[A-Za-z ]+", text):
        return " ".join(text.casefold().split())
    text = re.sub(r"\s+", "", text)
    rational = _RATIONAL.fullmatch(text)
    if rational and int(rational[3] or 1):
        value = Fraction(rational[2]) / int(rational[3] or 1)
        return str(-value if rational[1] == "-" else value)
    return text


def same(gold, answer):
    """Whether two answers are one answer in another dress; cheap, and needs no package.

    Args:
      gold, answer: str.

    Returns:
      bool: equal by `canonical`. Never True for an empty one.
    """
    gold, answer = canonical(gold), canonical(answer)
    return bool(gold) and gold == answer


_COMMANDS = (
    "frac dfrac tfrac sqrt cdot times div pi infty cup cap in pm mp left right text mathrm mathbf "
    "textbf mathbb le leq ge geq lt gt ne neq approx quad qquad circ degree sin cos tan cot sec "
    "csc arcsin arccos arctan log ln exp binom dbinom tbinom alpha beta delta theta lambda mu phi "
    "omega sigma rho begin end ldots dots cdots emptyset varnothing langle rangle mbox"
)
_FUNCTIONS = re.compile(r"\\(?:sqrt|sin|cos|tan|cot|sec|csc|arc\w+|log|ln|exp|[dt]?binom)\b")
_POWER = re.compile(r"\^|\*\*")
_ROOT = re.compile(r"sqrt\s*\[\s*(?:\d{1,2}|[A-Za-z])\s*\]")
_ARITHMETIC = re.compile(r"(?:[\d\s.,+\-*/^(){}]|\\(?:[dt]?frac|cdot|times|div)(?![A-Za-z]))*")
_SMALL_FACTORIAL = re.compile(
    r"(?<!\d)(?:\d{1,3}|[A-Za-z])!|binom\s*\{\s*\d{1,3}\s*\}\s*\{\s*\d{1,3}\s*\}"
)


def tame(*answers):
    r"""Whether answers that are to be compared are small enough for sympy.

    Refused are: more than 200 characters, brackets deeper than 6, numbers of more than 30 digits,
    LaTeX commands other than those final answers are written with (no sums, products, integrals or
    limits), towers of powers, large powers (above 12; of a letter above 100, in equations 6; of
    a number above 9999 where nothing but arithmetic is around), roots whose index is no short
    number, factorials or binomials of more than a letter or numbers up to 999, or beside powers,
    more than 8 functions, 8 powers, 60 commas or 80 cells of matrices.

    Args:
      *answers: str; what one of them holds counts for all.

    Returns:
      bool.
    """
    text = "  ".join(answers)
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    powers = list(_POWER.finditer(text))
    factorials = len(re.findall(r"(?<!\\)!|binom", text))
    letters = 6 if re.search(r"[=<>]", text) else 100
    digits = 9999 if _ARITHMETIC.fullmatch(text) else 12
    return (
        max(map(len, answers)) <= 200
        and deepest <= 6
        and not re.search(r"\d{31}", text)
        and set(re.findall(r"\\([A-Za-z]+)", text)) <= {*_COMMANDS.split()}
        and len(_ROOT.findall(text)) == len(re.findall(r"sqrt\s*\[", text))
        and factorials == len(_SMALL_FACTORIAL.findall(text))
        and not (factorials and powers)
        and len(_FUNCTIONS.findall(text)) <= 8
        and len(powers) <= 8
        and text.count(",") <= 60
        and text.count("&") <= 80
        and all(_small_power(text[: p.start()], text[p.end() :], letters, digits) for p in powers)
    )


def _small_power(base, rest, letters, digits):
    """Whether the exponent that `rest` begins with is harmless on what `base` ends with."""
    base, rest = base.rstrip(), rest.lstrip()
    size = 0
    if rest[:1] in ("{", "("):
        depth = 0
        for size, char in enumerate(rest, 1):  # noqa: B007
            depth += (char in "({") - (char in ")}")
            if depth == 0:
                break
    else:
        size = re.match(r"-?\d*|.", rest).end() or 1
    exponent, after = rest[:size], rest[size:].lstrip()
    if _POWER.search(exponent) or _POWER.match(after) or _FUNCTIONS.search(exponent):
        return False
    largest = max((int(run[:6]) for run in re.findall(r"\d+", exponent)), default=0)
    if base[-1:].isdigit():
        return largest <= digits
    return largest <= (letters if base[-1:].isalpha() else 12)


@functools.cache
def _math_verify():
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            "comparing mathematical answers needs the package math-verify; install it with "
            "pip install 'jaxreward[real]'"
        ) from error
    # It would say once that its time limits are off, which is on purpose (see the top of the file).
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return math_verify


@functools.lru_cache(maxsize=8192)
def equivalent(gold, answer):
    r"""Whether an answer is mathematically equal to the reference.

    Equal strings and fractions by `canonical` are equal; different integers are not, nor are
    different words. The rest is math-verify's judgement if both are `tame`, else False. It counts
    \sqrt{8} and 2\sqrt{2}, 1/3 and 0.333333 (6 decimals), 1/2 and 50%, \{1,2\} and "2, 1" as equal,
    and (1,2) and (2,1) as different.

    The same in every thread and process; nothing is interrupted and no signal is touched.

    Args:
      gold: Reference, str. (math-verify is not symmetric: "x=5" in the answer matches gold "5".)
      answer: str.

    Returns:
      bool.

    Raises:
      ImportError: without the package math-verify.
    """
    verifier = _math_verify()
    a, b = canonical(gold), canonical(answer)
    if not a or not b or a == b:
        return bool(a) and a == b
    if all(re.fullmatch(r"-?\d+", x) for x in (a, b)):
        return False
    if any(re.fullmatch(r"[A-Za-z ]{3,}", x) for x in (a, b)):
        return False  # sympy would read words as products of letters, equal to their anagrams
    if not tame(gold, answer):
        return False
    parsed = [
        verifier.parse(f"${x.strip().strip('$')}$", parsing_timeout=None) for x in (gold, answer)
    ]
    return bool(verifier.verify(*parsed, timeout_seconds=None))


def grade(prompt, answer, record, *, last_number=True):
    """Text reward: is the final answer the reference, and was it stated as one.

    Args:
      prompt: Unused; part of the contract of text rewards.
      answer: The model's answer, str.
      record: Has "answer", the reference: bare ("18"), or a worked solution that ends in "#### 18"
        or a box.
      last_number: Let the last number count where no answer is stated.

    Returns:
      dict of accuracy (1.0 if `equivalent`, else 0.0) and format (1.0 if the answer was boxed or
      stated, 0.0 if it was the last number or missing).

    Raises:
      KeyError: if the record has no "answer".
      ImportError: without the package math-verify.
    """
    del prompt
    found, how = final_answer(answer, last_number=last_number)
    right = found is not None and equivalent(reference(record), found)
    return {"accuracy": float(right), "format": float(how in ("boxed", "stated"))}


def reference(record):
    """The reference answer of a record.

    Args:
      record: dict with "answer": str or number; bare, or a worked solution.

    Returns:
      str.

    Raises:
      KeyError: if there is none.
    """
    if record.get("answer") is None:
        raise KeyError(
            f"record {record.get('id', '?')!r} needs a field 'answer' with the reference; it has "
            f"{', '.join(map(str, record)) or 'no fields'}"
        )
    text = str(record["answer"])
    found, _ = final_answer(text, last_number=False)
    return text if found is None else found
