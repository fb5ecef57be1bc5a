#!/bin/sh
# Installs the headless browser that the tests of the report's page use, where that can be done
# without asking. Where it cannot, says so: those tests are skipped then, and say so too.
set -eu

have() { command -v "$1" >/dev/null 2>&1; }

present() {
    have chromedriver && { have chromium || have chromium-browser || have google-chrome; }
}

if present; then
    exit 0
fi
if have apt-get && [ "$(id -u)" = 0 ]; then
    echo "set-up: installing Chromium and its driver, for the tests of the report's page" >&2
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # Versions in an old list of packages are not on the servers any more.
    timeout 300 sh -c 'apt-get update && apt-get install --yes --no-install-recommends \
        chromium chromium-driver fonts-liberation' </dev/null >"$log" 2>&1 || tail -n 3 "$log" >&2
    rm -f "$log"
fi
if ! present; then
    echo "set-up: Chromium and chromedriver are not installed: the tests of the report's page" \
        "will be skipped; on Debian, 'apt-get install chromium chromium-driver' as root" >&2
fi
