#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and below ten minutes: build, tests, benchmarks, profiles, summary.
# `bash benchmarks/gpu_suite.sh --help` lists stages and options; what it does is in gpu_suite.py. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" benchmarks/gpu_suite.py "$@"
