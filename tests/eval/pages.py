"""What tests read out of a page: tags, attributes, tables, and the pictures inside."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: (name, attributes) of every tag, in order.
        tables: title of the section -> rows of cells, head first.
        text: of everything that is shown.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._section = ""
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        self._inside.append(tag)
        if tag == "section":
            self._section = found.get("aria-label", "")
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        elif tag == "small":
            self.tables[self._section][-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._inside or "style" in self._inside:
            return
        self.text += data
        if "td" in self._inside or "th" in self._inside:
            self.tables[self._section][-1][-1] += data

    def addresses(self) -> list[str]:
        """Return every src, href and the like."""
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
        return [attributes[name] for _, attributes in self.tags for name in names if name in attributes]

    def picture(self, name: str) -> np.ndarray:
        """Return the pixels of the <img> with this id."""
        uri = next(attributes["src"] for tag, attributes in self.tags if tag == "img" and attributes.get("id") == name)
        assert uri.startswith("data:image/webp;base64,")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB"))
