#!/usr/bin/env bash
# Unpacks Debian's prometheus and promtool into build/prometheus, for tests/e2e/test_metrics.py. Nothing is installed, no
# service is started, and root is not needed. Does nothing if they are there, or if the system has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$PWD/build/prometheus

say() { printf 'prometheus: %s\n' "$*"; }

if { command -v prometheus && command -v promtool; } >/dev/null || [ -x "$folder/usr/bin/promtool" ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  say "this system has no apt-get: install prometheus and promtool, or do without the test of them"
  exit 0
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/sharearea-prometheus.XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch() { (cd "$work" && apt-get download -o APT::Sandbox::User="$(id -un)" prometheus); }
if ! fetch >"$work/log" 2>&1; then
  # A fresh system has no lists of packages yet.
  if [ "$(id -u)" -eq 0 ]; then
    apt-get update >>"$work/log" 2>&1 || true
  fi
  fetch >>"$work/log" 2>&1 || {
    say "Debian's package cannot be downloaded:"
    tail -n 5 "$work/log"
    exit 1
  }
fi
say "Debian's package is unpacked into build/prometheus"
rm -rf "$folder"
mkdir -p "$folder"
dpkg-deb -x "$work"/prometheus_*.deb "$folder"
