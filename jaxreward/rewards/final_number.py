"""The last number written in a text, as graders of arithmetic read it."""

import re

# A sign belongs to the number only where nothing stands before it that it could subtract from.
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z.)\]}])[-−–－](?=[$\\0-9.])(?:\\?\$)?)?"
    r"(?P<value>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][+-]?[0-9]+)?"
)


def final_number(text):
    """Reads the last number of a text.

    Reads "1,234" as 1234, keeps decimals as written ("12.50"), looks through markup ("**8**",
    "$8$", "-$5"), drops the full stop of "3.", and takes "-", "−" (U+2212), "–" and "－" for a
    minus sign, except directly after a digit, letter or closing bracket: "3-5" ends in 5, not -5.
    Nor is one before a space: "4 - 1" ends in 1, and so does the list item "- 1".

    Args:
      text: Free text, for example a model's whole answer.

    Returns:
      The number as str of ASCII digits, with "-" in front if negative and without thousands
      separators; None if the text holds no number.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    number = found["value"].replace(",", "") + (found["exponent"] or "")
    return f"-{number}" if found["sign"] else number
