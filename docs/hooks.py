"""What the site of `make docs` needs beside mkdocs.yml.

README.md, CONTRIBUTING.md and CHANGELOG.md stand at the root of the
repository, where readers look for them, and mkdocs reads pages from docs/
alone: they are added as pages, and links between the two follow. A name with
a * in `nav` becomes the files that match it, the newest first where names
begin with a date, so that a new report or guide needs no line there.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that are not in docs/, by their path in the site.
FROM_ROOT = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
_DATED = re.compile(r"/\d{4}-\d\d-\d\d-[^/]*$")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Write out the names in `nav` that have a *."""
    config.nav = _expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, source in FROM_ROOT.items():
        files.append(
            File.generated(config, page, abs_src_path=str(ROOT / source))
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of the site.

    A link to a file that is no page, such as an example, becomes its text. A
    link to nothing stays as it is, so that a strict build fails of it.
    """
    here = page.file.src_uri
    source = ROOT / FROM_ROOT.get(here, f"docs/{here}")

    def pointed(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        path = (source.parent / target).resolve()
        if not path.exists():
            return match[0]
        if path.is_relative_to(ROOT / "docs") and path.is_file():
            there = path.relative_to(ROOT / "docs").as_posix()
        else:
            named = [p for p, s in FROM_ROOT.items() if ROOT / s == path]
            if not named:
                return text
            (there,) = named
        up = "../" * here.count("/")
        return f"{mark}[{text}]({up}{there}{anchor})"

    return _LINK.sub(pointed, markdown)


def _expanded(nav: Any) -> Any:
    """Return a part of `nav` with files in the place of names with a *."""
    if isinstance(nav, dict):
        return {title: _expanded(part) for title, part in nav.items()}
    if not isinstance(nav, list):
        return nav
    whole = []
    for part in nav:
        if isinstance(part, str) and "*" in part:
            whole += _matching(part)
        else:
            whole.append(_expanded(part))
    return whole


def _matching(pattern: str) -> list[str | dict[str, str]]:
    """Return the pages that match; dated ones with their dates, newest first.

    Reports of one kind have the same heading, and differ in their dates.
    """
    docs = ROOT / "docs"
    pages = [p.relative_to(docs).as_posix() for p in docs.rglob("*.md")]
    pages = sorted(page for page in pages if fnmatch(page, pattern))
    if not all(_DATED.search(page) for page in pages):
        return [*pages]
    return [{_dated_title(docs / page): page} for page in reversed(pages)]


def _dated_title(file: Path) -> str:
    """Return the first heading of a page and the date in its name."""
    with file.open(encoding="utf-8") as lines:
        heading = next(line for line in lines if line.startswith("# "))
    return f"{heading[2:].strip()} ({file.name[:10]})"
