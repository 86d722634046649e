"""What the documentation site has besides docs/: mkdocs calls these functions (mkdocs.yml, hooks).

CONTRIBUTING.md, CHANGELOG.md and the recipes of plans/ are pages and files of the site, too, and a
page of the commands is made from their --help. Links are written as they are right in the
repository; where they point out of docs/ they are put right here.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from lazymerge.cli.main import app
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that lie outside docs/, by their place in the repository."""

PLANS = sorted((ROOT / "plans").glob("*.yml"))

LINK = re.compile(r"(?<!!)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.lazymerge")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and files that lie elsewhere, or nowhere."""
    texts = {
        page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()
    } | {"plans.md": plans_page(), "commands.md": commands_page()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for path in PLANS:
        files.append(File.generated(config, f"plans/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the links of a page right."""
    source = {site: repository for repository, site in PAGES.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(lambda match: _link(match, source), part) for part in parts[::2]]
    # a link's words may be code, so that the split has cut it: ](target) is left
    return re.sub(
        r"(?<=`)\]\((?P<target>[^)\s]+)\)",
        lambda match: f"]({_target(match['target'], source) or '#'})",
        "".join(parts),
    )


def _link(match: re.Match[str], source: str) -> str:
    target = _target(match["target"], source)
    return match["words"] if target is None else f"[{match['words']}]({target})"


def _target(target: str, source: str) -> str | None:
    """Where a link of a file of the repository leads on the site; None: nowhere.

    source: the file, from the root of the repository.
    """
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return target
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / place).exists() and not place.startswith("docs/"):
        logger.warning("%s: the link %s points to nothing", source, target)
    if place in PAGES:
        site = PAGES[place]
    elif place == "README.md":
        site = "index.md"
    elif place.rstrip("/") == "plans":
        site = "plans.md"
    elif place.startswith("docs/"):
        site = place.removeprefix("docs/")
    elif place.startswith("plans/"):
        site = place
    else:
        return None
    return f"{site}{hash_}{anchor}"


def plans_page() -> str:
    """The recipes of plans/, each with what its opening comment says."""
    parts = [
        "# Example recipes",
        f"The {len(PLANS)} recipes of the folder `plans/`. Each opens with what it does and the "
        "command that runs it. `make demo` makes the models that most of them name.",
    ]
    for path in PLANS:
        text = path.read_text(encoding="utf-8").rstrip()
        parts += [f"## {path.name}", f"[Download](plans/{path.name})", f"```yaml\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """What `--help` says of every command."""
    parts = [
        "# Commands",
        "Results go to stdout; progress and messages to stderr. Sizes are written as `512MiB`, "
        "`2GB` or `4e9`.",
        "| exit code | |\n|---|---|\n| 0 | done |\n| 1 | a failure at run time |\n"
        "| 2 | wrong usage, recipe or input |\n| 3 | does not fit, in memory or on the disk |\n"
        "| 130 | interrupted; can be resumed |",
    ]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"lazymerge {name}")
        usage = " ".join(piece.strip("{}") for piece in command.collect_usage_pieces(context))
        parts += [
            f"## {name}",
            f"```text\nlazymerge {name} {usage}\n```",
            _paragraphs(command.help or ""),
        ]
        records = [parameter.get_help_record(context) for parameter in command.params]
        rows = [_row(*record) for record in records if record is not None]
        parts += ["\n".join(["| | |", "|---|---|", *rows])] if rows else []
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    return _with_code(re.sub(r"[ \t]*\n[ \t]*", "\n", text).strip())


def _with_code(text: str) -> str:
    """A text with the options in it as code."""
    return re.sub(r"(?<![`\w-])--[a-z][\w-]*", r"`\g<0>`", text)


def _row(names: str, words: str) -> str:
    """The row of an argument or option in a table. names: with what they take, as in --help."""
    words, _, facts = words.partition("  [")
    details = [detail for detail in facts.rstrip("]").split("; ") if detail]
    details = [re.sub(r"^default: \(?(.*?)\)?$", r"default: \1", detail) for detail in details]
    words = _with_code(f"{words} ({'; '.join(details)})" if details else words)
    words = words.replace("|", "\\|").replace("\n", " ")
    return f"| <code>{html.escape(names).replace('|', '&#124;')}</code> | {words} |"
