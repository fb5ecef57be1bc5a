#!/bin/sh
# Installs the headless browser that the tests of the report's page use, where that can be done
# without asking: as root, with apt. Where it cannot, says so and why, and does not fail: those
# tests are skipped then, and say so too.
set -eu

# Some systems have a script of that name that only tells how to install the program.
runs() { "$1" --version >/dev/null 2>&1; }

present() {
    runs chromedriver && { runs chromium || runs chromium-browser || runs google-chrome; }
}

packages="chromium chromium-driver fonts-liberation"

# An interrupted download leaves nothing behind, an interrupted installation a broken system: only
# what needs the network has a time limit.
install_all() {
    export DEBIAN_FRONTEND=noninteractive
    # Versions in an old list of packages are not on the servers any more.
    timeout 120 apt-get --option Acquire::Retries=1 update &&
        timeout 300 apt-get install --yes --no-install-recommends --download-only $packages &&
        apt-get --option DPkg::Lock::Timeout=60 install --yes --no-install-recommends $packages
}

if present; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    why="there is no apt-get"
elif [ "$(id -u)" != 0 ]; then
    why="only root can install them"
else
    echo "set-up: installing Chromium and its driver, for the tests of the report's page" >&2
    log=$(mktemp)
    install_all </dev/null >"$log" 2>&1 || true
    why="apt-get could not: $(tail -n 1 "$log")"
    rm -f "$log"
fi
if ! present; then
    echo "set-up: Chromium and chromedriver are missing, and $why: the tests of the report's page" \
        "will be skipped; on Debian, 'apt-get install $packages' as root" >&2
fi
