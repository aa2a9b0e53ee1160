"""The agent's configuration: what is read, what is refused, and that its example is whole."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from sharearea_agent.common import toml_schema as schema
from sharearea_agent.common.errors import ConfigError
from sharearea_agent.config import AgentConfig

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "agent.toml"

MINIMAL = '[agent]\nname = "web-1"\nfolders = ["/usr"]\n'
WITHOUT_FOLDERS = '[agent]\nname = "web-1"\n'


def parse(text: str) -> AgentConfig:
    return AgentConfig.parse(text.encode(), "agent.toml")


def faults(text: str) -> list[str]:
    """Return the lines of the one error that a text gives."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "docs/examples/agent.toml" in caught.value.hint
    first, *rest = caught.value.message.split("\n")
    assert first.startswith("agent.toml: ")
    return [line.strip() for line in rest] if rest else [first.removeprefix("agent.toml: ")]


def test_name_and_folders_are_enough() -> None:
    config = parse(MINIMAL)
    assert (config.name, config.folders, config.root) == ("web-1", (Path("/usr"),), Path("/"))
    assert (config.rescan_interval, config.settle, config.lease_timeout) == (60.0, 0.5, 1.0)
    assert (config.drop, config.one_file_system, config.exclude) == (True, True, ())


def test_what_is_for_xen_alone_is_refused_on_local() -> None:
    assert faults(MINIMAL + 'allow_user_mappings = true\nconsumer_group = "x"\nworld_readable = false\n') == [
        'agent.allow_user_mappings: is for agent.backend = "xen"; leave it out',
        'agent.consumer_group: is for agent.backend = "xen"; leave it out',
        'agent.world_readable: is for agent.backend = "xen"; leave it out',
    ]
    config = parse(MINIMAL + 'backend = "xen"\nconsumer_group = ""\n')
    assert (config.backend, config.allow_user_mappings, config.world_readable) == ("xen", False, True)
    (fault,) = faults(MINIMAL + 'backend = "xen"\nconsumer_group = "a b"\n')
    assert fault.startswith("agent.consumer_group: expected a name of at most 64 characters")


def test_values_arrive() -> None:
    config = parse(
        """
        [agent]
        name = "db"
        root = "/srv/db"
        folders = ["/srv/db/usr", "/srv/db/opt"]
        exclude = ["*.a", "/opt/**"]
        one_file_system = false
        backend = "xen"
        allow_user_mappings = true
        consumer_group = "sharers"
        world_readable = false
        views = [{ lower = "/srv/db/usr/share", at = "/run/v", verify = "all" }, { lower = "/srv/db/opt", at = "/w" }]
        broker_socket = "/b"
        consumer_socket = "/c"
        control_socket = "/d"
        cache = "/e"
        rescan_interval = "1 h"
        settle = "0 s"
        lease_timeout = "40 s"
        drop = false
        drop_interval = "100 ms"
        max_attached_files = 65536
        reconnect_max = "1 min"
        log_file = "/f.log"
        events_interval = "2 s"
        log_level = "debug"
        """
    )
    assert dataclasses.astuple(config) == (
        "db",
        (Path("/srv/db/usr"), Path("/srv/db/opt")),
        Path("/srv/db"),
        ("*.a", "/opt/**"),
        False,
        "xen",
        True,
        "sharers",
        False,
        ((Path("/srv/db/usr/share"), "/run/v", False, "all"), (Path("/srv/db/opt"), "/w", False, "resident")),
        Path("/b"),
        Path("/c"),
        Path("/d"),
        Path("/e"),
        3600.0,
        0.0,
        40.0,
        False,
        0.1,
        65536,
        60.0,
        "/f.log",
        2.0,
        "debug",
    )


XEN = MINIMAL + 'backend = "xen"\n'


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ('{ lower = "/usr" }', "agent.views[0]: is either `at` a place or `over` its folder"),
        ('{ lower = "/usr", at = "/v", over = true }', "agent.views[0]: is either `at` a place or `over` its folder"),
        ('{ lower = "/usr/a,b", over = true }', "agent.views[0].lower: has a comma or a line's end"),
        ('{ lower = "/srv", over = true }', "agent.views[0].lower: /srv is in none of agent.folders"),
        ('{ lower = "/usr", at = "/usr/v" }', "agent.views[0].at: is inside agent.folders[0] = /usr"),
        (
            '{ lower = "/usr/a", over = true }, { lower = "/usr/a/b", over = true }',
            "agent.views[1]: covers the same files as agent.views[0]",
        ),
        (
            '{ lower = "/usr/a", at = "/v" }, { lower = "/usr/b", at = "/v" }',
            "agent.views[1]: is mounted at the same place as agent.views[0]",
        ),
        ('{ lower = "/usr", at = "/v", verify = "none" }', "agent.views[0].verify: expected"),
        ('{ at = "/v" }', "agent.views[0].lower: is missing"),
        ('"/usr"', "agent.views[0]: expected a table"),
    ],
)
def test_views_that_cannot_be_meant_are_refused(views: str, expected: str) -> None:
    (fault,) = faults(XEN + f"views = [{views}]\n")
    assert fault.startswith(expected)


def test_views_are_for_xen_and_those_over_their_folder_for_one_file_system() -> None:
    assert faults(MINIMAL + 'views = [{ lower = "/usr", over = true }]\n') == [
        'agent.views: is for agent.backend = "xen"; leave it out'
    ]
    (fault,) = faults(XEN + 'one_file_system = false\nviews = [{ lower = "/usr", over = true }]\n')
    assert fault.startswith("agent.views[0].over: needs agent.one_file_system = true")
    wider = parse(XEN + 'views = [{ lower = "/usr/share", over = true }, { lower = "/", at = "/v" }]\n')
    assert [(view.over, str(view.mounted_at)) for view in wider.views] == [(True, "/usr/share"), (False, "/v")]


def test_root_itself_may_be_a_folder() -> None:
    config = parse('[agent]\nname = "a"\nroot = "/srv"\nfolders = ["/srv"]\n')
    assert config.folders == (config.root,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WITHOUT_FOLDERS, 'agent.folders: is missing and has no default; for example folders = ["/usr"]'),
        ('[agent]\nfolders = ["/usr"]', 'agent.name: is missing and has no default; for example name = "web-1"'),
        (WITHOUT_FOLDERS + "folders = []", "agent.folders: expected a list of 1 to 256 entries"),
        (WITHOUT_FOLDERS + 'folders = "/usr"', "agent.folders: expected a list of 1 to 256 entries"),
        (
            WITHOUT_FOLDERS + 'folders = ["usr"]',
            'agent.folders[0]: expected an absolute path, found the text "usr"; for',
        ),
        (
            WITHOUT_FOLDERS + 'folders = ["/usr/"]',
            'agent.folders[0]: the text "/usr/" has needless slashes or dots; write "/u',
        ),
        (WITHOUT_FOLDERS + 'folders = ["/usr/../etc"]', 'agent.folders[0]: the text "/usr/../etc" goes up'),
        (WITHOUT_FOLDERS + 'folders = ["/a", "/a"]', "agent.folders[1]: /a is there twice"),
        (WITHOUT_FOLDERS + 'folders = ["/a/b", "/a"]', "agent.folders[0]: /a/b is inside agent.folders[1] = /a"),
        (MINIMAL + 'root = "/srv"', "agent.folders[0]: /usr is not inside agent.root = /srv"),
        ('[agent]\nname = "a"\nroot = "/srv"\nfolders = ["/srvx"]', "agent.folders[0]: /srvx is not inside"),
        (MINIMAL + 'exclude = ["a/b"]', 'agent.exclude[0]: the glob "a/b" is relative'),
        (MINIMAL + 'lease_timeout = "45 s"', "agent.lease_timeout: expected a time from 1 s to 40 s"),
        (MINIMAL + "settle = 500", "agent.settle: expected a time from 0 s to 60 s"),
        (MINIMAL + "max_attached_files = 65537", "agent.max_attached_files: expected a whole number from 1 to 65536"),
        (MINIMAL + "follow = true", "agent.follow: unknown key"),
        (MINIMAL + "rescan_intervall = '1 s'", "agent.rescan_intervall: unknown key; did you mean rescan_interval?"),
        (
            MINIMAL + 'control_socket = "/run/sharearea/broker.sock"',
            "agent.control_socket: is the path of agent.broker_s",
        ),
        (MINIMAL + f'consumer_socket = "/{"a" * 107}"', "agent.consumer_socket: the path has more than 107 bytes"),
        (MINIMAL.replace("web-1", "web 1"), "agent.name: expected a name of 1 to 64 characters"),
        (MINIMAL + "[broker]", "broker: unknown key; the keys here are agent"),
    ],
)
def test_a_fault_names_key_and_remedy(text: str, expected: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert found[0].startswith(expected)
    assert "; " in found[0]


def test_all_faults_are_reported_at_once() -> None:
    found = faults('[agent]\nnam = "a"\ndrop = 1\nsettle = "x"\nexclude = ["[", "*.a", "{"]\n')
    assert [fault.split(": ")[0] for fault in found] == [
        "agent.nam",
        "agent.exclude[0]",
        "agent.exclude[2]",
        "agent.settle",
        "agent.drop",
        "agent.name",
        "agent.folders",
    ]


def test_an_empty_file_says_what_is_needed() -> None:
    assert [fault.split(": ")[0] for fault in faults("")] == ["agent.name", "agent.folders"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        AgentConfig.load(tmp_path / "none.toml")


def test_example_has_every_key_and_no_other() -> None:
    document = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert set(document) == {"agent"}
    assert set(document["agent"]) == set(schema.keys_of(AgentConfig))


def test_example_shows_the_defaults() -> None:
    assert AgentConfig.load(EXAMPLE) == parse(MINIMAL)


def test_example_says_every_default() -> None:
    comment = ""
    seen: list[str] = []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120
        if line.startswith("#"):
            comment += line.removeprefix("#")
            continue
        if found := re.match(r"([a-z_]+) = (.*)", line):
            wanted = "none, has to be written" if found[1] in ("name", "folders") else found[2]
            assert comment.endswith(f"Default: {wanted}."), found[1]
            seen.append(found[1])
        comment = ""
    assert sorted(seen) == sorted(schema.keys_of(AgentConfig))
