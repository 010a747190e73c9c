#!/usr/bin/env bash
# Installs the project with its development tools and passes style, types and tests.
#   bash scripts/test.sh [pytest arguments]        VENV=folder chooses the virtual environment (default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh train,eval,onnx,dev
ruff check .
ruff format --check .
mypy
python -m pytest -n auto --dist loadfile "$@"
