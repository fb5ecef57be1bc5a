#!/bin/sh
# Makes .venv: the versions of requirements.lock and this package, editable.
set -eu

cd "$(dirname "$0")/.."
installed=.venv/.installed

python=$(tools/find_python.sh)
uv=$(tools/find_uv.sh)

# An environment without the stamp is one whose set-up stopped midway: start afresh.
if [ ! -e "$installed" ] || ! .venv/bin/python --version >/dev/null 2>&1; then
    rm -rf .venv
    "$uv" venv --quiet --no-config --python "$python" .venv
fi
rm -f "$installed"

echo "set-up: installing requirements.lock into .venv (a few GB when nothing is cached)" >&2
# Compiled now, since every rank process of every test imports torch and Megatron.
"$uv" pip sync --quiet --python .venv/bin/python --require-hashes --compile-bytecode \
    requirements.lock
# The lock holds all that this package needs, and the setuptools that builds it.
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
touch "$installed"
