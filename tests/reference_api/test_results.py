"""What was counted is good, and docs/drop_in.md is made from it; nothing is run here."""

import json

from tests.reference_api.__main__ import PAGE, RESULTS, TABLES
from tests.reference_api.versions import ROWS

from qwen_image_fast.drop_in.accelerate import OLDEST_DIFFUSERS

FOUND = json.loads(RESULTS.read_text())


def test_every_hook_is_seen():
    hooks = FOUND["hooks"]
    assert set(hooks["counts"]["now"].values()) == {hooks["of"]}
    assert min(hooks["counts"]["before"].values()) < hooks["of"]


def test_every_version_from_the_floor_on_passes():
    floor = ".".join(map(str, OLDEST_DIFFUSERS))
    assert FOUND["versions"].keys() == ROWS.keys()
    for row in FOUND["versions"].values():
        version = row["versions"]["diffusers"]
        if tuple(map(int, version.split(".")[:2])) >= OLDEST_DIFFUSERS:
            assert row["passed"], row
        else:
            assert not row["passed"] and f"diffusers must be {floor} or newer, got {version}" in row["said"]


def test_diffusers_own_tests():
    """After `accelerate` each has the outcome that it has without; stand-alone those are named that pass only there."""
    tests = FOUND["diffusers-tests"]
    counts, other = tests["counts"]["now"], tests["other outcome"]
    assert counts["after `accelerate`"] == tests["of"] and other["after `accelerate`"] == {}
    worse = [outcome for outcome in other["stand-alone"].values() if not outcome.startswith("passed")]
    assert sum(counts["stand-alone"].values()) == sum(tests["of"].values()) - len(worse)


def test_the_page_is_made_from_them():
    assert all(table(FOUND[name]) in PAGE.read_text() for name, table in TABLES.items())


def test_the_calls_are_those_of_the_list():
    import pytest

    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tests.reference_api import calls

    counts = FOUND["calls"]["counts"]["now"]
    different = sum(call.different is not None for call in calls.CALLS)
    assert FOUND["calls"]["of"] == len(calls.CALLS) == counts["after `accelerate`"]
    assert counts["stand-alone"] == len(calls.CALLS) - different
    assert FOUND["calls"]["counts"]["before"]["stand-alone"] < counts["stand-alone"]
