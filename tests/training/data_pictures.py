"""Pictures for the tests of the data pipeline: photographs of scikit-image's wheel, and files made of them."""

import functools
import io

import numpy as np
from PIL import Image

from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.synthesis.photos import find_photos


def encoded(image, kind="PNG", **options):
    """The bytes of a file of a uint8 array or a Pillow image."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def photos():
    """{name: uint8 RGB array} of nine photographs."""
    return {path.rpartition("/")[2]: np.asarray(Image.open(path).convert("RGB")) for path, _, _ in find_photos(None)}


def photo_record(name="astronaut.png", caption="a photograph of something in a place", **fields):
    return Record(encoded(photos()[name]), {"raw": caption}, origin=name, **fields)


def noise(seed, height=32, width=32):
    """A small PNG that no other seed gives."""
    return encoded(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
