"""A page of every sentence with which the package refuses something, read from the sources."""

from __future__ import annotations

import ast
import html
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDERS = ("python/qwen_image_fast", "training")
HEAD = """# Sentences of errors

Every sentence with which the package refuses something says what was wrong and what to do; this page has all of them,
by the file that says it, so that a search finds the one on your screen. What stands in braces is filled in.
"""


def on_files(files: Files, config) -> Files:
    lines = [HEAD]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if said := sentences(ast.parse(path.read_text(encoding="utf-8"))):
                lines.append(f"## {path.relative_to(ROOT)}\n")
                lines += [f"- **{kind}**: {html.escape(text)}" for kind, text in said]
                lines.append("")
    files.append(File.generated(config, "sentences.md", content="\n".join(lines)))
    return files


def sentences(tree: ast.AST) -> list[tuple[str, str]]:
    """Class and text of what is raised with a text, in the order of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind = ast.unparse(node.exc.func).rpartition(".")[2]
            text = _text(node.exc.args[0])
            if text.strip(" {}") and kind[0].isupper():
                found.append((kind, text))
    return found


def _text(node: ast.expr) -> str:
    """A literal or f-string with {what is filled in}; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "{" + ast.unparse(v.value) + "}" for v in node.values]
        return " ".join("".join(parts).split())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""
