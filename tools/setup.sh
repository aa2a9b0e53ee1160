#!/usr/bin/env bash
# Makes .venv: finds or installs what the system must have, then both packages (editable) and the development tools.
#
# A second run does nothing but look: .venv keeps two keys, one of what the libraries depend on, one of what the native
# code depends on, and a step is done again only when its key has changed. Python sources need neither: the installs are
# editable. Long output goes to build/setup.log. PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
log=$root/build/setup.log

say() { printf 'setup: %s\n' "$*"; }

# Runs a step with its output in the log; shows the end of the log if the step fails.
logged() {
  local what=$1
  shift
  say "$what"
  printf '\n$ %s\n' "$*" >>"$log"
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    say "this failed: $what. The end of ${log#"$root"/}:"
    tail -n 30 "$log"
    exit 1
  fi
}

# ------------------------------------------------------------------------------------------- what the system must have

# Prints why an interpreter will not do; nothing if it will.
lack_of_python() {
  "$1" - 2>/dev/null <<'EOF' || echo "no such interpreter"
import os, sys, sysconfig
if sys.version_info < (3, 11):
    print("older than 3.11")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("no headers")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("no venv")
EOF
}

# Sets python to the first interpreter that will do.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 /usr/bin/python3.11 python3 /usr/bin/python3 \
    python3.12 python3.13 python3.14; do
    if [ -z "$(lack_of_python "$candidate")" ]; then
      python=$candidate
      return 0
    fi
    [ -z "${PYTHON:-}" ] || return 1
  done
  return 1
}

find_compiler() { command -v "${CC:-cc}" >/dev/null; }

# Debian's names for what is missing, one per line.
missing_packages() {
  if ! find_python; then
    printf '%s\n' python3 python3-dev python3-venv
  fi
  find_compiler || printf '%s\n' gcc libc6-dev
  command -v make >/dev/null || echo make
}

python=
if [ -n "${PYTHON:-}" ] && ! find_python; then
  say "PYTHON=$PYTHON will not do: $(lack_of_python "$PYTHON"). It must be 3.11 or newer, with venv and headers."
  exit 1
fi
mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    say "missing: Python 3.11 or newer with its headers and venv, a C compiler, make; or one of them."
    say "By Debian's names: ${missing[*]}. Install them and run this again."
    exit 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    say "the system lacks: ${missing[*]}. Run this, then this script again:"
    printf '  sudo apt-get update && sudo apt-get install -y %s\n' "${missing[*]}"
    exit 1
  fi
  say "the system lacks: ${missing[*]}; they are installed with apt-get now"
  mkdir -p "${log%/*}"
  : >"$log"
  logged "apt-get update" apt-get update
  logged "apt-get install ${missing[*]}" \
    env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  mapfile -t missing < <(missing_packages)
  if [ "${#missing[@]}" -gt 0 ]; then
    say "still missing: ${missing[*]}. This system's Python may be older than 3.11: install one and set PYTHON."
    exit 1
  fi
fi
find_python

# ------------------------------------------------------------------------------------------------ what has changed

key() { sha256sum | cut -c1-64; }

# All that both packages, their builds and the development tools ask of the package index.
requirements=$("$python" - <<'EOF'
import tomllib

with open("pyproject.toml", "rb") as file:
    broker = tomllib.load(file)
with open("guest-agent/pyproject.toml", "rb") as file:
    agent = tomllib.load(file)
wanted = [
    *broker["build-system"]["requires"],
    *broker["dependency-groups"]["dev"],
    *broker["project"]["dependencies"],
    *(text for extra in broker["project"].get("optional-dependencies", {}).values() for text in extra),
    *agent["project"]["dependencies"],
]
print(*sorted(set(wanted)), sep="\n")
EOF
)

# The place counts too: a virtual environment and an editable install hold absolute paths.
libraries_key=$({
  echo "$root"
  "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
  echo "$requirements"
  cat tools/setup.sh
} | key)
native_key=$({
  echo "$libraries_key"
  cat pyproject.toml guest-agent/pyproject.toml CMakeLists.txt sharearea/common/__init__.py
  cat native/*.c native/*.h native/area_stub.*
} | key)

is_key() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ]; }

if is_key native.key "$native_key" && "$venv/bin/python" -c '' 2>/dev/null; then
  say "up to date"
  exit 0
fi
mkdir -p "${log%/*}"
: >>"$log"

# -------------------------------------------------------------------------------------------------------- the steps

if ! is_key libraries.key "$libraries_key" || ! "$venv/bin/python" -c '' 2>/dev/null; then
  logged "virtual environment .venv, with $("$python" --version)" "$python" -m venv --clear "$venv"
  printf '%s\n' "$requirements" >"${log%/*}/requirements.txt"
  logged "libraries and tools from the package index" \
    "$venv/bin/python" -m pip install --disable-pip-version-check --requirement "${log%/*}/requirements.txt"
  echo "$libraries_key" >"$venv/libraries.key"
fi
# The build's own requirements are in .venv already: no isolation, and so no network for a rebuild.
logged "native code, and both packages (editable)" \
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
  --editable . --editable ./guest-agent
echo "$native_key" >"$venv/native.key"
say "done; try: .venv/bin/sharearea --help"
