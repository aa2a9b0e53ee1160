#!/usr/bin/env bash
# Gets the kernel headers that the guest's module is built against (tests/test_view_module.py). Installs Debian's for its
# own kernel and the newest 6.12, and unpacks those of Debian 11's 5.10 to build/kernel-headers: they would not install
# here. Does nothing where headers are already, or without apt-get and root: the test then says what is skipped.
set -euo pipefail

cd "$(dirname "$0")/.."
old=build/kernel-headers
export DEBIAN_FRONTEND=noninteractive
get=(apt-get -q -o DPkg::Lock::Timeout=600)

may_install() {
  command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ] && return
  echo "kernel_headers: no headers of $1, and they cannot be installed here (needs apt-get and root)"
  return 1
}

# Leaves $old/apt.conf: with it as APT_CONFIG apt knows Debian 11's packages, and nothing of this machine's apt changes.
old_lists() {
  mkdir -p "$old"/{lists,archives}/partial
  : >"$old/status"
  : >"$old/old.sources"
  : >"$old/old.list"
  [ ! -e /etc/apt/sources.list.d/debian.sources ] ||
    sed 's/bookworm/bullseye/g' /etc/apt/sources.list.d/debian.sources >"$old/old.sources"
  [ ! -e /etc/apt/sources.list ] || sed -n 's/bookworm/bullseye/gp' /etc/apt/sources.list >"$old/old.list"
  cat >"$old/apt.conf" <<CONF
Dir::State "$PWD/$old";
Dir::State::status "$PWD/$old/status";
Dir::Cache "$PWD/$old";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$PWD/$old";
APT::Sandbox::User "root";
CONF
  APT_CONFIG=$old/apt.conf apt-get update >/dev/null
}

depends_on() { apt-cache depends "$1" | sed -n "s/^ *Depends: \($2\)$/\1/p"; }

if ! compgen -G '/lib/modules/*/build/Makefile' >/dev/null && may_install 6.1; then
  apt-get update >/dev/null
  "${get[@]}" install -y --no-install-recommends linux-headers-amd64 >/dev/null
  newest=$(apt-cache search --names-only '^linux-headers-6\.12\.[0-9].*[0-9]-amd64$' | awk '{print $1}' | sort -V | tail -n 1)
  [ -z "$newest" ] || "${get[@]}" install -y --no-install-recommends "$newest" >/dev/null
fi

if ! compgen -G "$old/5.10.*/build/Makefile" >/dev/null && may_install 5.10; then
  old_lists
  export APT_CONFIG=$PWD/$old/apt.conf
  package=$(depends_on linux-headers-amd64 'linux-headers-5\.10\..*')
  version=${package#linux-headers-}
  rm -rf "$old/part"
  mkdir "$old/part"
  (
    cd "$old/part"
    apt-get -q download "$package" "${package%-amd64}-common" linux-kbuild-5.10 >/dev/null
    for deb in *.deb; do dpkg-deb -x "$deb" .; done
    rm ./*.deb
    ln -s "usr/src/$package" build
  )
  # The only place with the path that they would be installed at. Their compiler is not in Debian 12.
  sed -i "s|/usr/src/|$PWD/$old/$version/usr/src/|" "$old/part/build/Makefile"
  sed -i 's/gcc-10$/gcc/' "$old/part/build/.kernelvariables"
  mv "$old/part" "$old/$version"
fi
