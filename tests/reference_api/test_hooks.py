"""Every kind of hook at every module: seen as diffusers sees it, and forgotten when it is removed."""

import pytest

pytest.importorskip("diffusers")

from tests.reference_api import hooks


@pytest.fixture(scope="module")
def both():
    return hooks.Both()


@pytest.fixture(scope="module")
def layered():
    return hooks.Both(layered=True)


@pytest.mark.parametrize("kind", hooks.KINDS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks(both, layered, kind):
    """All places and kinds; both models are made once."""
    places = hooks.places(both.theirs.transformer)
    assert len(places) == 86
    assert layered.fault(hooks.LAYERED, kind) is None
    assert {place: fault for place in places if (fault := both.fault(place, kind))} == {}


def test_hooks_on_all_modules(both):
    from torch.nn.modules.module import register_module_forward_hook

    expected = both.plain[hooks.draw]
    seen = {}
    handle = register_module_forward_hook(lambda module, args, output: seen.__setitem__(id(module), True))
    try:
        assert hooks.alike(hooks.draw(both.fast), expected)
    finally:
        handle.remove()
    transformer = both.fast.transformer
    assert {id(transformer.get_submodule(place)) for place in hooks.places(transformer)} <= seen.keys()
