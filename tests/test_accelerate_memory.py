"""Streaming in the drop-in, with the CPU in the place of a GPU: the same bits, and all as it was afterwards."""

import pytest
import torch
from accelerate_harness import run, small_transformer

from qwen_image_fast import accelerate, restore
from qwen_image_fast.drop_in import memory
from qwen_image_fast.models import streamed_parts
from qwen_image_fast.weights.plan import working_bytes

CPU = torch.device("cpu")


def test_streamed_equals_resident_and_is_restored():
    model = small_transformer(num_layers=4)
    before = run(model)
    accelerate(model)
    expected = run(model)
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    size = streamed_parts.part_size("transformer", model)
    working = working_bytes(len(model.img_in.weight), 4, 4)
    block = size.units["blocks"][0]
    for more in (2 * block, 3 * block + 1, 5 * block):
        plan = memory.stream_accelerated({"transformer": model}, size.kept + working + more, CPU, base=0)
        assert plan.streams and plan.peak <= plan.limit
        away = [name for name, p in model.named_parameters() if p.is_meta]
        assert len(away) >= 4 and all(model.get_parameter(name).dim() == 2 for name in away)
        for _ in range(2):
            assert torch.equal(run(model), expected)
        assert any("streamed for every step" in line for line in memory.said(plan))
        with pytest.raises(ValueError, match="memory_limit is in force already"):
            memory.stream_accelerated({"transformer": model}, plan.limit, CPU, base=0)
        with pytest.raises(ValueError, match="whose weights are streamed stays where and as it is"):
            model.half()
        model.transformer_blocks[0].attn.norm_q.weight.data = model.transformer_blocks[0].attn.norm_q.weight.double()
        with pytest.raises(RuntimeError, match="weights that are streamed need the fast forward"):
            run(model)
        model.transformer_blocks[0].attn.norm_q.weight.data = model.transformer_blocks[0].attn.norm_q.weight.float()
        assert streamed_parts.restore_parts({"transformer": model})
        names = {name for name in tensors if "norm_q" not in name}
        assert all(model.get_parameter(name).data_ptr() == tensors[name] for name in names)
    restore(model)
    assert torch.equal(run(model), before)


def test_what_is_refused(monkeypatch):
    model = small_transformer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="accelerate: memory_limit must go with a GPU, and torch sees none here"):
        accelerate(model, memory_limit="20GB")
    with pytest.raises(ValueError, match="memory_limit must be a positive number of bytes"):
        accelerate(model, memory_limit="lots")
    with pytest.raises(ValueError, match="needs the fast forward of the transformer: it could not be accelerated"):
        memory.stream_accelerated({"transformer": model}, 10**9, CPU)
    accelerate(model)
    with pytest.raises(ValueError, match="memory_limit must be at least"):
        memory.stream_accelerated({"transformer": model}, 1000, CPU)
