"""Every public call that diffusers' tests make: the same on accelerated and on stand-alone objects, but for a few."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.reference_api import calls


@pytest.mark.parametrize("kind", calls.KINDS)
def test_calls(kind):
    """Those that differ on purpose raise an error."""
    faults = calls.faults(kind)
    different = calls.DIFFERENT if kind == "stand-alone" else {}
    assert {name: fault for name, fault in faults.items() if name not in different} == {}
    assert faults.keys() == different.keys()
    assert all(fault.startswith("AttributeError: ") for fault in faults.values())


def test_calls_are_named_once():
    names = [call.name for call in calls.CALLS]
    assert len(set(names)) == len(names) and calls.DIFFERENT.keys() <= set(names)
