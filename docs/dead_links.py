"""Links of the built site that lead nowhere on it."""

import html.parser
import pathlib
import urllib.parse


class _Page(html.parser.HTMLParser):
    """The links of a page, and the places on it that a link can name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" or (tag == "a" and name == "name"):
                self.places.add(value)


def dead_links(site: pathlib.Path) -> list[str]:
    """Strings `page: link`; links to other sites are not followed."""
    pages = {path.resolve(): _Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":  # shown at any address
            continue
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                name = urllib.parse.unquote(parts.path)
                target = (path.parent / name).resolve()
                target = target / "index.html" if target.is_dir() else target
            place = urllib.parse.unquote(parts.fragment)
            known = pages[target].places if target in pages else None
            found = target.is_file() and (
                not place or known is None or place in known
            )
            if not found:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead
