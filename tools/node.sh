#!/usr/bin/env bash
# Puts what tests/logql/package-lock.json names into build/logql, for tests/test_grafana.py; node and npm are Debian's, if
# the system has none. Does nothing if all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=tests/logql
folder=$PWD/build/logql

say() { printf 'node: %s\n' "$*"; }

if ! { command -v node && command -v npm; } >/dev/null; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    say "node and npm are missing: install them (Debian: apt-get install nodejs npm), or do without the test of LogQL"
    exit 0
  fi
  say "nodejs and npm are installed with apt-get now"
  mkdir -p build
  log=$PWD/build/node.log
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get install -y --no-install-recommends nodejs npm; }
  # A fresh system has no lists of packages yet.
  if ! { install || { apt-get update && install; }; } >"$log" 2>&1 </dev/null; then
    say "this failed; the end of build/node.log:"
    tail -n 10 "$log"
    exit 1
  fi
fi
wanted=$(cat "$source"/* | sha256sum)
[ "$(cat "$folder/key" 2>/dev/null)" != "$wanted" ] || exit 0
rm -rf "$folder"
mkdir -p "$folder"
cp "$source"/* "$folder"
if ! npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund >"$folder/log" 2>&1 </dev/null; then
  say "npm ci failed:"
  tail -n 10 "$folder/log"
  exit 1
fi
echo "$wanted" >"$folder/key"
say "Loki's grammar is in build/logql"
