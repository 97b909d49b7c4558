"""Every kind of hook at every module: seen as diffusers sees it, and forgotten when it is removed."""

import pytest

pytest.importorskip("diffusers")

from tests.reference_api import hooks

from qwen_image_fast.drop_in.obstacle import _UNUSED


@pytest.fixture(scope="module")
def both():
    return hooks.Both()


@pytest.mark.parametrize("kind", hooks.KINDS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks(both, kind):
    everywhere = hooks.places(both.theirs.transformer)
    assert len(everywhere) == 86
    # The last block is like the first, but for the layers that it does not call.
    unused = [f"transformer_blocks.1.{'.'.join(path)}" for path in _UNUSED]
    places = [place for place in everywhere if place in unused or "blocks.1" not in place]
    assert len(places) == 51 + len(unused)
    assert hooks.Both(layered=True).fault(hooks.LAYERED, kind) is None
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
