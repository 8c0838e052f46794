"""A page in a real browser without a window: what it complains of, loads, and how it lies on the screen."""

import html
import json
import os
import shutil
import subprocess

import pytest

# The page stays as it is, in a frame: a frame may be as narrow as a telephone, a window may not.
_PROBE = """<!doctype html><meta charset="utf-8">
<iframe srcdoc="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>
const parse = words => (words.match(/[\\d.]+/g) || []).map(Number);
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
document.querySelector("iframe").addEventListener("load", event => {{
  const view = event.target.contentWindow, page = view.document, faint = [];
  const behind = e => {{
    for (; e; e = e.parentElement) {{
      const colour = parse(view.getComputedStyle(e).backgroundColor);
      if (colour.length == 3 || colour[3] > 0) return colour;
    }}
    return [255, 255, 255];
  }};
  for (const e of page.body.querySelectorAll("*")) {{
    if (![...e.childNodes].some(node => node.nodeType == 3 && node.data.trim())) continue;
    const style = view.getComputedStyle(e), own = e instanceof view.SVGElement ? style.fill : style.color;
    const [low, high] = [light(parse(own)), light(behind(e))].sort((x, y) => x - y);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) faint.push(`${{e.tagName}} ${{e.textContent.slice(0, 20)}} ${{ratio.toFixed(2)}}`);
  }}
  document.documentElement.dataset.found = JSON.stringify({{
    faint, width: page.documentElement.scrollWidth, inner: view.innerWidth, scripts: page.scripts.length,
    loaded: view.performance.getEntriesByType("resource").map(entry => entry.name),
    background: view.getComputedStyle(page.body).backgroundColor, title: page.title,
  }});
}});
</script>"""


def looked_at(page, folder, *, width, dark):
    """Return what came of showing a page; skip where there is no browser.

    `faint` names texts whose contrast is below 4.5, `console` holds every line that the page caused there.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    probe = folder / f"probe-{width}-{dark}.html"
    inside = html.escape(page.read_text(encoding="utf-8"), quote=True)
    probe.write_text(_PROBE.format(page=inside, width=width), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width + 40},1000",
        "--dump-dom", f"file://{probe}",
    ]  # fmt: skip
    surroundings = {**os.environ, "LANG": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=surroundings)
    found = json.loads(html.unescape(done.stdout.split('data-found="')[1].split('"')[0]))
    return found | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
