"""deploy/: dashboards, the Elasticsearch template, and how lines get there.

Queries are parsed by Loki's own grammar and evaluated on lines that the log itself wrote, so that a renamed field or
label breaks the build.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharearea.common.events import COMMON, EVENTS, FIELDS, Kind
from sharearea.common.logs import EventLog
from tests import loki
from tests.lines import faults
from tools import gen_grafana

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KEYS = {field.key for field in COMMON} | {field.key for field in FIELDS.values()}
LABELS = {"service_name": "service.name", "host_name": "host.name", "event_kind": "event.kind"}
# What Grafana puts in for its variables.
VARIABLES = {"$host": ".+", "$pool": ".*", "$domain": ".*", "$window": "2m", "$__auto": "1m", "$__range": "6h"}
PANELS = [panel for _, panels in gen_grafana.ROWS for panel in panels if isinstance(panel, gen_grafana.Panel)]


def board(name: str) -> dict[str, Any]:
    """Read a dashboard as Grafana would."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / f"sharearea-{name}.json").read_text())
    return found


def targets(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every query of a dashboard with the title of its panel."""
    for panel in board(name)["panels"]:
        for each in (panel, *panel.get("panels", ())):
            for target in each.get("targets", ()):
                yield each["title"], target


def filled(query: str) -> str:
    """Put the variables in."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def fields(kind: Kind, pool: str, domain: str, number: int) -> dict[str, object]:
    """Return values for all fields of an event, with other numbers for each call."""
    values: dict[str, object] = {"string": "x", "boolean": True, "strings": ["x"]}
    made: dict[str, object] = {}
    for at, name in enumerate((*kind.fields, *kind.options)):
        made[name] = values.get(FIELDS[name].type, (number + at) / (1000 if FIELDS[name].type == "number" else 1))
        if FIELDS[name].type == "integer":
            made[name] = number + at
    given = {"pool": pool, "domain": domain, "path": f"/f{number}", "reason": (*kind.reasons, "")[number % 2]}
    return made | {name: value for name, value in given.items() if name in made}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Every kind of event, by both programs, for two pools of two domains, three times; written by the log itself."""
    stream = io.StringIO()
    logs = {"broker": EventLog("sharearea", "debug", stream), "agent": EventLog("sharearea-agent", "debug", stream)}
    number = 0
    for _ in range(3):
        for kind in EVENTS.values():
            for program in kind.programs:
                for pool in ("one", "two"):
                    for domain in ("a", "b"):
                        number += 100
                        logs[program].event(kind.name, **fields(kind, pool, domain, number))
    written = stream.getvalue().splitlines()
    # The two logs share a process here: their numbers cannot follow each other.
    assert not [fault for fault in faults(written) if " follows line " not in fault]
    return written


@pytest.fixture(scope="module")
def grammar() -> None:
    """Have Loki's grammar, with the node to run it."""
    subprocess.run([ROOT / "tools" / "node.sh"], check=True)
    if shutil.which("node") is None:
        pytest.skip("no node, and no apt-get to get it with")


def test_what_is_generated_is_current() -> None:
    for path, text in gen_grafana.files().items():
        assert path.read_text() == text, path


@pytest.mark.usefixtures("grammar")
def test_every_query_is_logql() -> None:
    queries = [filled(target["expr"]) for _, target in targets("loki")]
    assert len(queries) > 50
    for query, tree in zip(queries, loki.parse(queries), strict=True):
        assert not loki.faults(tree), query
    # The grammar says what is wrong, where something is.
    wrong = ['{a="b"', 'rate({a="b"})', '{a="b"} | unwrap', "sum by (a) (1"]
    assert all(loki.faults(tree) for tree in loki.parse(wrong))


@pytest.mark.usefixtures("grammar")
def test_every_panel_shows_what_the_lines_say(lines: list[str]) -> None:
    events = [json.loads(line) for line in lines]
    shipped = loki.entries(lines, LABELS)
    asked = {(title, target["refId"]): target for title, target in targets("loki")}
    wanted = [
        (panel, name, asked[panel.title, chr(ord("A") + at)])
        for panel in PANELS
        for at, (name, _) in enumerate(panel.figures)
    ]
    trees = loki.parse([filled(target["expr"]) for _, _, target in wanted])
    for (panel, name, target), tree in zip(wanted, trees, strict=True):
        expected: dict[loki.Labels, float] = {}
        for event in events:
            if event["event.name"] != panel.event:
                continue
            keys = ["host.name", *(FIELDS[each].key for each in panel.by)]
            series = tuple(sorted((re.sub(r"\W", "_", key), event[key]) for key in keys if key in event))
            value = 1.0 if panel.how == "count" else float(event[FIELDS[name].key])
            expected[series] = value + (expected.get(series, 0.0) if panel.how in ("sum", "count") else 0.0)
        if panel.how == "top":
            expected = dict(sorted(expected.items(), key=lambda each: -each[1])[: gen_grafana.TOP])
        assert expected, panel.title
        assert loki.evaluate(tree, shipped) == pytest.approx(expected), target["expr"]
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= {label for series in expected for label, _ in series}, panel.title


@pytest.mark.usefixtures("grammar")
def test_events_and_troubles_are_found(lines: list[str]) -> None:
    asked = {title: filled(target["expr"]) for title, target in targets("loki")}
    titles = ("Events", "Warnings, errors, and what was no event", "All events")
    count, troubles, everything = loki.parse([asked[title] for title in titles])
    shipped = loki.entries(lines, LABELS)
    traceback = loki.Entry("Traceback (most recent call last):", dict.fromkeys(LABELS, "sharearea"))
    events = [json.loads(line) for line in lines]
    told = [event for event in events if event["event.kind"] != "metric"]
    counted = loki.evaluate(count, [*shipped, traceback])
    assert counted == {
        (("event_name", name),): float(sum(event["event.name"] == name for event in told))
        for name, kind in EVENTS.items()
        if kind.kind != "metric"
    }
    bad = [line for line, event in zip(lines, events, strict=True) if event["log.level"] in ("warning", "error")]
    assert loki.evaluate(troubles, [*shipped, traceback]) == [*bad, traceback.line]
    shown = loki.evaluate(everything, shipped)
    assert isinstance(shown, list)
    assert len(shown) == len(told)
    for text, event in zip(shown, told, strict=True):
        assert text.startswith(event["event.name"])
        assert text.endswith(event["message"])
        assert event.get("event.reason", "") in text


def test_a_pool_and_a_domain_can_be_chosen(lines: list[str], grammar: None) -> None:
    del grammar
    (tree,) = loki.parse([filled(gen_grafana.Loki().lines("pages.granted")).replace('~".*"', '~"one"', 1)])
    found = loki.evaluate(tree, loki.entries(lines, LABELS))
    assert isinstance(found, list)
    assert {json.loads(line)["sharearea.pool"] for line in found} == {"one"}
    assert len(found) == 6


def test_every_elasticsearch_query_asks_for_fields_of_its_event() -> None:
    schemas = {
        name: json.loads((ROOT / "sharearea" / "schemas" / f"{name}.json").read_text())["properties"] for name in EVENTS
    }
    seen = 0
    for title, target in targets("elasticsearch"):
        query = target["query"]
        event = re.search(r'event\.name:"([a-z_.]+)"', query)
        known: dict[str, Any] = schemas[event[1]] if event else dict.fromkeys(KEYS)
        named = re.findall(r"(?:_exists_:)?([@\w.]+):[^ ]", query.replace("_exists_:", "")) + re.findall(
            r"_exists_:([\w.]+)", query
        )
        named += [each["field"] for each in (*target["metrics"], *target["bucketAggs"]) if each.get("field")]
        named += re.findall(r"\{\{term ([\w.]+)\}\}", target.get("alias", ""))
        assert named, title
        assert target["timeField"] == "@timestamp"
        for name in named:
            assert name in known, f"{title}: {name}"
            seen += 1
        metric = target["metrics"][0]
        if metric["type"] in ("avg", "sum", "max"):
            assert known[metric["field"]]["type"] in ("integer", "number"), title
    assert seen > 200
    for variable in board("elasticsearch")["templating"]["list"]:
        if variable["type"] == "query":
            assert json.loads(variable["query"])["field"] in KEYS


def test_both_dashboards_show_the_same_panels() -> None:
    one, other = (
        [
            (panel["title"], panel["type"], panel["gridPos"], len(panel.get("targets", ())))
            for panel in board(name)["panels"]
        ]
        for name in ("loki", "elasticsearch")
    )
    assert one == other
    assert {panel.title for panel in PANELS} <= {title for title, *_ in one}
    for name in ("loki", "elasticsearch"):
        for variable in board(name)["templating"]["list"]:
            if variable["type"] == "query":
                assert variable["datasource"] == {"type": name, "uid": "${source}"}


def test_the_index_template_has_every_key_with_its_type() -> None:
    template = json.loads((DEPLOY / "elasticsearch" / "index-template.json").read_text())
    mapped = template["template"]["mappings"]["properties"]
    assert set(mapped) == KEYS
    for field in FIELDS.values():
        if field.type in ("integer", "number"):
            assert mapped[field.key]["type"] in ("long", "double"), field.key


# ------------------------------------------------------------------------------------------------ how lines get there


def vector(*names: str) -> dict[str, dict[str, Any]]:
    """Put files of deploy/vector together as Vector does."""
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        for part, components in yaml.safe_load((DEPLOY / "vector" / f"{name}.yaml").read_text()).items():
            assert not set(parts.setdefault(part, {})) & set(components)
            parts[part] |= components
    return parts


@pytest.mark.parametrize("source", ["from-journal", "from-files"])
def test_vector_is_wired_and_takes_few_labels(source: str) -> None:
    parts = vector(source, "events", "to-loki", "to-elasticsearch")
    made = {**parts["sources"], **parts["transforms"]}
    for component in {**parts["transforms"], **parts["sinks"]}.values():
        for wanted in component["inputs"]:
            assert [name for name in made if re.fullmatch(wanted.replace("*", ".*"), name)], wanted
    program = parts["transforms"]["sharearea_events"]["source"]
    assert set(re.findall(r'event\."([^"]+)"', program)) == {*LABELS.values(), "event.module", "@timestamp"}
    assert set(re.findall(r'^ +"([^"]+)":', program.partition(". = {")[0], re.MULTILINE)) <= KEYS
    output = program.partition(". = {")[2]
    labels = parts["sinks"]["sharearea_loki"]["labels"]
    assert set(labels) == set(LABELS) == set(gen_grafana.LABELS)
    for name, template in labels.items():
        assert template == f"{{{{ {name} }}}}"
        assert f'"{name}": event."{LABELS[name]}"' in output
    stream = parts["sinks"]["sharearea_elasticsearch"]["data_stream"]
    template = json.loads((DEPLOY / "elasticsearch" / "index-template.json").read_text())
    assert template["index_patterns"] == [f"{stream['type']}-{stream['dataset']}-*"]


@pytest.mark.parametrize("source", ["from-journal", "from-files"])
@pytest.mark.parametrize("sink", ["to-loki", "to-elasticsearch"])
def test_alloy_is_wired_and_takes_few_labels(source: str, sink: str) -> None:
    text = "".join((DEPLOY / "alloy" / f"{name}.alloy").read_text() for name in (source, sink))
    code = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
    bare = re.sub(r'`[^`]*`|"(?:\\.|[^"\\])*"', '""', code)
    assert all(bare.count(one) == bare.count(other) for one, other in ("{}", "[]", "()"))
    made = {f"{kind}.{label}" for kind, label in re.findall(r'^([a-z_.]+) "(\w+)" \{$', code, re.MULTILINE)}
    used = set(re.findall(r"\b((?:loki|otelcol|local)\.[a-z_.]+\.\w+)\.(?:receiver|input|targets)\b", bare))
    assert used
    assert used <= made
    kept = re.search(r"stage\.label_keep \{\s+values = (\[.*?\])", code, re.DOTALL)
    assert kept is not None
    assert set(json.loads(kept[1])) <= set(LABELS)
    if sink == "to-loki":
        assert set(json.loads(kept[1])) == set(gen_grafana.LABELS)
        named = dict(re.findall(r'(\w+) += "\\"([^"]+)\\""', code))
        assert named == LABELS | {"written": "@timestamp"}
    else:
        assert set(re.findall(r'(?:cache\["|attributes, ")([^"]+)"', code)) - {"upsert"} <= KEYS


def test_units_and_folders_are_those_that_are_installed() -> None:
    # Those of the guest view mount and unmount and end: they log no events.
    units = {path.name for path in (DEPLOY / "systemd").glob("*.service") if "-view" not in path.stem}
    folders = {path.read_text().split(" {")[0].splitlines()[-1] for path in (DEPLOY / "logrotate").iterdir()}
    assert set(vector("from-journal")["sources"]["sharearea_source_journal"]["include_units"]) == units
    assert set(vector("from-files")["sources"]["sharearea_source_files"]["include"]) == folders
    journal, files = ((DEPLOY / "alloy" / f"from-{name}.alloy").read_text() for name in ("journal", "files"))
    assert set(re.findall(r"_SYSTEMD_UNIT=([\w.-]+)", journal)) == units
    assert set(re.findall(r'__path__ = "([^"]+)"', files)) == folders


def test_provisioning_names_what_is_here() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    sources = yaml.safe_load((folder / "datasources.yaml").read_text())["datasources"]
    assert {source["type"] for source in sources} == {"loki", "elasticsearch"}
    data = next(source for source in sources if source["type"] == "elasticsearch")["jsonData"]
    assert {data["timeField"], data["logMessageField"], data["logLevelField"]} <= KEYS
