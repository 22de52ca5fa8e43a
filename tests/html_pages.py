"""Pages as tests read them: no external address, pictures that decode, attributes by tag."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"img", "input", "meta", "br", "link"}


class Tags(HTMLParser):
    """Every opening tag with its attributes, all text outside styles and scripts, and tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        return [decoded(str(attributes["src"])) for attributes in self.named("img")]

    def addresses(self) -> list[str]:
        """What could be fetched."""
        names = ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
        return [value for _, attributes in self.tags for name in names if (value := attributes.get(name)) is not None]


def decoded(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    image.load()
    return image
