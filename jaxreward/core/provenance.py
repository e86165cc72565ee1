"""Where an artefact comes from: versions, commit, machine and command, with secrets masked.

    {"environment": provenance.environment()}

stands in `environment.json`, in every checkpoint's `meta`, and in what else a run leaves behind.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from jaxreward import __version__

# What a result may depend on; those that are not installed are left out.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)
MASK = "***"

# Of a flag, a variable or a field whose value is nobody's business.
_NAME = (
    r"(?:[\w.-]*[\W_])?(?:keys?|secrets?|passwords?|passwd|pwd|credentials?|apikey|token|auth"
    r"|authorization|sig|signature)"
)
_FLAG = re.compile(rf"(--?{_NAME})", re.IGNORECASE)
_SETTING = re.compile(rf"((?:--?)?{_NAME}=).+", re.IGNORECASE | re.DOTALL)
# name=value inside a text: in the query of an address, or as JSON or a header has it.
_PAIR = re.compile(
    rf"((?:^|[\s?&;,{{\"'])(?:{_NAME})[\"']?\s*[=:]\s*[\"']?(?:Bearer\s+|Basic\s+)?)[^\s&;,\"'}}]+",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(\w://)[^\s/@]+@")
_TOKEN = re.compile(
    # As well-known services give them out.
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_\w{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    # What looks drawn at random: long hexadecimal, and long words of both cases and digits.
    r"|\b[0-9a-fA-F]{32,}\b|\b(?=\w*[a-z])(?=\w*[A-Z])(?=\w*\d)[A-Za-z0-9]{32,}\b"
)


def mask(text: str) -> str:
    """`text` with `***` in place of what looks like a key, a token or a password.

    Masked are the values of names that end in key, token, secret, password and the like
    (`api_key=…`, `?token=…`), the login of an address (`https://user:…@host`), tokens of the
    forms that well-known services give out (`hf_…`, `sk-…`, `ghp_…`), and long random words. Too
    much is masked rather than too little.
    """
    text = _LOGIN.sub(rf"\1{MASK}@", text)
    text = _PAIR.sub(rf"\1{MASK}", text)
    return _TOKEN.sub(MASK, text)


def command(words: Sequence[str]) -> str:
    """A command line as one masked text; the word after a flag like `--api_key` is masked too."""
    out, hide = [], False
    for word in words:
        if hide and not word.startswith("--"):
            word = MASK
        elif setting := _SETTING.fullmatch(word):
            word = setting[1] + MASK
        hide = _FLAG.fullmatch(word) is not None
        out.append(mask(word))
    return " ".join(out)


def environment() -> dict:
    """What made an artefact, as plain JSON values.

    Starts a JAX backend if none runs, and nothing else.

    Returns:
      dict of jaxreward (version), commit and dirty (of a source checkout, else None: its commit,
      and whether its sources differ from it), python, platform, devices, processes, one version
      for each of `PACKAGES` that is installed, and command (masked).
    """
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _checkout()
    return {
        "jaxreward": __version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **versions,
        "command": command(sys.argv),
    }


def _checkout():
    """(commit, whether the sources differ from it), or (None, None)."""
    # Of a source checkout only: an installed package may lie inside somebody else's repository.
    where = Path(__file__).resolve().parents[2]
    if not (where / "pyproject.toml").is_file():
        return None, None
    commit = _git(where, "rev-parse", "HEAD")
    changes = _git(where, "status", "--porcelain", "--", "jaxreward", "configs")
    return commit, None if changes is None else bool(changes)


def _git(where, *words):
    try:
        return subprocess.run(
            # Without locks: somebody may be committing right now.
            ["git", "--no-optional-locks", "-C", str(where), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
