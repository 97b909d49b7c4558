"""The pages name files, commands and options that are there; their Python runs where the shipped model suffices."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import qwen_image_fast
from qwen_image_fast import ops

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
# A path in a page may begin at one of these.
BASES = ["", "python/qwen_image_fast", "training", "csrc", "docs"]


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in a language; one without a language is ""."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language.strip() in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for path in re.findall(r"`([\w.-]+/[\w./-]*\.(?:py|h|cpp|cu|cuh|md|yaml|sh|json))`", text):
        if not any((ROOT / base / path).exists() for base in BASES):
            missing.append(path)
    assert not missing, f"{page.name} names {missing}"


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=lambda x: x.name if isinstance(x, Path) else "")
def test_python(page, block, tmp_path, monkeypatch):
    """It parses, what it imports from the package is there, and what names no model but the shipped one runs."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("qwen_image_fast"):
            exec(ast.unparse(node), {})
    if '"tiny"' in block and 'from_pretrained("' not in block.replace('from_pretrained("tiny"', ""):
        monkeypatch.chdir(tmp_path)
        exec(compile(block, str(page), "exec"), {})


def commands() -> list[tuple[str, list[str]]]:
    """Every `qwen-image-fast …` line of a page, joined where it goes on, without what a shell would do with it."""
    found = []
    for page in PAGES:
        for block in blocks(page, "", "sh", "bash", "console"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.startswith("qwen-image-fast ") and "|" not in line:
                    found.append((page.name, shlex.split(line, comments=True)[1:]))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x[:2]))
def test_commands(page, words):
    """The command and all its options exist; nothing is run."""
    import typer

    from qwen_image_fast.cli import app

    command = typer.main.get_command(app)
    while hasattr(command := command.load() if hasattr(command, "load") else command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{page}: there is no command {name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if re.match(r"--?[a-zA-Z]", word) and word.partition("=")[0] not in known]
    assert not unknown, f"{page}: {command.name} has no {unknown}"


# ---- the site ---------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_sites_menu():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == set()


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    named = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    assert set(qwen_image_fast.__all__) - named <= {"build_info"}  # compiled
    assert set(ops.__all__) - named == set()


def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    """With the gallery drawn, every link followed, and the sentences of errors read from the sources."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    for name in ("index", "gallery", "sentences", "api/ops", "source/constraints.txt"):
        assert (tmp_path / f"{name}.html").exists()
    assert len(list((tmp_path / "gallery").glob("*.png"))) == 10
    sentences = (tmp_path / "sentences.html").read_text(encoding="utf-8")
    assert "{path} ({size} bytes) is cut off" in sentences
