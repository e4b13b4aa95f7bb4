"""What the built site refers to: ``python docs/hooks/links.py out/site`` lists addresses elsewhere and their pages.

Exits with 1 if a page loads anything from elsewhere, or a link within the site leads nowhere.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data", "use": "href"
}  # fmt: skip
CALLED = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


@dataclass
class Found:
    """What one page has.

    Attributes:
        loads: addresses of what a browser fetches with it.
        links: addresses that a reader may follow.
        anchors: places within it.
    """

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class Reader(HTMLParser):
    """Notes every address and anchor of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Found()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        for anchor in (named.get("id"), named.get("name")):
            if anchor:
                self.found.anchors.add(anchor)
        wanted = named.get(LOADS.get(tag, ""))
        passive = tag == "link" and named.get("rel") in ("canonical", "prev", "next", "alternate")
        if wanted and not passive:
            self.found.loads.append(wanted)
        if tag == "a" and named.get("href"):
            self.found.links.append(str(named["href"]))
        self.found.loads += [first or other for first, other in CALLED.findall(named.get("style") or "")]


def read(page: Path) -> Found:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader.found


def from_elsewhere(address: str) -> bool:
    """Whether an address has a scheme or a host of its own; those in the text itself (``data:``) do not count."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def loaded_from_elsewhere(site: Path) -> list[str]:
    """What pages and style sheets would fetch over the network."""
    found = [f"{page.relative_to(site)}: {each}" for page in site.rglob("*.html") for each in read(page).loads
             if from_elsewhere(each)]  # fmt: skip
    for sheet in site.rglob("*.css"):
        called = [first or other for first, other in CALLED.findall(sheet.read_text(encoding="utf-8"))]
        found += [f"{sheet.relative_to(site)}: {each}" for each in called if from_elsewhere(each)]
    return found


def dead_ends(site: Path) -> list[str]:
    """Links within the site whose file or anchor is not there. The page of errors has links from the root; not it."""
    pages = {page.resolve(): read(page) for page in site.rglob("*.html") if page.name != "404.html"}
    found = []
    for page, has in pages.items():
        for address in has.links + has.loads:
            if from_elsewhere(address) or address.startswith("data:"):
                continue
            parts = urlsplit(address)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            there = target.exists() and (not anchor or target not in pages or anchor in pages[target].anchors)
            if not there and anchor != "__skip":
                found.append(f"{page.relative_to(site.resolve())}: {address}")
    return found


def elsewhere(site: Path) -> dict[str, set[str]]:
    """Addresses elsewhere that readers may follow, each with the pages that have it."""
    found: dict[str, set[str]] = defaultdict(set)
    for page in site.rglob("*.html"):
        for address in read(page).links:
            if from_elsewhere(address):
                found[address].add(str(page.relative_to(site)))
    return dict(found)


def main() -> int:
    site = Path(sys.argv[1])
    for address, pages in sorted(elsewhere(site).items()):
        print(address, "-", ", ".join(sorted(pages)[:3]) + (", ..." if len(pages) > 3 else ""))
    wrong = loaded_from_elsewhere(site) + dead_ends(site)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
