"""Views by configuration: what is mounted and when, where plain files are looked at, and who keeps views down.

Mounting needs Xen and the module (tests/xen/view_packages.py); here a table of mounts is kept in memory, by the same
commands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sharearea_agent import cli
from sharearea_agent.common.errors import HostError, UsageError
from sharearea_agent.config import AgentConfig
from sharearea_agent.view_mounts import (
    HOLD_S,
    UNIT_NAME,
    Covered,
    Holder,
    ViewMounts,
    covered_folders,
    drop_in,
    holder,
    mounts,
    to_plain,
    to_seen,
)
from sharearea_agent.views import MountedView, mounted_views


class Table:
    """The kernel's mounts, as far as mount(8) and umount(8) are asked for them. A bind shows its folder by a link."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str]] = []  # where, type, lower
        self.private: set[str] = set()
        self.calls: list[list[str]] = []
        self.busy: set[str] = set()
        self.refuse = ""

    def text(self) -> bytes:
        return "".join(f"9 1 0:1 / {at} rw - {type} none ro,lower={lower}\n" for at, type, lower in self.lines).encode()

    def command(self, words: Sequence[str]) -> None:
        self.calls.append(list(words))
        match list(words):
            case ["mount", "--bind", source, at]:
                self.lines.append((at, "ext4", ""))
                if source != at:
                    Path(at).rmdir()
                    Path(at).symlink_to(source)
            case ["mount", "--make-private", at]:
                self.private.add(at)
            case ["mount", "-t", "shareview", "-o", options, "none", at]:
                if self.refuse:
                    raise HostError(self.refuse)
                assert Path(at).is_dir()
                self.lines.append((at, "shareview", options.partition(",")[0].removeprefix("lower=")))
            case ["umount", at] if at in self.busy:
                raise HostError("target is busy")
            case ["umount", *_, at]:
                if Path(at).is_symlink():
                    Path(at).unlink()
                    Path(at).mkdir()
                self.lines.remove([line for line in self.lines if line[0] == at][-1])
            case _:
                pytest.fail(f"unexpected: {words}")


class Guest:
    """A guest with folders usr/share and srv, of which views are configured."""

    def __init__(self, tmp_path: Path, views: str, folders: Sequence[str] = ("usr/share", "srv")) -> None:
        self.top = tmp_path
        self.base = tmp_path / "run"
        for folder in ("usr/share/doc", "srv"):
            (tmp_path / folder).mkdir(parents=True)
        text = '[agent]\nname = "g"\nbackend = "xen"\n'
        text += f"folders = {json.dumps([str(tmp_path / folder) for folder in folders])}\n"
        text += f"control_socket = {json.dumps(str(tmp_path / 'control'))}\n"
        text += "views = [" + views.replace("TOP", str(tmp_path)) + "]\n"
        self.file = tmp_path / "agent.toml"
        self.file.write_text(text)
        self.config = AgentConfig.load(self.file)
        self.table = Table()
        self.mounts = ViewMounts(self.config, base=self.base, mountinfo=self.table.text, command=self.table.command)


OVER = '{ lower = "TOP/usr/share", over = true }'
BESIDE = '{ lower = "TOP/srv", at = "TOP/run/srv", verify = "all" }'


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path, f"{OVER}, {BESIDE}")


@pytest.fixture
def process() -> subprocess.Popen[bytes]:
    """Give a process that lives until its input ends."""
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE)


def test_the_plain_files_have_a_private_place_before_a_view_covers_them(guest: Guest) -> None:
    assert guest.mounts.up() == []
    top, base = str(guest.top), str(guest.base)
    (covered,) = guest.mounts.covered
    plain = os.fsdecode(covered.plain)
    assert Path(plain).parent == guest.base / "plain"
    assert guest.table.calls == [
        ["mount", "--bind", f"{base}/plain", f"{base}/plain"],
        ["mount", "--make-private", f"{base}/plain"],
        ["mount", "--bind", f"{top}/usr/share", plain],
        ["mount", "--make-private", plain],
        ["mount", "-t", "shareview", "-o", f"lower={plain},verify=resident", "none", f"{top}/usr/share"],
        ["mount", "-t", "shareview", "-o", f"lower={top}/srv,verify=all", "none", f"{base}/srv"],
    ]
    assert (guest.base / "plain").stat().st_mode & 0o777 == 0o700
    assert guest.mounts.plain_there() == [covered]
    found = mounted_views(guest.table.text(), [covered])
    share, srv = f"{top}/usr/share".encode(), f"{top}/srv".encode()
    assert found == [MountedView(share, share), MountedView(srv, f"{base}/srv".encode())]
    assert [view.over for view in found] == [True, False]


def test_what_is_mounted_is_adopted(guest: Guest) -> None:
    guest.mounts.up()
    before = len(guest.table.calls)
    later = ViewMounts(guest.config, base=guest.base, mountinfo=guest.table.text, command=guest.table.command)
    assert later.up() == []
    assert len(guest.table.calls) == before
    assert all(later.is_up(view) for view in later.views)


def test_what_is_taken_down_comes_up_again_over_the_same_plain_files(guest: Guest) -> None:
    guest.mounts.up()
    over, beside = guest.config.views
    assert guest.mounts.down([over]) == []
    assert [guest.mounts.is_up(view) for view in (over, beside)] == [False, True]
    assert guest.mounts.plain_there() == guest.mounts.covered
    guest.table.calls.clear()
    assert guest.mounts.up() == []
    assert [words[:3] for words in guest.table.calls] == [["mount", "-t", "shareview"]]
    assert guest.mounts.down([over, beside]) == []
    assert not (guest.base / "srv").exists()  # a unit that binds it, if it is there, would show an empty folder


def test_a_folder_that_was_replaced_has_its_plain_files_bound_anew(guest: Guest) -> None:
    guest.mounts.up()
    over = guest.config.views[0]
    guest.mounts.down([over])
    (covered,) = guest.mounts.covered
    assert not covered.stale
    share, plain = guest.top / "usr/share", Path(os.fsdecode(covered.plain))
    # As a bind mount, and unlike this link, still shows the old folder.
    share.rename(guest.top / "old")
    share.mkdir()
    plain.unlink()
    plain.symlink_to(guest.top / "old")
    assert covered.stale
    assert guest.mounts.up() == []
    assert guest.mounts.is_up(over)
    assert not covered.stale
    assert ["umount", "-l", str(plain)] in guest.table.calls


def test_a_view_in_use_leaves_the_tree_of_names(guest: Guest) -> None:
    guest.mounts.up()
    guest.table.busy.add(f"{guest.top}/usr/share")
    assert guest.mounts.down(guest.config.views[:1]) == []
    assert guest.table.calls[-2:] == [["umount", f"{guest.top}/usr/share"], ["umount", "-l", f"{guest.top}/usr/share"]]


def test_a_mount_that_fails_is_named_and_leaves_no_empty_folder(guest: Guest) -> None:
    guest.table.refuse = "unknown filesystem type 'shareview'"
    problems = guest.mounts.up()
    assert [error.message for error in problems] == [
        f"no view of {guest.top}/{lower} at {at}: unknown filesystem type 'shareview'"
        for lower, at in (("usr/share", guest.top / "usr/share"), ("srv", guest.base / "srv"))
    ]
    assert not (guest.base / "srv").exists()


def test_a_view_that_was_mounted_over_its_folder_by_hand_is_not_built_upon(guest: Guest) -> None:
    share = f"{guest.top}/usr/share"
    guest.table.lines.append((share, "shareview", share))
    (problem,) = guest.mounts.up()
    assert "mounted by hand" in problem.message
    assert problem.hint == f"umount {share}"
    assert mounted_views(guest.table.text(), guest.mounts.covered)[0].lower == f"{guest.top}/srv".encode()


def test_a_file_system_between_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(tmp_path, '{ lower = "TOP/usr/share", over = true }', ["usr"])
    (tmp_path / "usr.below/share").mkdir(parents=True)
    # A bind of /usr shows below share what is under a mount there: another folder than everybody sees.
    monkeypatch.setattr(Covered, "stale", False)
    place = Path(os.fsdecode(guest.mounts.covered[0].plain))
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "usr.below")
    guest.table.lines += [(str(place.parent), "ext4", ""), (str(place), "ext4", "")]
    (problem,) = guest.mounts.up()
    assert "a file system is mounted between" in problem.message


@pytest.mark.parametrize(
    ("folders", "lower", "wider", "name"),
    [
        (["/usr"], "/usr/share", "/usr", "usr"),
        (["/usr/share"], "/usr", "/usr", "usr"),
        (["/"], "/usr-a/b", "/", "-"),
        (["/usr-a/b%"], "/usr-a/b%/c", "/usr-a/b%", "usr%2Da-b%25"),
    ],
)
def test_the_wider_one_of_view_and_folder_has_a_place(folders: list[str], lower: str, wider: str, name: str) -> None:
    text = f'[agent]\nname = "g"\nbackend = "xen"\nfolders = {json.dumps(folders)}\n'
    text += f'views = [{{ lower = "{lower}", over = true }}]\n'
    (covered,) = covered_folders(AgentConfig.parse(text.encode(), "x"), Path("/run/v"))
    assert covered == Covered(wider.encode(), f"/run/v/plain/{name}".encode())
    inside = lower.encode() + b"/x y"
    assert to_seen([covered], to_plain([covered], inside)) == inside
    assert to_plain([covered], inside).startswith(covered.plain + b"/")
    assert to_plain([covered], wider.encode()) == covered.plain
    other = b"relative" if wider == "/" else wider.encode() + b"2/x"
    assert to_plain([covered], other) == other


def test_mounts_are_read_with_their_escapes() -> None:
    (mount,) = mounts(b"31 25 0:41 / /mnt/a\\040b ro - shareview none ro,lower=/srv/a\\134040b/,verify=all\n")
    assert (mount.at, mount.lower) == (b"/mnt/a b", b"/srv/a b")


# -------------------------------------------------------------------------------------------------- who keeps down


def test_views_stay_down_while_somebody_wants_it(guest: Guest, process: subprocess.Popen[bytes]) -> None:
    with guest.mounts.turn():
        assert guest.mounts.why_down() == ""
        who = holder(process.pid)
        guest.mounts.want_down(who)
        guest.mounts.want_down(None)
        assert guest.mounts.why_down() == f"process {process.pid} (cat)"
        guest.mounts.want_up(who.pid)
        assert guest.mounts.why_down() == "an operator"
        guest.mounts.want_up(None)
        assert guest.mounts.why_down() == ""
    assert not (guest.base / "down").exists()  # sharearea-view-again.service asks for nothing else
    process.communicate()


def test_a_dead_package_manager_holds_nothing_down(guest: Guest, process: subprocess.Popen[bytes]) -> None:
    who = holder(process.pid)
    with guest.mounts.turn():
        guest.mounts.want_down(who)
        process.communicate()
        assert guest.mounts.why_down() == ""
        assert not who.alive
    with pytest.raises(UsageError):
        holder(process.pid)


def test_another_process_of_that_number_and_one_that_lives_for_ever_hold_nothing_down() -> None:
    me = holder(os.getpid())
    assert me.alive
    assert not Holder(me.pid, "1", me.since).alive
    assert not Holder(me.pid, me.started, time.time() - HOLD_S - 1).alive


def test_the_holder_is_the_package_manager_and_not_its_copy_that_calls_the_hook() -> None:
    # As apt does: a child of its own, which ends when the hooks have.
    code = "import os\nif os.fork() == 0:\n  print(os.getpid(), flush=True); input(); os._exit(0)\nos.wait()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as apt:
        assert apt.stdout is not None
        child = int(apt.stdout.readline())
        assert child != apt.pid
        assert holder(child).pid == holder(apt.pid).pid == apt.pid
        apt.communicate("\n")


def test_a_note_that_is_rubbish_holds_nothing_down(guest: Guest) -> None:
    with guest.mounts.turn():
        for text in ("", "[]", '{"by_hand": 1}', '{"by_hand": true, "holders": [1]}'):
            (guest.base / "down").write_text(text)
            assert guest.mounts.why_down() == ""


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def words(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Have the command line use the guest's table of mounts."""
    monkeypatch.setattr(cli, "_mounts", lambda _: (guest.config, guest.mounts))
    return guest


def test_up_down_and_status(words: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["view", "up"]) == 0
    assert cli.main(["view", "down"]) == 0
    assert words.mounts.why_down() == "an operator"
    assert cli.main(["view", "up", "--if-due"]) == 0
    capsys.readouterr()
    assert cli.main(["view", "status", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [view["up"] for view in said["views"]] == [False, False]
    assert (said["kept_down_by"], said["agent_runs"]) == ("an operator", False)
    assert cli.main(["view", "up"]) == 0
    assert cli.main(["view", "status"]) == 0
    assert f"{words.top}/usr/share over itself: up" in capsys.readouterr().out


def test_a_package_manager_takes_only_views_over_their_folder_down(
    words: Guest, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["view", "up"])
    over, beside = words.config.views
    dpkg = subprocess.Popen(["sleep", "60"])
    try:
        for pid in (process.pid, dpkg.pid):  # apt, and the dpkg that it calls
            assert cli.main(["view", "down", "--while", str(pid)]) == 0
        assert [words.mounts.is_up(view) for view in (over, beside)] == [False, True]
        assert cli.main(["view", "up", "--after", str(dpkg.pid)]) == 0
        assert not words.mounts.is_up(over), "the other package manager is still at work"
        assert "views stay down" in capsys.readouterr().out
        assert cli.main(["view", "up"]) == 0
        assert not words.mounts.is_up(over), "an operator cannot want it up under a package manager"
        process.communicate()
        assert (words.base / "down").exists()
        assert cli.main(["view", "up", "--if-due"]) == 0
        assert words.mounts.is_up(over)
        assert not (words.base / "down").exists()  # or the timer would start a process every minute
    finally:
        dpkg.kill()
        dpkg.wait()


def test_what_cannot_be_mounted_is_an_error(words: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    words.table.refuse = "unknown filesystem type 'shareview'"
    assert cli.main(["view", "up"]) == HostError.exit_code
    assert "0 of 2 views are up" in capsys.readouterr().out


def test_a_drop_in_gives_units_the_views_beside_their_folder(
    words: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["view", "drop-in", "nginx"]) == 0
    text = capsys.readouterr().out
    assert f"\nBindReadOnlyPaths=-{words.base}/srv:{words.top}/srv\n" in text
    assert text.count("BindReadOnlyPaths") == 1
    monkeypatch.setattr(cli, "UNITS", tmp_path / "units")
    assert cli.main(["view", "drop-in", "--write", "nginx", "a@b.service"]) == 0
    for name in ("nginx.service.d", "a@b.service.d"):
        assert (tmp_path / "units" / name / "sharearea-view.conf").read_text() == text
    assert cli.main(["view", "drop-in", "../x"]) == UsageError.exit_code
    assert not UNIT_NAME.match("a/b.service")


def test_a_drop_in_quotes_what_systemd_would_split(tmp_path: Path) -> None:
    guest = Guest(tmp_path, '{ lower = "TOP/srv/a b:c%d", at = "/run/v" }')
    last = drop_in(guest.config.views).splitlines()[-1]
    assert last == f'BindReadOnlyPaths=-/run/v:"{tmp_path}/srv/a b:c%%d"'
