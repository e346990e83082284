"""README and docs: every Python snippet runs as written, every link leads somewhere, README stays short."""

import pathlib
import re

import pytest
from cdna_support import require_cdna

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Pages whose snippets compile for gfx942.
NEED_CDNA = {"docs/cdna.md", "docs/howto/change-a-block-size.md"}
# What a reader must find from the README in two clicks.
QUESTIONS = {
    "install on ROCm": "docs/howto/run-on-mi300x.md",
    "use one operator": "docs/howto/use-one-operator.md",
    "serve a folder": "docs/howto/serve-a-folder.md",
    "what was checked without an AMD GPU": "docs/cdna.md",
    "what is not supported": "docs/support.md",
    "how to add a kernel": "docs/howto/add-an-operator.md",
}


def text_of(page):
    return (ROOT / page).read_text()


def links(page):
    """Targets of a page's links and pictures that lie in the repository, from its root."""
    folder, found = (ROOT / page).parent, set()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", SNIPPET.sub("", text_of(page))):
        if not re.match(r"\w+:", target):
            found.add(str((folder / target).resolve().relative_to(ROOT)))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(text_of(page))])
def test_every_snippet_runs(page, monkeypatch, capsys):
    """One after the other, in one namespace, from the repository's root; `print(...)  # -> text` prints that text."""
    if page in NEED_CDNA:
        require_cdna("triton")
    monkeypatch.chdir(ROOT)
    names = {"__name__": "snippet"}
    for number, code in enumerate(SNIPPET.findall(text_of(page))):
        exec(compile(code, f"{page}, snippet {number + 1}", "exec"), names)
        printed = capsys.readouterr().out
        for expected in re.findall(r"^print\(.*\)  # -> (.*)$", code, re.MULTILINE):
            assert expected in printed, f"{page}, snippet {number + 1}: {expected!r} is not in {printed!r}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    missing = [target for target in links(page) if not (ROOT / target).exists()]
    assert not missing


def test_the_readme_is_short_and_leads_on():
    assert len(text_of("README.md").splitlines()) <= 120
    one = links("README.md")
    two = one | {target for page in one if page.endswith(".md") for target in links(page)}
    assert not {question: page for question, page in QUESTIONS.items() if page not in two}
    orphans = [page for page in PAGES if page.startswith("docs/") and page != "docs/index.md" and page not in two]
    assert not [page for page in orphans if f"- {page.removeprefix('docs/')}" not in text_of("mkdocs.yml")]
