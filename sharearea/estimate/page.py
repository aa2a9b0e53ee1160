"""The HTML report of an estimate: one file without scripts, fonts or addresses. Text in, text out.

The matrix is SVG made here: a grid of squares is less than what a charting library would bring, and all of those that
were looked at draw with a script of megabytes or need numpy (docs/dependencies.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from .figures import Estimate, LeftOut
from .text import percent, shown, size_text

_MOST_LABELLED: Final = 12  # roots; with more of them the squares have no numbers in them
_MOST_ROWS: Final = 200
_MOST_LEFT_OUT: Final = 500
_CELL: Final = 64
_LABEL: Final = 34

_STYLE: Final = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --shared: #0969da;
  --text: #8250df; --rodata: #bf8700; --data: #1a7f37; --on: #fff }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --shared: #4493f8; --text: #ab7df8; --rodata: #d29922; --data: #3fb950; --on: #0d1117 } }
* { box-sizing: border-box }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p.soft, td.soft, figcaption { color: var(--soft) }
.figures { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); margin: 0 }
.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
.figures dt { color: var(--soft); font-size: .85rem } .figures dd { font-size: 1.3rem; margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right; vertical-align: top }
th:first-child, td:first-child, td.words, th.words { text-align: left; overflow-wrap: anywhere }
small { white-space: nowrap } figure { margin: 0 } svg { display: block; height: auto; width: 100% }
svg text { fill: var(--ink); font: 13px system-ui }
"""


def page(estimate: Estimate) -> str:
    """Return the report."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>sharearea estimate</title><style>{_STYLE}</style></head><body>",
        "<h1>What these guests would share</h1>",
        f'<p class="soft">{escape(_subject(estimate))}</p>',
        _figures(estimate),
    ]
    if len(estimate.roots) > 1:
        parts += ["<h2>Pairs</h2>", _matrix(estimate)]
    parts += ["<h2>Roots</h2>", _roots(estimate), "<h2>Page classes</h2>", _classes(estimate)]
    if estimate.packages:
        parts += ["<h2>Packages</h2>", _packages(estimate)]
    if estimate.notes or estimate.left_out:
        parts += ["<h2>Not counted, and notes</h2>", _left_out(estimate.left_out, estimate)]
    parts.append(
        '<p class="soft">An upper bound, counted from the files: what guests have cached at the same time is less. '
        "Each page counts once for each root that has it, but for the first; zero pages and pages that a root has "
        "twice are apart.</p></body></html>"
    )
    return "\n".join(parts) + "\n"


def _subject(estimate: Estimate) -> str:
    memory = "" if estimate.memory is None else f", each with {size_text(estimate.memory)} for its page cache (a model)"
    backend = "local" if estimate.backend == "local" else "Xen, which does not share executable text"
    return f"{len(estimate.roots)} roots on the backend {backend}{memory}."


def _figures(estimate: Estimate) -> str:
    rows = [
        (
            "possible to save",
            f"{size_text(estimate.possible_saved)}",
            percent(estimate.possible_saved, estimate.resident),
        ),
        ("in all files", size_text(estimate.total), ""),
        ("zero pages", size_text(estimate.zero), percent(estimate.zero, estimate.total)),
        ("shared with itself", size_text(estimate.self_shared), percent(estimate.self_shared, estimate.total)),
        ("executable text", size_text(estimate.text), percent(estimate.text, estimate.total)),
    ]
    if estimate.memory is not None:
        rows.insert(
            1, ("in memory at a time", size_text(estimate.resident), percent(estimate.resident, estimate.total))
        )
    cells = (f"<div><dt>{escape(name)}</dt><dd>{value} <small>{part}</small></dd></div>" for name, value, part in rows)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _matrix(estimate: Estimate) -> str:
    """The pairs as a picture: the darker a square, the larger a part of the smaller root both have."""
    count = len(estimate.roots)
    width = _LABEL + count * _CELL
    labelled = count <= _MOST_LABELLED
    parts = []
    for number in range(count):
        middle = _LABEL + number * _CELL + _CELL // 2
        parts.append(f'<text x="{middle}" y="{_LABEL - 10}" text-anchor="middle">{number + 1}</text>')
        parts.append(f'<text x="{_LABEL - 8}" y="{middle + 5}" text-anchor="end">{number + 1}</text>')
        at = _LABEL + number * _CELL
        parts.append(
            f'<rect x="{at}" y="{at}" width="{_CELL - 2}" height="{_CELL - 2}" rx="4" style="fill:none;'
            'stroke:var(--line)"/>'
        )
    sizes = [root.pages * 4096 for root in estimate.roots]
    for a, b, shared in estimate.pairs:
        smaller = min(sizes[a], sizes[b])
        part = min(1.0, shared / smaller) if smaller else 0.0
        title = escape(
            f"{a + 1} {shown(estimate.roots[a].name)} and {b + 1} {shown(estimate.roots[b].name)}: "
            f"{size_text(shared)}, {percent(shared, smaller)} of the smaller one"
        )
        for row, column in ((a, b), (b, a)):
            x, y = _LABEL + column * _CELL, _LABEL + row * _CELL
            parts.append(
                f'<g><title>{title}</title><rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="4" '
                f'style="fill:var(--shared);fill-opacity:{0.04 + 0.96 * part:.3f};stroke:var(--line)"/>'
            )
            if labelled:
                ink = "var(--on)" if part > 0.45 else "var(--ink)"
                parts.append(
                    f'<text x="{x + _CELL // 2 - 1}" y="{y + _CELL // 2 + 4}" text-anchor="middle" '
                    f'style="fill:{ink};font-size:11px">{size_text(shared)}</text>'
                )
            parts.append("</g>")
    legend = "".join(f"<li>{escape(shown(root.name))}</li>" for root in estimate.roots)
    return (
        f'<figure><svg viewBox="0 0 {width} {width}" style="max-width:{max(width, 320)}px" role="img" '
        f'aria-label="What each pair of roots would share">{"".join(parts)}</svg>'
        "<figcaption>What two roots would save if there were no others. The stronger the colour, the larger a part of "
        f"the smaller root.</figcaption><ol>{legend}</ol></figure>{_pairs(estimate)}"
    )


def _pairs(estimate: Estimate) -> str:
    pairs = sorted(estimate.pairs, key=lambda pair: -pair[2])
    rows = [(shown(estimate.roots[a].name), shown(estimate.roots[b].name), size_text(shared)) for a, b, shared in pairs]
    return _table(("root", "and", "would share"), rows[:_MOST_ROWS], len(rows), words=2)


def _roots(estimate: Estimate) -> str:
    rows = [
        (
            shown(root.name),
            root.kind,
            f"{root.files:,}",
            size_text(root.pages * 4096),
            size_text(root.zero * 4096),
            size_text(root.repeated * 4096),
            size_text(root.text * 4096),
        )
        for root in estimate.roots
    ]
    return _table(("root", "kind", "files", "bytes", "zero", "twice", "text"), rows, len(rows), words=2)


_CLASS_NAMES: Final = {"text": "executable text", "rodata": "read-only data of programs", "data": "other data"}


def _classes(estimate: Estimate) -> str:
    saved = max(1, sum(size for _, size in estimate.classes.values()))
    at = 0.0
    bars = []
    for name, (_, size) in estimate.classes.items():
        width = 100 * size / saved
        bars.append(
            f'<rect x="{at:.2f}" y="0" width="{width:.2f}" height="4" style="fill:var(--{name})">'
            f"<title>{_CLASS_NAMES[name]}: {size_text(size)}</title></rect>"
        )
        at += width
    rows = [
        (_CLASS_NAMES[name], size_text(total), size_text(size), percent(size, saved))
        for name, (total, size) in estimate.classes.items()
    ]
    svg = (
        '<svg viewBox="0 0 100 4" preserveAspectRatio="none" style="height:1.25rem" role="img" '
        f'aria-label="What is saved, by page class">{"".join(bars)}</svg>'
    )
    return f"<figure>{svg}</figure>{_table(('class', 'in all roots', 'saved', ''), rows, len(rows))}"


def _packages(estimate: Estimate) -> str:
    rows = [(shown(name), size_text(size), percent(size, estimate.possible_saved)) for name, size in estimate.packages]
    return _table(("package", "saved", ""), rows[:_MOST_ROWS], len(rows))


def _left_out(left_out: Sequence[LeftOut], estimate: Estimate) -> str:
    notes = "".join(f"<li>{escape(shown(text))}</li>" for text in estimate.notes)
    rows = [(shown(entry.root), shown(entry.path), entry.reason) for entry in left_out[:_MOST_LEFT_OUT]]
    table = _table(("root", "path", "why"), rows, estimate.left_out_count, words=3) if rows else ""
    return f"<ul>{notes}</ul>{table}" if notes else table


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], count: int, words: int = 1) -> str:
    """A table; count: how many rows there are in all. words: so many columns from the left are text."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="words">{escape(cell)}</{tag}>' if at < words else f"<{tag}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    body = [f"<tr>{cells('td', row)}</tr>" for row in rows]
    more = f'<p class="soft">and {count - len(body):,} more</p>' if count > len(body) else ""
    head = f"<thead><tr>{cells('th', heads)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(body)}</tbody></table></div>{more}'
