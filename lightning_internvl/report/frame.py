"""The frame of every page: one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources

from lightning_internvl.report.pictures import Pictures

HATCH = (
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="hatch" y2="6"/></pattern>'
)


def page(title: str, header: str, sections: list[tuple[str, str, str]], pictures: Pictures, footer: str) -> str:
    """An HTML page with its style and script.

    Args:
        header: what stands over the links.
        sections: (id, link, HTML) each; those without HTML are left out.
        pictures: that the HTML refers to.
        footer: HTML under all.
    """
    style, script = (
        resources.files("lightning_internvl.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    shown = [one for one in sections if one[2]]
    links = "".join(f'<a href="#{name}">{escape(link)}</a>' for name, link, _ in shown)
    # Names and captions are escaped; should one slip through, the policy still runs no script but
    # ours.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<svg class="definitions" aria-hidden="true"><defs>{HATCH}{pictures.symbols()}</defs></svg>'
        f"<main>{header}<nav>{links}</nav>{''.join(html for _, _, html in shown)}<footer>{footer}</footer></main>"
        f"<script>{script}</script></body></html>"
    )
