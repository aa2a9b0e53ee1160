"""The verb as its user has it: tables, files, exit codes, words on what is wrong, and nothing left behind."""

from __future__ import annotations

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharearea.cli import main
from sharearea.common.errors import HostError
from sharearea.estimate.counting import Listener, Options, estimate
from sharearea.estimate.figures import Estimate, LeftOut
from sharearea.estimate.intake import keep
from sharearea.estimate.page import page

from .oracle import PAGE, count, files_of
from .test_figures import example
from .trees import make_tree

KEYS = (
    "roots",
    "total_bytes",
    "zero_bytes",
    "self_shared_bytes",
    "possible_saved_bytes",
    "text_bytes",
    "pairs",
    "packages",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give three folders that share a part."""
    folders = [tmp_path_factory.mktemp("roots") / name for name in "abc"]
    for seed, folder in enumerate(folders):
        make_tree(folder, seed)
    return [str(folder) for folder in folders]


def test_the_json_file_says_what_was_asked_for(roots: list[str], tmp_path: Path) -> None:
    assert main(["estimate", *roots, "--json", str(tmp_path / "figures.json")]) == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    wanted = count([files_of(Path(root)) for root in roots])
    assert list(record)[: len(KEYS)] == list(KEYS)
    assert record["roots"] == roots
    assert record["total_bytes"] == wanted.total
    assert record["zero_bytes"] == wanted.zero
    assert record["self_shared_bytes"] == wanted.self_shared
    assert record["possible_saved_bytes"] == wanted.possible
    assert record["text_bytes"] == wanted.text
    assert record["pairs"] == [
        {"a": roots[a], "b": roots[b], "shared_bytes": shared} for (a, b), shared in sorted(wanted.pairs.items())
    ]
    assert record["packages"] == [{"name": "(no package)", "bytes": wanted.possible}]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_the_table_says_the_same(roots: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["estimate", *roots, "--backend", "xen", "--memory", "4M", "--json", str(tmp_path / "figures")]) == 0
    record = json.loads((tmp_path / "figures").read_text())
    out = capsys.readouterr().out
    assert record["backend"] == "xen"
    assert record["memory_bytes"] == 4 << 20
    assert f"possible to save: {record['possible_saved_bytes'] / (1 << 20):.1f} MiB of 12.0 MiB" in out
    assert "by a model of guests with 4.0 MiB" in out
    other = record["possible_saved_bytes_by_backend"]["local"] / (1 << 20)
    assert f"on the backend local it would be {other:.1f} MiB" in out
    for root in roots:
        assert root in out
    assert "\x1b" not in out


def test_names_of_guests_are_shown_and_never_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "[red]\x1b[31m<script>alert(1)<"
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (info / "[b]<i>&\udcff.list").write_text("/file\n")
    (root / "file").write_bytes(b"x" * PAGE)
    arguments = ["estimate", str(root), str(root), "--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "j")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]\\x1b[31m<script>" in out
    assert "[b]<i>&\\udcff" in out
    report = (tmp_path / "r.html").read_text()
    assert "<script" not in report
    assert "<i>" not in report
    assert "[red]\\x1b[31m&lt;script&gt;" in report
    assert "[b]<i>&\udcff" in [entry["name"] for entry in json.loads((tmp_path / "j").read_text())["packages"]]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere"], 2, "/nowhere: No such file"),
        (["/dev/null"], 2, "character device"),
        (["/", "--work-dir", "/nowhere"], 4, "/nowhere: no file can be made there"),
        (["/", "--json", "/nowhere/figures"], 2, "there is no folder /nowhere"),
        (["/", "--html", "/"], 2, "is a folder"),
        (["/", "--memory", "12"], 2, "less than a page"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["/", "--memory", "much"], ["/", "--backend", "kvm"]])
def test_wrong_words_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *arguments])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_was_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tarfile

    with tarfile.open(tmp_path / "archive", "w") as archive:
        for name in ("one", "two"):
            member = tarfile.TarInfo(name)
            member.size = 0
            archive.addfile(member)
    data = (tmp_path / "archive").read_bytes()
    (tmp_path / "archive").write_bytes(data[:1024])
    assert main(["estimate", str(tmp_path / "archive")]) == 0
    out = capsys.readouterr().out
    assert "not counted, wholly or in part: 1" in out
    assert "without an end mark" in out


def test_results_may_go_to_a_pipe(roots: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from sharearea.cli import main; main()", "estimate", roots[0], "--json", "/dev/stderr"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stderr)["roots"] == [roots[0]]
    assert "possible to save" in done.stdout


def test_an_older_result_is_replaced_whole(roots: list[str], tmp_path: Path) -> None:
    result = tmp_path / "figures"
    result.write_text("x" * 100_000)
    (tmp_path / "link").symlink_to("figures")
    assert main(["estimate", roots[0], "--json", str(tmp_path / "link")]) == 0
    assert json.loads(result.read_text())["roots"] == [roots[0]]
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "link"]
    mask = os.umask(0)
    os.umask(mask)
    assert result.stat().st_mode & 0o777 == 0o666 & ~mask


# ------------------------------------------------------------------------------------------------------ interrupted


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    library = str(Path(os.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from sharearea.cli import main; sys.exit(main())", "estimate"]
        + [library] * 200
        + ["--work-dir", str(work), "--json", str(tmp_path / "figures")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        fds = Path(f"/proc/{process.pid}/fd")
        while not any(str(work) in link for link in links(fds)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err == "sharearea: interrupted\n"
    assert out == ""
    assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def links(folder: Path) -> list[str]:
    found = []
    for entry in folder.iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_whatever_ends_it_closes_everything(roots: list[str], tmp_path: Path) -> None:
    class Breaks(Listener):
        def joining(self, part: int, parts: int) -> None:
            raise KeyboardInterrupt(part, parts)

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        estimate([Path(root) for root in roots], Options(work=tmp_path), Breaks())
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list(tmp_path.iterdir())


def test_a_full_work_folder_is_said_to_be_full() -> None:
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(HostError, match="No space left") as caught:
        keep(file, b"x")
    assert "--work-dir" in caught.value.hint


# -------------------------------------------------------------------------------------------------------- the report


class Reader(html.parser.HTMLParser):
    """Checks that tags are closed in their order, and keeps what it reads."""

    EMPTY = frozenset({"meta", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.EMPTY:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not [tag for tag in reader.open if tag != "rect"]
    return reader


def test_the_report_is_one_file_for_any_screen(roots: list[str], tmp_path: Path) -> None:
    assert main(["estimate", *roots, "--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "j.json")]) == 0
    text = (tmp_path / "r.html").read_text()
    record = json.loads((tmp_path / "j.json").read_text())
    reader = read(text)
    # Nothing is fetched, nothing runs.
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|javascript:", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"fill\s*[:=]\s*[\"']?#", text.partition("</style>")[2])  # colours follow the theme
    svg = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(svg) == 2
    assert all("viewbox" in attributes and "aria-label" in attributes for attributes in svg)
    words = " ".join(reader.words)
    for pair in record["pairs"]:
        assert f"{pair['shared_bytes'] / (1 << 20):.1f} MiB" in words
    for root in roots:
        assert root in words


def test_the_matrix_has_a_square_for_each_pair_in_both_halves() -> None:
    reader = read(page(example()))
    # Two of the pair, two on the diagonal, three page classes.
    assert [tag for tag, _ in reader.tags].count("rect") == 2 + 2 + 3
    opacities = {
        match[1]
        for tag, attributes in reader.tags
        if (match := re.search(r"fill-opacity:([\d.]+)", attributes.get("style") or ""))
    }
    assert opacities == {f"{0.04 + 0.96 * 20 / 50:.3f}"}


def test_the_report_names_what_was_left_out() -> None:
    found = example()
    left = [LeftOut("a", f"etc/{number}", "cannot be read: x & y") for number in range(700)]
    more = Estimate(found.backend, None, found.roots, found.shared, left, 900, ["a: note <b>"])
    text = page(more)
    read(text)
    assert "x &amp; y" in text
    assert "and 400 more" in text
    assert "note &lt;b&gt;" in text
    alone = Estimate("xen", 1 << 20, found.roots[:1], found.shared)
    assert "Pairs" not in page(alone)
