"""Pages opened in a real browser, where one is installed: a script in a copy of the page tries it and leaves what it found in the page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
_OPTIONS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
_OPTIONS += ("disable-dev-shm-usage", "hide-scrollbars", "virtual-time-budget=8000")

_RECORDER = """<script>
window.found = { errors: [], requests: [] };
window.addEventListener("error", event => found.errors.push(String(event.message || event.target.outerHTML.slice(0, 200))), true);
window.addEventListener("unhandledrejection", event => found.errors.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...words) => found.errors.push(words.join(" "));
</script>"""
_CHECKS = """<script>
window.addEventListener("load", async () => {
  try {
    document.querySelectorAll("details").forEach(each => each.open = true);
    const wide = document.documentElement;
    found.width = innerWidth;
    found.overflow = wide.scrollWidth - innerWidth;
    found.images = [...document.images].map(each => each.complete && each.naturalWidth > 0 && each.alt !== "" && each.height > 4);
    found.outside = [...document.querySelectorAll("img, svg, h1, h2, h3, p, label, button, figcaption")]
      .filter(each => !each.closest(".wide, pre, svg g, figure div") && each.getBoundingClientRect().right > innerWidth + 0.5)
      .map(each => each.outerHTML.slice(0, 80));
    found.requests = performance.getEntriesByType("resource").map(each => each.name).filter(name => !name.startsWith("data:"));
    found.tried = await (async () => { SCRIPT })();
  } catch (error) { found.errors.push(String(error)); }
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
# A window of its own has 500 pixels at least, a frame as many as it is given.
_HOST = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<script>
addEventListener("message", event => {
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = event.data;
  document.body.append(result);
});
</script>
<iframe src="NAME" style="width: WIDTHpx; height: 900px; border: 0"></iframe>"""


def browse(page: Path, folder: Path, width: int, script: str = "") -> dict[str, Any]:
    """What a window of this width finds: errors, requests, pictures, what overflows, and, as `tried`, what the body of an async function returns."""
    assert PROGRAM is not None
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{_RECORDER}", 1)
    copy = folder / f"tried_{width}_{page.name}"
    copy.write_text(text.replace("</body>", _CHECKS.replace("SCRIPT", script) + "</body>"), encoding="utf-8")
    host = folder / f"host_{width}.html"
    host.write_text(_HOST.replace("NAME", copy.name).replace("WIDTH", str(width)), encoding="utf-8")
    options = [f"--{each}" for each in (*_OPTIONS, f"window-size={max(500, width)},900", f"user-data-dir={folder / 'profile'}", "dump-dom")]
    process = subprocess.run([PROGRAM, *options, host.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    (found,) = re.findall('<pre id="found">(.*?)</pre>', process.stdout, re.DOTALL) or pytest.fail(f"no result: {process.stderr[-2000:]}")
    return json.loads(html.unescape(found))
