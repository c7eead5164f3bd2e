"""The report's page in a browser: its script draws, and answers to keys."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harmony.report.text import write_report
from tests.synthetic import make_record, make_timeline

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
KEYS = """<script>
const press = key => document.querySelector("svg")
  .dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const ticks = () => document.querySelectorAll("svg .grid").length + " " +
  [...document.querySelectorAll("svg text[text-anchor]")].map(t => t.textContent).join(" ");
const seen = [ticks()];
press("+"); press("+"); seen.push(ticks());
press("0"); seen.push(ticks());
press("ArrowRight"); seen.push(document.querySelector("output").textContent);
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_draws_and_answers_to_keys(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report([make_record()], path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"{KEYS}</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    shown = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path}/user", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr, "an error of the script, or a refused resource"
    lanes = {span.lane for span in make_timeline().spans}
    drawn = re.search(r"<svg.*?</svg>", shown.stdout, re.DOTALL)
    assert drawn is not None
    names = re.findall(r"<text[^>]*>([^<]*)</text>", drawn[0])
    assert all(lane in names for lane in lanes)
    assert drawn[0].count("<path") > len(lanes)
    seen = re.search(r'data-seen="([^"]*)"', shown.stdout)
    assert seen is not None
    whole, near, again, says = json.loads(html.unescape(seen[1]))
    assert whole == again != near
    assert re.search(r"measured gpu0\.\w+: .* from ", says), says
