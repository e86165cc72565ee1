"""docs/troubleshooting.md quotes messages that the code really has."""

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def texts():
    """All string literals of the package, f-strings with … for their values."""
    found = []
    for path in (REPO / "jaxreward").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_exist():
    """Catches a message that was reworded, after which nobody finds its row."""
    page = (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8")
    ours = page.partition("Not ours, but met on the way")[0]
    cells = [line.split("|")[1] for line in ours.splitlines() if line.startswith("| `")]
    quoted = [re.search("`([^`]+)`", cell)[1] for cell in cells]
    code = texts()
    assert len(quoted) > 25
    assert [text for text in quoted if text not in code] == []
