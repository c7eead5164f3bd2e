"""Hooks of the documentation's site: pages that lie beside the code, and links to them.

A page links to another as files of the repository do, so that both a reader of the repository and
one of the site can follow.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

BESIDE = {
    "CHANGELOG.md": "inside/changelog.md",
    "CONTRIBUTING.md": "inside/contributing.md",
    "examples/README.md": "examples.md",
    **{
        f"{folder}/README.md": f"inside/{folder.replace('/', '-')}.md"
        for folder in (
            "harmony/capture",
            "harmony/checkpoint",
            "harmony/engine",
            "harmony/planner",
            "harmony/runtime",
            "kernels",
            "kernels/cpu",
            "kernels/fakecuda",
            "kernels/vgpu",
        )
    },
}
"""File of the repository: its page on the site."""

_LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside the code."""
    for source, page in BESIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links between files of the repository lead to pages of the site."""
    uri = page.file.src_uri
    places = {page: source for source, page in BESIDE.items()}
    folder = PurePosixPath(places.get(uri, f"docs/{uri}")).parent.as_posix()
    return _LINK.sub(lambda found: _link(found, folder, posixpath.dirname(uri)), markdown)


def _link(found: re.Match[str], folder: str, page_folder: str) -> str:
    text, target, anchor = found.groups()
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    meant = posixpath.normpath(posixpath.join(folder, target))
    page = BESIDE.get(meant)
    if page is None and meant.startswith("docs/"):
        page = meant.removeprefix("docs/")
    if page is None:  # a file of code: there is no page of it
        if not (ROOT / meant).exists():
            raise ValueError(f"a page of {folder} links to {target}, which is not there")
        return text
    return f"[{text}]({os.path.relpath(page, page_folder or '.')}{anchor or ''})"
