"""What holds for every page that the package writes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image


HOSTILE = [
    '"quoted" & <script>alert(1)</script>',
    "</svg></style><img src=http://example.com/x.png onerror=alert(1)>",
    "$x_1$",
    "it's a $ and {{ 7 * 7 }} {% raw %}",
    "_under 🚀 名前",
    "x" * 200,
]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Checks that every element is closed in its turn, and keeps text, attributes and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(path: Path) -> Reader:
    """Everything that holds for every page."""
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "use-external"}
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    links = [value for name, value in reader.attributes if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(links) | {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", page)}
    assert used == {f"#{name}" for name in ids}
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    for picture in path.parent.glob("*.png"):
        with Image.open(picture) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    return reader
