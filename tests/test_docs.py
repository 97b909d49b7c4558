"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
# A path in a page may begin at one of these.
BASES = ["", "python/qwen_image_fast", "training", "csrc", "docs"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for path in re.findall(r"`([\w.-]+/[\w./-]*\.(?:py|h|cpp|cu|cuh|md|yaml|sh|json))`", text):
        if not any((ROOT / base / path).exists() for base in BASES):
            missing.append(path)
    assert not missing, f"{page.name} names {missing}"
