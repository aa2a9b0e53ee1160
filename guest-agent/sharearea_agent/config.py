"""The agent's configuration file: its keys, their defaults, and what has to fit together.

docs/examples/agent.toml shows every key. Reading values and saying what is wrong with them is common/toml_schema.py's.
Which files may be shared in the end is the broker's to decide: here stands only what the guest is willing to report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .common import toml_schema as schema
from .common.toml_schema import Problems, key
from .common.wire import MAX_GLOBS, MAX_HELD

MAX_FOLDERS: Final = 256
MAX_VIEWS: Final = 64
# The kernel takes a lease from us after 45 s (/proc/sys/fs/lease-break-time): by then consumers must have let go.
MAX_LEASE_TIMEOUT: Final = 40.0  # seconds

BACKEND_LOCAL: Final = "local"
BACKEND_XEN: Final = "xen"

_AT: Final = '"/run/sharearea-view/usr-share"'
_VIEW: Final = f'{{ lower = "/usr/share", at = {_AT} }}'
_HINT: Final = "docs/examples/agent.toml shows every key with its default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """A guest view, a table of agent.views. `lower` is its folder; it is mounted `at` another place, or `over` it."""

    lower: Path = field(metadata=key(schema.AbsolutePath('"/usr/share"')))
    at: str = field(default="", metadata=key(schema.OptionalPath(_AT)))
    over: bool = field(default=False, metadata=key(schema.Boolean()))
    verify: str = field(default="resident", metadata=key(schema.Choice(("resident", "all"))))

    @property
    def mounted_at(self) -> Path:
        """Where it is mounted."""
        return self.lower if self.over else Path(self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What the agent is told: the section [agent].

    Paths are absolute, durations seconds. `folders` lie inside `root`; what is reported of a path is the rest behind
    `root`, and `exclude` is matched against that. Symbolic links are never followed.
    """

    name: str = field(metadata=key(schema.Name()))
    folders: tuple[Path, ...] = field(metadata=key(schema.ListOf(schema.AbsolutePath('"/usr"'), 1, MAX_FOLDERS)))
    root: Path = field(default=Path("/"), metadata=key(schema.AbsolutePath('"/"')))
    exclude: tuple[str, ...] = field(default=(), metadata=key(schema.ListOf(schema.Glob(), 0, MAX_GLOBS)))
    one_file_system: bool = field(default=True, metadata=key(schema.Boolean()))
    backend: str = field(default=BACKEND_LOCAL, metadata=key(schema.Choice((BACKEND_LOCAL, BACKEND_XEN))))
    allow_user_mappings: bool = field(default=False, metadata=key(schema.Boolean()))
    consumer_group: str = field(default="", metadata=key(schema.OptionalName(example='"sharearea"')))
    world_readable: bool = field(default=True, metadata=key(schema.Boolean()))
    views: tuple[ViewConfig, ...] = field(
        default=(),
        metadata=key(schema.ListOf(schema.Table(ViewConfig, _VIEW, "a table with lower and at"), 0, MAX_VIEWS)),
    )
    broker_socket: Path = field(
        default=Path("/run/sharearea/broker.sock"), metadata=key(schema.socket_path('"/run/sharearea/broker.sock"'))
    )
    consumer_socket: Path = field(
        default=Path("/run/sharearea-agent/consumers.sock"),
        metadata=key(schema.socket_path('"/run/sharearea-agent/consumers.sock"')),
    )
    control_socket: Path = field(
        default=Path("/run/sharearea-agent/control.sock"),
        metadata=key(schema.socket_path('"/run/sharearea-agent/control.sock"')),
    )
    cache: Path = field(
        default=Path("/var/cache/sharearea-agent/fingerprints.db"),
        metadata=key(
            schema.AbsolutePath('"/var/cache/sharearea-agent/fingerprints.db"', "the absolute path of a file")
        ),
    )
    rescan_interval: float = field(default=60.0, metadata=key(schema.Duration(1, 86_400)))
    settle: float = field(default=0.5, metadata=key(schema.Duration(0, 60)))
    lease_timeout: float = field(default=1.0, metadata=key(schema.Duration(1, MAX_LEASE_TIMEOUT)))
    drop: bool = field(default=True, metadata=key(schema.Boolean()))
    drop_interval: float = field(default=5.0, metadata=key(schema.Duration(0.1, 3600)))
    max_attached_files: int = field(default=4096, metadata=key(schema.Integer(1, MAX_HELD)))
    reconnect_max: float = field(default=30.0, metadata=key(schema.Duration(1, 3600)))
    log_file: str = field(default="", metadata=key(schema.OptionalPath('"/var/log/sharearea-agent/agent.log"')))
    events_interval: float = field(default=10.0, metadata=key(schema.Duration(0.1, 3600)))
    log_level: str = field(default="info", metadata=key(schema.Choice(("debug", "info", "warning", "error"))))

    @classmethod
    def load(cls, path: Path | str) -> AgentConfig:
        """Read and check a file. Raises ConfigError that lists all of its faults."""
        return cls.parse(schema.read_file(Path(path), _HINT), str(path))

    @classmethod
    def parse(cls, data: bytes, file: str) -> AgentConfig:
        """Check the text of a file; `file` names it in messages. Raises ConfigError that lists all of its faults."""
        document = schema.parse(data, file, _HINT)
        problems = Problems(file)
        schema.check_keys(document, ("agent",), "", problems)
        config = schema.read_section(cls, document.get("agent", {}), "agent", problems)
        if config is not None:
            _check_folders(config, problems)
            _check_paths(config, problems)
            _check_backend(config, problems)
            _check_views(config, problems)
        problems.raise_if_any(_HINT)
        assert config is not None  # or there was a problem
        return config


def _check_folders(config: AgentConfig, problems: Problems) -> None:
    for at, folder in enumerate(config.folders):
        where = f"agent.folders[{at}]"
        if not folder.is_relative_to(config.root):
            problems.add(
                where, f"{folder} is not inside agent.root = {config.root}", "write its path with root in front"
            )
        for other, wider in enumerate(config.folders):
            if folder == wider and other < at:
                problems.add(where, f"{folder} is there twice", "leave one out")
            elif folder != wider and folder.is_relative_to(wider):
                problems.add(where, f"{folder} is inside agent.folders[{other}] = {wider}", "leave it out")


def _check_paths(config: AgentConfig, problems: Problems) -> None:
    taken: dict[Path, str] = {}
    for name in ("broker_socket", "consumer_socket", "control_socket", "cache"):
        path: Path = getattr(config, name)
        if path in taken:
            problems.add(f"agent.{name}", f"is the path of agent.{taken[path]} too", "choose another path")
        taken.setdefault(path, name)


def _check_backend(config: AgentConfig, problems: Problems) -> None:
    if config.backend == BACKEND_XEN:
        return
    for name, value, meant in (
        ("allow_user_mappings", config.allow_user_mappings, False),
        ("consumer_group", config.consumer_group, ""),
        ("world_readable", config.world_readable, True),
        ("views", config.views, ()),
    ):
        if value != meant:
            problems.add(f"agent.{name}", f'is for agent.backend = "{BACKEND_XEN}"', "leave it out")


def _check_views(config: AgentConfig, problems: Problems) -> None:
    for number, view in enumerate(config.views):
        where = f"agent.views[{number}]"
        if bool(view.at) == view.over:
            problems.add(where, "is either `at` a place or `over` its folder", "write one of the two")
            continue
        # The kernel splits a mount's options at commas, and /proc/self/mountinfo its lines.
        if "," in str(view.lower) or "\n" in f"{view.lower}{view.at}":
            problems.add(f"{where}.lower", "has a comma or a line's end, which no mount can have", "rename the folder")
        if not any(_related(view.lower, folder) for folder in config.folders):
            problems.add(f"{where}.lower", f"{view.lower} is in none of agent.folders", "designate it there")
        for at, folder in enumerate(config.folders):
            if not view.over and view.mounted_at.is_relative_to(folder):
                # The agent would meet its files there again, where it cannot lease them.
                problems.add(f"{where}.at", f"is inside agent.folders[{at}] = {folder}", f"for example at = {_AT}")
        if view.over and not config.one_file_system:
            problems.add(
                f"{where}.over", "needs agent.one_file_system = true", "leave that out, or mount the view `at`"
            )
        for other, earlier in enumerate(config.views[:number]):
            if view.mounted_at == earlier.mounted_at:
                problems.add(where, f"is mounted at the same place as agent.views[{other}]", "leave one out")
            elif view.over and earlier.over and _related(view.lower, earlier.lower):
                problems.add(where, f"covers the same files as agent.views[{other}]", "leave one out")


def _related(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
