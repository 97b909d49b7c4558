"""Every public call that diffusers' tests make: the same on accelerated and on stand-alone objects, but for a few."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.reference_api import calls


@pytest.mark.parametrize("of", calls.ROWS)
def test_calls(of):
    """Those that differ on purpose raise an error that names what there is instead."""
    assert calls.faults("accelerated", [of]) == {}
    faults = calls.faults("stand-alone", [of])
    different = {call.name: call.different for call in calls.CALLS if call.of == of and call.different}
    for name in different.keys() & {*calls.BY_WEIGHTS}:
        assert calls.share_of_deviation(faults.pop(name, None)) < 0.1
        del different[name]
    assert {name: fault for name, fault in faults.items() if name not in different} == {}
    assert {name: faults.get(name, "as diffusers")[: len(begin)] for name, begin in different.items()} == different


def test_calls_are_named_once():
    names = [call.name for call in calls.CALLS]
    assert len(set(names)) == len(names) and calls.DIFFERENT.keys() <= {*names, *(call.row[0] for call in calls.CALLS)}
