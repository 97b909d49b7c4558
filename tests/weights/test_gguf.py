"""GGUF files: the container and every type of blocks, against the `gguf` package."""

import pytest
import torch
from weights.writers import SIZES, from_q8_0, q8_0, random_blocks, write_gguf

from qwen_image_fast.weights.formats import open_weights
from qwen_image_fast.weights.gguf_types import BLOCK_TYPES
from qwen_image_fast.weights.reading import CHUNK, read_weights

CPU = torch.device("cpu")


def read(path, dtype=torch.float32):
    return read_weights(open_weights([path]).weights, dtype, CPU)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_those_of_gguf(tmp_path, kind, dtype):
    """Also where a tensor is decoded in several parts."""
    from gguf import GGMLQuantizationType, quants

    number, values, _ = SIZES[kind]
    count = CHUNK // values + 3
    blocks = random_blocks(kind, count)
    (weight,) = read(write_gguf(tmp_path / "a.gguf", {"w": (kind, blocks, (count, values))}, {}), dtype).values()
    expected = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType(number)))
    assert torch.equal(weight, expected.to(dtype)) and expected.abs().max() > 0
    assert BLOCK_TYPES[number].name == kind


def test_what_the_gguf_package_writes(tmp_path):
    """Every plain type, quantised blocks, several axes, an original shape, a tokenizer's lists, its alignment."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen_image")
    writer.add_custom_alignment(128)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("half", 0.5)
    writer.add_bool("yes", True)
    torch.manual_seed(0)
    plain = torch.randn(3, 5)
    flat = torch.randn(2, 3, 4, 2, 4)
    matrix = torch.randn(6, 64)
    writer.add_tensor("f32", plain.numpy())
    writer.add_tensor("f16", plain.half().numpy())
    bf16 = plain.bfloat16().view(torch.int16).numpy()
    writer.add_tensor("bf16", bf16.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
    blocks = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("q5_1", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.add_array("comfy.gguf.orig_shape.five", list(flat.shape))
    writer.add_tensor("five", flat.view(6, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = read(tmp_path / "a.gguf", None)
    assert torch.equal(found["f32"], plain) and torch.equal(found["f16"], plain.half())
    assert torch.equal(found["bf16"], plain.bfloat16()) and torch.equal(found["five"], flat)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q5_1))
    assert found["q5_1"].dtype == torch.bfloat16 and torch.equal(found["q5_1"], expected.bfloat16())


def test_other_versions_and_alignments(tmp_path):
    tensor = torch.arange(40.0).view(5, 8)
    for version, alignment in ((2, 32), (3, 64)):
        description = {"general.alignment": alignment, "words": ["x", "y"]}
        path = write_gguf(tmp_path / "a.gguf", {"a": tensor[:1], "b": tensor}, description, alignment, version)
        assert torch.equal(read(path)["b"], tensor)


def damaged(tmp_path, change):
    blocks = q8_0(torch.randn(4, 64))
    description = {"general.architecture": "qwen_image", "words": ["a", "b"]}
    path = write_gguf(tmp_path / "x.gguf", {"w": ("Q8_0", blocks, (4, 64))}, description)
    path.write_bytes(change(path.read_bytes()))
    return path


SAYS = {
    "inside its header": lambda data: data[:40],
    "cut off: w ends at byte": lambda data: data[:-40],
    "a GGUF of version 1": lambda data: data[:4] + b"\1" + data[5:],
    "a big-endian GGUF": lambda data: data[:4] + b"\0\0\0\3" + data[8:],
    "not safetensors": lambda data: b"GGUX" + data[4:],
    "w has 204 values, not a multiple of the 32 of Q8_0": lambda data: data.replace(
        b"\x40" + b"\0" * 7, b"\x33" + b"\0" * 7
    ),
    "a list of lists": lambda data: data.replace(b"\x09\0\0\0\x08", b"\x09\0\0\0\x09"),
    "unknown type 77": lambda data: data.replace(b"\x09\0\0\0\x08", b"\x4d\0\0\0\x08"),
}


@pytest.mark.parametrize("text", SAYS)
def test_a_damaged_file_is_named(tmp_path, text):
    path = damaged(tmp_path, SAYS[text])
    with pytest.raises(ValueError, match=text) as error:
        open_weights([path], "transformer")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", range(4, 300, 37))
def test_cut_anywhere_in_the_header(tmp_path, length):
    with pytest.raises(ValueError, match="is cut off"):
        open_weights([damaged(tmp_path, lambda data: data[:length])])


def test_a_type_that_is_not_read_is_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": (17, torch.zeros(1, 74, dtype=torch.uint8), (1, 256))}, {})
    with pytest.raises(ValueError, match=r"holds w as IQ2_XS, which is not read: take a file of .*Q4_K"):
        open_weights([path])
    path = write_gguf(tmp_path / "a.gguf", {"w": (99, torch.zeros(1, 74, dtype=torch.uint8), (1, 256))}, {})
    with pytest.raises(ValueError, match="as type 99"):
        open_weights([path])


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    blocks = q8_0(torch.randn(4, 64))
    blocks[3, :2] = torch.tensor([float("nan")]).half().view(torch.uint8)
    path = write_gguf(tmp_path / "a.gguf", {"some.weight": ("Q8_0", blocks, (4, 64))}, {})
    with pytest.raises(ValueError, match=r"some.weight in .*a.gguf \(GGUF Q8_0\) is not finite in torch.float32"):
        read(path)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    blocks = q8_0(torch.randn(4, 64))
    path = write_gguf(tmp_path / "a.gguf", {"w": ("Q8_0", blocks, (4, 64))}, {})
    weights = open_weights([path]).weights
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="became shorter"):
        read_weights(weights, None, CPU)


def test_another_architecture_is_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": torch.zeros(2, 2)}, {"general.architecture": "flux"})
    with pytest.raises(ValueError, match=r"of the architecture flux, not of a Qwen-Image transformer \(qwen_image\)"):
        open_weights([path], "transformer")
    assert list(open_weights([path], "vae").weights) == ["w"]


def test_own_blocks_of_the_tests(tmp_path):
    tensor = torch.randn(8, 96)
    blocks = q8_0(tensor)
    found = read(write_gguf(tmp_path / "a.gguf", {"w": ("Q8_0", blocks, (8, 96))}, {}))["w"]
    assert torch.equal(found, from_q8_0(blocks, (8, 96)))
    assert (found - tensor).abs().max() < tensor.abs().max() / 100
