"""A hook of mkdocs: show the roles in docstrings (``:class:`~.layout.Layout` ``) as plain code."""

import re

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?\.?([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Return the page with each role replaced by the last part of its name."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
