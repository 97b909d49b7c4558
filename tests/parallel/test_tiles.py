"""Tiles that one process has, and others compute with it: the same results in order, errors, and one that is gone."""

import threading
from multiprocessing import Pipe

import pytest
import torch

import qwen_image_fast as q
from qwen_image_fast.parallel.leader import GroupLost
from qwen_image_fast.parallel.tiles import TileLeader, follow_tiles


class Twice(torch.nn.Module):
    """What stands for a VAE: it counts its pieces, and fails at one that holds `wrong`."""

    def __init__(self, wrong=None, error=ValueError):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.count, self.wrong, self.error = 0, wrong, error

    def twice(self, piece):
        if piece[0, 0] == self.wrong:
            raise self.error(f"no {float(piece[0, 0])} here")
        self.count += 1
        return self.weight.detach() * piece


def followed(vaes):
    """A leader, and a thread for each VAE that follows it."""
    ends = [Pipe() for _ in vaes]
    for vae, (_, theirs) in zip(vaes, ends):
        threading.Thread(target=follow_tiles, args=(vae, theirs), daemon=True).start()
    return TileLeader([ours for ours, _ in ends]), ends


@pytest.mark.parametrize("pieces, shares", [(7, [3, 2, 2]), (2, [1, 1, 0])])
def test_the_pieces_are_shared(pieces, shares):
    own, others = Twice(), [Twice(), Twice()]
    leader, _ = followed(others)
    given = list(torch.arange(9.0 * pieces).view(3, 3 * pieces).split(3, dim=1))  # views, as tiles are
    found = leader.each(own.twice, given)
    assert all(torch.equal(result, 2 * piece) for result, piece in zip(found, given, strict=True))
    assert [vae.count for vae in (own, *others)] == shares


@pytest.mark.parametrize("error, kind", [
    (ValueError, ValueError), (torch.OutOfMemoryError, torch.OutOfMemoryError), (KeyError, RuntimeError),
])  # fmt: skip
@pytest.mark.parametrize("who", ["own", "other"])
def test_an_error_is_raised_and_the_next_call_is_right(who, error, kind):
    own, other = Twice(3 if who == "own" else None, error), Twice(4 if who == "other" else None, error)
    leader, _ = followed([other])
    pieces = [torch.full((2, 2), float(k)) for k in range(1, 9)]
    with pytest.raises(error if who == "own" else kind, match=f"no {3 if who == 'own' else 4}.0 here"):
        leader.each(own.twice, pieces)
    right = [p for p in pieces if p[0, 0] not in (3, 4)]
    assert torch.equal(torch.stack(leader.each(own.twice, right)), 2 * torch.stack(right))


def test_one_that_is_gone():
    leader, ((_, theirs),) = TileLeader([(ends := Pipe())[0]]), [ends]
    theirs.close()
    with pytest.raises(GroupLost, match="shares the tiles of the VAE is gone"):
        leader.each(Twice().twice, [torch.ones(2, 2)] * 2)


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_tiles_of_the_tiny_model(what):
    """The bits of one process that tiles."""
    vaes = [q.QwenImagePipeline.from_pretrained("tiny", torch_dtype=torch.float32).vae for _ in range(2)]
    vaes[0].enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16,
                          tile_sample_stride_width=16)  # fmt: skip
    shape = (1, 3, 1, 64, 80) if what == "encode" else (1, 16, 1, 8, 10)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = getattr(vaes[0], f"_{what}")(given)
        vaes[0].ranks, _ = followed(vaes[1:])
        assert torch.equal(getattr(vaes[0], f"_{what}")(given), expected)
