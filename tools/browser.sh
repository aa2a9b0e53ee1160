#!/usr/bin/env bash
# Sees to a Chromium for tests/e2e/test_dashboard.py: Debian's, installed if the system has none. Prints where it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'browser: %s\n' "$*" >&2; }

find_browser() { command -v chromium-headless-shell || command -v chromium; }

find_browser && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  say "there is no Chromium: install it (Debian: apt-get install chromium-headless-shell), or do without the test of the dashboard"
  exit 0
fi
say "chromium-headless-shell is installed with apt-get now"
mkdir -p build
log=$PWD/build/browser.log
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core; }
# A fresh system has no lists of packages yet.
if ! { install || { apt-get update && install; }; } >"$log" 2>&1 </dev/null; then
  say "this failed; the end of build/browser.log:"
  tail -n 10 "$log" >&2
  exit 1
fi
find_browser
