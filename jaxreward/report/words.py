"""Numbers and verdicts as words, the same in the tables, the charts and the summary."""

import re

__all__ = [
    "all_shares",
    "count",
    "finite",
    "interval",
    "is_number",
    "is_share",
    "label",
    "number",
    "percent",
    "points",
    "reader",
    "title",
    "verdict",
]

FAR = 1e30  # beyond this a value is treated as not finite: matplotlib's transforms overflow


def is_number(value) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value) -> bool:
    """Whether a JSON value is a number that can be drawn: not NaN, not beyond 1e30."""
    return is_number(value) and abs(value) <= FAR  # a comparison with NaN is False


def count(n: int, noun: str) -> str:
    """1 line, 2 lines, 2 entries."""
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{n:,} {noun if n == 1 else many}"


def number(value) -> str:
    """A number for reading: four figures, thousands separated, a real minus sign."""
    if value is None:
        return "–"
    if not finite(value):
        return "not finite"
    value = int(value) if float(value).is_integer() and abs(value) < 1e9 else value
    if isinstance(value, int):
        text = f"{value:,}"
    elif 1e-3 <= abs(value) < 1e9:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    else:
        digits, power = f"{value:.2e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("-", "−")


def percent(value) -> str:
    """0.7123 as 71.2 %, with a space that does not break."""
    return f"{100 * value:.1f}\u00a0%".replace("-", "−") if finite(value) else number(value)


def reader(shares: bool):
    """The function that words a value: `percent` for shares, `number` otherwise."""
    return percent if shares else number


def is_share(name: str, *values) -> bool:
    """Whether values of a metric of this name read best as per cent."""
    parts = set(re.split(r"[^a-z]+", name.lower()))
    named = parts & {"accuracy", "share", "fraction", "solved"} or (
        "rate" in parts and "learning" not in parts
    )
    return bool(named) and all(0 <= v <= 1 for v in values if finite(v))


def all_shares(evaluation: dict) -> bool:
    """Whether every selector's value of a best-of-n evaluation lies in [0, 1]."""
    values = [s["value"] for s in evaluation["selectors"] if finite(s["value"])]
    return all(0 <= v <= 1 for v in values)


def interval(low, high, shares: bool) -> str:
    """69.1 to 74.0 %, or a dash when no interval is known."""
    if low is None or high is None:
        return "–"
    say = reader(shares)
    return f"{say(low).removesuffix(chr(0xA0) + '%')} to {say(high)}"


def points(value, shares: bool) -> str:
    """A signed difference; of shares, in hundredths."""
    if not finite(value):
        return number(value)
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + (f"{abs(100 * value):.1f}" if shares else number(abs(value)))


def verdict(pair: dict, problems: int | None) -> str:
    """What the interval of a paired difference says, as a sentence."""
    a, b = pair["a"], pair["b"]
    if pair["low"] is None:
        return "No interval was recorded, so no verdict."
    if pair["low"] > 0:
        return f"{a} is higher than {b}: the whole interval lies above zero."
    if pair["high"] < 0:
        return f"{a} is lower than {b}: the whole interval lies below zero."
    on = f"these {count(problems, 'problem')} do" if problems else "this evaluation does"
    return f"Undecided: the interval includes zero, so {on} not tell {a} from {b}."


def label(text: str, limit: int = 24) -> str:
    """Untrusted text as a one-line plot label of at most `limit` characters."""
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be drawn
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = f"\u200b{text}" if text.startswith("_") else text  # else matplotlib leaves it out
    # Cut in the middle: names of one family differ at their ends.
    head, tail = limit // 2, limit - limit // 2 - 1
    return text if len(text) <= limit else f"{text[:head]}…{text[-tail:]}"


def title(evaluation: dict) -> str:
    """best_of_4 as Best of 4."""
    words = evaluation["name"].replace("_", " ")
    return words[:1].upper() + words[1:]
