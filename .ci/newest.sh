#!/usr/bin/env bash
# The whole CPU suite on Python 3.12, where pip brings megatron-core 0.19, then our GPU kernels in Triton's interpreter.
# What is skipped, and why, stands at the end of each. PYTHON names the interpreter; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv312}

make --no-print-directory setup PYTHON="${PYTHON:-python3.12}"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'triton>=3.4'
"$VENV/bin/python" -c 'import megatron.core, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "megatron-core", megatron.core.__version__)' 2>/dev/null
"$VENV/bin/python" -m pytest -rs tests --ignore tests/gpu "$@"
OMP_NUM_THREADS=1 TRITON_INTERPRET=1 "$VENV/bin/python" -m pytest -rs tests/gpu "$@"
