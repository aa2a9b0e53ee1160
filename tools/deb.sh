#!/usr/bin/env bash
# Makes Debian packages of both wheels: dist/sharearea_*.deb for dom0, dist/sharearea-agent_*.deb for guests. And one of the
# guest view's module, for DKMS, with its units and hooks: dist/sharearea-view-dkms_*.deb.
#
# They need Debian 12's own Python packages, nothing from a package index, and no network to install. Units are installed
# but neither enabled nor started; configuration files are the documented examples, and share nothing until switched on.
# Works on what `make setup` made. The version is the wheels'; dates are those of the last commit, so that the same tree
# gives the same packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/.venv/bin/python
work=$root/build/deb
architecture=$(dpkg --print-architecture)
maintainer="${DEBFULLNAME:-sharearea developers} <${DEBEMAIL:-sharearea@packages.invalid}>"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
umask 022

say() { printf 'deb: %s\n' "$*"; }

if ! command -v dpkg-deb >/dev/null || ! command -v dpkg-shlibdeps >/dev/null; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    say "needs dpkg-deb and dpkg-shlibdeps (Debian: apt-get install dpkg-dev)"
    exit 1
  fi
  say "dpkg-dev is installed with apt-get now"
  export DEBIAN_FRONTEND=noninteractive
  install() { apt-get install -y --no-install-recommends dpkg-dev; }
  # A fresh system has no lists of packages yet.
  { install || { apt-get update && install; }; } >/dev/null </dev/null
fi

rm -rf "$work"
mkdir -p "$work/wheels" dist
say "wheels"
if ! "$python" -m pip --quiet --disable-pip-version-check --no-input wheel --no-build-isolation --no-deps --no-index \
  --wheel-dir "$work/wheels" . ./guest-agent >"$work/wheels.log" 2>&1 </dev/null; then
  tail -n 30 "$work/wheels.log"
  exit 1
fi

# ---------------------------------------------------------------------------------------------------------- parts

# The package's Python files and its metadata, from the wheel, as Debian keeps them.
unpack_wheel() { # NAME TREE
  local module=${1//-/_} target=$2/usr/lib/python3/dist-packages wheel
  wheel=$(echo "$work/wheels/$module"-*-cp311-abi3-*.whl)
  mkdir -p "$target" "$2/usr/bin"
  "$python" -m zipfile -e "$wheel" "$target"
  # RECORD is pip's, which is not to remove files that dpkg installed.
  rm -f "$target/$module"-*.dist-info/RECORD
  rm -rf "$target/$module"-*.dist-info/licenses
  printf 'Debian\n' >"$(echo "$target/$module"-*.dist-info)/INSTALLER"
  find "$target" -type f -exec chmod 644 {} +
  cat >"$2/usr/bin/$1" <<END
#!/usr/bin/python3
import sys

from $module.cli import main

if __name__ == "__main__":
    sys.exit(main())
END
  chmod 755 "$2/usr/bin/$1"
}

# What the extension needs of the C library, by Debian's own reckoning.
library_depends() { # TREE
  mkdir -p "$work/shlibs/debian"
  printf 'Source: sharearea\n\nPackage: sharearea\nArchitecture: any\n' >"$work/shlibs/debian/control"
  (cd "$work/shlibs" && find "$1" -name '*.so' -print0 |
    xargs -0 dpkg-shlibdeps -O --ignore-missing-info 2>/dev/null) | sed -n 's/^shlibs:Depends=//p'
}

write_documents() { # NAME TREE EXAMPLES...
  local folder=$2/usr/share/doc/$1 file
  mkdir -p "$folder"
  cat >"$folder/copyright" <<END
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: sharearea

Files: *
Copyright: $(date -u -d "@$SOURCE_DATE_EPOCH" +%Y) the sharearea developers
License: Apache-2.0
 On Debian systems the full text is in /usr/share/common-licenses/Apache-2.0.
END
  printf 'sharearea (%s) bookworm; urgency=medium\n\n  * Built from the tree; see CHANGELOG.md.gz.\n\n -- %s  %s\n' \
    "$version" "$maintainer" "$(date -u -R -d "@$SOURCE_DATE_EPOCH")" | gzip -9n >"$folder/changelog.Debian.gz"
  gzip -9nc CHANGELOG.md >"$folder/changelog.gz"
  for file in docs/operations.md docs/exit-codes.md docs/threat-model.md docs/xen.md docs/view.md; do
    if [ -e "$file" ]; then
      cp "$file" "$folder/"
    fi
  done
  # No manual of ours is anywhere else: the examples say what every key means.
  if [ $# -gt 2 ]; then
    install -D -m 644 -t "$folder/examples" "${@:3}"
  fi
}

# The kernel of area domains is no program of this system's.
write_overrides() { # NAME TREE
  install -d "$2/usr/share/lintian/overrides"
  printf '%s: %s\n' "$1" statically-linked-binary "$1" unstripped-binary-or-object \
    >"$2/usr/share/lintian/overrides/$1"
}

# One man page for each command, made of what the command says of itself.
write_manual() { # NAME TREE TEXT
  local folder=$2/usr/share/man/man8
  mkdir -p "$folder"
  {
    printf '.TH %s 8 "%s" "%s %s"\n' "${1^^}" "$(date -u -d "@$SOURCE_DATE_EPOCH" +%F)" "$1" "$version"
    printf '.SH NAME\n%s \\- %s\n.SH DESCRIPTION\n.nf\n' "$1" "$3"
    COLUMNS=78 "$root/.venv/bin/$1" --help | sed -e 's/\\/\\\\/g' -e 's/-/\\-/g' -e "s/^\\([.']\\)/\\\\\\&\\1/"
    printf '.fi\n.SH SEE ALSO\n/usr/share/doc/%s/operations.md\n' "$1"
  } | gzip -9n >"$folder/$1.8.gz"
}

# Python's byte code is made on the target, by its own Python. A running service is restarted by an upgrade and stopped
# by a removal; nothing is started that did not run.
write_scripts() { # NAME TREE FOLDERS-TO-PURGE
  cat >"$2/DEBIAN/postinst" <<END
#!/bin/sh
set -e
if [ "\$1" = configure ]; then
  if command -v py3compile >/dev/null; then
    py3compile -p $1
  fi
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    if [ -n "\$2" ]; then
      deb-systemd-invoke try-restart $1.service || true
    fi
  fi
fi
END
  cat >"$2/DEBIAN/prerm" <<END
#!/bin/sh
set -e
if [ "\$1" = remove ] && [ -d /run/systemd/system ]; then
  deb-systemd-invoke stop $1.service || true
fi
if command -v py3clean >/dev/null; then
  py3clean -p $1
fi
END
  cat >"$2/DEBIAN/postrm" <<END
#!/bin/sh
set -e
if [ "\$1" = purge ]; then
  deb-systemd-helper purge $1.service >/dev/null || true
  rm -rf $3
fi
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload || true
fi
END
  chmod 755 "$2"/DEBIAN/{postinst,prerm,postrm}
}

package() { # NAME CONFIG-SOURCE CONFIG-NAME SUMMARY DESCRIPTION DEPENDS PURGE SUGGESTS EXAMPLES
  local name=$1 tree=$work/$1
  version=$(echo "$work/wheels/${name//-/_}"-*.whl)
  version=${version##*/"${name//-/_}"-}
  version=${version%%-*}-1
  mkdir -p "$tree/DEBIAN"
  unpack_wheel "$name" "$tree"
  install -D -m 644 "$2" "$tree/etc/sharearea/$3"
  install -D -m 644 "deploy/logrotate/$name" "$tree/etc/logrotate.d/$name"
  printf '%s\n' "/etc/sharearea/$3" "/etc/logrotate.d/$name" >"$tree/DEBIAN/conffiles"
  install -D -m 644 "deploy/systemd/$name.service" "$tree/lib/systemd/system/$name.service"
  write_documents "$name" "$tree" $9
  write_manual "$name" "$tree" "$4"
  write_scripts "$name" "$tree" "$7"
  if [ -n "$(find "$tree" -name '*.elf')" ]; then
    write_overrides "$name" "$tree"
  fi
  {
    echo "Package: $name"
    echo "Source: sharearea"
    echo "Version: $version"
    echo "Section: admin"
    echo "Priority: optional"
    echo "Architecture: $architecture"
    echo "Maintainer: $maintainer"
    echo "Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)"
    echo "Depends: $(library_depends "$tree"), python3 (>= 3.11), $6"
    [ -z "$8" ] || echo "Suggests: $8"
    echo "Description: $4"
    printf '%s\n' "$5"
  } >"$tree/DEBIAN/control"
  build "$name" "$tree" "$architecture"
}

build() { # NAME TREE ARCHITECTURE
  (cd "$2" && find . -path ./DEBIAN -prune -o -type f -print0 | sort -z | xargs -0 md5sum | sed 's# \./# #') >"$work/md5sums"
  install -m 644 "$work/md5sums" "$2/DEBIAN/md5sums"
  rm -f dist/"$1"_*.deb
  dpkg-deb --root-owner-group -Zxz --build "$2" "dist/$1_${version}_$3.deb" >"$work/$1.log"
  say "dist/$1_${version}_$3.deb"
}

# The module's source for DKMS, which builds it on the guest; what mounts views there; what takes them down for packages.
package_view() {
  local name=sharearea-view-dkms tree=$work/sharearea-view-dkms source
  source=$tree/usr/src/shareview-${version%-*}
  mkdir -p "$tree/DEBIAN"
  install -D -m 644 -t "$source" guest-agent/kmod/{*.c,*.h,Kbuild,Makefile,COPYING}
  # DKMS tells sources apart by their version.
  sed "s/^PACKAGE_VERSION=.*/PACKAGE_VERSION=\"${version%-*}\"/" guest-agent/kmod/dkms.conf >"$source/dkms.conf"
  chmod 644 "$source/dkms.conf"
  install -D -m 644 -t "$tree/lib/systemd/system" deploy/systemd/sharearea-view{.service,-again.service,-again.timer}
  install -D -m 644 deploy/view/sharearea-agent-view.conf "$tree/lib/systemd/system/sharearea-agent.service.d/view.conf"
  install -D -m 755 deploy/view/packages "$tree/usr/libexec/sharearea-view/packages"
  install -D -m 644 deploy/view/apt.conf "$tree/etc/apt/apt.conf.d/50sharearea-view"
  install -D -m 644 deploy/view/dpkg.cfg "$tree/etc/dpkg/dpkg.cfg.d/sharearea-view"
  install -D -m 644 deploy/view/dnf_plugin.py "$tree/usr/lib/python3/dist-packages/dnf-plugins/sharearea_view.py"
  printf '%s\n' /etc/apt/apt.conf.d/50sharearea-view /etc/dpkg/dpkg.cfg.d/sharearea-view >"$tree/DEBIAN/conffiles"
  write_documents "$name" "$tree"
  cat >>"$tree/usr/share/doc/$name/copyright" <<END

Files: usr/src/shareview-*
Copyright: $(date -u -d "@$SOURCE_DATE_EPOCH" +%Y) the sharearea developers
License: GPL-2.0-only
 On Debian systems the full text is in /usr/share/common-licenses/GPL-2.
END
  # What dh_dkms of Debian 12 writes, and systemd told of the units. Nothing is started that did not run.
  cat >"$tree/DEBIAN/postinst" <<END
#!/bin/sh
set -e
if [ "\$1" = configure ]; then
  /usr/lib/dkms/common.postinst shareview ${version%-*} /usr/share/$name "" "\$2"
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
  fi
fi
END
  cat >"$tree/DEBIAN/prerm" <<END
#!/bin/sh
set -e
if [ "\$1" = remove ] && [ -d /run/systemd/system ]; then
  deb-systemd-invoke stop sharearea-view-again.timer sharearea-view.service || true
fi
case "\$1" in
  remove | upgrade | deconfigure)
    if [ "\$(dkms status -m shareview -v ${version%-*})" ]; then
      dkms remove -m shareview -v ${version%-*} --all
    fi
    ;;
esac
END
  cat >"$tree/DEBIAN/postrm" <<END
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload || true
fi
END
  chmod 755 "$tree"/DEBIAN/{postinst,prerm,postrm}
  cat >"$tree/DEBIAN/control" <<END
Package: $name
Source: sharearea
Version: $version
Section: kernel
Priority: optional
Architecture: all
Maintainer: $maintainer
Installed-Size: $(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)
Depends: dkms (>= 3.0), mount, sharearea-agent (>= $version)
Recommends: linux-headers-amd64 | linux-headers-generic
Description: guest view of sharearea: shared pages for unmodified programs (DKMS)
 A small read-only stacked file system for Xen guests, through which programs
 read and map pages that the broker has granted, at the speed of the page cache
 and without using it. DKMS builds the module for the kernels of this guest.
 .
 With it come the unit that mounts the configured views, what the agent's own
 unit needs for them, and hooks of apt, dpkg and dnf that take views over their
 own folder down while packages are changed.
END
  build "$name" "$tree" all
}

# ------------------------------------------------------------------------------------------------- the packages

package sharearea docs/examples/broker.toml broker.toml \
  "one copy of each identical file page, for all guests (dom0 side)" \
  " Guests on one host that come from the same template keep the same files in
 their own page caches. sharearea keeps one copy of each such page and maps it
 read-only into every guest that uses it. This is the broker, for dom0 (or for
 a host of containers). Nothing is shared until its configuration says so." \
  "python3-cffi-backend (>= 1.15.1), python3-lmdb (>= 1.4.0), python3-msgpack (>= 1.0.3), python3-rich (>= 13.3.1), python3-structlog (>= 22.3.0)" \
  "/var/lib/sharearea" \
  "xen-utils-4.17, python3-prometheus-client (>= 0.16.0)" \
  "docs/examples/broker.toml docs/examples/broker-xen.toml"
package sharearea-agent docs/examples/agent.toml agent.toml \
  "one copy of each identical file page, for all guests (guest side)" \
  " Guests on one host that come from the same template keep the same files in
 their own page caches. sharearea keeps one copy of each such page and maps it
 read-only into every guest that uses it. This is the agent, one in each guest,
 and the Python interface through which programs map shared files." \
  "python3-cffi-backend (>= 1.15.1), python3-msgpack (>= 1.0.3), python3-structlog (>= 22.3.0), python3-watchdog (>= 2.2.1)" \
  "/var/cache/sharearea-agent" \
  "" \
  "docs/examples/agent.toml"
package_view
