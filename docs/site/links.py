"""The start page is README.md; what the pages link to outside docs/ comes along as pages of its own."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
MAX_BYTES = 100_000  # a longer text is not shown but copied
SHOWN = {
    ".py": "python",
    ".json": "json",
    ".md": "markdown",
    ".sh": "sh",
    ".txt": "text",
    ".jsonl": "json",
    ".yaml": "yaml",
}


def on_files(files: Files, config) -> Files:
    start = LINK.sub(lambda m: _from_readme(m[0]), (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=start))
    for page in [f for f in files if f.src_uri.endswith(".md")]:
        for link in LINK.findall(page.content_string):
            if (path := _outside(page.src_uri, link)) is not None:
                _add(files, path, config)
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    def inside(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[0])
        if path is None:
            return match[0]
        return posixpath.relpath(_place(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(inside, markdown) if not page.file.src_uri.startswith("source/") else markdown


def _from_readme(link: str) -> str:
    """A link of README.md as one of a page in docs/."""
    if "://" in link:
        return link
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def _outside(page: str, link: str) -> str | None:
    """The path from the root of what a page links to, where it is not in docs/."""
    if "://" in link or page.startswith("source/"):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _place(path: str) -> str:
    """Where a file outside docs/ is in the site."""
    whole = ROOT / path
    if whole.is_dir():
        return f"source/{path}/index.md"
    shown = whole.suffix in SHOWN and whole.stat().st_size <= MAX_BYTES
    return f"source/{path}.md" if shown else f"source/{path}"


def _add(files: Files, path: str, config) -> None:
    place, whole = _place(path), ROOT / path
    if files.get_file_from_path(place) is not None:
        return
    if whole.is_dir():
        children = sorted(child.relative_to(ROOT).as_posix() for child in whole.iterdir() if child.is_file())
        for child in children:
            _add(files, child, config)
        lines = [f"- [{posixpath.basename(c)}]({posixpath.relpath(_place(c), f'source/{path}')})" for c in children]
        files.append(File.generated(config, place, content=_page(path, "\n".join(lines))))
    elif place.endswith(".md"):
        text = whole.read_text(encoding="utf-8")
        fence = "`" * (max(map(len, re.findall(r"`{3,}", text)), default=2) + 1)
        body = f"{fence} {SHOWN[whole.suffix]}\n{text}\n{fence}"
        files.append(File.generated(config, place, content=_page(path, body)))
    else:
        files.append(File.generated(config, place, abs_src_path=str(whole)))


def _page(title: str, body: str) -> str:
    return f"---\nsearch: {{exclude: true}}\n---\n# {title}\n\n{body}\n"
