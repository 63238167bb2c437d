"""Traces as one self-contained HTML page: data, style and script in one file, without a network."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

PAGE_SCHEMA = 1
# A script in data cannot end the element it stands in, nor begin a comment.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def view_data(traces: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """Return all that a page shows, as plain JSON."""
    return {"schema": PAGE_SCHEMA, "title": title, "results": list(traces)}


def html_page(data: Mapping[str, Any]) -> str:
    """Return the page. Text of models is data in it and never markup."""
    folder = resources.files("multiverse_hf.viewing") / "page"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    page = parts["page.html"]
    head, rest = page.split("{{title}}")
    middle, rest = rest.split("{{style}}")
    before_data, rest = rest.split("{{data}}")
    before_script, tail = rest.split("{{script}}")
    filled = [html.escape(str(data["title"])), middle, parts["page.css"], before_data, text, before_script]
    return "".join([head, *filled, parts["page.js"], tail])
