"""README, docs and CONTRIBUTING: links lead somewhere, English and Chinese say the same, every node and dialect is named.

Each check is a function from text to a list of faults, and the last tests show it a page that has one.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path

import pytest

from oft_core.formats import DIALECTS

REPO = Path(__file__).resolve().parents[2]
LONGEST_LINE, LONGEST_README = 120, 100
FRONT = ("README.md", "README.zh.md")
PAGES = sorted(p.relative_to(REPO).as_posix() for p in (REPO / "docs").rglob("*.md"))
#: What is checked for links and lengths, by its path in the repository.
ALL = (*FRONT, "CONTRIBUTING.md", *PAGES)
#: English page -> its Chinese one.
PAIRS = {"README.md": "README.zh.md"} | {
    f"docs/{p.name}": f"docs/zh/{p.name}" for p in sorted((REPO / "docs" / "zh").glob("*.md"))
}
REPOSITORY = re.search(r'Repository = "(.+?)"', (REPO / "pyproject.toml").read_text("utf-8"))[1]


def read(page: str) -> str:
    return (REPO / page).read_text("utf-8")


# ---------------------------------------------------------------- what a page consists of


def prose(text: str) -> list[str]:
    """The lines of a page; those of code blocks are empty."""
    lines, inside = [], False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        lines.append("" if fence or inside else line)
        inside ^= fence
    assert not inside, "a code block has no end"
    return lines


def headings(text: str) -> list[tuple[int, str]]:
    """(level, text) of every heading."""
    found = (re.match(r"(#+) (.+)", line) for line in prose(text))
    return [(len(m[1]), m[2].strip()) for m in found if m]


def slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    out: set[str] = set()
    for _, title in headings(text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = sum(s == slug or re.fullmatch(re.escape(slug) + r"-\d+", s) is not None for s in out)
        out.add(f"{slug}-{again}" if again else slug)
    return out


def links(text: str) -> list[str]:
    """Targets of links and pictures, Markdown's and HTML's."""
    whole = re.sub(r"`[^`]*`", "", "\n".join(prose(text)))
    return re.findall(r"\]\(([^)\s]+)\)", whole) + re.findall(r'(?:src|href)="([^"]+)"', whole)


def tables(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, without the rule below the head."""
    out: list[list[list[str]]] = []
    before = ""
    for line in prose(text):
        if line.startswith("|"):
            if not before.startswith("|"):
                out.append([])
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                out[-1].append(cells)
        before = line
    return out


def code_blocks(text: str) -> list[str]:
    """Code blocks, without the comments that are translated."""
    return [re.sub(r" +#.*", "", block) for block in re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)]


# ---------------------------------------------------------------- faults


def dead_links(page: str, text: str) -> list[str]:
    """Relative links, and links into this repository, without a file or an anchor at their end."""
    faults = []
    for link in links(text):
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            target, folder = link.removeprefix(f"{REPOSITORY}/blob/main/"), REPO
        elif "://" in link or link.startswith("mailto:"):
            continue
        else:
            target, folder = link, (REPO / page).parent
        name, _, anchor = target.partition("#")
        file = (folder / name).resolve()
        if name and not (file.is_relative_to(REPO) and file.exists()):
            faults.append(f"{page}: {link}: no such file")
        elif anchor and anchor not in slugs(file.read_text("utf-8") if name else text):
            faults.append(f"{page}: {link}: no such heading")
    return faults


def long_lines(page: str, text: str) -> list[str]:
    """Lines beyond the width. Tables cannot be wrapped, and what programs write between comments is theirs."""
    faults, theirs = [], False
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("<!--"):
            theirs = not line.startswith("<!-- end")
        if len(line) > LONGEST_LINE and not theirs and not line.startswith("|"):
            faults.append(f"{page}:{number}: {len(line)} characters")
    return faults


def numbers(cell: str) -> list[str]:
    """The numbers in a cell, in any order: a translation may turn the words around."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", cell))


def _linked(page: str, text: str) -> set[str]:
    """What a page links to, translations as the English page, by paths in the repository."""
    english = {chinese: english for english, chinese in PAIRS.items()}
    names = (link.partition("#")[0] for link in links(text) if "://" not in link)
    found = (posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) for name in names if name)
    return {english.get(file, file) for file in found}


def differences(english: str, chinese: str, pages: tuple[str, str] = ("README.md", "README.zh.md")) -> list[str]:
    """What is not the same in two pages that should differ in their language alone."""
    faults = []
    levels = [[level for level, _ in headings(t)] for t in (english, chinese)]
    if levels[0] != levels[1]:
        faults.append(f"headings have the levels {levels[0]} and {levels[1]}")
    ours, theirs = tables(english), tables(chinese)
    if len(ours) != len(theirs):
        faults.append(f"{len(ours)} and {len(theirs)} tables")
    for n, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        sizes = [[len(row) for row in table] for table in (one, other)]
        if sizes[0] != sizes[1]:
            faults.append(f"table {n}: cells by row {sizes[0]} and {sizes[1]}")
            continue
        for a, b in zip(one, other, strict=True):
            if re.findall(r"`[^`]+`", a[0]) != re.findall(r"`[^`]+`", b[0]):
                faults.append(f"table {n}: {a[0]!r} and {b[0]!r} name different things")
            faults += [
                f"table {n}: {x!r} and {y!r} have different numbers"
                for x, y in zip(a, b, strict=True) if numbers(x) != numbers(y) and not _is_date(x)
            ]
    if code_blocks(english) != code_blocks(chinese):
        faults.append("code blocks differ")
    marked = [re.findall(r"^<!-- .*?^<!-- end.*?$", t, re.DOTALL | re.MULTILINE) for t in (english, chinese)]
    if marked[0] != marked[1]:
        faults.append("what a program wrote differs: copy it from the English page")
    files = [_linked(page, text) - set(pages) for page, text in zip(pages, (english, chinese), strict=True)]
    if files[0] != files[1]:
        faults.append(f"only one page has links to {sorted(files[0] ^ files[1])}")
    return faults


def _is_date(cell: str) -> bool:
    """Whether a month has a name here: it is a number in Chinese."""
    return re.search(r"March|September|October|autumn", cell) is not None


def displayed_names() -> dict[str, str]:
    """node_id -> display_name of every node, from the source: a call that has both as plain text."""
    found = {}
    for file in sorted((REPO / "nodes").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                named = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
                if {"node_id", "display_name"} <= set(named):
                    found[named["node_id"]] = named["display_name"]
    return found


def missing_nodes(text: str, names: dict[str, str]) -> list[str]:
    """Nodes that are in no table's first column."""
    bold = {name for table in tables(text) for row in table for name in re.findall(r"\*\*(.+?)\*\*", row[0])}
    return [f"{node_id}: {name}" for node_id, name in names.items() if name not in bold]


# ---------------------------------------------------------------- the pages as they are


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    assert dead_links(page, read(page)) == []


@pytest.mark.parametrize("page", sorted(p.relative_to(REPO).as_posix() for p in (REPO / "web" / "docs").rglob("*.md")))
def test_help_pages_link_to_what_is_there(page):
    assert dead_links(page, read(page)) == []


@pytest.mark.parametrize("page", ALL)
def test_lines_are_short(page):
    assert long_lines(page, read(page)) == []


@pytest.mark.parametrize("page", FRONT)
def test_front_page_is_short(page):
    text = read(page)
    assert text.count("\n") <= LONGEST_README
    for command in ("python dev/run.py demo", "python dev/run.py test"):
        assert any(command in block for block in code_blocks(text)), command


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items())
def test_both_languages_say_the_same(english, chinese):
    assert differences(read(english), read(chinese), (english, chinese)) == []


def test_every_page_is_on_the_front_page():
    """In English all, in Chinese those that are translated and the English ones of those that are not."""
    english = {page for page in PAGES if "/zh/" not in page}
    for front, pages in zip(FRONT, (english, {PAIRS.get(page, page) for page in english}), strict=True):
        assert pages <= set(links(read(front))), front


def test_every_node_is_on_the_front_page():
    names = displayed_names()
    assert len(names) >= 13 and names["OFT_Load"] == "Load OFT"
    assert missing_nodes(read("README.md"), names) == []
    said = json.loads((REPO / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    assert missing_nodes(read("README.zh.md"), {node_id: said[node_id]["display_name"] for node_id in names}) == []


def test_every_dialect_is_in_the_table():
    for page in ("docs/loading.md", "docs/zh/loading.md"):
        rows = {row[0].strip("`"): row[2] for row in tables(read(page))[0][1:]}
        assert list(rows) == list(DIALECTS), page
        turned = {"F5d"} | {name for name, side in rows.items() if side in ("input", "输入")}
        assert turned == {"F5d"} | {d.id for d in DIALECTS.values() if d.input_side}, page


# ---------------------------------------------------------------- the checks can fail

PAGE = """# One
[a](README.md) [b](#one) [c](README.md#install)

| x | y |
|---|---|
| `k` | 1.5 |
| **Load OFT** | 2 |

```bash
# Two
do it   # comment
```
"""


def test_a_sound_page_has_no_faults():
    assert dead_links("x.md", PAGE) == long_lines("README.md", PAGE) == []
    chinese = PAGE.replace("One", "一").replace("comment", "注释").replace("x", "甲")
    assert differences(PAGE, chinese) == []
    assert missing_nodes(PAGE, {"OFT_Load": "Load OFT"}) == []


@pytest.mark.parametrize("link", ["READMEE.md", "#two", "README.md#instal", "../outside.md", f"{REPOSITORY}/blob/main/docs/none.md"])
def test_dead_links_are_found(link):
    assert len(dead_links("x.md", PAGE.replace("(README.md)", f"({link})"))) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# One", "## One"), ("# One\n", "# One\n## Three\n"), ("| x | y |", "| x | y | z |"), ("| **Load OFT** | 2 |\n", ""),
        ("`k`", "`l`"), ("1.5", "1.6"), ("do it", "do that"), ("[a](README.md)", "![a](docs/images/demo.png)"),
    ],
)
def test_differences_are_found(old, new):
    assert old in PAGE and differences(PAGE, PAGE.replace(old, new))


def test_changed_tables_of_programs_are_found():
    marked = "# One\n<!-- guide: x -->\nfirst\n<!-- end of guide: x -->\n"
    assert differences(marked, marked) == [] and differences(marked, marked.replace("first", "second"))


def test_long_lines_and_missing_nodes_are_found():
    assert long_lines("x", "a" * 121) and not long_lines("x", "a" * 120) and not long_lines("x", "| " + "a" * 130)
    assert missing_nodes(PAGE, {"OFT_New": "New OFT"}) == ["OFT_New: New OFT"]
    assert missing_nodes("Text about **Load OFT** alone", {"OFT_Load": "Load OFT"})
