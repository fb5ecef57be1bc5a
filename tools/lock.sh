#!/bin/sh
# Writes requirements.lock: the newest versions that setup.py and tools/lock_pins.txt allow.
#
# One file serves every platform. It names neither an index nor a path, so that it reads the same
# wherever it was made.
set -eu

cd "$(dirname "$0")/.."
python=$(tools/find_python.sh)
uv=$(tools/find_uv.sh)

"$uv" pip compile --quiet --no-config --python "$python" --python-version 3.12 --universal \
    --upgrade --generate-hashes --no-annotate --custom-compile-command "make lock" \
    --constraint tools/lock_pins.txt --extra dev setup.py --output-file requirements.lock

if grep -n -e '://' -e ' @ ' -e '^-' requirements.lock; then
    echo "lock: requirements.lock must hold names, versions and hashes alone; see above" >&2
    exit 1
fi
