"""The dashboard as a reader sees it: in Chromium, over logs of a real demo run and over lines with known numbers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, sync_playwright

from sharearea.common.logs import EventLog

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = Path(sys.executable).parent / "sharearea"
FIGURES = "#tile-saved_bytes"
PATIENCE_MS = 20_000

Event = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    """Run the demo once; give the folder with its logs."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test-", dir=build) as work:
        command = [str(COMMAND), "demo", "--domains", "3", "--size-mib", "16", "--keep", "--work-dir", work]
        subprocess.run(command, capture_output=True, check=True, timeout=300)
        [folder] = Path(work).iterdir()
        yield folder


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Start what drives browsers."""
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Start Debian's Chromium."""
    found = subprocess.run([ROOT / "tools" / "browser.sh"], check=True, capture_output=True, text=True).stdout.strip()
    if not found:
        pytest.skip("no Chromium, and no right to install it")
    # Root has no sandbox of Chromium's; what is opened is our own page.
    browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
    try:
        yield browser
    finally:
        browser.close()


class Dashboard:
    """The command, served on a port of its own."""

    def __init__(self, *logs: Path | str, cache: Path, more: tuple[str, ...] = ()) -> None:
        arguments = ["dashboard", *more, "--port", "0", "--every", "0.5", "--logs", *map(str, logs)]
        self.process = subprocess.Popen(
            [COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/", line)
        assert found is not None, line + self.process.stdout.read()
        self.url, self.port = found[0], int(found[1])

    def close(self) -> str:
        """End it as a service manager would; return what it printed since."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[0]


@pytest.fixture(scope="module")
def served(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Serve the demo's logs."""
    dashboard = Dashboard(demo / "*.log", cache=tmp_path_factory.mktemp("cache"))
    try:
        yield dashboard
    finally:
        assert dashboard.close() == "dashboard: ended\n"


@pytest.fixture(scope="module")
def window(browser: Browser) -> Iterator[BrowserContext]:
    """Open a window for all pages of this module: libraries are fetched once."""
    window = browser.new_context(viewport={"width": 1200, "height": 900})
    try:
        yield window
    finally:
        window.close()


@pytest.fixture
def page(window: BrowserContext) -> Iterator[Page]:
    """Open an empty page. The test fails if anything goes wrong in it."""
    page = window.new_page()
    page.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    try:
        yield page
        assert not wrong
    finally:
        page.close()


def opened(page: Page, dashboard: Dashboard) -> Page:
    """Open the dashboard and wait until every chart is drawn."""
    page.goto(dashboard.url)
    page.wait_for_selector(FIGURES)
    drawn(page)
    return page


def drawn(page: Page) -> None:
    """Wait until every chart is drawn."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.chart')].every(chart => chart.querySelector('.main-svg'))"
    )


# ---------------------------------------------------------------------------------- what the logs say, without any view


def events_of(folder: Path, name: str = "") -> list[Event]:
    """Return all events of a folder's logs in the order of time, or those of one kind."""
    found = []
    for path in sorted(folder.glob("*.log")):
        found += [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    found.sort(key=lambda event: str(event["@timestamp"]))
    return [event for event in found if not name or event["event.name"] == name]


def text_of(size: int) -> str:
    """Write a size as the page does; by itself."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if abs(size) >= 1024**power:
            return f"{size / 1024**power:,.1f} {unit}"
    return f"{size} B"


def table(page: Page, name: str) -> list[list[str | int]]:
    """Read a chart's table off the page: exact numbers, where a cell has one that is rounded for people."""
    details = page.locator(f"#{name}-section details")
    if not details.evaluate("details => details.open"):
        details.locator("summary").click()
    rows: list[list[str | int]] = page.locator(f"#{name}-table tbody tr").evaluate_all(
        """rows => rows.map(row => [...row.cells].slice(0, -1).map(cell => {
             const exact = cell.querySelector('[data-n]');
             return exact ? Number(exact.dataset.n) : cell.innerText;
           }))"""
    )
    shown = page.locator(f"#{name}-table [data-n]").evaluate_all(
        "spans => spans.map(span => [span.innerText, Number(span.dataset.n), span.title])"
    )
    for text, number, title in shown:
        assert title.startswith(f"{number:,} ")
        assert text == (text_of(number) if title.endswith(" bytes") else f"{number:,}")
    return rows


NOT_KNOWN: Final = "not known"  # as the page says it


def steps(events: list[Event], keys: tuple[str, ...], figures: tuple[str, str]) -> set[tuple[Any, ...]]:
    """Return the last figures in every second: of a domain whose agent has said nothing yet, some are not known."""
    last: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for event in events:
        moment = event["@timestamp"][:19].replace("T", " ")
        step = (moment, *(event[key] for key in keys))
        before = last.get(step, (NOT_KNOWN,) * len(figures))
        last[step] = tuple(event.get(figure, old) for figure, old in zip(figures, before, strict=True))
    return {(*key, *value) for key, value in last.items()}


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="this system's packages are not dpkg's")
def test_the_numbers_on_the_page_are_those_of_the_logs(demo: Path, served: Dashboard, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    opened(page, served)
    host = events_of(demo, "host.statistics")
    assert len(host) >= 2
    assert host[-1]["sharearea.saved_bytes"] > 10 << 20
    for name in ("saved", "net_saved", "possible_saved", "given_up", "area", "overhead"):
        value = host[-1][f"sharearea.{name}_bytes"]
        tile = page.locator(f"#tile-{name}_bytes")
        assert (tile.inner_text(), tile.get_attribute("data-n")) == (text_of(value), str(value))

    both = ("sharearea.saved_bytes", "sharearea.net_saved_bytes")
    assert {tuple(row) for row in table(page, "saved")} == steps(host, ("host.name",), both)
    pools = events_of(demo, "pool.statistics")
    page.get_by_role("radio", name="pool", exact=True).check()
    page.wait_for_function("() => document.querySelector('#saved-table td:nth-child(2)')?.innerText == 'demo'")
    assert {tuple(row) for row in table(page, "saved")} == steps(pools, ("sharearea.pool",), both)
    page.get_by_role("radio", name="domain", exact=True).check()
    page.wait_for_function(
        "() => document.querySelector('#saved-table td:nth-child(2)')?.innerText.startsWith('demo-')"
    )
    domains = [event for event in events_of(demo, "domain.statistics") if "sharearea.net_bytes" in event]
    given = ("sharearea.given_up_bytes", "sharearea.net_bytes")
    assert {tuple(row) for row in table(page, "saved")} == steps(domains, ("sharearea.domain",), given)

    last = pools[-1]
    words = {"text": "executable text", "rodata": "read-only data", "data": "plain data"}
    assert [row for row in table(page, "classes") if row[0] in words.values()] == [
        [word, last[f"sharearea.reported_{name}_bytes"], last[f"sharearea.mapped_{name}_bytes"]]
        for name, word in words.items()
    ]
    ranked: list[list[Event]] = []
    for event in events_of(demo, "file.statistics"):
        if event["sharearea.rank"] == 1:
            ranked.append([])
        ranked[-1].append(event)
    largest = sorted(ranked[-1], key=lambda event: (-event["sharearea.held_bytes"], event["file.path"]))[:20]
    assert table(page, "largest") == [
        [
            event["file.path"],
            event["sharearea.domains"],
            event["sharearea.held_bytes"],
            event["sharearea.possible_saved_bytes"],
            event["sharearea.pages_owned"] * 4096,
        ]
        for event in largest
    ]
    shown = {str(row[0]): row[2] for row in table(page, "packages")}
    assert len(shown) > 2
    for package in set(shown) - {"(no package)"}:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout.split()
        # Some packages name /lib what is /usr/lib.
        named = {f"/common{prefix}{path}" for path in listed for prefix in ("", "/usr")}
        own = sum(event["sharearea.held_bytes"] for event in ranked[-1] if event["file.path"] in named)
        assert shown[package] == own > 0, package
    plain: Counter[str] = Counter()
    for event in events_of(demo, "files.plain"):
        plain[event["event.reason"]] += event["sharearea.files"]
    assert plain
    assert {row[0]: row[2] for row in table(page, "refusals") if str(row[1]).startswith("a program")} == plain
    held = {row[0]: row[1] for row in table(page, "owners")}
    assert held["3"] == last["sharearea.slots_held_by_3"] > 0
    assert sum(int(number) for number in held.values()) == last["sharearea.pages_published"]
    [budget] = table(page, "budgets")
    assert budget[:3] == ["demo", last["sharearea.area_bytes"], last["sharearea.area_max_bytes"]]
    read = sum(event["sharearea.read_bytes"] for event in events_of(demo, "scan.finished"))
    assert page.locator("#io-read").get_attribute("data-n") == str(read)
    assert page.locator("#io-avoided").inner_text() == "0 B"

    told = [event for event in events_of(demo) if event["event.kind"] != "metric"]
    assert page.locator("#events-about").inner_text() == f"{len(told):,} of all kinds but figures"
    assert {url.split("/")[2] for url in asked if not url.startswith(("data:", "blob:"))} == {
        f"127.0.0.1:{served.port}"
    }


def test_a_click_and_a_key_show_the_events_behind(demo: Path, served: Dashboard, page: Page) -> None:
    opened(page, served)
    plain = events_of(demo, "files.plain")
    reason = plain[0]["event.reason"]
    expected = [event for event in plain if event["event.reason"] == reason]

    bar = page.locator("#refusals-section .barlayer .point path").first
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("() => document.getElementById('events-about').innerText.includes('behind')")
    assert page.locator("#events-about").inner_text().startswith(f"{len(expected)} behind {reason}: ")
    shown = page.locator("#events tbody tr").evaluate_all("rows => rows.map(row => row.cells[2].innerText)")
    assert shown == ["files.plain"] * len(expected)
    page.get_by_role("button", name="All events").click()
    page.wait_for_function("() => document.getElementById('events-about').innerText.includes('of all kinds')")

    # The same without a mouse: open the table, go to a row's button, press it.
    page.locator("#saved-section summary").focus()
    page.keyboard.press("Enter")
    page.locator("#saved-table button").first.wait_for()
    while page.evaluate("document.activeElement.tagName") != "BUTTON":
        page.keyboard.press("Tab")
    moment = page.evaluate("document.activeElement.closest('tr').cells[0].innerText")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.id == 'events-title'")
    page.wait_for_function("() => document.getElementById('events-about').innerText.includes('1 s from')")
    second = moment.replace(" ", "T")
    behind = [
        event for event in events_of(demo) if event["event.kind"] != "metric" and event["@timestamp"].startswith(second)
    ]
    assert page.locator("#events-about").inner_text().startswith(f"{len(behind)} behind host ")


def test_a_phone_has_no_sideways_page(served: Dashboard, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    try:
        page.set_default_timeout(PATIENCE_MS)
        opened(page, served)
        for summary in page.locator("summary").all():
            summary.tap()
        page.locator("#saved-table tbody tr").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("window.innerWidth") == 360
        # What is wider than the page is scrolled by itself.
        assert page.locator("#largest-table .wide").evaluate("part => part.scrollWidth > part.clientWidth")
        for chart in page.locator(".chart .main-svg").all():
            box = chart.bounding_box()
            assert box is None or box["width"] <= 360
        for name in ("button", "summary"):
            assert all(
                height >= 24
                for height in page.locator(name).evaluate_all(
                    "parts => parts.filter(part => part.offsetParent).map(part => part.offsetHeight)"
                )
            )
    finally:
        page.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2)."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21 (WCAG 2)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_both_schemes(served: Dashboard, browser: Browser, scheme: Any) -> None:
    page = browser.new_page(color_scheme=scheme)
    try:
        page.set_default_timeout(PATIENCE_MS)
        opened(page, served)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) < 0.05) == (scheme == "dark")
        for selector, property_name, least in (
            ("main p, main h2, main th, main td, label", "color", 4.5),
            (".chart .main-svg text", "fill", 4.5),
            ("button, summary", "color", 4.5),
            (".chart .barlayer path", "fill", 3.0),
            (".chart .scatterlayer path.js-line", "stroke", 3.0),
        ):
            colours = set(
                page.locator(selector).evaluate_all(
                    "(parts, name) => parts.filter(part => part.getBoundingClientRect().width)"
                    ".map(part => getComputedStyle(part)[name])",
                    property_name,
                )
            )
            assert colours, selector
            for colour in colours:
                assert contrast(colour, ground) >= least, (selector, colour)
        tile = page.locator(".tiles > div").first.evaluate("part => getComputedStyle(part).backgroundColor")
        for part in ("dt", "dd"):
            ink = page.locator(f".tiles {part}").first.evaluate("part => getComputedStyle(part).color")
            assert contrast(ink, tile) >= 4.5
    finally:
        page.close()


def test_the_keyboard_reaches_everything_in_its_order(served: Dashboard, page: Page) -> None:
    opened(page, served)
    page.locator("#events tbody tr").first.wait_for()
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    walked: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const part = document.activeElement;
              if (part === document.body) return null;
              const style = getComputedStyle(part), box = part.getBoundingClientRect();
              return {name: part.name || part.getAttribute('aria-label') || part.innerText,
                      tag: part.tagName, outline: style.outlineStyle, width: parseFloat(style.outlineWidth),
                      inside: box.bottom > 0 && box.top < innerHeight};
            }"""
        )
        if found is None:
            break
        assert found["outline"] != "none", found
        assert found["width"] >= 2, found
        assert found["inside"], found
        walked.append(f"{found['tag']} {found['name']}" if found["tag"] != "INPUT" else "INPUT")
    tables = [
        "Saved over time",
        "Page classes",
        "Packages",
        "Files",
        "Refusals, by reason",
        "Owners per page",
        "Area and grants",
    ]
    expected = ["A Skip to the figures", "INPUT", "INPUT", *(f"SUMMARY Table: {title}" for title in tables)]
    assert [each for each in walked if each.startswith(("A ", "INPUT", "SUMMARY"))] == expected
    assert walked[-1] == "DIV Events"
    # The skip link leads past the filters; the arrow keys choose among radio buttons.
    page.locator("#window input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="15 min").is_checked()


def test_every_chart_has_a_name_and_a_table(served: Dashboard, page: Page) -> None:
    opened(page, served)
    charts = page.locator(".chart[role=img]")
    assert charts.count() == page.locator(".chart").count() == page.locator("details").count() == 7
    for chart in charts.all():
        assert "table below" in (chart.get_attribute("aria-label") or "")
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    for name in ("saved", "classes", "packages", "largest", "refusals", "owners", "budgets"):
        rows = table(page, name)
        assert rows
        heads = page.locator(f"#{name}-table th[scope=col]").count()
        assert {len(row) for row in rows} == {heads - 1}


# -------------------------------------------------------------------------------------------- lines with known numbers


def write_known(path: Path, program: str = "sharearea", host: str = "one") -> EventLog:
    """Return a log into a file, whose lines say that they come from a host."""
    log = EventLog(program, stream=io.StringIO(), file=path)
    log._common["host.name"] = host
    return log


def statistics(log: EventLog, pool: str, number: int) -> None:
    """Write a round of figures of one pool with all fields that the page sums, told by a number."""
    from sharearea.common.events import EVENTS, FIELDS

    for name in ("pool.statistics", "host.statistics"):
        kind = EVENTS[name]
        fields: dict[str, object] = {}
        for each in (*kind.fields, *kind.options):
            if FIELDS[each].type in ("integer", "number"):
                fields[each] = number
        texts = {"pool": pool, "mode": "share", "backend": "xen", "area_fill_ratio": 0.5}
        fields |= {key: value for key, value in texts.items() if key in (*kind.fields, *kind.options)}
        log.event(name, **fields)


def test_what_is_refused_and_two_hosts(tmp_path: Path, page: Page) -> None:
    for host, number in (("one", 3 << 20), ("two", 5 << 20)):
        log = write_known(tmp_path / f"{host}.log", host=host)
        log.event("domain.joined", pool=f"pool-{host}", domain="d", rule="r")
        for reason, files in (("too-small", 7), ("excluded", 2)):
            fields = {"pool": f"pool-{host}", "domain": "d", "stage": "report", "examples": ["/x"]}
            log.event("files.refused", reason=reason, files=files, file_bytes=files * number, **fields)
        log.event("domain.refused", detail="no rule names it", reason="no-matching-rule", domid=7)
        log.event("grants.refused", pool=f"pool-{host}", domain="d", files=1, pages=9)
        statistics(log, f"pool-{host}", number)
        log.close()
    dashboard = Dashboard(tmp_path / "*.log", cache=tmp_path / "cache")
    try:
        opened(page, dashboard)
        assert page.locator("#tile-saved_bytes").inner_text() == "8.0 MiB"
        mib = 8 << 20
        assert {(row[0], row[2], row[3]) for row in table(page, "refusals")} == {
            ("too-small", 14, 7 * mib),
            ("excluded", 4, 2 * mib),
        }
        obstacles = page.locator("#obstacles tbody tr").evaluate_all(
            "rows => rows.map(row => [row.cells[1].innerText, row.cells[3].innerText, row.cells[5].innerText])"
        )
        assert sorted(map(tuple, obstacles)) == [
            ("domain.refused", "no-matching-rule", "no rule names it"),
            ("domain.refused", "no-matching-rule", "no rule names it"),
            ("grants.refused", "", ""),
            ("grants.refused", "", ""),
        ]
        assert "of 3,145,728" in str(table(page, "budgets")[0])
        page.locator("#host-choice").get_by_role("radio", name="two", exact=True).check()
        page.wait_for_function("() => document.getElementById('tile-saved_bytes').innerText == '5.0 MiB'")
        assert {(row[0], row[3]) for row in table(page, "refusals")} == {
            ("too-small", 35 << 20),
            ("excluded", 10 << 20),
        }
        page.locator("#host-choice").get_by_role("radio", name="all").check()
        page.locator("#pool-choice").get_by_role("radio", name="pool-one", exact=True).check()
        page.wait_for_function("() => document.getElementById('tile-saved_bytes').innerText == '3.0 MiB'")
    finally:
        dashboard.close()


def test_it_says_what_to_do_and_follows_what_grows(tmp_path: Path, page: Page) -> None:
    path = tmp_path / "broker.log"
    dashboard = Dashboard(tmp_path / "*.log", cache=tmp_path / "cache")
    try:
        page.goto(dashboard.url)
        problem = page.locator("#problem")
        problem.get_by_text("No log file fits").wait_for()
        assert "log_file = " in problem.inner_text()
        path.touch()
        problem.get_by_text("The log files are empty.").wait_for()
        assert "sharearea status" in problem.inner_text()
        path.write_text('Traceback (most recent call last):\n{"@timestamp": "2026-11-20T18:52:19.5\n{"a": 1}\n[]\n')
        problem.get_by_text("is an event of sharearea").wait_for()
        assert "docs/events.md" in problem.inner_text()
        assert page.locator("#figures").is_hidden()
        log = write_known(path)
        log.event("broker.started", pools=1, kernel="k", backend="local")
        page.locator("#tiles").get_by_text("The broker logged no figures in this window").wait_for()
        assert problem.inner_text() == ""
        statistics(log, "p", 1 << 20)
        page.wait_for_function("() => document.getElementById('tile-saved_bytes')?.innerText == '1.0 MiB'")
        assert "lines are no events, and were passed over" in page.locator("#about").inner_text()
        # What the reader has opened stays open, and the focus where it is, when new lines come.
        page.locator("#saved-section summary").click()
        statistics(log, "p", 2 << 20)
        page.wait_for_function("() => document.getElementById('tile-saved_bytes')?.innerText == '2.0 MiB'")
        assert page.locator("#saved-section details").evaluate("details => details.open")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        # A moved file: the log goes on in a new one.
        path.rename(tmp_path / "broker.log.1")
        statistics(log, "p", 4 << 20)
        page.wait_for_function("() => document.getElementById('tile-saved_bytes')?.innerText == '4.0 MiB'")
        log.close()
    finally:
        dashboard.close()


# --------------------------------------------------------------------------------------------------------- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the verb to its end."""
    return subprocess.run([COMMAND, "dashboard", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_a_port_that_is_taken_and_an_address_that_others_reach(served: Dashboard) -> None:
    taken = command("--logs", "x", "--port", str(served.port))
    assert taken.returncode == 4
    assert f"127.0.0.1 port {served.port}: Address already in use" in taken.stderr
    assert "--port" in taken.stderr.splitlines()[-1]
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        refused = command("--logs", "x", "--address", address)
        assert refused.returncode == 2
        assert "there is no password" in refused.stderr
        assert "--allow-remote" in refused.stderr
    absent = command("--logs", "x", "--address", "192.0.2.1", "--allow-remote", "--port", "0")
    assert (absent.returncode, "cannot listen on 192.0.2.1" in absent.stderr) == (4, True)
    assert command("--port", "70000").returncode == 2
    assert command("--address", "nonsense").returncode == 2


def test_it_ends_cleanly_when_interrupted(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        dashboard = Dashboard(tmp_path / "none.log", cache=tmp_path / "cache")
        with urllib.request.urlopen(dashboard.url, timeout=30) as answer:
            assert answer.status == 200
        dashboard.process.send_signal(number)
        printed = dashboard.process.communicate(timeout=30)[0]
        assert (printed, dashboard.process.returncode) == ("dashboard: ended\n", 0)


def test_other_names_are_not_answered_and_nothing_else_is_allowed(served: Dashboard) -> None:
    for name in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example"):
        request = urllib.request.Request(served.url, headers={"Host": name})
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(request, timeout=30)
        refused.value.close()
    with urllib.request.urlopen(f"http://localhost:{served.port}/", timeout=30) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy


def test_who_is_let_in_from_elsewhere_comes_by_any_name(tmp_path: Path) -> None:
    more = ("--address", "0.0.0.0", "--allow-remote")
    dashboard = Dashboard(tmp_path / "none.log", cache=tmp_path / "cache", more=more)
    try:
        url = f"http://127.0.0.1:{dashboard.port}/"
        request = urllib.request.Request(url, headers={"Host": f"dom0.example:{dashboard.port}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
    finally:
        dashboard.close()


@pytest.mark.parametrize("library", ["dash", "duckdb", "waitress"])
def test_a_missing_library_is_named(library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; from sharearea.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "dashboard", "--logs", "x"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 4
    assert library in done.stderr
    assert "sharearea[dashboard]" in done.stderr


def test_a_still_page_gets_nothing_again(served: Dashboard, page: Page) -> None:
    opened(page, served)
    for _ in range(2):
        with page.expect_response(re.compile("_dash-update-component")) as answer:
            pass
        assert len(answer.value.body()) < 2_000  # which says that nothing is new
