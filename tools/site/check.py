"""What is wrong with a folder of HTML: links and anchors that lead nowhere, and anything that loads from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("source", "src"), ("video", "src"), ("iframe", "src"), ("link", "href")}
STYLES = re.compile(r"url\(\s*['\"]?(https?:)?//|@import")


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []  # and whether it is loaded with the page
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what an element names."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif value and (name in ("href", "src") or (tag, name) in LOADS):
                self.links.append((value, (tag, name) in LOADS))


def faults(site: Path) -> list[str]:
    """One line a fault; empty for a site that is whole and works without a network."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [
        f"{path.relative_to(site)}: loads a style from elsewhere"
        for path in [*pages, *site.rglob("*.css")]
        if STYLES.search(path.read_text(encoding="utf-8"))
    ]
    for path, page in pages.items():
        where = path.relative_to(site)
        for link, loads in page.links:
            address = urlsplit(link)
            if address.scheme in ("data", "mailto", "javascript"):
                continue
            if address.scheme or address.netloc:
                found += [f"{where}: loads {link}"] if loads else []
                continue
            if where.name == "404.html":  # its links are from the site's root, wherever it is shown
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{where}: {link} leads nowhere")
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} names no anchor of {target.relative_to(site)}")
    return sorted(set(found))
