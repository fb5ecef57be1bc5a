#!/bin/sh
# Prints the path of a uv: the one on PATH, else one of our own, which is installed on first use.
set -eu

UV_VERSION=0.13.8
cd "$(dirname "$0")/.."

if uv --version >/dev/null 2>&1; then
    command -v uv
    exit 0
fi

own_uv=$PWD/.venv-uv/bin/uv
if [ "$("$own_uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "$UV_VERSION" ]; then
    # Any Python will do, as long as its `venv` works: some systems ship that separately.
    python=$(tools/find_python.sh 'import ensurepip, venv')
    rm -rf .venv-uv
    "$python" -m venv .venv-uv
    .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" >&2
fi
echo "$own_uv"
