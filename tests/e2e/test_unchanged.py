"""Programs that know nothing of shared pages, with the shim: what they see is what they would see without it."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from sharearea_agent.common import native

from .harness import BIN, MIB, PAGE, Domain, Host, Stamped, Unchanged, cached_pages, digest, noise, wait

PAGES = MIB // PAGE
READ, WRITE = 1, 2


def _attached(host: Host, **keys: object) -> tuple[Domain, Unchanged, bytes]:
    """Give a domain with a program that has mapped a file, all of whose pages are shared."""
    data = noise(MIB, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data}, **keys)
    host.wait_offered(1)
    program = first.unchanged()
    program.map(first.root / "f.bin")
    program.wait_shared(PAGES)
    return first, program, data


def test_a_mapped_file_is_shared_and_dropped_from_the_page_cache(host: Host) -> None:
    domain, program, data = _attached(host)
    assert program.ask("hash", name="f") == digest(data)
    assert program.attached() == {"/f.bin": PAGES}
    wait("the page cache dropped", lambda: cached_pages(domain.root / "f.bin") == 0)
    assert program.ask("hash", name="f") == digest(data)
    assert program.shared() == PAGES
    assert cached_pages(domain.root / "f.bin") == 0
    program.quit()
    wait("no owner", lambda: host.domain_states()[domain.name]["owned_pages"] == 0)


def test_a_writer_waits_and_no_byte_is_stale(host: Host) -> None:
    host.start_broker()
    first, second = host.add_domain(), host.add_domain()
    stamped = Stamped(first, "f.bin", 64)
    second.write("f.bin", stamped.content())
    first.start()
    second.start()
    host.wait_offered(1)
    programs = [first.unchanged() for _ in range(3)]
    for program in programs:
        program.map(stamped.path)
        program.wait_shared(64)
        program.ask("check", name="f", counters=os.fspath(stamped.counters), pages=64)
    for _ in range(4):
        with stamped.writing() as data:
            fd = os.open(stamped.path, os.O_WRONLY)
            os.pwrite(fd, data, 0)
            os.close(fd)
        for program in programs:
            assert program.ask("hash", name="f") == digest(data)
        target = os.open(second.root / "f.bin", os.O_WRONLY)
        os.pwrite(target, data, 0)
        os.close(target)
        os.sync()
        for program in programs:
            program.wait_shared(64)
    for program in programs:
        report = program.ask("stop", name="f")
        assert report["faults"] == []
        assert report["rounds"]
    assert not first.running.events("consumer.hung")


def _overwrite(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, 0)
    os.close(fd)


# ------------------------------------------------------------------------------------------------ calls over mappings


@pytest.mark.parametrize("way", ["libc", "by number"])
def test_a_mapping_that_becomes_writable_is_the_programs_own(host: Host, way: str) -> None:
    domain, program, data = _attached(host)
    if way == "libc":
        program.ask("protect", name="f", protection=READ | WRITE, start=10, pages=2)
    else:
        at = program.ask("map", name="g", path=os.fspath(domain.root / "f.bin"))
        program.wait_shared(PAGES, "g")
        assert program.ask("raw", words=["mprotect", at + 10 * PAGE, 2 * PAGE, READ | WRITE]) == 0
    name = "f" if way == "libc" else "g"
    program.ask("write", name=name, start=10 * PAGE + 5, data="aabbcc")
    now = data[: 10 * PAGE + 5] + b"\xaa\xbb\xcc" + data[10 * PAGE + 8 :]
    assert program.ask("hash", name=name) == digest(now)
    assert (domain.root / "f.bin").read_bytes() == data
    # What the program wrote stays, whatever becomes of the rest.
    program.ask("protect", name=name, protection=READ, start=10, pages=2)
    wait("the rest shared again", lambda: program.shared(name) > 0)
    assert program.ask("hash", name=name) == digest(now)
    domain.command("detach", "--all")
    program.wait_shared(0, name)
    assert program.ask("hash", name=name) == digest(now)


def test_moved_grown_and_cut(host: Host) -> None:
    _, program, data = _attached(host)
    program.ask("move", name="f", pages=PAGES // 2)
    assert program.ask("hash", name="f") == digest(data[: MIB // 2])
    program.wait_shared(PAGES // 2)
    program.ask("move", name="f", pages=PAGES)
    assert program.ask("hash", name="f") == digest(data)
    program.wait_shared(PAGES)
    assert program.ask("hash", name="f") == digest(data)


def test_unmapped_in_part_and_mapped_over(host: Host) -> None:
    domain, program, data = _attached(host)
    program.ask("unmap", name="f", start=100, pages=1)
    program.ask("anonymous", name="f", start=100, pages=1)
    program.ask("anonymous", name="f", start=PAGES - 1, pages=1)
    now = data[: 100 * PAGE] + bytes(PAGE) + data[101 * PAGE : -PAGE] + bytes(PAGE)
    assert program.ask("hash", name="f") == digest(now)
    program.ask("write", name="f", start=100 * PAGE, data="01")
    now = now[: 100 * PAGE] + b"\1" + now[100 * PAGE + 1 :]
    program.wait_shared(PAGES - 2)
    assert program.ask("hash", name="f") == digest(now)
    # The file's own pages come back under what is left, and only there.
    _overwrite(domain.root / "f.bin", bytes(MIB))
    now = bytes(100 * PAGE) + b"\1" + bytes(MIB - 100 * PAGE - 1)
    assert program.ask("hash", name="f") == digest(now)
    program.ask("unmap", name="f")
    assert program.shared() == 0
    wait("closed", lambda: not program.attached())


def test_a_whole_mapping_gone_gives_the_lease_back(host: Host) -> None:
    domain, program, data = _attached(host)
    program.ask("anonymous", name="f", start=0, pages=PAGES)
    assert program.ask("hash", name="f") == digest(bytes(MIB))
    wait("no lease", lambda: domain.status()["leases"] == 0)
    program.map(domain.root / "f.bin", "g")
    program.wait_shared(PAGES, "g")
    assert program.ask("hash", name="g") == digest(data)


def test_advice_and_locks(host: Host) -> None:
    domain, program, data = _attached(host)
    program.ask("sync", name="f")
    for advice in (4, 3, 20, 22):  # DONTNEED, WILLNEED, COLD, POPULATE_READ
        program.ask("advise", name="f", advice=advice, start=3, pages=9)
        assert program.ask("hash", name="f") == digest(data)
    assert program.shared() == PAGES
    program.ask("advise", name="f", advice=1, start=8, pages=9)  # RANDOM
    assert program.ask("hash", name="f") == digest(data)
    program.wait_shared(PAGES)
    program.map(domain.root / "f.bin", "g")
    program.wait_shared(PAGES, "g")
    program.ask("lock", name="g", start=5, pages=1)
    assert program.shared("g") == 0
    assert program.ask("hash", name="g") == digest(data)


def test_parts_of_files_and_files_with_a_short_last_page(host: Host) -> None:
    data = noise(50 * PAGE + 77, 3)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    program = first.unchanged()
    program.map(first.root / "f.bin", "part", pages=20, offset=30 * PAGE)
    program.map(first.root / "f.bin", "begin", pages=10)
    program.map(first.root / "f.bin", "all")
    program.wait_shared(20, "part")
    program.wait_shared(10, "begin")
    program.wait_shared(51, "all")
    whole = data + bytes(PAGE - 77)
    assert program.ask("hash", name="part") == digest(whole[30 * PAGE : 50 * PAGE])
    assert program.ask("hash", name="begin") == digest(whole[: 10 * PAGE])
    assert program.ask("hash", name="all") == digest(whole)


def test_a_mapping_that_is_shared_with_others(host: Host) -> None:
    domain, program, data = _attached(host)
    program.map(domain.root / "f.bin", "s", flags=mmap.MAP_SHARED)
    program.wait_shared(PAGES, "s")
    assert program.ask("hash", name="s") == digest(data)
    program.ask("sync", name="s")
    with pytest.raises(OSError, match="PermissionError"):
        program.ask("protect", name="s", protection=READ | WRITE)
    _overwrite(domain.root / "f.bin", bytes(MIB))
    assert program.ask("hash", name="s") == digest(bytes(MIB))


def test_errors_and_handlers(host: Host) -> None:
    _, program, data = _attached(host)
    assert program.ask("errors") == ["EINVAL", "ENOMEM", "EINVAL", "EBADF", "EINVAL", "EXDEV"]
    assert program.ask("signals", count=2000) >= 2000
    assert program.ask("hash", name="f") == digest(data)


def test_the_way_back_in_a_program_that_has_used_up_its_mappings(host: Host) -> None:
    domain, program, data = _attached(host)
    assert program.ask("occupy_mappings") > 1000
    assert program.attached() == {"/f.bin": PAGES}
    _overwrite(domain.root / "f.bin", bytes(MIB))
    program.ask("release_mappings")
    assert program.ask("hash", name="f") == digest(bytes(MIB)) != digest(data)
    assert program.shared() == 0
    assert not domain.running.events("consumer.hung")


# ----------------------------------------------------------------------------------------------- children and rights


@pytest.mark.parametrize("by", ["fork", "_Fork", "syscall"])
def test_a_child_is_on_the_files_own_pages(host: Host, by: str) -> None:
    domain, program, _ = _attached(host)
    child = program.ask("fork", name="f", by=by)
    assert child["shared"] == 0 or by != "syscall"
    now = noise(MIB, 5)
    _overwrite(domain.root / "f.bin", now)
    assert program.ask("child") == digest(now)
    assert program.ask("hash", name="f") == digest(now)
    assert not domain.running.events("consumer.hung")


def test_a_child_shares_too(host: Host) -> None:
    domain, program, data = _attached(host)
    child = program.ask("fork", name="f")
    wait(
        "the child among the programs",
        lambda: any(p["pid"] == child["pid"] and p["attached_bytes"] == MIB for p in domain.ask("ps")["programs"]),
    )
    assert program.ask("child") == digest(data)


def test_spawned_programs_leave_the_parent_alone(host: Host) -> None:
    _, program, data = _attached(host)
    program.ask("spawn", count=100)
    assert program.shared() == PAGES
    assert program.ask("hash", name="f") == digest(data)


def test_descriptors_are_the_programs(host: Host) -> None:
    domain, program, data = _attached(host)
    plain = subprocess.run(
        [sys.executable, Path(__file__).parent / "unchanged.py"],
        input='{"verb": "descriptors"}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'"answer": {program.ask("descriptors")}' in plain.stdout
    program.ask("close_descriptors")
    assert program.shared() == PAGES
    _overwrite(domain.root / "f.bin", bytes(MIB))
    assert program.ask("hash", name="f") == digest(bytes(MIB))
    assert data != bytes(MIB)


def test_rights_that_are_given_up_are_given_up_by_all_threads(host: Host) -> None:
    domain, program, data = _attached(host)
    if os.getuid() != 0:
        pytest.skip("needs root")
    uids = program.ask("change_user", uid=65534)
    assert {line.split()[1] for line in uids} == {"65534"}
    wait("a thread again", lambda: len(program.ask("thread_lines", word="Uid:")) == 2)
    assert {line.split()[1] for line in program.ask("thread_lines", word="Uid:")} == {"65534"}
    _overwrite(domain.root / "f.bin", bytes(MIB))
    assert program.ask("hash", name="f") == digest(bytes(MIB)) != digest(data)


def test_a_changed_root_folder(host: Host) -> None:
    domain, program, _ = _attached(host)
    if os.getuid() != 0:
        pytest.skip("needs root")
    program.ask("chroot", path=os.fspath(domain.root))
    _overwrite(domain.root / "f.bin", bytes(MIB))
    assert program.ask("hash", name="f") == digest(bytes(MIB))


@pytest.mark.parametrize("what", ["forbid", "isolate", "limit_memory"])
def test_what_the_shim_could_be_in_the_way_of_ends_it(host: Host, what: str) -> None:
    domain, program, data = _attached(host)
    assert program.ask(what) in (0, None)
    wait("gone from the agent", lambda: not program.attached())
    assert program.ask("hash", name="f") == digest(data)
    _overwrite(domain.root / "f.bin", bytes(MIB))
    assert program.ask("hash", name="f") == digest(bytes(MIB))
    assert domain.status()["consumers"] == 0


def test_programs_that_are_left_alone(host: Host) -> None:
    domain, _, data = _attached(host)
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "-", *domain.shim, sys.executable, "-c", _COUNT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert limited.stdout == "1\n"
    assert len(data) == MIB


_COUNT = "import os; print(len(os.listdir('/proc/self/task')))"


# ------------------------------------------------------------------------------------------------------- programs


def test_its_own_text_and_libraries(host: Host) -> None:
    """The program itself, what it was linked with, and a library that comes and goes."""
    host.start_broker()
    domains = [host.add_domain(), host.add_domain()]
    library = Path(str(__import__("_sqlite3").__file__))
    for domain in domains:
        shutil.copy(os.path.realpath(sys.executable), domain.root / "python")
        for linked in Path(str(sysconfig.get_config_var("LIBDIR"))).glob("libpython3.??.so.1.0"):
            shutil.copy(linked, domain.root)
        shutil.copy(library, domain.root / library.name)
        domain.use()
    os.sync()
    for domain in domains:
        domain.start()
    host.wait_offered(2)
    paths = ["env", f"LD_LIBRARY_PATH={domains[0].root}"]
    program = domains[0].unchanged(before=paths, python=domains[0].root / "python")

    def text() -> bool:
        """Whether most of the interpreter is shared, which is in its program or in its library."""
        return max((pages for path, pages in program.attached().items() if "python" in path), default=0) > 100

    wait("its own text", text)
    path = os.fspath(domains[0].root / library.name)
    assert not program.ask("where", path=path)
    program.ask("load", path=path)
    wait("the library's text", lambda: ["r-xp"] in [line[:1] for line in program.ask("where", path=path)])
    program.ask("unload", path=path)
    wait("the library gone", lambda: f"/{library.name}" not in program.attached())
    for _ in range(5):
        program.ask("load", path=path)
        program.ask("unload", path=path)
    assert program.ask("spawn", count=3) is None
    domains[0].command("detach", "--all")
    wait("plain", lambda: not program.attached())
    domains[0].command("reattach")
    wait("its own text again", text)


def test_ps_and_detach(host: Host) -> None:
    domain, program, data = _attached(host)
    done = domain.command("ps", "--files")
    assert done.returncode == 0, done.stderr
    assert f"{program.pid:>8} {os.getuid():>6} {1:>6} {'1.0 MiB':>12}  python" in done.stdout
    assert "1.0 MiB  /f.bin" in done.stdout
    api = domain.program()
    api.open(domain.root / "f.bin")
    api.wait_shared(PAGES)
    assert "(uses the API)" in domain.command("ps").stdout
    assert '"attached_bytes": 1048576' in domain.command("ps", "--json").stdout
    assert domain.command("detach", "--all").returncode == 0
    program.wait_shared(0)
    assert program.ask("hash", name="f") == digest(data)
    domain.command("reattach")
    program.wait_shared(PAGES)


# -------------------------------------------------------------------------------------------------- agents and time


def test_no_agent_and_one_that_comes_later(host: Host) -> None:
    data = noise(MIB, 1)
    host.start_broker()
    first = host.add_domain()
    first.write("f.bin", data)
    program = first.unchanged()
    program.map(first.root / "f.bin")
    assert program.ask("hash", name="f") == digest(data)
    second = host.add_domain()
    second.write("f.bin", data)
    first.start()
    second.start()
    host.wait_offered(1)
    program.wait_shared(PAGES)
    assert program.ask("hash", name="f") == digest(data)


def test_agent_and_broker_killed_and_started_again(host: Host) -> None:
    domain, program, data = _attached(host)
    for _ in range(2):
        domain.running.kill()
        program.wait_shared(0)
        assert program.ask("hash", name="f") == digest(data)
        domain.start()
        program.wait_shared(PAGES)
        host.running.kill()
        assert program.ask("hash", name="f") == digest(data)
        host.start_broker()
        wait("joined again", lambda: domain.status().get("connected"))
        host.wait_offered(1)
        program.wait_shared(PAGES)
        assert program.ask("hash", name="f") == digest(data)


def test_an_agent_that_does_not_answer(host: Host) -> None:
    domain, program, data = _attached(host)
    domain.running.stop()
    late = domain.unchanged()
    late.map(domain.root / "f.bin")
    assert late.ask("hash", name="f") == digest(data)
    assert program.ask("hash", name="f") == digest(data)
    domain.running.send(signal.SIGCONT)
    late.wait_shared(PAGES)


def test_a_stopped_program_holds_a_writer_for_a_bounded_time(host: Host) -> None:
    domain, program, _ = _attached(host)
    program.stop()
    written = threading.Event()

    def write() -> None:
        _overwrite(domain.root / "f.bin", bytes(MIB))
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert written.wait(20), "the writer waits for the kernel's own limit"
    writer.join()
    [event] = wait("an event", lambda: domain.running.events("consumer.hung"))
    assert event["sharearea.consumers"] == [f"pid {program.pid} uid {os.getuid()}"]
    program.send(signal.SIGCONT)
    program.wait_shared(0)
    assert program.ask("hash", name="f") == digest(bytes(MIB))


def test_exec_says_what_is_wrong(host: Host) -> None:
    command = [os.fspath(BIN / "sharearea-agent"), "exec"]
    for words, code, text in (
        (["--socket", "/none", "--", "/no/such/program"], 4, "cannot run /no/such/program: No such file"),
        (["--socket", "none", "--", "true"], 2, "not an absolute path"),
        (["--config", "/none", "--", "true"], 3, "/none"),
        (["--socket", "/none"], 2, "COMMAND"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    done = subprocess.run(
        [*command, "--socket", "/none", "--", "sh", "-c", "exit 7"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    assert host.processes == []


# ------------------------------------------------------------------------------------------------------ from C


@pytest.mark.parametrize("shim", [False, True], ids=["alone", "with the shim"])
def test_the_library_for_c(host: Host, shim: bool) -> None:
    """The example that the documents show: built as they say, it shares, and reads what the file holds."""
    data = noise(MIB + 100, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    folder = Path(native.EXTENSION_FILE).parent
    reader = host.folder / "reader"
    example = Path(__file__).parents[2] / "docs" / "examples" / "reader.c"
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{folder}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run(["cc", "-o", reader, example, *flags, "-lsharearea"], check=True)
    path = first.root / "f.bin"
    before = [os.fspath(word) for word in first.shim] if shim else []
    program = subprocess.Popen(
        [*before, os.fspath(reader), os.fspath(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | {"SHAREAREA_AGENT_SOCKET": os.fspath(first.consumer_socket)},
    )
    assert program.stdin is not None
    assert program.stdout is not None

    def said() -> str:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        return program.stdout.readline()

    def attached() -> bool:
        return any(p["pid"] == program.pid and p["attached_bytes"] >= MIB + PAGE for p in first.ask("ps")["programs"])

    try:
        assert program.stdout.readline() == f"{len(data)} bytes, sum {sum(data)}, 0 shared\n"
        wait("shared", attached)
        assert said() == f"{len(data)} bytes, sum {sum(data)}, {0 if shim else MIB + PAGE} shared\n"
        _overwrite(path, bytes(len(data)))
        assert said() == f"{len(data)} bytes, sum 0, 0 shared\n"
        program.stdin.close()
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    assert subprocess.run([reader, first.root], capture_output=True, check=False).returncode == 1
