"""The report as one HTML file beside the pictures: tables, and every caption's pictures side by side, with zoom."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from .report import Report, Row

TITLE = "X-Adapter, evaluated"

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; }
h1 { font-size: 1.3rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; white-space: nowrap; }
td + td { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
section { border-top: 1px solid var(--line); padding: .8rem 0; content-visibility: auto;
  contain-intrinsic-size: auto 22rem; }
section p { margin: 0 0 .4rem; }
.row { display: flex; gap: .5rem; overflow-x: auto; }
figure { margin: 0; flex: 1 0 10rem; max-width: 20rem; }
figure img { width: 100%; display: block; }
.row button { border: 0; padding: 0; width: 100%; background: none; cursor: zoom-in; }
figcaption { font-size: .8rem; }
dialog { width: 100vw; height: 100vh; max-width: none; max-height: none; border: 0; padding: .5rem;
  box-sizing: border-box; background: Canvas; }
dialog .row { height: calc(100% - 2.2rem); overflow: hidden; display: grid; grid-auto-rows: minmax(0, 1fr);
  grid-template-columns: repeat(auto-fit, minmax(30%, 1fr)); }
dialog figure { max-width: none; display: flex; flex-direction: column; min-width: 0; min-height: 0; }
dialog figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
dialog figcaption br { display: none; }
dialog .pane { flex: 1; min-height: 0; overflow: hidden; cursor: grab; touch-action: none; }
dialog img { width: 100%; height: 100%; object-fit: contain; transform-origin: 0 0; user-select: none; }
dialog p { margin: 0 0 .4rem; display: flex; gap: 1rem; justify-content: space-between; }
"""

SCRIPT = """
const dialog = document.querySelector('dialog');
const panes = dialog.querySelector('.row');
let view, opener;

function draw() {
  for (const image of panes.querySelectorAll('img'))
    image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
}

function zoom(factor, x, y) {
  const scale = Math.min(Math.max(view.scale * factor, 1), 32), by = scale / view.scale;
  view = scale === 1 ? {x: 0, y: 0, scale} : {x: x - (x - view.x) * by, y: y - (y - view.y) * by, scale};
  draw();
}

function enlarge(button) {
  const section = button.closest('section');
  opener = button;
  view = {x: 0, y: 0, scale: 1};
  dialog.querySelector('span').textContent = section.querySelector('p').textContent;
  panes.replaceChildren(...[...section.querySelectorAll('figure')].map(figure => {
    const copy = document.createElement('figure'), pane = document.createElement('div');
    const image = new Image(), caption = figure.querySelector('figcaption').cloneNode(true);
    image.src = figure.querySelector('img').src;
    image.alt = figure.querySelector('img').alt;
    image.draggable = false;
    pane.className = 'pane';
    pane.append(image);
    copy.append(caption, pane);
    return copy;
  }));
  draw();
  dialog.showModal();
}

document.addEventListener('click', event => {
  const button = event.target.closest('section button');
  if (button) enlarge(button);
});
dialog.querySelector('button').addEventListener('click', () => dialog.close());
dialog.addEventListener('close', () => opener.focus());
panes.addEventListener('wheel', event => {
  const pane = event.target.closest('.pane');
  if (!pane) return;
  event.preventDefault();
  const box = pane.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
panes.addEventListener('pointermove', event => {
  if (!event.buttons || view.scale === 1) return;
  view.x += event.movementX;
  view.y += event.movementY;
  draw();
});
dialog.addEventListener('keydown', event => {
  const pane = panes.querySelector('.pane').getBoundingClientRect(), factor = {'+': 1.5, '=': 1.5, '-': 1 / 1.5}[event.key];
  if (factor) zoom(factor, pane.width / 2, pane.height / 2);
  const step = {ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40]}[event.key];
  if (step && view.scale > 1) {
    view.x += step[0];
    view.y += step[1];
    draw();
  }
});
"""  # noqa: E501

ZOOM_HELP = "wheel or + − to zoom all at once, drag or arrows to move, Escape to close"


def page(report: Report) -> str:
    """The whole page; it asks the network for nothing."""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{TITLE}</h1><p>{_text(report.sample)}</p>",
            *_tables(report),
            *(f"<p>{_text(remark)}</p>" for remark in report.remarks),
            *_made_with(report),
            *map(_section, report.pictures),
            f"<dialog><p><span></span><small>{ZOOM_HELP}</small><button>Close</button></p>",
            '<div class="row"></div></dialog>',
            f"<script>{SCRIPT}</script></body></html>",
            "",
        ]
    )


def _tables(report: Report) -> Iterator[str]:
    if not report.measured.figures:
        return
    yield _table(report.rows())
    yield "<ul>"
    yield from (
        f"<li>{_text(figure.name)}: {_text(figure.description)}; {figure.compared.resamples} resamples</li>"
        for figure in report.measured.figures
    )
    yield "</ul>"
    yield "<details><summary>Differences on the same captions (* where 0 is outside the interval)</summary>"
    yield _table(report.difference_rows())
    yield "</details>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def _made_with(report: Report) -> Iterator[str]:
    yield "<details><summary>What the pictures were made with</summary>"
    yield _table([("", ""), *((name, str(value)) for name, value in report.made_with.items())])
    yield "</details>"


def _section(row: Row) -> str:
    pictures = "".join(_figure(row, name, path) for name, path in row.pictures.items())
    caption = f"<p>{_text(row.caption)} <small>seed {row.seed}</small></p>"
    return f'<section>{caption}<div class="row">{pictures}</div></section>'


def _figure(row: Row, name: str, path: str) -> str:
    values = "".join(f" <br>{_text(figure)} {ways[name]:.3f}" for figure, ways in row.values.items() if name in ways)
    picture = f'<img src="{quote(path)}" alt="{_text(name)}" loading="lazy">'
    return f"<figure><button>{picture}</button><figcaption>{_text(name)}{values}</figcaption></figure>"


def _text(text: str) -> str:
    return html.escape(text)
