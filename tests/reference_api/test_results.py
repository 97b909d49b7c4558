"""What was counted is good, and docs/drop_in.md is made from it; nothing is run here."""

import json

from tests.reference_api.__main__ import PAGE, RESULTS, TABLES

from qwen_image_fast.drop_in.accelerate import OLDEST_DIFFUSERS

FOUND = json.loads(RESULTS.read_text())


def test_every_hook_is_seen():
    assert set(FOUND["hooks"]["now"].values()) == {FOUND["places"]}
    assert min(FOUND["hooks"]["before"].values()) < FOUND["places"]


def test_every_version_from_the_floor_on_passes():
    floor = ".".join(map(str, OLDEST_DIFFUSERS))
    for version, found in FOUND["versions"].items():
        if tuple(map(int, version.split(".")[:2])) >= OLDEST_DIFFUSERS:
            assert found["passed"], (version, found)
        else:
            assert not found["passed"] and f"diffusers must be {floor} or newer, got {version}" in found["said"]


def test_the_page_is_made_from_them():
    assert all(table(FOUND) in PAGE.read_text() for table in TABLES.values())
