"""The bench, with tiny sizes: it runs, yields the figures that docs/performance.md names, and leaves nothing behind.

How large a figure is, is not tested. KSM of this host is not touched: what switches it is tested on a folder like its.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import asking, copies, dataset, estimate, hashing, host, intake, ksm, memory, programs, runs, sharing
from bench.report import Samples, interval, show
from sharearea.common import native
from sharearea.common.errors import HostError, NativeError
from sharearea.common.wire import PAGE_SIZE
from tests.lines import faults, read

KIB = 1024
MIB = 1024 * KIB


def quiet(_: str) -> None:
    """Show no progress."""


def metrics(found: Samples) -> dict[str, set[str]]:
    cases: dict[str, set[str]] = {}
    for case, metric in found.samples:
        cases.setdefault(case, set()).add(metric)
    return cases


@pytest.fixture
def data(disk_path: Path) -> dataset.DataSet:
    made = dataset.write(disk_path / "domains", 2, {"a": MIB, "b": MIB}, MIB, 16 * KIB, quiet)
    try:
        with host.OpenFiles(made.files(("a",))) as files:
            files.cached_bytes()
    except NativeError as error:
        pytest.skip(f"the page cache cannot be counted here: {error.message}")
    return made


# ------------------------------------------------------------------------------------------------------------ figures


def test_hash_compares_every_kernel_that_runs() -> None:
    before = native.selected_hash_kernel()
    found = hashing.run(hashing.Sizes(MIB, 64 * KIB, 2), quiet)
    cases = metrics(found)
    for kernel in native.hash_kernels():
        assert (f"pages, {kernel.name}" in cases) == (kernel.state == native.KERNEL_RUNS)
    for case in (hashing.PACKAGE, hashing.PACKAGE_PAGES, hashing.MEMCPY, hashing.TWO_THREADS, "file root"):
        assert cases[case] == {"rate_bytes_per_s"}
        assert found.median(case, "rate_bytes_per_s") > 0
    native.select_hash_kernel("auto")
    fastest = native.selected_hash_kernel()
    native.select_hash_kernel(before)
    for other in (hashing.PACKAGE, hashing.MEMCPY):
        assert len(found.samples[f"pages, {fastest} / {other}", "rate_ratio"]) == 2


def test_stats_are_asked_cold_and_again_on_lines_that_fit(disk_path: Path) -> None:
    log = disk_path / "a.log"
    asking.write_lines(log, 3000)
    lines = read(log)
    assert len(lines) == 3000
    assert [fault for fault in faults(lines) if " follows line " not in fault] == []
    log.unlink()
    cases = metrics(asking.run(asking.Sizes(3000, rounds=1), disk_path, quiet))
    assert set(cases) == {f"{name}, {state}" for name in asking.QUESTIONS for state in ("cold", "again")} | {
        "last hour, cold"
    }
    assert all(measured == {"time_s", "cpu_s", "memory_bytes"} for measured in cases.values())
    assert not list(disk_path.iterdir())


def test_estimate_measures_every_kind_of_root_and_the_tally(disk_path: Path) -> None:
    found = estimate.run(estimate.Sizes(32 * MIB, 64 * MIB, rounds=1), disk_path, quiet)
    cases = metrics(found)
    kinds = {estimate.LIBRARIES, estimate.LARGE, estimate.TAR, estimate.RAW, estimate.RAW_LARGE, estimate.QCOW2}
    assert cases.keys() | found.skipped.keys() == kinds | {estimate.TALLY}
    for kind in kinds & cases.keys():
        assert cases[kind] == {"rate_bytes_per_s", "cpu_rate_bytes_per_s"}
    assert cases[estimate.TALLY] == {"peak_bytes", "spilled_bytes", "feed_s", "compare_s"}
    assert not list(disk_path.iterdir())


def test_intake_measures_first_second_and_tenth_domain(disk_path: Path) -> None:
    found = intake.run(intake.Sizes(2, MIB, MIB, 2 * MIB, rounds=1), disk_path, quiet)
    cases = metrics(found)
    for name in (intake.LARGE, intake.LIBRARIES, intake.SHAREABLE):
        for which in ("first", "second", "tenth"):
            assert cases[f"{name}, {which} domain"] == {"rate_pages_per_s", "rate_files_per_s", "time_s", "cpu_s"}
        for which in ("second", "tenth"):
            assert cases[f"{name}, {which} / first"] == {"cpu_ratio", "time_ratio"}
    assert not list(disk_path.iterdir())


def test_a_report_has_every_page_of_every_file_once() -> None:
    report = intake.prepare([1, PAGE_SIZE, 5000 * PAGE_SIZE, 3 * PAGE_SIZE + 1], "/usr/lib")
    assert (report.files, report.page_count) == (4, 1 + 1 + 5000 + 4)


def test_sharing_measures_both_starts_and_says_why_ksm_is_missing(data: dataset.DataSet, disk_path: Path) -> None:
    found = sharing.run(sharing.Sizes(("a", "own"), rounds=1, steady_s=0.1, ksm=False), data, disk_path, quiet)
    cases = metrics(found)
    for case in (sharing.COLD, sharing.WARM):
        assert {"time_s", "cpu_s", "cpu_beyond_start_s", "cpu_broker_s", "cpu_agents_s", "steady_cpu_ratio"} <= cases[
            case
        ]
        assert "cpu_start_s" in cases[case]
        assert found.median(case, "saved_ratio") >= sharing.TARGET_RATIO
    assert found.skipped == dict.fromkeys((sharing.AGGRESSIVE, sharing.DEFAULT), "not asked for")


def test_memory_tells_what_is_fixed_from_what_grows(data: dataset.DataSet, disk_path: Path) -> None:
    found = memory.run(memory.Sizes(("a",), ("a", "b"), idle_s=0.1), data, disk_path, quiet)
    cases = metrics(found)
    for case in (f"{memory.IDLE} agent", f"{memory.IDLE} broker"):
        assert {"private_bytes", "anonymous_bytes", "start_cpu_s"} <= cases[case]
        assert found.median(case, "private_bytes") > MIB
    assert "interpreter_bytes" in cases[memory.IMPORTS]
    assert "sharearea_agent.runner_bytes" in cases[memory.IMPORTS]
    parts = {"broker_private", "agent_private", "consumer_private", "agent_cache_file", "store_file", "table"}
    assert {f"{part}_bytes_per_gib" for part in parts} <= cases[memory.SLOPE]
    assert {"table_bytes_per_page", "agent_private_bytes_per_page", "agent_cache_bytes_per_page"} <= cases[memory.PAGE]


# ---------------------------------------------------------------------------------------------------------- the parts


def test_ratios_are_taken_round_by_round() -> None:
    found = Samples("x")
    for above, below in ((2.0, 1.0), (30.0, 10.0), (4.0, 1.0)):
        found.add("above", time_s=above)
        found.add("below", time_s=below)
    found.ratio("above / below", "time_ratio", ("above", "time_s"), ("below", "time_s"))
    found.ratio("above / nothing", "time_ratio", ("above", "time_s"), ("nothing", "time_s"))
    found.skip("nothing", "not here")
    assert found.median("above / below", "time_ratio") == 3.0
    records = found.records()
    assert {"bench": "x", "case": "nothing", "skipped": "not here"} in records
    assert not any(record.get("case") == "above / nothing" for record in records)
    assert {"metric": "time_s", "median": 4.0, "low": 2.0, "high": 30.0, "rounds": 3}.items() <= records[0].items()


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("rate_bytes_per_s", 3 * MIB * KIB, "3.00 GiB/s"),
        ("rate_pages_per_s", 1234567, "1,234,567/s"),
        ("table_bytes_per_page", 83.04, "83.0 B"),
        ("private_bytes", 3 * MIB, "3.00 MiB"),
        ("cpu_ratio", 0.0123, "0.0123"),
        ("time_s", 0.0042, "4.20 ms"),
        ("time_s", 4.2, "4.20 s"),
    ],
)
def test_a_value_is_shown_by_its_unit(metric: str, value: float, text: str) -> None:
    assert show(metric, value) == text


@pytest.mark.parametrize("smallest", [1, 16 * KIB])
def test_library_sizes_add_up(smallest: int) -> None:
    sizes = dataset.library_sizes(8 * MIB, smallest)
    assert 8 * MIB - smallest < sum(sizes) <= 8 * MIB
    assert min(sizes) >= smallest
    assert sizes == dataset.library_sizes(8 * MIB, smallest)


def test_common_files_are_the_same_everywhere_and_own_ones_are_not(data: dataset.DataSet) -> None:
    one, other = data.domains
    assert [path.read_bytes() for path in one.files(("a",))] == [path.read_bytes() for path in other.files(("a",))]
    assert [path.read_bytes() for path in one.files(("own",))] != [path.read_bytes() for path in other.files(("own",))]
    pages = sum(-(-path.stat().st_size // PAGE_SIZE) for path in one.files(("a",)))
    assert data.shareable_bytes(("a", "own")) == pages * PAGE_SIZE


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that stands still: it has started, and waits for its input."""
    program = "import sys; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.communicate()


def test_programs_say_the_same_with_the_shim_and_leave_their_files_to_it(disk_path: Path) -> None:
    found = programs.run(programs.QUICK, disk_path, quiet)
    measured = {case for case, _ in found.samples}
    assert measured | set(found.skipped) == set(programs.QUICK.programs)
    for case in measured:
        assert found.median(case, "starts_with_other_output") == 0
        assert found.median(case, "lives_with_other_output") == 0
        assert found.median(case, "lives_attached") == found.median(case, "lives") == programs.QUICK.lives
        assert found.median(case, "attached_bytes") > found.median(case, "one_domain_after_bytes")
        assert found.median(case, "left_out_bytes") < found.median(case, "one_domain_after_bytes")
        for kind in ("shared", "plain", "no_agent"):
            assert len(found.samples[case, f"start_{kind}_cpu_s"]) == programs.QUICK.starts
        for kind in ("shared", "again"):
            low, high = (found.median(case, f"answer_{kind}_{end}_ratio") for end in ("low", "high"))
            assert 0 < low <= found.median(case, f"answer_{kind}_cpu_ratio") <= high


def test_what_is_no_program_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no program ngnix") as raised:
        copies.install("ngnix", tmp_path / "ngnix", MIB)
    assert all(name in raised.value.hint for name in programs.PROGRAMS)


@pytest.mark.parametrize("name", ["postgres", "nginx"])
def test_servers_run_beside_one_another_and_end_by_themselves(disk_path: Path, name: str) -> None:
    disk_path.chmod(0o755)
    program = copies.install(name, disk_path / name, MIB)
    if isinstance(program, str):
        pytest.skip(program)
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(program.running(program.variables, seat)) for seat in range(runs.SEATS)]
        assert len({one.answer() for one in running}) == 1
        pids = [pid for one in running for pid in one.processes()]
        if os.geteuid() == 0:
            owners = {Path(f"/proc/{pid}").stat().st_uid for pid in pids}
            assert 65534 in owners, "none runs as another user"
        assert [sum(one.end()) for one in running] == [0] * runs.SEATS
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    first, second = (program.once(program.variables) for _ in range(2))
    assert first.said == second.said
    assert first.cpu_s > 0


def test_a_program_that_ends_otherwise_is_not_overlooked(tmp_path: Path) -> None:
    def piped(script: str) -> runs.Piped:
        return runs.Piped(tmp_path, {}, ["sh", "-c", script], ["sh", "-c", script])

    scripts = ("echo a", "echo b", "echo a >&2", "echo b >&2", "echo a; exit 1")
    said = [piped(script).once({"PATH": "/bin"}).said for script in scripts]
    assert len(set(said)) == len(scripts)
    with piped("echo ready; read line; echo $line; exit 3").running({"PATH": "/bin"}) as one:
        assert one.answer() == "\n"
        assert one.end() == [3]
    with pytest.raises(HostError, match="exit code -11"):
        piped("kill -SEGV $$").start({"PATH": "/bin"})


@pytest.mark.parametrize(
    ("groups", "low", "high"),
    [
        ([[1.0] * 5] * 3, 1.0, 1.0),
        ([[1.0] * 50, [2.0] * 50, [2.0] * 50], 1.0, 2.0),  # two processes that differ: however often each was asked
    ],
)
def test_an_interval_is_as_wide_as_processes_differ(groups: list[list[float]], low: float, high: float) -> None:
    assert interval(groups) == (low, high)


def test_an_interval_is_narrower_with_more_values() -> None:
    few, many = ([[float(value % 10) for value in range(count)]] * 5 for count in (10, 400))
    below, above = (interval(each, draws=200) for each in (few, many))
    assert below[0] < above[0] <= 4.5 <= above[1] < below[1]


def test_memory_parts_add_up_to_what_the_kernel_says(sleeper: subprocess.Popen[bytes]) -> None:
    private = anonymous = 0
    for line in Path(f"/proc/{sleeper.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * KIB
        elif line.startswith("Anonymous:"):
            anonymous = int(line.split()[1]) * KIB
    found = host.memory_of(sleeper.pid)
    assert (found.total, found.anonymous) == (private, anonymous)


def test_an_area_is_told_from_a_process_own_memory() -> None:
    before = host.memory_of("self")
    with native.Segment.create("sharearea-bench-test", 1024) as segment:
        pages = os.urandom(1024 * PAGE_SIZE)
        key = bytes(native.FP_SIZE)
        segment.fill(key, 0, pages, native.fingerprint_pages(key, pages)[0])
        after = host.memory_of("self")
        assert after.area - before.area == len(pages)
        assert host.memfd_bytes(os.getpid()) >= len(pages)


def test_cpu_time_is_the_process_own() -> None:
    before = time.process_time()
    between = host.cpu_s(os.getpid())
    assert before <= between <= time.process_time()


def test_processes_end_with_the_block(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), host.Processes(tmp_path) as processes:
        process = processes.start("sleeper", [sys.executable, "-c", "import sys; sys.stdin.read()"])
        raise RuntimeError
    assert process.returncode is not None


def test_a_process_that_ended_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with host.Processes(tmp_path) as processes:
        process = processes.start("dying", [sys.executable, "-c", "raise SystemExit('no luck')"])
        process.wait()
        with pytest.raises(HostError, match="dying ended with exit code 1: no luck"):
            processes.check()


# ------------------------------------------------------------------------------------------------------ KSM's settings


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Give a folder like /sys/kernel/mm/ksm on a host that does not use KSM."""
    folder = tmp_path / "ksm"
    folder.mkdir()
    for name, value in (("run", 0), ("pages_to_scan", 100), ("sleep_millisecs", 20), ("pages_shared", 0)):
        (folder / name).write_text(f"{value}\n")
    return folder


def as_found(folder: Path) -> bool:
    return [int((folder / name).read_text()) for name in ("run", "pages_to_scan", "sleep_millisecs")] == [0, 100, 20]


def test_settings_are_put_back_after_a_failure(settings: Path, tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), ksm.Ksm(tmp_path, settings) as merging:
        merging.set("pages_to_scan", 100_000)
        merging.set("sleep_millisecs", 0)
        merging.set("run", 1)
        assert not as_found(settings)
        raise KeyboardInterrupt
    assert as_found(settings)


def test_settings_are_put_back_when_the_bench_is_killed(settings: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from bench import ksm\n"
        "with ksm.Ksm(Path(sys.argv[1]), Path(sys.argv[2])) as merging:\n"
        "    merging.set('run', 1); merging.set('pages_to_scan', 5)\n"
        "    print('set', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path, settings],
        cwd=host.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == b"set\n"
        assert not as_found(settings)
        bench.kill()
    folder = os.open(settings, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the keeper holds it until it has done its work
    finally:
        os.close(folder)
    assert as_found(settings)


def test_two_benches_do_not_take_each_others_settings_for_the_hosts(settings: Path, tmp_path: Path) -> None:
    with ksm.Ksm(tmp_path, settings) as merging:
        merging.set("pages_to_scan", 7)
        with pytest.raises(HostError, match="another bench"), ksm.Ksm(tmp_path, settings):
            pass
        assert merging.get("pages_to_scan") == 7
    assert as_found(settings)


def test_a_host_that_uses_ksm_is_left_alone(settings: Path, tmp_path: Path) -> None:
    assert ksm.lacking(tmp_path / "none") == "this kernel has no KSM"
    if os.geteuid() != 0:
        assert ksm.lacking(settings) == "only root may switch KSM on"
        return
    for name, value in (("run", "1\n"), ("pages_shared", "8\n")):
        before = (settings / name).read_text()
        (settings / name).write_text(value)
        assert ksm.lacking(settings) == "KSM is in use on this host"
        (settings / name).write_text(before)
    (settings / "advisor_mode").write_text("none [scan-time]\n")
    assert ksm.lacking(settings) == "KSM's advisor steers it on this host"


# ----------------------------------------------------------------------------------------------------- the command line


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=host.ROOT, capture_output=True, text=True, check=False
    )


def test_results_are_json_lines_and_a_table(tmp_path: Path) -> None:
    target = tmp_path / "found.jsonl"
    ended = bench("hash", "--quick", "--json", target)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert records[0]["bench"] == "environment"
    assert {"kernel", "cpu", "cpus", "load_before", "load_after", "seconds", "quick"} <= records[0].keys()
    assert {record["bench"] for record in records[1:]} == {"hash"}
    assert "memcpy" in ended.stdout
    assert "hash: round 1 of" in ended.stderr


def test_an_unknown_bench_is_an_error_that_names_the_others() -> None:
    ended = bench("hsah")
    assert ended.returncode == 2
    assert "hsah" in ended.stderr
    assert "intake" in ended.stderr


def test_an_interrupted_bench_leaves_nothing(disk_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "intake", "--quick", "--work-dir", disk_path],
        cwd=host.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "round 1" in line:
                break
        running.send_signal(signal.SIGTERM)
        running.communicate()
    assert running.returncode == 130
    assert not list(disk_path.iterdir())
