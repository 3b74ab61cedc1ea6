"""Holds a built site to what a reader needs: `make site`.

    every link, image, script and anchor inside it leads somewhere
    nothing that it shows or runs comes from another server
    every page is reached from the first one

The builder checks links between pages; this reads what it wrote, so it sees all the rest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements that fetch what they name, as the page is shown.
FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}
SHEET = re.compile(r"""url\(\s*["']?(?P<url>[^"')]+)|@import\s+["'](?P<sheet>[^"']+)""")


class Page(HTMLParser):
    """What a page links to, what it fetches, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag in FETCHED:
            self.fetched += [value for value in [found.get(FETCHED[tag])] if value]
        elif tag == "link" and "canonical" not in (found.get("rel") or ""):
            self.fetched += [found.get("href") or ""]
        elif tag == "a" and found.get("href") is not None:
            self.links.append(found["href"] or "")


def problems(site: Path) -> list[str]:
    """What is wrong with the site in this folder, a line each."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    first = site / "index.html"
    if first not in pages:
        return [f"{site}: wanted a built site, found no index.html; run `make site`"]
    return [
        *(line for path, page in pages.items() for line in _of_page(site, path, page, pages)),
        *(line for path in sorted(site.rglob("*.css")) for line in _of_sheet(site, path)),
        *_unreached(site, first, pages),
    ]


def _of_page(site: Path, path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    here = path.relative_to(site)
    for url in page.fetched:
        if urlsplit(url).netloc:
            yield f"{here}: fetches {url} from another server"
        elif _is_local(url) and not _target(site, path, url).exists():
            yield f"{here}: fetches {url}, which is not there"
    for url in page.links:
        if not _is_local(url):
            continue
        target, anchor = _target(site, path, url), unquote(urlsplit(url).fragment)
        if not target.is_file():
            yield f"{here}: links to {url}, which is not there"
        elif anchor and target in pages and anchor not in pages[target].anchors | {"__skip"}:
            yield f"{here}: links to {url}, which has no such anchor"


def _of_sheet(site: Path, path: Path) -> Iterator[str]:
    for match in SHEET.finditer(path.read_text()):
        url = match["url"] or match["sheet"]
        if urlsplit(url).netloc:
            yield f"{path.relative_to(site)}: fetches {url} from another server"


def _unreached(site: Path, first: Path, pages: dict[Path, Page]) -> Iterator[str]:
    reached, open_ends = {first}, [first]
    while open_ends:
        path = open_ends.pop()
        found = {_target(site, path, url) for url in pages[path].links if _is_local(url)}
        new = (found & pages.keys()) - reached
        reached |= new
        open_ends += new
    for path in sorted(pages.keys() - reached):
        if path.name != "404.html":
            yield f"{path.relative_to(site)}: nothing leads here; put it in mkdocs.yml's nav"


def _is_local(url: str) -> bool:
    """Whether it names something of this site; `data:` and `mailto:` do not."""
    parts = urlsplit(url)
    return not parts.scheme and not parts.netloc


def _target(site: Path, path: Path, url: str) -> Path:
    """The file that a server would send."""
    name = unquote(urlsplit(url).path)
    found = path if not name else (site / name[1:] if name[0] == "/" else path.parent / name)
    found = found.resolve()
    return found / "index.html" if found.is_dir() else found


def main(folder: str) -> int:
    found = problems(Path(folder).resolve())
    for line in found:
        print(line, file=sys.stderr)
    print(f"{folder}: {len(found)} problems" if found else f"{folder}: no dead links")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
