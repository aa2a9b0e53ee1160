"""LogQL as Loki reads it, for the queries of deploy/grafana: parsed by the official grammar, evaluated on our lines.

Evaluated is what those queries use, over all lines at once (as if every range held them all); anything else raises.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "logql"

Labels = tuple[tuple[str, str], ...]

_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "Eq": lambda value, wanted: value == wanted,
    "Neq": lambda value, wanted: value != wanted,
    "Re": lambda value, wanted: re.fullmatch(wanted, value) is not None,
    "Nre": lambda value, wanted: re.fullmatch(wanted, value) is None,
}
_LINES: dict[str, Callable[[str, str], bool]] = {
    "PipeExact": lambda line, wanted: wanted in line,
    "Neq": lambda line, wanted: wanted not in line,
}


@dataclass(slots=True)
class Node:
    """One node of a syntax tree."""

    name: str
    text: str
    error: bool
    children: list[Node]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Node:
        """Return what parse.mjs printed."""
        return cls(tree["name"], tree["text"], tree["error"], [cls.of(child) for child in tree["children"]])

    def every(self) -> Iterator[Node]:
        """Yield this node and all below it, in the order of the text."""
        yield self
        for child in self.children:
            yield from child.every()

    def only(self, name: str) -> Node:
        """Return the child of a name."""
        (found,) = (child for child in self.children if child.name == name)
        return found

    def maybe(self, name: str) -> Node | None:
        """Return the child of a name, None without one."""
        return next((child for child in self.children if child.name == name), None)


def parse(queries: list[str]) -> list[Node]:
    """Return the syntax tree of each query. `tools/node.sh` must have run."""
    done = subprocess.run(
        ["node", str(FOLDER / "parse.mjs")], input=json.dumps(queries), capture_output=True, text=True, check=True
    )
    return [Node.of(tree) for tree in json.loads(done.stdout)]


def faults(tree: Node) -> list[str]:
    """Return the parts of a query that the grammar does not know."""
    return [node.text or "(something is missing)" for node in tree.every() if node.error]


@dataclass(slots=True)
class Entry:
    """A line on its way through a pipeline: labels of its stream, then those that parsers add."""

    line: str
    labels: dict[str, str] = field(default_factory=dict)
    value: float | None = None


def entries(lines: Iterable[str], labels: Mapping[str, str]) -> list[Entry]:
    """Return lines as a shipper hands them in. `labels`: names of labels, and the keys of the line they come from."""
    made = []
    for line in lines:
        event = json.loads(line)
        made.append(Entry(line, {name: event[key] for name, key in labels.items()}))
    return made


def evaluate(tree: Node, lines: Iterable[Entry]) -> dict[Labels, float] | list[str]:
    """Return what a query answers: a number for each series, or lines."""
    expression = tree.only("Expr").children[0]
    if expression.name == "LogExpr":
        return [entry.line for entry in _selected(expression, lines)]
    return _metric(expression, list(lines))


def _metric(node: Node, lines: list[Entry]) -> dict[Labels, float]:
    [inner] = node.children
    match inner.name:
        case "RangeAggregationExpr":
            return _over_time(inner, lines)
        case "VectorAggregationExpr":
            series = _metric(inner.only("MetricExpr"), lines)
            match inner.only("VectorOp").text:
                case "sum":
                    return _grouped(_names(inner), ((dict(labels), value) for labels, value in series.items()), sum)
                case "topk":
                    most = next(int(each.text) for each in inner.children if each.text.isdigit())
                    return dict(sorted(series.items(), key=lambda each: -each[1])[:most])
    raise NotImplementedError(inner.text)


def _over_time(node: Node, lines: list[Entry]) -> dict[Labels, float]:
    logs = node.only("LogRangeExpr")
    found = _selected(logs, lines)
    unwrap = logs.maybe("UnwrapExpr")
    operation = node.only("RangeOp").text
    if unwrap is None:
        if operation != "count_over_time":
            raise NotImplementedError(node.text)
        names = [*{name for entry in found for name in entry.labels}]
        return _grouped(names, ((entry.labels, 1.0) for entry in found), sum)
    label = unwrap.only("Identifier").text
    values = ((entry.labels, float(entry.labels[label])) for entry in found if label in entry.labels)
    match operation:
        case "last_over_time":
            return _grouped(_names(node), values, lambda numbers: list(numbers)[-1])
        case "sum_over_time":
            rest = [*{name for entry in found for name in entry.labels} - {label}]
            return _grouped(rest, values, sum)
    raise NotImplementedError(node.text)


def _names(node: Node) -> list[str]:
    return [each.text for each in node.only("Grouping").only("Labels").every() if each.name == "Identifier"]


def _grouped(
    names: Iterable[str], values: Iterable[tuple[Mapping[str, str], float]], how: Callable[[list[float]], float]
) -> dict[Labels, float]:
    """Group by labels; a series does not have a label that no line of it has, as in Loki."""
    names = sorted(names)
    groups: dict[Labels, list[float]] = {}
    for labels, value in values:
        groups.setdefault(tuple((name, labels[name]) for name in names if name in labels), []).append(value)
    return {labels: how(numbers) for labels, numbers in groups.items()}


def _selected(node: Node, lines: Iterable[Entry]) -> list[Entry]:
    matchers = [_matcher(each) for each in node.only("Selector").every() if each.name == "Matcher"]
    found = [Entry(each.line, dict(each.labels)) for each in lines if all(matches(each.labels) for matches in matchers)]
    for stage in (each for each in node.every() if each.name == "PipelineStage"):
        found = [entry for entry in found if _staged(stage, entry)]
    return found


def _matcher(node: Node) -> Callable[[Mapping[str, str]], bool]:
    name, operator, wanted = node.children
    matches = _MATCHES[operator.name]
    return lambda labels: matches(labels.get(name.text, ""), _string(wanted))


def _string(node: Node) -> str:
    return node.text[1:-1] if node.text.startswith("`") else str(json.loads(node.text))


def _staged(stage: Node, entry: Entry) -> bool:
    """Put an entry through one stage; return whether it goes on."""
    what = stage.children[-1]
    match what.name:
        case "LineFilters":
            filters = [each for each in what.every() if each.name == "LineFilter"]
            return all(
                _LINES[each.only("Filter").children[0].name](entry.line, _string(each.only("String")))
                for each in filters
            )
        case "LabelParser" if what.text == "json":
            return _json(entry)
        case "LabelFilter":
            return all(_matcher(each)(entry.labels) for each in what.every() if each.name == "Matcher")
        case "LineFormatExpr":
            template = _string(what.only("String"))
            entry.line = re.sub(r"\{\{\.(\w+)\}\}", lambda found: entry.labels.get(found[1], ""), template)
            return True
    raise NotImplementedError(stage.text)


def _json(entry: Entry) -> bool:
    """As Loki's parser: keys with underscores, texts, numbers and booleans; lists are passed over."""
    try:
        event = json.loads(entry.line)
    except ValueError:
        entry.labels["__error__"] = "JSONParserErr"
        return True
    for key, value in event.items():
        if isinstance(value, list):
            continue
        if isinstance(value, dict):
            raise NotImplementedError(key)
        name = re.sub(r"\W", "_", key)
        # A label of the stream is not overwritten.
        entry.labels[f"{name}_extracted" if name in entry.labels else name] = (
            value if isinstance(value, str) else json.dumps(value)
        )
    return True
