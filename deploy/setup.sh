#!/usr/bin/env bash
# Makes the virtual environment: deploy/setup.sh FOLDER cpu|gpu. Called by make.
set -euo pipefail
venv=$1 build=$2
requirements=requirements-$build.txt
torch=2.13.0

if [ "$build" = gpu ] && [ -e "$venv/.installed-cpu" ]; then
  echo "baton: $venv holds the CPU build; run 'make clean' first" >&2
  exit 1
fi

if ! command -v "${PYTHON:-python3.11}" >/dev/null; then
  echo "baton: ${PYTHON:-python3.11} is not found: install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv), or name another with PYTHON=..." >&2
  exit 1
fi
if ! "${PYTHON:-python3.11}" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "baton: ${PYTHON:-python3.11} must be Python 3.11 with venv (Debian: apt install python3.11-venv)" >&2
  exit 1
fi

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ "$build" = cpu ] && ! "$venv/bin/python" -c "import importlib.metadata as m; assert m.version('torch') == '$torch+cpu'" 2>/dev/null; then
  # torch's CPU build is on no package index but PyTorch's own. Where pip knows of a wheel already
  # (PIP_FIND_LINKS), that is taken; asking with --no-index answers at once.
  echo "installing torch $torch for CPU"
  pip install -q --no-deps --no-index "torch==$torch+cpu" 2>/dev/null ||
    pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
fi
echo "installing $(grep -c '==' "$requirements") packages (about two minutes the first time)"
pip install -q --no-deps -r "$requirements"
pip install -q --no-deps --no-build-isolation -e .
if ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
  echo "baton: vLLM needs libnuma.so.1, which is not found (Debian and Ubuntu: apt install libnuma1)" >&2
  exit 1
fi
