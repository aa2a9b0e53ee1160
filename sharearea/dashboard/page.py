"""The dashboard's page: what is where, and what happens when something is chosen. Dash and plotly draw it.

One page of plain headings, tables and buttons, in the order in which one would ask; every chart has its numbers as a
table below it, and every row of a table a button that shows the events behind it. Nothing comes from outside: scripts
and styles are the libraries' own, from the disk, and the answers forbid the browser to ask anybody else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import flask
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update
from werkzeug.sansio.utils import host_is_trusted

from . import charts
from .charts import Amount, Chart, Table, bytes_text, time_text
from .snapshot import TOP_FILES, Choice, Problem, Row, Snapshot, Source, details

TABLE_ROWS: Final = 200
_WINDOWS: Final = {"": "all", "900": "15 min", "3600": "1 h", "21600": "6 h", "86400": "1 day", "604800": "7 days"}
_TILES: Final = (
    ("net_saved_bytes", "net saved", "saved, less all bookkeeping"),
    ("saved_bytes", "saved", "what guests gave up, less the area"),
    ("possible_saved_bytes", "possible", "if every page that is held often enough were shared"),
    ("given_up_bytes", "given up", "page cache that guests let go"),
    ("area_bytes", "area", "memory that holds the one copy"),
    ("overhead_bytes", "overhead", "bookkeeping of both sides"),
)
_CHARTS: Final[dict[str, tuple[str, str]]] = {
    "saved": (
        "Saved over time",
        "Dotted: memory saved. Solid: net saved, which is that less all bookkeeping. By domain: what it gave up, and "
        f"that less its part of the area. The chart has the {charts.LINES} that matter most, the table all.",
    ),
    "classes": (
        "Page classes",
        "File pages that agents reported, and pages that domains map. Grants of Xen cannot carry executable text.",
    ),
    "largest": (
        "Files",
        f"The {TOP_FILES} files whose copies take the most.",
    ),
    "packages": (
        "Packages",
        "The packages whose files' copies take the most; of the files that the broker names in file.statistics.",
    ),
    "refusals": (
        "Refusals, by reason",
        "How it is at the end of the window. Sizes of files that programs asked for are not known.",
    ),
    "owners": (
        "Owners per page",
        "Slots of the area by how many domains hold their page. The more they are, the more one copy saves. A domain "
        "that maps a page through two files counts twice in what is mapped.",
    ),
    "budgets": ("Area and grants", "How full each pool's area is, and on Xen its table of grants."),
}
_DRAWN: Final[dict[str, Callable[[Snapshot], Chart]]] = {
    "classes": charts.page_classes,
    "largest": charts.largest,
    "packages": charts.packages,
    "refusals": charts.refusals,
    "owners": charts.owners,
    "budgets": charts.budgets,
}
_NO_CONFIG: Final[Any] = {"displayModeBar": False, "responsive": True}

_INDEX: Final = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<title>{%title%}</title>
{%css%}
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
{%app_entry%}
<noscript>This page needs JavaScript. Without it: sharearea stats --logs ...</noscript>
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>
"""


def make_app(source: Source, hosts: Sequence[str], every_s: float) -> Dash:
    """Return the page over a source.

    `hosts`: names and addresses under which it may be asked for, without the port; empty: any. `every_s`: how often the
    page asks.
    """
    app = Dash(
        __name__,
        title="sharearea",
        update_title="",
        index_string=_INDEX,
        serve_locally=True,
        meta_tags=[
            {"name": "viewport", "content": "width=device-width, initial-scale=1"},
            {"name": "color-scheme", "content": "light dark"},
        ],
    )
    app.layout = _layout(every_s)
    _answer(app, source)
    _guard(app, hosts)
    return app


def _guard(app: Dash, hosts: Sequence[str]) -> None:
    """Answer only who asks for us by our own name (a page elsewhere may have its name point here), and forbid the
    browser to ask anybody else.
    """
    scripts = " ".join(app.csp_hashes())
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    def known() -> Any:
        # werkzeug takes the port off; an IPv6 address it leaves in brackets.
        if not host_is_trusted(flask.request.host, [*hosts, *(f"[{host}]" for host in hosts if ":" in host)]):
            return flask.Response("this dashboard is not served under that name\n", 400, mimetype="text/plain")
        return None

    def marked(answer: flask.Response) -> flask.Response:
        answer.headers["Content-Security-Policy"] = policy
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    app.server.before_request(known)
    app.server.after_request(marked)


# ------------------------------------------------------------------------------------------------------------- layout


def _layout(every_s: float) -> html.Div:
    return html.Div(
        [
            html.Header([html.H1("sharearea"), html.P(id="about", role="status")]),
            html.Main(
                [
                    html.Div(id="problem"),
                    html.Div(
                        [
                            _filters(),
                            html.Section([html.H2("Now", className="hidden"), html.Dl(id="tiles", className="tiles")]),
                            _section("saved", _by()),
                            html.H2("Where the bytes are"),
                            html.Div(
                                [_section("classes"), _section("packages", html.P(id="package-note"))], className="pair"
                            ),
                            _section("largest"),
                            html.H2("Why not more"),
                            _section("refusals"),
                            html.Section(
                                [
                                    html.H3("What else stands in the way"),
                                    html.Div(id="obstacles"),
                                ]
                            ),
                            html.H2("Owners and budgets"),
                            html.Div([_section("owners"), _section("budgets")], className="pair"),
                            html.H2("I/O avoided"),
                            html.Div(id="reading"),
                            html.Section(
                                [
                                    html.H2("Events", id="events-title", tabIndex="-1"),
                                    html.P(id="events-about", role="status"),
                                    html.Button("All events", id="events-all", type="button"),
                                    html.Div(id="events"),
                                ]
                            ),
                        ],
                        id="figures",
                        hidden=True,
                    ),
                ],
                id="main",
            ),
            dcc.Interval(id="tick", interval=int(1000 * every_s)),
            dcc.Store(id="serial"),
            dcc.Store(id="behind", data={}),
        ]
    )


def _filters() -> html.Section:
    return html.Section(
        [
            html.H2("What to show", className="hidden"),
            _radio("window", "The last", _WINDOWS, ""),
            _radio("host", "Host", {"": "all"}, ""),
            _radio("pool", "Pool", {"": "all"}, ""),
        ],
        className="filters",
    )


def _by() -> html.Div:
    return _radio("by", "By", {"host": "host", "pool": "pool", "domain": "domain"}, "host")


def _radio(name: str, label: str, options: Mapping[str, str], value: str) -> html.Div:
    # Native radio buttons: the arrow keys choose, a phone draws them large.
    return html.Div(
        [
            html.Span(label, id=f"{name}-label"),
            dcc.RadioItems(id=name, options=_options(options), value=value, inline=True),
        ],
        role="radiogroup",
        className="choice",
        id=f"{name}-choice",
        **_marks(aria_labelledby=f"{name}-label"),
    )


def _options(options: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"label": label, "value": value} for value, label in options.items()]


def _section(name: str, *more: Any) -> html.Section:
    title, text = _CHARTS[name]
    heading = html.H2 if name == "saved" else html.H3
    return html.Section(
        [
            heading(title, id=f"{name}-title"),
            html.P(text),
            *more,
            html.Div(
                dcc.Graph(id={"chart": name}, config=_NO_CONFIG, responsive=True),
                id=f"{name}-frame",
                role="img",
                className="chart",
                **_marks(aria_label=f"Chart: {title}. The table below has its numbers."),
            ),
            html.Details([html.Summary(f"Table: {title}"), html.Div(id=f"{name}-table")]),
        ],
        id=f"{name}-section",
    )


# ------------------------------------------------------------------------------------------------------------ answers

_CHOICE: Final = [Input(name, "value") for name in ("window", "host", "pool", "by")]


def _choice(window: str, host: str, pool: str, by: str) -> Choice:
    return Choice(int(window) if window else None, host or "", pool or "", by or "host")


def _answer(app: Dash, source: Source) -> None:
    @app.callback(
        Output("serial", "data"),
        Output("about", "children"),
        Output("problem", "children"),
        Output("figures", "hidden"),
        Output("tiles", "children"),
        Output("obstacles", "children"),
        Output("reading", "children"),
        Output("package-note", "children"),
        Output("host", "options"),
        Output("pool", "options"),
        Output("host-choice", "hidden"),
        Output("pool-choice", "hidden"),
        *(Output({"chart": name}, "figure") for name in _CHARTS),
        *(Output(f"{name}-frame", "style") for name in _CHARTS),
        *(Output(f"{name}-table", "children") for name in _CHARTS),
        Input("tick", "n_intervals"),
        *_CHOICE,
        State("serial", "data"),
    )
    def show(_: int | None, window: str, host: str, pool: str, by: str, serial: str | None) -> Sequence[Any]:
        choice = _choice(window, host, pool, by)
        snapshot = source.snapshot(choice)
        if snapshot.serial == serial:
            return [no_update] * (12 + 3 * len(_CHARTS))
        if snapshot.problem is not None:
            shown = [snapshot.serial, _about(snapshot), _problem(snapshot.problem), True]
            return [*shown, *[no_update] * (8 + 3 * len(_CHARTS))]
        drawn = {"saved": charts.saved(snapshot, choice)} | {name: draw(snapshot) for name, draw in _DRAWN.items()}
        return [
            snapshot.serial,
            _about(snapshot),
            None,
            False,
            _tiles(snapshot),
            _obstacles(snapshot),
            _reading(snapshot),
            snapshot.package_note,
            _options({"": "all"} | {name: name for name in snapshot.hosts}),
            _options({"": "all"} | {name: name for name in snapshot.pools}),
            len(snapshot.hosts) < 2,
            len(snapshot.pools) < 2,
            *(chart.figure for chart in drawn.values()),
            *({"height": f"{chart.height_px}px"} for chart in drawn.values()),
            *(_table(name, chart.table) for name, chart in drawn.items()),
        ]

    app.clientside_callback(  # type: ignore[no-untyped-call]
        ClientsideFunction("page", "toEvents"),
        Output("events-title", "data-shown"),
        Input("behind", "data"),
        prevent_initial_call=True,
    )

    # Buttons in tables say theirs through assets/page.js.
    @app.callback(
        Output("behind", "data"),
        Input({"chart": ALL}, "clickData"),
        Input("events-all", "n_clicks"),
        prevent_initial_call=True,
    )
    def point(clicks: Sequence[Any], _: int | None) -> Any:
        if ctx.triggered_id == "events-all":
            return {}
        for click, given in zip(clicks, ctx.inputs_list[0], strict=True):
            if click and given["id"] == ctx.triggered_id:
                with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
                    return json.loads(click["points"][0]["customdata"])
        return no_update

    @app.callback(
        Output("events-about", "children"),
        Output("events", "children"),
        Output("events-all", "hidden"),
        Input("behind", "data"),
        Input("serial", "data"),
        *_CHOICE,
    )
    def events(about: Mapping[str, Any], _: str | None, window: str, host: str, pool: str, by: str) -> Sequence[Any]:
        found, count = source.events(_choice(window, host, pool, by), about)
        label = about.get("label")
        what = f"behind {label}" if label else "of all kinds but figures"
        shown = f"the newest {len(found)} of {count:,}" if count > len(found) else f"{count:,}"
        return [f"{shown} {what}", _events(found), not label]


def _about(snapshot: Snapshot) -> str:
    parts = [f"{len(snapshot.files)} log file{'s' * (len(snapshot.files) != 1)}"]
    span = snapshot.span
    if span and span.get("last") is not None:
        parts += [f"{span['events']:,} events", f"from {time_text(span['first'])} to {time_text(span['last'])} UTC"]
    if snapshot.other_lines:
        parts.append(f"{snapshot.other_lines:,} lines are no events, and were passed over")
    if snapshot.stopped:
        parts.append("the broker has stopped: these are its last figures")
    return "; ".join(parts) + "."


def _problem(problem: Problem) -> html.Section:
    return html.Section(
        [html.H2("Nothing to show yet"), html.P(problem.what), html.Ul([html.Li(each) for each in problem.remedies])],
        className="problem",
    )


def _tiles(snapshot: Snapshot) -> list[Any]:
    if snapshot.totals.get("saved_bytes") is None:
        text = "The broker logged no figures in this window: it does every status_interval (60 s unless configured)."
        return [html.P(text)]
    return [
        html.Div([html.Dt(label, title=text), html.Dd(_amount(Amount(snapshot.totals[name]), id=f"tile-{name}"))])
        for name, label, text in _TILES
    ]


def _amount(amount: Amount, **more: Any) -> html.Span:
    if amount.number is not None:
        more |= {"title": f"{amount.number:,} {amount.unit}", **_marks(data_n=str(amount.number))}
    return html.Span(amount.text, **more)


def _table(name: str, table: Table) -> Any:
    if not table.rows:
        return html.P("Nothing in this window.")
    title = _CHARTS[name][0]
    rows = [
        html.Tr(
            [
                *(
                    html.Td(_amount(cell), className="number")
                    if isinstance(cell, Amount)
                    else html.Td(cell, className="long" if len(cell) > 40 else None)
                    for cell in cells
                ),
                html.Td(_button(about)),
            ]
        )
        for cells, about in table.rows[:TABLE_ROWS]
    ]
    heads = [html.Th(head, scope="col") for head in (*table.heads, "behind it")]
    made: list[Any] = [_wide(title, _grid(title, heads, rows))]
    if len(table.rows) > TABLE_ROWS:
        made.append(
            html.P(f"The first {TABLE_ROWS} of {len(table.rows):,} rows; choose a shorter window for the others.")
        )
    return made


def _grid(title: str, heads: Sequence[Any], rows: Sequence[Any]) -> html.Table:
    return html.Table([html.Caption(title, className="hidden"), html.Thead(html.Tr(heads)), html.Tbody(rows)])


def _marks(**attributes: str) -> dict[str, Any]:
    """Return attributes whose names have a dash, which Python's have not."""
    return {name.replace("_", "-"): value for name, value in attributes.items()}


def _wide(title: str, content: Any) -> html.Div:
    """Return a part that is scrolled sideways where it has no room: with the keyboard too."""
    return html.Div(content, className="wide", tabIndex="0", role="region", **_marks(aria_label=title))


def _button(about: Mapping[str, Any] | None) -> Any:
    if about is None:
        return None
    given = _marks(data_behind=charts.behind(**about), aria_label=f"events behind {about['label']}")
    return html.Button("events", type="button", **given)


def _obstacles(snapshot: Snapshot) -> Any:
    rows = []
    for row in snapshot.turned_away:
        about = {"label": f"domains refused: {row['reason']}", "reason": row["reason"], "events": ["domain.refused"]}
        rows.append(_obstacle(row, "domain.refused", row["domain"] or "", about))
    for row in snapshot.obstacles:
        whose = " ".join(filter(None, (row["pool"], row["domain"])))
        about = {"label": f"{row['event']} {whose}", "events": [row["event"]], "reason": row["reason"]}
        rows.append(_obstacle(row, row["event"], whose, about | {"pool": row["pool"], "domain": row["domain"]}))
    if not rows:
        return html.P("Nothing: no domain was refused, no pool paused, no limit met in this window.")
    heads = [html.Th(head, scope="col") for head in ("last", "what", "who", "reason", "times", "in words", "behind it")]
    return _wide("What else stands in the way", _grid("What else stands in the way", heads, rows))


def _obstacle(row: Row, event: str, whose: str, about: Mapping[str, Any]) -> html.Tr:
    cells = (time_text(row["last_time"]), event, whose, row["reason"] or "", str(row["times"]), row["error"] or "")
    return html.Tr([*(html.Td(cell) for cell in cells), html.Td(_button(about))])


def _reading(snapshot: Snapshot) -> list[Any]:
    reading = snapshot.reading
    dropped, read = reading.get("dropped_bytes"), reading.get("read_bytes")
    return [
        html.P(
            [
                "I/O avoided: ",
                html.Strong(_amount(Amount(reading.get("io_avoided_bytes")), id="io-avoided")),
                " of what is shared now was never read from a disk: it was not in the page cache when it was mapped, "
                "and nobody has read it since (docs/cold-start.md).",
            ]
        ),
        html.P(
            [
                "In this window guests dropped ",
                _amount(Amount(dropped or 0), id="io-dropped"),
                " of page cache, which they can have again from the area without a disk; to fingerprint files, agents "
                "read ",
                _amount(Amount(read or 0), id="io-read"),
                f" in {reading.get('scans') or 0:,} scans.",
            ]
        ),
    ]


def _events(found: Sequence[Row]) -> Any:
    if not found:
        return html.P("No event.")
    rows = [
        html.Tr(
            [
                html.Td(time_text(event["time"])),
                html.Td(event["level"], className=f"level-{event['level']}"),
                html.Td(event["event"]),
                html.Td(" ".join(filter(None, (event["pool"], event["domain"])))),
                html.Td(event["reason"] or ""),
                html.Td(_detail_text(event), title=event["message"], className="long"),
            ]
        )
        for event in found
    ]
    heads = [html.Th(head, scope="col") for head in ("time (UTC)", "level", "event", "whose", "reason", "what")]
    return _wide("Events", _grid("Events", heads, rows))


def _detail_text(event: Row) -> str:
    said = []
    for name, value in details(event).items():
        if name.endswith("_bytes") and isinstance(value, int):
            value = bytes_text(value)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        said.append(f"{name.removesuffix('_bytes')} {value}")
    text = "; ".join(said) or str(event["message"])
    return text if len(text) <= 400 else text[:399] + "…"
