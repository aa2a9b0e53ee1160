"""Write the Grafana dashboards and the Elasticsearch template in deploy/ from the catalogue of events.

One list of panels, two data sources: what Loki shows, Elasticsearch shows. Every field is looked up in the catalogue,
so that a panel cannot ask for one that no line has; Grafana's own library (grafana-foundation-sdk) writes the JSON. Run
without arguments it rewrites all of it. tests/test_grafana.py fails when something is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    elasticsearch,
    logs,
    loki,
    stat,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    LogsSortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.elasticsearch import TermsOrder
from grafana_foundation_sdk.models.text import TextMode

from sharearea.common.events import COMMON, EVENTS, FIELDS, MAX_PATH_TEXT, OWNER_BUCKETS, Field

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"

# Labels of a stream in Loki: few values each, and the same in deploy/vector and deploy/alloy.
LABELS = ("service_name", "host_name", "event_kind")
TOP = 20  # files, where the largest ones are shown

_COMMON = {field.key: field for field in COMMON}
_SOURCES = {"loki": "Loki", "elasticsearch": "Elasticsearch"}


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel shows: figures of one kind of event.

    `figures`: fields and what they are called. `how`: "last" for figures on a timer, "sum" and "count" for gathered
    events, "top" for the largest of the figures now. `by`: fields that tell series apart, besides the host. Filters of
    the dashboard apply where the event has the field.
    """

    title: str
    text: str
    event: str
    figures: tuple[tuple[str, str], ...]
    by: tuple[str, ...] = ()
    how: Literal["last", "sum", "count", "top"] = "last"
    unit: str = "bytes"
    stacked: bool = False
    large: bool = False

    def __post_init__(self) -> None:
        kind = EVENTS[self.event]
        for name in (*self.by, *(name for name, _ in self.figures)):
            if name not in (*kind.fields, *kind.options):
                raise KeyError(f"{self.title}: {self.event} has no {name}")


def _owners(form: str, word: str) -> tuple[tuple[str, str], ...]:
    buckets = OWNER_BUCKETS if "held" in form else OWNER_BUCKETS[1:]
    return tuple((form.format(bucket), f"{bucket.replace('_', ' ')} {word}") for bucket in buckets)


_SAVED = (
    ("net_saved_bytes", "net saved"),
    ("saved_bytes", "saved"),
    ("possible_saved_bytes", "possible"),
    ("overhead_bytes", "overhead"),
)
_CLASSES = (("text", "executable text"), ("rodata", "read-only data"), ("data", "plain data"))

ROWS: tuple[tuple[str, tuple[Panel | str, ...]], ...] = (
    (
        "What is saved",
        (
            Panel(
                "Now",
                "Memory saved is what guests gave up less what the area takes; net saved is that less all bookkeeping. "
                "Possible: if every page that is held often enough were shared.",
                "host.statistics",
                _SAVED,
                large=True,
            ),
            Panel("Over time", "The same, for each host.", "host.statistics", _SAVED),
            Panel("Net saved, by pool", FIELDS["net_saved_bytes"].text, "pool.statistics", _SAVED[:1], ("pool",)),
            Panel("Saved, by pool", FIELDS["saved_bytes"].text, "pool.statistics", _SAVED[1:2], ("pool",)),
            Panel(
                "By domain",
                "What each domain gave up, less its part of the area.",
                "domain.statistics",
                (("net_bytes", "net"),),
                ("pool", "domain"),
            ),
        ),
    ),
    (
        "Where the bytes are",
        (
            Panel(
                "Reported, by page class",
                "File pages that agents reported, by page class.",
                "pool.statistics",
                tuple((f"reported_{name}_bytes", label) for name, label in _CLASSES),
                ("pool",),
                stacked=True,
            ),
            Panel(
                "Mapped, by page class",
                "Granted pages, by page class. Grants of Xen cannot carry executable text.",
                "pool.statistics",
                (
                    *((f"mapped_{name}_bytes", label) for name, label in _CLASSES),
                    ("mapped_unclassified_bytes", "not known yet"),
                ),
                ("pool",),
                stacked=True,
            ),
            Panel(
                "Files whose copies take the most",
                FIELDS["held_bytes"].text,
                "file.statistics",
                (("held_bytes", ""),),
                ("pool", "path"),
                how="top",
            ),
            Panel(
                "Counted apart",
                "Zero pages are never shared; self-shared pages are copies inside one domain.",
                "pool.statistics",
                (("zero_pages", "zero pages"), ("self_shared_pages", "self-shared pages")),
                ("pool",),
                unit="short",
            ),
        ),
    ),
    (
        "Why not more",
        (
            Panel(
                "Refused files, by reason",
                "Sizes of the files that were refused in each interval. docs/events.md has every reason, "
                "`sharearea why PATH` what to do.",
                "files.refused",
                (("file_bytes", ""),),
                ("reason",),
                how="sum",
                stacked=True,
            ),
            Panel(
                "Reported, and not taken now",
                FIELDS["ignored_files"].text,
                "domain.statistics",
                (("ignored_bytes", ""),),
                ("pool", "domain"),
            ),
            Panel(
                "Programs that got plain files, by reason",
                "Files that programs asked for and could not share.",
                "files.plain",
                (("files", ""),),
                ("reason",),
                how="sum",
                unit="short",
                stacked=True,
            ),
            Panel(
                "Domains refused, by reason",
                "How often a domain was not let into a pool.",
                "domain.refused",
                (("reason", ""),),
                ("reason",),
                how="count",
                unit="short",
                stacked=True,
            ),
        ),
    ),
    (
        "Owners per page",
        (
            Panel(
                "Slots, by how many domains hold their page",
                "The more domains hold a page, the more one copy of it saves.",
                "pool.statistics",
                _owners("slots_held_by_{}", "domains"),
                ("pool",),
                unit="short",
                stacked=True,
            ),
            Panel(
                "Slots, by how often they are mapped",
                "A domain that maps a page through two files counts twice.",
                "pool.statistics",
                _owners("slots_mapped_{}_times", "times"),
                ("pool",),
                unit="short",
                stacked=True,
            ),
        ),
    ),
    (
        "Budgets",
        (
            Panel(
                "Area",
                "Memory that the area takes, and may take.",
                "pool.statistics",
                (("area_bytes", "area"), ("area_max_bytes", "at most"), ("unmapped_bytes", "mapped by nobody")),
                ("pool",),
            ),
            Panel(
                "Area fill",
                FIELDS["area_fill_ratio"].text,
                "pool.statistics",
                (("area_fill_ratio", ""),),
                ("pool",),
                unit="percentunit",
            ),
            Panel(
                "Grants (Xen)",
                "Entries of the area's table of grants.",
                "pool.statistics",
                (("grants_used", "used"), ("grants_max", "at most"), ("grants_pinned", "released, still mapped")),
                ("pool",),
                unit="short",
            ),
            Panel(
                "Grants refused (Xen)",
                "Pages that could not be granted: the table or the domain's part of it is full.",
                "grants.refused",
                (("pages", ""),),
                ("pool", "domain"),
                how="sum",
                unit="short",
                stacked=True,
            ),
        ),
    ),
    (
        "I/O",
        (
            "**I/O avoided: 0.** A program compares a shared page with its own file before it maps it, and reads the "
            "file for that: no reading is avoided yet, and no line claims one (docs/events.md). What sharing reads is "
            "beside.",
            Panel(
                "Read to be fingerprinted",
                "Bytes that agents read in scans. After the first scan only what changed is read again.",
                "scan.finished",
                (("read_bytes", ""),),
                ("domain",),
                how="sum",
                stacked=True,
            ),
        ),
    ),
)


def _key(name: str) -> str:
    return FIELDS[name].key


def label(key: str) -> str:
    """Return the name that Loki's `| json` gives a key."""
    return "".join(char if char.isalnum() or char == "_" else "_" for char in key)


def _has(event: str, name: str) -> bool:
    return name in (*EVENTS[event].fields, *EVENTS[event].options)


class Loki:
    """How Loki is asked."""

    name = "loki"

    def variables(self) -> list[Any]:
        """Pools and domains are in the lines, not in labels: they are typed."""
        hosts = (
            dashboard.QueryVariable("host")
            .label("Host")
            .query({"type": 1, "label": "host_name", "stream": "", "refId": "host"})
        )
        return [
            _everything(hosts, self.name).all_value(".+"),
            dashboard.TextBoxVariable("pool").label("Pool (regular expression)").default_value(".*"),
            dashboard.TextBoxVariable("domain").label("Domain (regular expression)").default_value(".*"),
            _window(),
        ]

    def targets(self, panel: Panel) -> list[Any]:
        """Return one query for each figure."""
        return [self._target(panel, name, word).ref_id(_ref(at)) for at, (name, word) in enumerate(panel.figures)]

    def _target(self, panel: Panel, name: str, word: str) -> loki.Dataquery:
        by = ", ".join(("host_name", *(label(_key(each)) for each in panel.by)))
        lines = self.lines(panel.event)
        unwrapped = f"{lines} | unwrap {label(_key(name))}"
        match panel.how:
            case "last":
                query = f"last_over_time({unwrapped} [$window]) by ({by})"
            case "sum":
                query = f"sum by ({by}) (sum_over_time({unwrapped} [$__auto]))"
            case "count":
                query = f"sum by ({by}) (count_over_time({lines} [$__auto]))"
            case "top":
                query = f"topk({TOP}, last_over_time({unwrapped} [$__range]) by ({by}))"
        names = [f"{{{{{label(_key(each))}}}}}" for each in panel.by] + ["{{host_name}}"]
        made = loki.Dataquery().expr(query).legend_format(" ".join(filter(None, (" ".join(names), word))))
        return made.query_type("instant").instant(True) if panel.how == "top" else made.query_type("range").range(True)

    def lines(self, event: str) -> str:
        """Return the selection of an event's lines."""
        kind = EVENTS[event]
        programs = "|".join("sharearea" if each == "broker" else "sharearea-agent" for each in kind.programs)
        match = f'service_name=~"{programs}"' if "|" in programs else f'service_name="{programs}"'
        selection = (
            f'{{{match}, host_name=~"$host", event_kind="{kind.kind}"}} |= `{event}` | json | event_name="{event}"'
        )
        for name in ("pool", "domain"):
            if _has(event, name):
                selection += f' | {label(_key(name))}=~"${name}"'
        return selection

    def counts(self) -> list[Any]:
        """Return the query of how many events there were."""
        lines = f'{{{self._all}, event_kind!="metric"}} | json | event_name!=""'
        query = f"sum by (event_name) (count_over_time({lines} [$__auto]))"
        return [
            loki.Dataquery().expr(query).legend_format("{{event_name}}").query_type("range").range(True).ref_id("A")
        ]

    _all = 'service_name=~"sharearea|sharearea-agent", host_name=~"$host"'

    def troubles(self) -> list[Any]:
        """Return the query of warnings and errors, and of what was no line of ours (a traceback, say)."""
        query = f'{{{self._all}, event_kind!="metric"}} | json | log_level!~"debug|info"'
        return [loki.Dataquery().expr(query).query_type("range").range(True).max_lines(500).ref_id("A")]

    def events(self) -> list[Any]:
        """Return the query of all events but figures."""
        query = (
            f'{{{self._all}, event_kind!="metric"}} | json'
            ' | line_format "{{.event_name}} {{.sharearea_pool}} {{.sharearea_domain}} {{.event_reason}} {{.message}}"'
        )
        return [loki.Dataquery().expr(query).query_type("range").range(True).max_lines(1000).ref_id("A")]


class Elasticsearch:
    """How Elasticsearch is asked. Its data source names the index: `logs-sharearea-*`."""

    name = "elasticsearch"

    def variables(self) -> list[Any]:
        """Return a list for each field that has few values."""
        made: list[Any] = []
        for name, word, key in (
            ("host", "Host", "host.name"),
            ("pool", "Pool", _key("pool")),
            ("domain", "Domain", _key("domain")),
        ):
            query = json.dumps({"find": "terms", "field": key, "size": 500})
            made.append(_everything(dashboard.QueryVariable(name).label(word).query(query), self.name).all_value("*"))
        return [*made, _window()]

    def targets(self, panel: Panel) -> list[Any]:
        """Return one query for each figure."""
        return [self._target(panel, name, word).ref_id(_ref(at)) for at, (name, word) in enumerate(panel.figures)]

    def _target(self, panel: Panel, name: str, word: str) -> elasticsearch.Dataquery:
        metric: Any
        match panel.how:
            case "last":
                metric = elasticsearch.Average().field(_key(name))
            case "sum":
                metric = elasticsearch.Sum().field(_key(name))
            case "count":
                metric = elasticsearch.Count()
            case "top":
                metric = elasticsearch.Max().field(_key(name))
        buckets: list[Any] = []
        for each in ("host.name", *(_key(each) for each in panel.by)):
            size = "500" if panel.how != "top" else str(TOP)
            settings = elasticsearch.ElasticsearchTermsSettings().order(TermsOrder.DESC).size(size).order_by("_term")
            buckets.append(elasticsearch.Terms().field(each).settings(settings))
        if panel.how == "top":
            buckets[-1].settings(settings.order_by("1"))
        if panel.how != "top":
            step = "$window" if panel.how == "last" else "auto"
            buckets.append(_histogram(step, "1" if panel.how == "last" else "0"))
        names = [f"{{{{term {_key(each)}}}}}" for each in panel.by] + ["{{term host.name}}"]
        return self._query(self.lines(panel.event), metric, buckets).alias(
            " ".join(filter(None, (" ".join(names), word)))
        )

    @staticmethod
    def _query(query: str, metric: Any, buckets: list[Any]) -> elasticsearch.Dataquery:
        for at, bucket in enumerate(buckets):
            bucket.id(str(at + 2))
        made = elasticsearch.Dataquery().query(query).metrics([metric.id("1")]).bucket_aggs(buckets)
        return made.time_field("@timestamp")

    def lines(self, event: str) -> str:
        """Return the selection of an event's lines."""
        selection = f'event.name:"{event}" AND host.name:$host'
        for name in ("pool", "domain"):
            if name in EVENTS[event].fields:
                selection += f" AND {_key(name)}:${name}"
            elif name in EVENTS[event].options:
                selection += f" AND ({_key(name)}:${name} OR NOT _exists_:{_key(name)})"
        return selection

    def counts(self) -> list[Any]:
        """Return the query of how many events there were."""
        settings = elasticsearch.ElasticsearchTermsSettings().order(TermsOrder.DESC).size("60").order_by("_count")
        buckets = [elasticsearch.Terms().field("event.name").settings(settings), _histogram("auto", "0")]
        query = "event.module:sharearea AND host.name:$host AND NOT event.kind:metric"
        return [self._query(query, elasticsearch.Count(), buckets).alias("{{term event.name}}").ref_id("A")]

    def _logs(self, query: str, limit: str) -> list[Any]:
        metric = elasticsearch.Logs().settings(elasticsearch.ElasticsearchLogsSettings().limit(limit))
        return [self._query(query, metric, []).ref_id("A")]

    def troubles(self) -> list[Any]:
        """Return the query of warnings and errors, and of what was no line of ours (a traceback, say)."""
        return self._logs("event.module:sharearea AND host.name:$host AND NOT log.level:(debug OR info)", "500")

    def events(self) -> list[Any]:
        """Return the query of all events but figures."""
        return self._logs("event.module:sharearea AND host.name:$host AND NOT event.kind:metric", "1000")


def _histogram(step: str, least: str) -> Any:
    settings = elasticsearch.ElasticsearchDateHistogramSettings().interval(step).min_doc_count(least).trim_edges("0")
    return elasticsearch.DateHistogram().field("@timestamp").settings(settings)


def _ref(at: int) -> str:
    return chr(ord("A") + at)


def _source(name: str) -> DataSourceRef:
    return DataSourceRef(type_val=name, uid="${source}")


def _everything(variable: dashboard.QueryVariable, source: str) -> dashboard.QueryVariable:
    chosen = VariableOption(text="All", value="$__all", selected=True)
    return (
        variable.datasource(_source(source))
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .current(chosen)
    )


def _window() -> dashboard.IntervalVariable:
    chosen = VariableOption(text="2m", value="2m", selected=True)
    values = "1m,2m,5m,15m,1h"
    about = "How old a figure may be and still be shown: at least status_interval of the broker's configuration"
    return (
        dashboard.IntervalVariable("window")
        .label("Figures at most this old")
        .description(about)
        .values(values)
        .current(chosen)
    )


def _legend() -> common.VizLegendOptions:
    options = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
    return options.placement(LegendPlacement.BOTTOM)


def _drawn(panel: Panel, way: Loki | Elasticsearch) -> Any:
    made: Any
    if panel.large:
        reduced = common.ReduceDataOptions().calcs(["lastNotNull"])
        made = stat.Panel().reduce_options(reduced).height(4).span(24).no_value("no figures yet")
    elif panel.how == "top":
        reduced = common.ReduceDataOptions().calcs(["lastNotNull"]).values(way.name == "elasticsearch").limit(TOP)
        made = bargauge.Panel().reduce_options(reduced).orientation(VizOrientation.HORIZONTAL).height(12).span(24)
    else:
        mode = StackingMode.NORMAL if panel.stacked else StackingMode.NONE
        made = (
            timeseries.Panel()
            .stacking(common.StackingConfig().mode(mode).group("A"))
            .fill_opacity(20 if panel.stacked else 0)
            .show_points(VisibilityMode.AUTO)
            .span_nulls(panel.how == "last")
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
            .legend(_legend())
            .height(8)
            .span(12)
        )
    return (
        made.title(panel.title)
        .description(panel.text)
        .unit(panel.unit)
        .datasource(_source(way.name))
        .targets(way.targets(panel))
    )


def built(way: Loki | Elasticsearch) -> dashboard.Dashboard:
    """Return the dashboard for one data source."""
    board = (
        dashboard.Dashboard(f"sharearea ({_SOURCES[way.name]})")
        .uid(f"sharearea-{way.name}")
        .description("What sharearea saves, and why not more; from its log lines.")
        .tags(["sharearea"])
        .time("now-6h", "now")
        .refresh("1m")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
        .with_variable(dashboard.DatasourceVariable("source").label("Data source").type(way.name))
    )
    for variable in way.variables():
        board = board.with_variable(variable)
    for title, panels in ROWS:
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            if isinstance(panel, str):
                board = board.with_panel(
                    text.Panel().title("").mode(TextMode.MARKDOWN).content(panel).height(8).span(12)
                )
            else:
                board = board.with_panel(_drawn(panel, way))
    counted = timeseries.Panel().title("Events").description("How many of each kind, figures left out.").unit("short")
    counted = (
        counted.legend(_legend())
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        .fill_opacity(20)
    )
    board = board.with_row(dashboard.Row("Events")).with_panel(
        counted.datasource(_source(way.name)).targets(way.counts()).height(8).span(24)
    )
    for title, targets in (("Warnings, errors, and what was no event", way.troubles()), ("All events", way.events())):
        shown = logs.Panel().title(title).show_time(True).enable_log_details(True).sort_order(LogsSortOrder.DESCENDING)
        board = board.with_panel(shown.datasource(_source(way.name)).targets(targets).height(10).span(24))
    return board


_TYPES: dict[str, dict[str, Any]] = {
    "integer": {"type": "long"},
    "number": {"type": "double"},
    "boolean": {"type": "boolean"},
    "string": {"type": "keyword", "ignore_above": 8191},
    "strings": {"type": "keyword", "ignore_above": 8191},
}


def _mapping(field: Field) -> dict[str, Any]:
    if field.key == "@timestamp":
        return {"type": "date"}
    if field.key in ("message", "error.message"):
        return {"type": "match_only_text"}
    if field.key == "file.path":  # a keyword of at most 32,766 bytes
        return {"type": "keyword", "ignore_above": MAX_PATH_TEXT // 2}
    return _TYPES[field.type]


def template() -> dict[str, Any]:
    """Return the index template: what our fields are in Elasticsearch."""
    fields = {**_COMMON, **{field.key: field for field in FIELDS.values()}}
    return {
        "index_patterns": ["logs-sharearea-*"],
        "priority": 200,
        "data_stream": {},
        "template": {"mappings": {"properties": {key: _mapping(fields[key]) for key in sorted(fields)}}},
        "_meta": {"description": "sharearea's events; made by tools/gen_grafana.py from the catalogue"},
    }


def files() -> dict[Path, str]:
    """Return the text of every file that is made here."""
    encoded: Callable[[Any], str] = lambda board: json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"  # noqa: E731
    made = {
        DEPLOY / "grafana" / "dashboards" / f"sharearea-{way.name}.json": encoded(built(way).build())
        for way in (Loki(), Elasticsearch())
    }
    made[DEPLOY / "elasticsearch" / "index-template.json"] = json.dumps(template(), indent=2) + "\n"
    return made


if __name__ == "__main__":
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
