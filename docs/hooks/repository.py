"""Pages that live elsewhere in the repository, and links to them.

Benchmarks, examples, the architecture and the changelog are pages of their own folders; the site shows them from there,
so that no figure is copied. A link from any page to any file of the repository leads to its page if it has one, and to
a copy of the file otherwise. ``<!-- table 2 of benchmarks/x/README.md -->`` is replaced by that page's second table.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
ITEM = re.compile(r"(-|\d+\.) ")
PARAGRAPH = re.compile(r"[^\s|#<>`-]")
FENCE = re.compile(r"^\s*(```|~~~)")
TABLE = re.compile(r"^<!-- table (?P<number>\d+) of (?P<path>\S+) -->$", re.MULTILINE)


def pages(root: Path) -> dict[str, str]:
    """Each file of the repository that is a page, and which one."""
    found = {"ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
    for folder in ("benchmarks", "examples"):
        for path in sorted((root / folder).glob("*/README.md")):
            found[f"{folder}/{path.parent.name}/README.md"] = f"{folder}/{path.parent.name}.md"
    for path in sorted((root / "src/wholegrad/nets/weights").glob("*.md")):
        found[path.relative_to(root).as_posix()] = path.name
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leaves pages out of the navigation that are still to be written, and fills in what no entry names."""
    root, shown = _root(config), pages(_root(config))
    there = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    late = {page for page in config.extra["expected"] if page not in there}
    named = set(_named(config.nav))
    rest = [page for page in shown.values() if page not in named]
    config.nav = _filled(config.nav, late, rest)
    config.extra["repository"] = {"root": root, "pages": shown}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    here = config.extra["repository"]
    for source, page in here["pages"].items():
        files.append(File.generated(config, page, abs_src_path=str(here["root"] / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = config.extra["repository"]
    sources = {shown: source for source, shown in here["pages"].items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    text = _relinked(markdown, source, page, config, files)
    return TABLE.sub(lambda match: _table(match["path"], int(match["number"]), page, config, files), text)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _named(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [name for value in values for name in _named(value)]


def _filled(entries: Any, late: set[str], rest: list[str]) -> Any:
    """Entries without pages in ``late``; ``folder/*`` stands for those of ``rest`` in that folder."""
    if isinstance(entries, dict):
        return {title: _filled(value, late, rest) for title, value in entries.items()}
    if isinstance(entries, list):
        found = []
        for each in entries:
            if isinstance(each, str) and each.endswith("/*"):
                found += [page for page in rest if page.startswith(each[:-1])]
            elif not isinstance(each, str) or each not in late:
                found.append(_filled(each, late, rest))
        return found
    return entries


def _relinked(markdown: str, source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of ``source``, a path in the repository, with links that work in the site."""
    lines, code = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line):
            code = not code
        before = lines[-1] if lines else ""
        if not code and ITEM.match(line) and PARAGRAPH.match(before) and not ITEM.match(before):
            lines.append("")  # a list right after a paragraph, as GitHub reads it
        lines.append(line if code else LINK.sub(lambda match: _target(match, source, page, config, files), line))
    return "\n".join(lines)


def _target(match: re.Match[str], source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = config.extra["repository"]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
    if path == "README.md":
        found = "index.md"
    elif path in here["pages"] or f"{path}/README.md" in here["pages"]:
        found = here["pages"].get(path) or here["pages"][f"{path}/README.md"]
    elif path.startswith("docs/"):
        found = path.removeprefix("docs/")
    elif (here["root"] / path).is_file():
        found = f"files/{path}" + (".txt" if path.endswith((".py", ".toml", ".cff", ".md")) else "")
        if files.get_file_from_path(found) is None:
            files.append(File.generated(config, found, abs_src_path=str(here["root"] / path)))
    else:
        return match[0]  # which mkdocs then complains about
    return posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".") + (match["anchor"] or "")


def _table(path: str, number: int, page: Page, config: MkDocsConfig, files: Files) -> str:
    text = (config.extra["repository"]["root"] / path).read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    if not 0 < number <= len(tables):
        raise PluginError(f"{page.file.src_uri}: {path} has {len(tables)} tables, and number {number} was asked for")
    return "\n" + _relinked(tables[number - 1], path, page, config, files)
