"""Copies of real programs in a domain's folder, with their libraries and data. How they are run is runs.py's.

Where a package is missing the program is left out; Debian's packages are: python3, python3-numpy, python3-lmdb, nodejs,
openjdk-17-jdk-headless (javac makes what the JVM runs), postgresql-15, nginx-light, sqlite3, git, ffmpeg.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from sharearea.common.errors import HostError

from .host import MIB
from .runs import CLUSTER, SEATS, Nginx, Piped, Postgres, Program, as_nobody

_DIST: Final = Path("/usr/lib/python3/dist-packages")
_POSTGRES: Final = Path("/usr/lib/postgresql/15")
_JVM: Final = Path("/usr/lib/jvm/java-17-openjdk-amd64")

PYTHON_MODULES: Final = "asyncio, ctypes, decimal, email, hashlib, json, sqlite3, ssl, unittest, xml.dom"
_PYTHON: Final = f"""
import {PYTHON_MODULES}, sys
text = json.dumps([[i, str(i)] for i in range(20000)])
print("ready", flush=True)
for line in sys.stdin:
    print(sum(len(json.dumps(json.loads(text))) for _ in range(4)), flush=True)
"""
_DATA: Final = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
def total():
    return sum(data[at] for at in range(0, len(data), 4096))
total()
print("ready", flush=True)
for line in sys.stdin:
    print([total() for _ in range(10)], flush=True)
"""
_NUMPY: Final = """
import json, numpy, sys
def tensors(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    whole = numpy.memmap(path, mode="r")
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        yield name, whole[begin:end].view("<i4").reshape(entry["shape"])
loaded = dict(tensors(sys.argv[1]))
def total():
    return sum(int(each.sum(dtype="i8")) ^ int(numpy.bitwise_xor.reduce(each, axis=None)) for each in loaded.values())
print("ready", total(), numpy.__version__, flush=True)
for line in sys.stdin:
    print([total() for _ in range(5)], flush=True)
"""
_LMDB: Final = """
import lmdb, sys, zlib
base = lmdb.open(sys.argv[1], readonly=True, lock=False, max_readers=1)
def total():
    with base.begin(buffers=True) as reading:
        found = 0
        for key, value in reading.cursor():
            found = zlib.crc32(value, found)
        return found
print("ready", total(), lmdb.version(), flush=True)
for line in sys.stdin:
    print([total() for _ in range(3)], flush=True)
"""
_FILL_LMDB: Final = """
import lmdb, random, sys
made = random.Random(7)
with lmdb.open(sys.argv[1], map_size=1 << 31) as base:
    for begin in range(0, int(sys.argv[2]), 1000):
        with base.begin(write=True) as writing:
            for key in range(begin, begin + 1000):
                writing.put(b"%08d" % key, made.randbytes(1500))
"""
_NODE: Final = """
const lines = require('readline').createInterface({input: process.stdin});
const text = JSON.stringify(Array.from({length: 20000}, (_, i) => [i, String(i)]));
console.log('ready');
function work() { let n = 0; for (let i = 0; i < 8; i++) n += JSON.stringify(JSON.parse(text)).length; return n; }
lines.on('line', () => console.log(work()));
"""
_JAVA: Final = """
import java.io.*;
import java.security.MessageDigest;
import java.util.*;
import java.util.stream.*;

public class Work {
    static String work() throws Exception {
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        TreeMap<String, Integer> map = new TreeMap<>();
        for (int i = 0; i < 100000; i++) map.merge(String.format("%x", i * 7919 % 9973), i, Integer::sum);
        for (Map.Entry<String, Integer> entry : map.entrySet())
            digest.update((entry.getKey() + entry.getValue()).getBytes("UTF-8"));
        return IntStream.range(0, 8).mapToObj(i -> String.valueOf(digest.digest()[i])).collect(Collectors.joining(","));
    }
    public static void main(String[] words) throws Exception {
        System.out.println("ready " + Runtime.version());
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        while (lines.readLine() != null) System.out.println(work());
    }
}
"""
_SQL: Final = "select count(*), sum(a.value * b.value % 7) from n a, n b where a.value % 400 = 1;"
_POSTGRES_SQL: Final = (
    "select count(*), sum(a.value::numeric * b.value % 7) from n a, n b where a.value % 400 = 1 and b.value % 4 = 0;"
)
_GRAY: Final = 64  # pixels: width and height of the frames that ffmpeg reads
_FRAMES: Final = 80
_FRAME_HEADER: Final = 6  # lines that framecrc writes before the first frame


def install(name: str, folder: Path, data_bytes: int) -> Program | str:
    """Copy a program with its libraries and data, or say why that cannot be done."""
    makers: dict[str, Callable[[Path, int], Program | str]] = {
        "python3": _python,
        "data": _data,
        "numpy": _numpy,
        "lmdb": _lmdb,
        "node": _node,
        "java": _java,
        "postgres": _postgres,
        "nginx": _nginx,
        "sqlite3": _sqlite,
        "git": _git,
        "ffmpeg": _ffmpeg,
    }
    if name not in makers:
        raise HostError(f"there is no program {name} in this bench", f"there are {', '.join(makers)}")
    (folder / "lib").mkdir(parents=True)
    return makers[name](folder, data_bytes)


# --------------------------------------------------------------------------------------------------------- copying


def _copy(folder: Path, name: str) -> str | None:
    """Copy a program and its libraries; return where it is now."""
    binary = shutil.which(name, path="/usr/bin:/bin:/usr/sbin")
    if binary is None:
        return None
    real = Path(binary).resolve()
    shutil.copy(real, folder / real.name)
    _copy_libraries(folder, [real])
    return os.fspath(folder / real.name)


def _copy_libraries(folder: Path, objects: Sequence[Path]) -> None:
    """Copy all libraries that programs and libraries need, by the names that the loader looks for."""
    said = subprocess.run(["ldd", *objects], capture_output=True, text=True, check=False)
    for line in said.stdout.splitlines():
        words = line.split()
        if "=>" in words and words[2].startswith("/") and not (folder / "lib" / words[0]).exists():
            shutil.copy(words[2], folder / "lib" / words[0])


def write_noise(path: Path, size: int, seed: int = 0) -> None:
    """Write bytes that are the same for the same seed."""
    made = random.Random(seed)
    with path.open("wb") as file:
        for at in range(0, size, MIB):
            file.write(made.randbytes(min(MIB, size - at)))


def _some_python(folder: Path, packages: Sequence[str] = ()) -> tuple[str, dict[str, str]] | str:
    """Copy Debian's python3, its library and packages of Debian's; return where it is and what it has to be told."""
    for package in packages:
        if not (_DIST / package).is_dir():
            return f"not installed here: python3-{package}"
    program = _copy(folder, "python3")
    if program is None:
        return "not installed here: python3"
    name = Path(program).name
    leave = shutil.ignore_patterns("test", "tests", "dist-packages")
    shutil.copytree(Path("/usr/lib") / name, folder / "lib" / name, ignore=leave)
    for package in packages:
        shutil.copytree(_DIST / package, folder / "lib" / "python3" / "dist-packages" / package, ignore=leave)
    _copy_libraries(folder, sorted((folder / "lib").rglob("*.so")))
    return program, {"PYTHONHOME": os.fspath(folder), "PYTHONDONTWRITEBYTECODE": "1"}


# -------------------------------------------------------------------------------------------------------- programs


def _python(folder: Path, _: int) -> Program | str:
    made = _some_python(folder)
    if isinstance(made, str):
        return made
    short = [made[0], "-c", f"import {PYTHON_MODULES}, sys; print(sys.version)"]
    return Piped(folder, made[1], [made[0], "-c", _PYTHON], short)


def _data(folder: Path, data_bytes: int) -> Program | str:
    made = _some_python(folder)
    if isinstance(made, str):
        return made
    write_noise(folder / "model.bin", data_bytes)
    words = [made[0], "-c", _DATA, os.fspath(folder / "model.bin")]
    return Piped(folder, made[1], words, words)


def _numpy(folder: Path, data_bytes: int) -> Program | str:
    """Have a file like safetensors': the length of a header, the header as JSON, the tensors."""
    made = _some_python(folder, ["numpy"])
    if isinstance(made, str):
        return made
    count = 8
    side = int((data_bytes / count / 4) ** 0.5)
    each = side * side * 4
    header = json.dumps(
        {
            f"layer.{at}.weight": {"dtype": "I32", "shape": [side, side], "data_offsets": [at * each, at * each + each]}
            for at in range(count)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    path = folder / "model.safetensors"
    write_noise(path, count * each)
    path.write_bytes(struct.pack("<Q", len(header)) + header + path.read_bytes())
    words = [made[0], "-c", _NUMPY, os.fspath(path)]
    return Piped(folder, made[1], words, words)


def _lmdb(folder: Path, data_bytes: int) -> Program | str:
    made = _some_python(folder, ["lmdb"])
    if isinstance(made, str):
        return made
    base = os.fspath(folder / "base")
    one = Piped(folder, made[1], [made[0], "-c", _LMDB, base], [made[0], "-c", _LMDB, base])
    fill = [made[0], "-c", _FILL_LMDB, base, str(data_bytes // 2048)]
    subprocess.run(fill, check=True, capture_output=True, env=one.variables)
    return one


def _node(folder: Path, _: int) -> Program | str:
    program = _copy(folder, "node")
    if program is None:
        return "not installed here: nodejs"
    return Piped(folder, {}, [program, "-e", _NODE], [program, "-e", "console.log(process.versions)"])


def _java(folder: Path, _: int) -> Program | str:
    if not (_JVM / "bin" / "javac").exists():
        return "not installed here: openjdk-17-jdk-headless"
    leave = shutil.ignore_patterns("jmods", "man", "docs", "legal", "include", "src.zip", "ct.sym")
    # With their times: the archive of shared classes is used only beside the very module file that it was made from.
    shutil.copytree(_JVM, folder / "jvm", ignore=leave, ignore_dangling_symlinks=True)
    _copy_libraries(folder, [folder / "jvm" / "bin" / "java", *sorted((folder / "jvm" / "lib").rglob("*.so"))])
    source = folder / "Work.java"
    source.write_text(_JAVA)
    subprocess.run([_JVM / "bin" / "javac", "-d", folder, source], check=True, capture_output=True)
    words = [os.fspath(folder / "jvm" / "bin" / "java"), "-Xmx128m", "-cp", os.fspath(folder)]
    return Piped(folder, {}, [*words, "Work"], [*words, "Work"], warm_up=40)


def _sqlite(folder: Path, _: int) -> Program | str:
    program = _copy(folder, "sqlite3")
    if program is None:
        return "not installed here: sqlite3"
    base = os.fspath(folder / "data.db")
    fill = "create table n as select value from generate_series(1, 20000); select count(*) from n;"
    subprocess.run([program, base, fill], check=True, capture_output=True)
    words = [program, "-batch", "-readonly", base]
    return Piped(folder, {}, words, [*words, "select sum(value) from n;"], question=_SQL, first="select 'ready';")


def _git(folder: Path, _: int) -> Program | str:
    program = _copy(folder, "git")
    if program is None:
        return "not installed here: git"
    repository = folder / "repository"
    git = [program, "-C", os.fspath(repository), "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    repository.mkdir()
    when = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}  # the same in all domains
    for number in range(300):
        write_noise(repository / f"file-{number:03}", 65536, number)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"], ["gc", "-q"]):
        subprocess.run([*git, *words], check=True, capture_output=True, env=dict(os.environ) | when)
    question = "\n".join(f"HEAD:file-{number:03}" for number in [*range(300)] * 4)
    return Piped(
        folder,
        {},
        [*git, "cat-file", "--batch-check"],
        [*git, "show", "--stat", "--format=%T"],
        question=question,
        replies=1200,
        first="HEAD",
    )


def _ffmpeg(folder: Path, _: int) -> Program | str:
    program = _copy(folder, "ffmpeg")
    if program is None:
        return "not installed here: ffmpeg"
    words = [program, "-nostdin", "-v", "error", "-threads", "1"]
    encode = ["-vf", "scale=640:360:flags=bicubic+bitexact,format=yuv420p", "-c:v", "mpeg4", "-threads", "1"]
    encode += ["-flags", "+bitexact", "-bf", "0"]
    frame = "".join(chr(33 + (x * y) % 90) for y in range(_GRAY) for x in range(_GRAY))
    reads = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{_GRAY}x{_GRAY}", "-probesize", "32", "-i", "pipe:0"]
    made = "testsrc=size=320x240:rate=25:duration=0.4"
    return Piped(
        folder,
        {},
        [*words, *reads, "-vsync", "passthrough", *encode, "-flush_packets", "1", "-f", "framecrc", "-"],
        [*words, "-f", "lavfi", "-i", made, *encode, "-f", "framemd5", "-"],
        question=(frame * _FRAMES)[:-1],  # the end of the line is a pixel too
        replies=_FRAMES,
        first=frame[:-1],
        first_replies=_FRAME_HEADER + 1,
    )


def _postgres(folder: Path, _: int) -> Program | str:
    if not (_POSTGRES / "bin" / "postgres").exists():
        return "not installed here: postgresql-15"
    there = folder / _POSTGRES.relative_to("/")  # it finds its other files from where it is
    leave = shutil.ignore_patterns("bitcode", "pgxs")
    shutil.copytree(_POSTGRES, there, ignore=leave)
    shared = Path("/usr/share/postgresql") / _POSTGRES.name
    shutil.copytree(shared, folder / shared.relative_to("/"), ignore=shutil.ignore_patterns("man", "extension"))
    (folder / shared.relative_to("/") / "extension").mkdir()
    for path in (shared / "extension").glob("plpgsql*"):
        shutil.copy(path, folder / path.relative_to("/"))
    binaries = [there / "bin" / name for name in ("postgres", "psql", "initdb")]
    _copy_libraries(folder, [*binaries, *sorted((there / "lib").glob("*.so"))])
    one = Postgres(folder, {}, there / "bin", _POSTGRES_SQL)
    seats = [one.seat(seat) for seat in range(SEATS)]
    for seat in seats:
        seat.mkdir(parents=True)
        as_nobody.give(seat)
    if subprocess.run([*as_nobody.words, "test", "-r", seats[0]], check=False).returncode != 0:
        return f"{folder} cannot be reached by another user"
    initdb = [*as_nobody.words, os.fspath(there / "bin" / "initdb"), "-D", os.fspath(seats[0] / CLUSTER)]
    initdb += ["--no-locale", "-E", "UTF8", "-U", "bench", "-A", "trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, env=one.variables)
    for seat in seats[1:]:
        shutil.copytree(seats[0] / CLUSTER, seat / CLUSTER)
        as_nobody.give(seat)
    for number in range(SEATS):
        one.fill(number)
    return one


def _nginx(folder: Path, _: int) -> Program | str:
    program = _copy(folder, "nginx")
    if program is None:
        return "not installed here: nginx-light"
    one = Nginx(folder, {}, program)
    (folder / "www").mkdir()
    for number in range(one.FILES):
        write_noise(folder / "www" / str(number), 65536, number)
    for number in range(SEATS):
        one.configure(number)
    return one
