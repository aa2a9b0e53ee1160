#!/usr/bin/env bash
# What the tests use of the system beyond what the product needs: makers of real file systems, images and package
# databases, and systemd's reader of units. As root on Debian they are installed; else their packages are named, and the
# tests that need them are skipped (with CI set, they fail). It leaves to setup.sh what nothing works without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'test tools: %s\n' "$*"; }

# Debian's names for what is missing, one per line.
missing_packages() {
  command -v mkfs.ext4 >/dev/null && command -v e2fsck >/dev/null || echo e2fsprogs
  command -v mkfs.xfs >/dev/null || echo xfsprogs
  command -v mkfs.btrfs >/dev/null || echo btrfs-progs
  command -v qemu-img >/dev/null && command -v qemu-io >/dev/null || echo qemu-utils
  command -v sfdisk >/dev/null || echo fdisk
  command -v mkswap >/dev/null || echo util-linux
  command -v rpmbuild >/dev/null && command -v rpm >/dev/null || echo rpm
  for tool in tar gzip bzip2 zstd; do command -v "$tool" >/dev/null || echo "$tool"; done
  command -v xz >/dev/null || echo xz-utils
  command -v systemd-analyze >/dev/null || echo systemd
}

mapfile -t missing < <(missing_packages)
[ "${#missing[@]}" -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  say "tests that need them will be skipped: ${missing[*]} (Debian's names) are not installed."
  exit 0
fi
log=build/test-tools.log
mkdir -p build
say "apt-get install ${missing[*]}"
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
  >"$log" 2>&1 </dev/null; then
  tail -n 20 "$log"
  say "they could not be installed; tests that need them will be skipped."
fi
