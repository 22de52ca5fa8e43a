"""Self-contained HTML pages: rendered from templates/, with their pictures inside, and nothing that is fetched."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.printing import printable


def rendered(template: str, page: Mapping[str, Any]) -> str:
    """HTML in which texts are shown as they are, whatever they look like."""
    import jinja2

    loader = jinja2.PackageLoader("fastgen", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template(template).render(page)
    return "\n".join(printable(line) for line in html.split("\n"))


def image_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def short_names(folders: Sequence[str | Path], what: str, depth: int = 1) -> list[str]:
    """Names of folders: the last `depth` parts of each path, or as many as make them differ. UserError where one is given twice; what: they are."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]  # which takes links in a circle
    for count in range(depth, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if parts:
        raise UserError(f"the same {what} is given twice: {', '.join(map(str, folders))}")
    return []
