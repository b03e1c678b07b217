"""The model card: one template, as Markdown and as a page of its own.

What the template prints is escaped for Markdown unless a filter here has made it; the page is that
Markdown rendered without HTML, so no value can become markup in either form.
"""

from __future__ import annotations

import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypeGuard
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

_TEMPLATE = Path(__file__).with_name("card.md.j2")

_NOTHING = "\N{EN DASH}"

_METRICS: Mapping[str, tuple[str, int, bool]] = {
    "auroc": ("AUROC", 3, False),
    "auprc": ("AUPRC (average precision)", 3, False),
    "brier": ("Brier score", 4, False),
    "log_loss": ("Log loss", 4, False),
    "ece": ("ECE, ten bins of equal count", 4, False),
    "lift_top_decile": ("Lift in the top 10 %", 2, False),
    "recall_top_decile": ("Recall in the top 10 %", 1, True),
    "calibration_slope": ("Calibration slope", 3, False),
}
"""Label, digits, and whether it is a share to print as a percentage."""

_FIGURES: Mapping[str, str] = {
    "calibration": "Reliability diagram: share readmitted by predicted probability in ten bins of "
    "equal count, above the histogram of the probabilities",
    "roc": "ROC curve: true positive rate by false positive rate",
    "precision_recall": "Precision by recall, with the base rate",
    "gain": "Cumulative gain: share of the readmitted found by share of encounters alerted",
    "confusion": "Outcome by alert: counts and percentages of each row",
    "shap_summary": "Contributions of the strongest features to the log odds, one point an "
    "encounter",
    "learning_curve": "AUROC and AUPRC by the number of training rows",
    "slices": "AUROC and true positive rate of each slice, beside the largest of its dimension",
}
"""What is to be seen, for who does not see it; `confusion_10` is a `confusion`."""

_SPECIAL = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # within a word it marks nothing: number_inpatient
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=[#A-Za-z])")


def render(facts: Mapping[str, Any], figures: Mapping[str, Path]) -> tuple[str, str]:
    """Write the card of a model.

    Args:
        facts: what `training.pipeline` found out about the model.
        figures: PNG files by name; the Markdown links them as `figures/<name>.png`, the page
            holds them.

    Returns:
        The card as Markdown, and as an HTML page that needs no other file.

    Raises:
        KeyError, jinja2.UndefinedError: a fact is missing.
        OSError: a figure can't be read.
    """
    template = _environment().get_template(_TEMPLATE.name)
    reports = [report for report in (facts["validation"], facts["test"]) if report]
    written = template.render({**facts, "reports": reports, "figures": _by_kind(figures)})
    # Blocks that print nothing leave their empty lines behind.
    markdown = re.sub(r"\n{3,}", "\n\n", written)
    title = f"Model card: {facts['name']}"
    return markdown, _page(title, markdown, figures)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "alt": _alt,
        "count": _count,
        "link": _link,
        "metric": _metric,
        "metric_names": _metric_names,
        "number": _number,
        "passed": _passed,
        "percent": _percent,
        "signed": _signed,
        "points": _points,
        "url": _url,
        "value": _value,
        "with_reference": _with_reference,
    }
    environment.globals["metric_labels"] = {name: label for name, (label, *_) in _METRICS.items()}
    return environment


def _escaped(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    text = _NOTHING if value is None else " ".join(str(value).split())
    text = _SPECIAL.sub(r"\\\g<0>", text)
    return Markup(_TAG.sub("&lt;", _ENTITY.sub("&amp;", text)))  # noqa: S704  (escaped above)


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if _known(value) else _NOTHING


def _percent(value: float | None) -> str:
    return f"{_number(100 * value, 1)} %" if _known(value) else _NOTHING


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _signed(value: float | None, digits: int) -> str:
    return _minus(f"{value:+.{digits}f}") if _known(value) else _NOTHING


def _points(value: float | None) -> str:
    """A difference of two percentages."""
    return f"{_signed(100 * value, 1)} pp" if _known(value) else _NOTHING


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _count(value: int) -> str:
    return f"{value:,}"


def _metric(found: Mapping[str, float | None] | None, name: str) -> str:
    """A metric with its interval where it has one."""
    _, digits, share = _METRICS.get(name, (name, 4, False))
    if found is None or not _known(found["value"]):
        return _NOTHING
    scale = 100 if share else 1
    unit = " %" if share else ""
    text = f"{_number(scale * found['value'], digits)}{unit}"
    low, high = found["low"], found["high"]
    if not (_known(low) and _known(high)):
        return text
    return f"{text} ({_number(scale * low, digits)} to {_number(scale * high, digits)})"


def _metric_names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics we know in their order, then any other."""
    there = [name for report in reports for name in report["metrics"]]
    return [name for name in _METRICS if name in there] + sorted(set(there) - _METRICS.keys())


def _value(value: Any) -> str | None:
    """Any value of a parameter or a gate with digits that mean something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str)
    return None if value is None else str(value)


def _passed(passed: bool) -> Markup:
    if passed:
        return Markup("\N{CHECK MARK} passed")
    return Markup("**\N{BALLOT X} FAILED**")


def _with_reference(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Slices, each with whether it is the one that its dimension's gaps are taken from."""
    rows = list(rows)
    largest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["rows"] > largest.get(row["dimension"], {"rows": -1})["rows"]:
            largest[row["dimension"]] = row
    return [{**row, "reference": row is largest[row["dimension"]]} for row in rows]


def _link(label: object, url: str) -> Markup:
    """A link where the address is one of the web, else the text alone."""
    if not re.match(r"https?://", url):
        return _escaped(label)
    # No brackets, quotes or pipes are left that could end the link or the cell it stands in.
    return Markup(f"[{_escaped(label)}]({quote(url, safe=':/?#@!&=+,;%-._')})")  # noqa: S704


def _url(name: str) -> Markup:
    return Markup(quote(name, safe=""))  # noqa: S704  (percent-encoded)


def _kind(name: str) -> str:
    kinds = [kind for kind in _FIGURES if name == kind or name.startswith(f"{kind}_")]
    return max(kinds, key=len, default="")


def _alt(name: str) -> str:
    kind = _kind(name)
    rest = name[len(kind) :].replace("_", " ").strip()
    if kind == "confusion" and rest.isdigit():
        rest = f"alerts for {rest} %"
    return f"{_FIGURES[kind]} ({rest})" if kind and rest else _FIGURES.get(kind, rest)


def _by_kind(figures: Iterable[str]) -> dict[str, list[str]]:
    """Names of the figures by what they show; one of no known kind stands under `other`."""
    kinds: dict[str, list[str]] = {kind: [] for kind in (*_FIGURES, "other")}
    for name in figures:
        kinds[_kind(name) or "other"].append(name)
    return kinds


# --- page ----------------------------------------------------------------------------------------


def _page(title: str, markdown: str, figures: Mapping[str, Path]) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    sources = {f"figures/{_url(name)}.png": path for name, path in figures.items()}
    headings = []
    for token, content in zip(tokens, [*tokens[1:], Token("", "", 0)], strict=True):
        if token.type == "heading_open" and token.tag == "h2":
            anchor = re.sub(r"[^a-z0-9]+", "-", content.content.lower()).strip("-")
            token.attrs["id"] = anchor
            headings.append(f'<a href="#{anchor}">{html.escape(content.content)}</a>')
        elif token.type == "paragraph_open" and _only_images(content):
            token.attrs["class"] = "figures"
        for child in token.children or ():
            if child.type == "image":
                data = b64encode(sources[str(child.attrs["src"])].read_bytes()).decode()
                child.attrs["src"] = f"data:image/png;base64,{data}"
    body = parser.renderer.render(tokens, parser.options, {})
    # A table that is too wide scrolls by itself, not the page with it.
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    return _PAGE.substitute(title=html.escape(title), nav="\n".join(headings), body=body)


def _only_images(token: Token) -> bool:
    kinds = {child.type for child in token.children or ()}
    return "image" in kinds and kinds <= {"image", "softbreak"}


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --shade: #f6f8fa;
  --link: #0a58a8; --bad: #b3261e; --warn: #fff4e0; --warn-line: #d98200;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e3e6ea; --soft: #9aa4af; --line: #343b43; --shade: #1d2228;
    --link: #76b4f5; --bad: #ff8a80; --warn: #33270f; --warn-line: #e0a030;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 {
  font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .4rem; color: var(--soft); }
p, ul { max-width: 48rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin-bottom: 1.5rem; font-size: .875rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
blockquote {
  margin: 1rem 0; padding: .7rem 1rem; background: var(--warn);
  border-left: 5px solid var(--warn-line); border-radius: 4px;
}
blockquote p { margin: 0; max-width: none; }
.table { overflow-x: auto; margin: 1rem 0; }
table {
  border-collapse: collapse; font-size: .875rem; line-height: 1.4; overflow-wrap: normal;
  font-variant-numeric: tabular-nums;
}
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left; }
th { background: var(--shade); vertical-align: bottom; }
td { vertical-align: top; }
td[style*="right"] { white-space: nowrap; }
td:nth-child(2):last-child { overflow-wrap: anywhere; }
td strong { color: var(--bad); white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; max-width: none; align-items: flex-start; }
.figures img {
  flex: 0 1 auto; width: calc(50% - .5rem); height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px;
}
.figures img:only-child { width: min(100%, 45rem); }
@media (max-width: 44rem) {
  main { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  .figures img { width: 100%; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #f2f2f2; --link: #000;
    --bad: #a00; --warn: #fff; --warn-line: #a60;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .table { overflow: visible; }
  h2, h3 { break-after: avoid; }
  tr, img, blockquote { break-inside: avoid; }
}
</style>
</head>
<body>
<main>
<nav aria-label="Sections">
$nav
</nav>
$body</main>
</body>
</html>
""")
