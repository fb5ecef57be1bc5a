#!/bin/sh
# Prints the path of the first Python for which a test, given as Python code, succeeds; without a
# test, of the first one that this project runs on.
#
# The test is run, because a name on PATH proves nothing: pyenv puts a shim there for every version
# that it holds, and the shim of a version that is not selected exits with 127.
set -eu

test_code=${1:-assert (3, 12) <= sys.version_info < (3, 15)}
pyenv_root=$(pyenv root 2>/dev/null) || pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}

for python in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3 \
    "$pyenv_root"/versions/*/bin/python; do
    if path=$("$python" -c "import sys; $test_code; print(sys.executable)" 2>/dev/null); then
        echo "$path"
        exit 0
    fi
done

echo "set-up: no Python here can run '$test_code'; install one that can, or name it with make PYTHON=..." >&2
exit 1
