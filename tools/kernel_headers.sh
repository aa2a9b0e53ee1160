#!/usr/bin/env bash
# Installs the kernel headers that tests/test_view_module.py builds the guest's module against: Debian's for its own
# kernel, and the newest 6.12 of the backports where its package lists are. Does nothing where headers are already, or
# without apt-get and root: the test then says that it is skipped.
set -euo pipefail

for build in /lib/modules/*/build/Makefile; do
  [ ! -e "$build" ] || exit 0
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "kernel_headers: no headers, and they cannot be installed here (needs apt-get and root)"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update >/dev/null
apt-get install -y --no-install-recommends linux-headers-amd64 >/dev/null
backport=$(apt-cache search --names-only '^linux-headers-6\.12\.[0-9].*[0-9]-amd64$' | awk '{print $1}' | sort -V | tail -n 1)
[ -z "$backport" ] || apt-get install -y --no-install-recommends "$backport" >/dev/null
