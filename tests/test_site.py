"""docs/check_site.py: what makes a built site fail; and links of what is read without a site."""

from __future__ import annotations

import re
import subprocess

import check_site
import pytest

from tests.running import ROOT

HEAD = '<html><head><link rel="stylesheet" href="{up}a.css"></head><body>'
GOOD = {
    "index.html": '<h1 id="top">x</h1> <a href="sub/">s</a> <a href="#top">t</a> <img src="a.png">',
    "sub/index.html": '<a href="../#top">home</a> <a href="https://example.org/x">far</a>',
    "404.html": '<a href="/sub/">s</a>',
    "a.css": "p { background: url(a.png) } q { background: url(data:image/png;base64,AA) }",
    "a.png": "",
}


@pytest.fixture
def site(tmp_path):
    for name, text in GOOD.items():
        write(tmp_path, name, text)
    return tmp_path


def write(site, name, text):
    path = site / name
    path.parent.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(up="../" * name.count("/")) if name.endswith(".html") else ""
    path.write_text(head + text)


def test_a_good_site_passes(site, capsys):
    assert check_site.problems(site) == []
    assert check_site.main(str(site)) == 0
    assert capsys.readouterr().out == f"{site}: no dead links\n"


@pytest.mark.parametrize(
    ("name", "added", "said"),
    [
        ("index.html", '<a href="nowhere/">x</a>', "links to nowhere/, which is not there"),
        ("index.html", '<a href="sub/#no">x</a>', "links to sub/#no, which has no such anchor"),
        ("index.html", '<a href="#no">x</a>', "links to #no, which has no such anchor"),
        ("index.html", '<a href="run.json">x</a>', "links to run.json, which is not there"),
        ("sub/index.html", '<img src="a.png">', "fetches a.png, which is not there"),
        ("index.html", '<script src="https://cdn.example/x.js"></script>', "from another server"),
        ("index.html", '<img src="//cdn.example/x.png">', "from another server"),
        ("index.html", '<link rel="preconnect" href="https://fonts.example">', "another server"),
        ("a.css", "@import 'https://fonts.example/x.css';", "from another server"),
        ("a.css", 'p { src: url("https://fonts.example/x.woff2") }', "from another server"),
        ("lost/index.html", "x", "nothing leads here"),
    ],
)
def test_a_fault_is_found(site, name, added, said, capsys):
    path = site / name
    if path.exists():
        path.write_text(path.read_text() + added)
    else:
        write(site, name, added)
    [found] = check_site.problems(site)
    assert found.startswith(f"{name}: ") and said in found
    assert check_site.main(str(site)) == 1
    assert found in capsys.readouterr().err


def test_a_folder_without_a_site_is_no_good_site(tmp_path):
    [found] = check_site.problems(tmp_path)
    assert "run `make site`" in found


def anchors_of(text):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def tracked_pages():
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    return listed or [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")]


@pytest.mark.parametrize("name", tracked_pages())
def test_links_lead_somewhere_without_a_site_too(name):
    """README.md and the pages of docs/, as they are read in the repository."""
    path = ROOT / name
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{name}: {link}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found.read_text()), f"{name}: {link}"
