# Sourced by the scripts beside it: makes the virtual environment $VENV (default .venv) and installs the project with
# the extras in $1. Does nothing when that was done already with the same pyproject.toml.
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed (set PYTHON=...)" >&2; exit 2; }
"$VENV/bin/python" -m pip --version > /dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV"  # missing, or half made
stamp="$VENV/.installed"
wanted="$1 $(cksum < pyproject.toml)"
if ! grep -qsxF "$wanted" "$stamp"; then
  echo "installing into $VENV (torch alone is some gigabytes; minutes on a fast line)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$1]"
  echo "$wanted" >> "$stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"
case "$VENV" in /*) export PATH="$VENV/bin:$PATH" ;; esac
