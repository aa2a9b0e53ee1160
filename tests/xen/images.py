"""What the lab boots, built from Debian 12's packages: Xen, a kernel, a root for dom0, and one for all guests.

Works as root on Debian 12. What is missing there is installed, and named. Results are kept in build/xen/cache below a
key of everything that went into them: a second run builds only the ram disks, which carry the scripts of inside/ and
take less than a second. Neither root holds anything of sharearea: the test run installs the packages it has just built.
Guests may be given other kernels than dom0's, by their kind (kernels.py).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
FOLDER: Final = Path(os.environ.get("XEN_FOLDER") or ROOT / "build" / "xen")
"""Where a host keeps its files, logs and results. Two at a time need two folders."""
CACHE: Final = ROOT / "build" / "xen" / "cache"

HOST_PACKAGES: Final = {
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "e2fsprogs": "/sbin/mke2fs",
    "busybox-static": "/bin/busybox",
    "kmod": "/sbin/depmod",
    "zstd": "/usr/bin/zstd",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdlib.h",
    "libxen-dev": "/usr/include/libxenvchan.h",
    "dpkg-dev": "/usr/bin/dpkg-shlibdeps",
}
"""Debian package -> a file that shows that it is there."""

XEN_PACKAGE: Final = "xen-hypervisor-4.17-amd64"
KERNEL_META: Final = "linux-image-amd64"
RELEASE: Final = "bookworm"

AGENT_NEEDS: Final = ("python3", "python3-cffi-backend", "python3-msgpack", "python3-structlog", "python3-watchdog")
BROKER_NEEDS: Final = (
    "python3",
    "python3-cffi-backend",
    "python3-lmdb",
    "python3-msgpack",
    "python3-rich",
    "python3-structlog",
)
DATA: Final = ("unicode-data", "libicu72", "perl-modules-5.36")
"""What guests share besides their system: 90 MiB of files, large and small, from Debian."""
PROGRAMS: Final = ("acl", "attr", "git", "nginx-light", "openjdk-17-jre-headless", "sqlite3")
"""What is run on a guest view (view_programs.py), and what makes files with access control lists."""

COMMON: Final = ("mount", "util-linux", "procps", "iproute2", "busybox-static")
ROOTS: Final = {
    "dom0": (*COMMON, *BROKER_NEEDS, "xen-utils-4.17", "xenstore-utils", "kmod", "bsdextrautils"),
    "guest": (*COMMON, *AGENT_NEEDS, *DATA, *PROGRAMS),
    # With systemd as process 1, package managers, and what our package of the kernel module depends on.
    "systemd": (*COMMON, *AGENT_NEEDS, "systemd-sysv", "kmod", "dkms", "dnf", "rpm", "nginx-light"),
}
IMAGE_BYTES: Final = 1 << 30
_HOOKS: Final = {"guest": ('--essential-hook=mkdir -p "$1/usr/share/man/man1"',)}
"""openjdk does not install where this folder is missing, as it is when manuals are left out."""
_LEFT_OUT: Final = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")

_OPTIONS: Final = [
    *("--variant=apt", *(f"--dpkgopt=path-exclude={glob}" for glob in _LEFT_OUT), "--dpkgopt=force-unsafe-io"),
]

_XEN_DEVICES: Final = ("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs")
DOM0_MODULES: Final = (
    *("virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4"),
    *_XEN_DEVICES,
    *("xen-privcmd", "xen-blkback", "xen-netback", "bridge"),
)
GUEST_KINDS: Final = ("pv", "pvh")
GUEST_MODULES: Final = ("xen-blkfront", "xen-netfront", "crc32c_generic", "ext4", *_XEN_DEVICES)

Say = Callable[[str], None]


class ImageError(Exception):
    """Something that the lab boots could not be built."""


@dataclass(frozen=True, slots=True)
class Images:
    """Files that a lab boots."""

    xen: Path
    kernel: Path
    dom0_ramdisk: Path
    dom0_root: Path
    guest_root: Path
    systemd_root: Path | None
    """What a guest that is created with `systemd` has as its disk; None: there is none such."""
    guest_boot: Path
    """A disk for dom0 with what guests boot, a folder for each kind: vmlinux and guest.cpio."""


def build(say: Say, kernels: Mapping[str, Path] | None = None, *, systemd: bool = False) -> Images:
    """Build what is not in the cache, and return where everything is. ImageError says what failed.

    `kernels`: the kind of a guest -> a folder with vmlinux and lib/modules, where it is not to be dom0's.
    `systemd`: with the disk of a guest that has systemd.
    """
    if os.geteuid() != 0:
        raise ImageError("the lab needs root: mmdebstrap makes device nodes, QEMU is given its images")
    install_missing(say)
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(ROOTS) + 1) as pool:
        boot = pool.submit(_boot_files, say)
        names = ("dom0", "guest", *(["systemd"] if systemd else []))
        jobs = {name: pool.submit(_root, name, ROOTS[name], say) for name in names}
        folder = boot.result()
        roots = {name: job.result() for name, job in jobs.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    dom0_ramdisk = FOLDER / "dom0.cpio"
    dom0_ramdisk.write_bytes(_ramdisk(folder, DOM0_MODULES, "dom0-boot", ("dom0-init", "server.py", "hotplug")))
    guest_boot = _guest_boot({kind: (kernels or {}).get(kind, folder) for kind in GUEST_KINDS})
    return Images(
        folder / "xen",
        folder / "vmlinux",
        dom0_ramdisk,
        roots["dom0"],
        roots["guest"],
        roots.get("systemd"),
        guest_boot,
    )


# --------------------------------------------------------------------------------------------------- the host's part


def install_missing(say: Say) -> None:
    """Install Debian packages that the lab needs and this host lacks."""
    missing = [package for package, file in HOST_PACKAGES.items() if not Path(file).exists()]
    if missing:
        install(missing, say)


def install(packages: Sequence[str], say: Say) -> None:
    """Install Debian packages on this host."""
    say(f"installing from Debian: {' '.join(packages)}")
    update_lists(say)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    call(["apt-get", "install", "-y", "--no-install-recommends", *packages], environment=environment)


def update_lists(say: Say) -> None:
    """Fetch Debian's package lists if this host has none."""
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        say("apt-get update")
        call(["apt-get", "update"])


def call(
    words: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit: float = 600,
) -> str:
    """Run a command; ImageError with the end of what it said if it fails."""
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"{' '.join(words)[:200]}: {error}") from None
    if done.returncode:
        raise ImageError(f"{' '.join(words)[:200]} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def key_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Give a place to build in, and move it to `path` only when the building is done."""
    part = path.with_name(path.name + f".part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    try:
        yield part
        part.rename(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- Xen and the kernel


def _boot_files(say: Say) -> Path:
    """Return a folder with xen, vmlinux and lib/modules of Debian's packages."""
    folder = CACHE / f"boot-{key_of(XEN_PACKAGE, KERNEL_META, 'vmlinux')}"
    if folder.exists():
        return folder
    begun = time.monotonic()
    update_lists(say)
    depends = call(["apt-cache", "depends", KERNEL_META])
    (kernel_package,) = {line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-6" in line}
    with made_whole(folder) as part:
        part.mkdir(parents=True)
        call(["apt-get", "download", "-o", "APT::Sandbox::User=root", XEN_PACKAGE, kernel_package], folder=part)
        for deb in sorted(part.glob("*.deb")):
            call(["dpkg-deb", "-x", str(deb), str(part / "tree")])
            deb.unlink()
        (xen,) = (part / "tree/boot").glob("xen-4.17-amd64.gz")
        (part / "xen").write_bytes(gzip.decompress(xen.read_bytes()))
        take_kernel(part)
    say(f"{XEN_PACKAGE} and {kernel_package}: {time.monotonic() - begun:.0f} s")
    return folder


def take_kernel(folder: Path) -> None:
    """Take vmlinux and lib/modules out of the unpacked packages in `folder`/tree, which goes."""
    tree = folder / "tree"
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    (folder / "vmlinux").write_bytes(_unpacked(kernel.read_bytes()))
    (folder / "lib").mkdir()
    (tree / "lib/modules").rename(folder / "lib/modules")
    (version,) = os.listdir(folder / "lib/modules")
    call(["depmod", "-b", str(folder), version])
    shutil.rmtree(tree)


def _unpacked(kernel: bytes) -> bytes:
    """Return the kernel that is packed in a bzImage: unpacking it at every boot of a guest takes seconds."""
    # Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length; its last four bytes are a size.
    begin = (kernel[0x1F1] + 1) * 512
    offset, size = struct.unpack_from("<II", kernel, 0x248)
    packed = kernel[begin + offset : begin + offset + size - 4]
    found = b""
    if packed.startswith(b"\xfd7zXZ\0"):
        found = lzma.LZMADecompressor().decompress(packed)
    elif packed.startswith(b"\x28\xb5\x2f\xfd"):
        found = subprocess.run(["zstd", "-dc"], input=packed, stdout=subprocess.PIPE).stdout
    if found[:4] != b"\x7fELF":
        raise ImageError("the kernel of Debian is packed in an unknown way")
    return found


# ---------------------------------------------------------------------------------------------------------- the roots


def _root(name: str, packages: Sequence[str], say: Say) -> Path:
    """Return an image (ext4) of a Debian root with these packages."""
    options = [*_OPTIONS, *_HOOKS.get(name, ())]
    image = CACHE / f"{name}-{key_of(RELEASE, sorted(packages), options, IMAGE_BYTES)}.img"
    if image.exists():
        return image
    begun = time.monotonic()
    tree = CACHE / f"{name}.tree"
    shutil.rmtree(tree, ignore_errors=True)
    _debootstrap(name, packages, options, tree, say)
    with made_whole(image) as part:
        with part.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        call(["/sbin/mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(tree), str(part)])
    shutil.rmtree(tree)
    say(f"root of {name}: {time.monotonic() - begun:.0f} s")
    return image


def debian_root(name: str, packages: Sequence[str], say: Say) -> Path:
    """Return a folder with a Debian root with these packages, to be copied: it is kept."""
    folder = CACHE / f"{name}-{key_of(RELEASE, sorted(packages), _OPTIONS)}"
    if not folder.exists():
        update_lists(say)
        with made_whole(folder) as part:
            _debootstrap(name, packages, _OPTIONS, part, say)
    return folder


def _debootstrap(name: str, packages: Sequence[str], options: Sequence[str], tree: Path, say: Say) -> None:
    say(f"root of {name}: {len(packages)} packages and what they need, from Debian")
    call(["mmdebstrap", *options, f"--include={','.join(packages)}", RELEASE, str(tree), *_sources()])


def _sources() -> list[str]:
    """Return this host's own list of Debian's mirrors, if it is one of Debian 12; else mmdebstrap has its own."""
    for path in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"):
        with contextlib.suppress(OSError):
            if RELEASE in Path(path).read_text():
                return [path]
    return []


# ------------------------------------------------------------------------------------------------------ the ram disks


def _ramdisk(boot: Path, modules: Sequence[str], init: str, inside: Sequence[str]) -> bytes:
    """Return an initial ram disk: busybox, kernel modules with what they need, and files of inside/."""
    (version,) = os.listdir(boot / "lib/modules")
    files: dict[str, tuple[bytes, int]] = {
        "bin/busybox": (Path("/bin/busybox").read_bytes(), 0o755),
        "init": ((HERE / "inside" / init).read_bytes(), 0o755),
    }
    # Loaded in this order by insmod: modprobe would read its lists of all modules again and again.
    paths = _module_files(boot, version, modules)
    for number, path in enumerate(paths):
        data = (boot / path).read_bytes()
        files[f"modules/{number}.ko"] = (lzma.decompress(data) if path.endswith(".xz") else data, 0o644)
    files["modules.list"] = ("\n".join(f"{number}.ko" for number in range(len(paths))).encode(), 0o644)
    for name in inside:
        files[f"lab/{name}"] = ((HERE / "inside" / name).read_bytes(), 0o755)
    # Not compressed: the emulated kernel would spend a second on it.
    return _cpio(files)


def _guest_boot(boots: Mapping[str, Path]) -> Path:
    """Return an image (ext4) with the files that xl boots guests from, by the guest's kind."""
    image = FOLDER / "guest-boot.img"
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, made_whole(image) as part:
        made: dict[Path, str] = {}
        size = 16 << 20
        inside = ("guest-init", "lab.service", "server.py")
        for kind, boot in boots.items():
            place = Path(folder) / kind
            if boot in made:
                place.symlink_to(made[boot])
                continue
            made[boot] = kind
            place.mkdir()
            (place / "guest.cpio").write_bytes(_ramdisk(boot, GUEST_MODULES, "guest-boot", inside))
            os.link(boot / "vmlinux", place / "vmlinux")
            size += sum(file.stat().st_size for file in place.iterdir())
        with part.open("wb") as file:
            file.truncate(-(-size // (1 << 20)) << 20)
        call(["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder, str(part)])
    return image


def _module_files(boot: Path, version: str, modules: Sequence[str]) -> list[str]:
    """Return the files of modules and of all that they depend on, in an order in which they can be loaded.

    They are relative to the folder that lib/modules is in.
    """
    found: dict[str, None] = {}
    for module in modules:
        said = call(["/sbin/modprobe", "-d", str(boot), "-S", version, "--show-depends", module])
        for line in said.splitlines():
            words = line.split()
            if words and words[0] == "insmod":
                found[os.path.relpath(words[1], boot)] = None
    return list(found)


def _cpio(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """Pack files into an archive of the kernel's format (newc): name -> content and permissions."""
    folders: dict[str, None] = {}
    for name in files:
        for parent in reversed(Path(name).parents):
            if str(parent) != ".":
                folders[str(parent)] = None
    out = bytearray()

    def add(number: int, name: str, mode: int, data: bytes) -> None:
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name.encode()) + 1, 0)
        out.extend(b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0")
        out.extend(bytes(-len(out) % 4))
        out.extend(data)
        out.extend(bytes(-len(out) % 4))

    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | mode, data) for name, (data, mode) in files.items()]
    for number, (name, mode, data) in enumerate(entries, 1):
        add(number, name, mode, data)
    add(0, "TRAILER!!!", 0, b"")
    return bytes(out)
