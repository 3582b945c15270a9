"""The documents: the API reference names what is public, the site's
navigation names what there is, and links lead somewhere.

Nothing of mkdocs is needed here. `make docs` builds the site, and fails of
links to headings that do not exist as well.
"""

import ast
import inspect
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

import keras_ring

pytestmark = pytest.mark.once
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
READ = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]

# Each page of the reference and the module that it shows.
MODULES = {"keras_ring": keras_ring} | {
    name: getattr(keras_ring, name)
    for name in keras_ring.__all__
    if inspect.ismodule(getattr(keras_ring, name))
}


def entries(page):
    """The names that a page of the reference shows."""
    text = (REFERENCE / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def without_code(text):
    """The text of a page without blocks and spans of code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def pages_from_the_root():
    """The site's pages that are not in docs/, as the build has them."""
    tree = ast.parse((DOCS / "hooks.py").read_text(encoding="utf-8"))
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "FROM_ROOT"
    )
    return found


def navigation():
    """The files and patterns in `nav` of mkdocs.yml."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (nav,) = re.findall(r"^nav:\n((?:[ #].*\n|\n)+)", text, re.MULTILINE)
    return re.findall(r"^ *- (?:[^:\n]*: )?(\S+\.md)$", nav, re.MULTILINE)


def test_every_public_module_has_a_page():
    assert sorted(MODULES) == sorted(p.stem for p in REFERENCE.glob("*.md"))


@pytest.mark.parametrize("page", MODULES)
def test_a_page_shows_what_its_module_exports(page):
    module = MODULES[page]
    public = [
        f"{module.__name__}.{name}"
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    ]
    assert sorted(entries(page)) == sorted(public)


def test_every_page_is_in_the_navigation_once():
    from_root = pages_from_the_root()
    nav = navigation()
    times = {
        page: sum(fnmatch(page, entry) for entry in nav)
        for page in [*PAGES, *from_root]
    }
    assert {page: n for page, n in times.items() if n != 1} == {}
    assert [e for e in nav if not any(fnmatch(p, e) for p in times)] == []
    assert [s for s in from_root.values() if not (ROOT / s).is_file()] == []


@pytest.mark.parametrize("page", READ, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    broken = [
        target
        for target in targets
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_decision_is_in_the_index():
    folder = DOCS / "decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((\d[^)]*\.md)\)", index)
    assert sorted(linked) == sorted(p.name for p in folder.glob("[0-9]*.md"))
