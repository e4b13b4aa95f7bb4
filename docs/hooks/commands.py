"""The command line's reference, from its own parser: ``<!-- commands -->`` becomes a section for each command."""

from __future__ import annotations

import argparse
import inspect
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """Markdown of all commands: what each is for, its usage, its arguments, its examples."""
    from wholegrad import cli

    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    codes = inspect.cleandoc(cli.__doc__ or "").partition("Exit codes: ")[2]
    parts = [
        f"Exit codes: {codes}",
        *(_section(name, summaries[name], each) for name, each in commands.choices.items()),
    ]
    return "\n\n".join(parts)


def _section(name: str, summary: str, parser: argparse.ArgumentParser) -> str:
    parts = [f"## wholegrad {name}", f"**{_plain(summary[:1].upper() + summary[1:])}.**", _description(parser)]
    parts.append(f"```text\n{_usage(parser)}\n```")
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    rows = [_row(parser, action) for action in shown if not isinstance(action, argparse._HelpAction)]
    parts.append("\n".join(["| argument | what |", "|---|---|", *rows]))
    if parser.epilog:
        head, _, body = parser.epilog.partition("\n")
        parts.append(f"{head[:1].upper()}{head[1:]}\n\n```text\n{inspect.cleandoc(body)}\n```")
    return "\n\n".join(part for part in parts if part)


def _usage(parser: argparse.ArgumentParser) -> str:
    """The usage without the word before it, its further lines moved along."""
    return re.sub(r"^ {7}", "", parser.format_usage().removeprefix("usage: ").rstrip(), flags=re.MULTILINE)


def _description(parser: argparse.ArgumentParser) -> str:
    """Paragraphs as text; lines that are set in columns stay as they are."""
    parts: list[str] = []
    for line in (parser.description or "").split("\n"):
        columns = line.startswith("  ")
        if not line.strip():
            parts.append("")
        elif columns and parts and parts[-1].startswith("```"):
            parts[-1] = parts[-1].removesuffix("\n```") + f"\n{line.strip()}\n```"
        elif columns:
            parts.append(f"```text\n{line.strip()}\n```")
        elif parts and parts[-1] and not parts[-1].startswith("```"):
            parts[-1] += f"\n{_plain(line)}"
        else:
            parts.append(_plain(line))
    return "\n\n".join(part for part in parts if part)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    values = (
        ""
        if action.nargs == 0
        else " " + formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    )
    if action.option_strings:
        names = ", ".join(f"`{name}{values}`" for name in action.option_strings)
    else:
        names = f"`{formatter._format_args(action, formatter._get_default_metavar_for_positional(action)).strip()}`"
    said = _plain(formatter._expand_help(action)) if action.help else ""
    said = said or ("print the version" if action.dest == "version" else "")
    if action.choices and action.metavar:
        said += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    need = " **required**" if action.option_strings and action.required else ""
    return f"| {names.replace('|', chr(92) + '|')} | {said}{need} |"


def _plain(text: str) -> str:
    """Text of a help message as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
