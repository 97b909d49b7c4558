"""How weights come into memory: mapped where they can be, given back, and said where they do not fit."""

import gc
import logging
import os

import pytest
import torch

from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.sizes import parse_bytes
from qwen_image_fast.tensor_files import SMALLEST_MAPPED, read_header, read_tensors
from qwen_image_fast.weights import memory
from qwen_image_fast.weights.formats import open_weights
from qwen_image_fast.weights.memory import Need, check_fits, need_of

CPU = torch.device("cpu")
SIDE = 512  # a float32 matrix of it is a MiB


class Wide(PretrainedModel):
    @record_config
    def __init__(self, layers: int = 2):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE) for _ in range(layers))


@pytest.fixture
def wide(tmp_path):
    torch.manual_seed(0)
    model = Wide()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def mappings(folder):
    with open("/proc/self/maps") as file:
        return sum(str(folder) in line for line in file)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="mappings are read from /proc")


@linux
@pytest.mark.parametrize("dtype, count", [(None, 2), (torch.float32, 2), (torch.bfloat16, 0)])
def test_large_weights_that_stay_as_stored_are_mapped_and_given_back(wide, dtype, count):
    model, folder = wide
    files = len(os.listdir("/proc/self/fd"))
    back = Wide.from_pretrained(folder, torch_dtype=dtype)
    assert mappings(folder) == count
    assert len(os.listdir("/proc/self/fd")) == files  # a mapping needs no open file
    for name, p in model.named_parameters():
        assert torch.equal(back.get_parameter(name), p.to(back.dtype))
        assert back.get_parameter(name).untyped_storage().nbytes() == back.get_parameter(name).nbytes
    weight = back.layers[0].weight
    del back
    gc.collect()
    assert mappings(folder) == min(count, 1)
    del weight
    gc.collect()
    assert mappings(folder) == 0


def test_what_is_written_to_a_mapped_weight_stays_in_this_process(wide):
    model, folder = wide
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    back = Wide.from_pretrained(folder)
    with torch.no_grad():
        back.layers[0].weight.add_(1)
    assert torch.equal(back.layers[0].weight, model.layers[0].weight + 1)
    back.layers[1](torch.ones(3, SIDE)).sum().backward()
    back.save_pretrained(folder)  # over the file that it is mapped from
    assert torch.equal(back.layers[1].weight, model.layers[1].weight)
    model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_shrank_is_not_mapped(wide):
    _, folder = wide
    path = folder / "diffusion_pytorch_model.safetensors"
    entries = read_header(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(OSError, match="became shorter"):
        read_tensors(entries, None, CPU, mapped=True)


def test_small_and_unaligned_tensors_are_read(tmp_path):
    """A file of another tool may begin a tensor anywhere."""
    path = tmp_path / "x.safetensors"
    size = SMALLEST_MAPPED
    header = b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F32","shape":[%d],' % (size // 4)
    header += b'"data_offsets":[1,%d]}}' % (size + 1)
    content = torch.arange(size // 4, dtype=torch.float32)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + content.numpy().tobytes())
    entries = read_header(path)
    assert need_of(entries.values(), None, CPU) == Need(size + 1, 0) or entries["a"].start % 4 == 0
    assert torch.equal(read_tensors(entries, None, CPU, mapped=True)["a"], content)


@pytest.mark.parametrize(
    "dtype, own, mapped",
    [(None, 2 * SIDE * 4, 2 * SIDE**2 * 4), (torch.bfloat16, 2 * (SIDE + SIDE**2) * 2, 0)],
)
def test_what_weights_need(wide, dtype, own, mapped):
    _, folder = wide
    weights = open_weights([folder / "diffusion_pytorch_model.safetensors"]).weights.values()
    assert need_of(weights, dtype, CPU) == Need(own, mapped)
    assert need_of(weights, dtype, torch.device("meta")) == Need(own + mapped, 0)


def test_what_does_not_fit_is_said_before_it_is_read(wide, monkeypatch, caplog):
    _, folder = wide
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * SIDE**2 * 2)
    sentence = r"^the weights must fit: 1.1 MB \(Wide 1.1 MB\), but 1.0 MB of memory is free; load the pipeline with "
    with pytest.raises(ValueError, match=sentence + r'memory_limit="1GB" \(--memory\), which streams'):
        Wide.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        Wide.from_pretrained(folder)  # mapped: it runs
    assert "they are read from the disk again at every step" in caplog.text


def test_parts_are_added():
    with pytest.raises(ValueError, match=r"the weights must fit: 3.0 GB \(a 1.0 GB, b 2.0 GB\), but 2.5 GB of memory"):
        check_fits({"a": Need(10**9, 0), "b": Need(2 * 10**9, 0), "c": Need(0, 0)}, CPU, free=2_500_000_000)
    check_fits({"a": Need(10**9, 0), "b": Need(10**9, 0)}, CPU, free=2_500_000_000)


@linux
def test_free_memory_is_that_of_the_machine_and_of_the_control_groups(tmp_path):
    free = memory.free_bytes(CPU)
    assert free is not None and 0 < free < 2**50
    group = tmp_path / "root" / "outer" / "inner"
    group.mkdir(parents=True)
    for folder, limit, used, pages in ((group, "max", 5, 1), (group.parent, "1000", 600, 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nfile {pages}\n")
    (tmp_path / "cgroup").write_text("1:cpu:/x\n0::/outer/inner\n")
    assert memory._of_groups(tmp_path / "cgroup", tmp_path / "root") == [1000 - 600 + 100]
    assert memory._of_groups(tmp_path / "absent", tmp_path / "root") == []


@pytest.mark.parametrize("limit", ["20 GB", "20gb", "20000MB", 20 * 10**9])
def test_limits_are_read(limit):
    assert parse_bytes(limit) == 20 * 10**9


def test_a_unit_is_not_forgotten_in_silence():
    with pytest.raises(ValueError, match="memory_limit must have a unit, such as 20GB, got '20', which would be bytes"):
        parse_bytes("20")


@pytest.mark.parametrize("limit", ["", "much", "-1GB", 0, True, None, "20 G"])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match="memory_limit must be a positive number of bytes or a string like '4GB'"):
        parse_bytes(limit)
