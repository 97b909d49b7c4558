"""Arguments of loading and saving that all parts share, and a sentence for every keyword that has no effect here."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable)

HUB = ("revision", "cache_dir", "token", "local_files_only")
# What diffusers' `from_pretrained` takes besides, and why this package's does not.
ELSEWHERE = {
    "max_memory": "memory_limit= says what the device may hold",
    "offload_folder": "memory_limit= streams what does not fit from the files as they are",
    "offload_state_dict": "weights go straight to one device, device=",
    "quantization_config": "weights are read as floating point; quantise the layers of a loaded model",
    "custom_pipeline": "no code is loaded from a folder or repository",
    "custom_revision": "no code is loaded from a folder or repository",
    "trust_remote_code": "no code is loaded from a folder or repository",
    "force_download": "remove the repository from the hub's cache, or pass another cache_dir",
    "proxies": "the hub's client takes them from HTTPS_PROXY",
    "output_loading_info": "weights that are missing, unexpected or of another shape are errors",
    "disable_mmap": "large weights that stay on the CPU as they are stored are mapped, others are read in pieces",
    "use_onnx": "only safetensors files are read",
    "from_flax": "only safetensors files are read",
    "use_flashpack": "only safetensors files are read",
    "save_function": "files are written as safetensors, and put in place when they are whole",
    "push_to_hub": "upload the folder with huggingface_hub.upload_folder",
}


def refuse(where: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for keywords that nobody takes, with what to do instead or the nearest known one."""
    known = list(known)
    for name in unknown:
        if name in ELSEWHERE:
            raise TypeError(f"{where}: {name} has no use here: {ELSEWHERE[name]}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise TypeError(f"{where}: {name} is not an argument; {hint}")


def hinted(function: F) -> F:
    """A function with a TypeError for keywords that it lacks, which names the nearest: Python names none until 3.13."""
    known = keyword_names(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := [name for name in kwargs if name not in known]:
            called = function.__qualname__.endswith(".__call__")
            name = type(args[0]).__name__ if called else function.__qualname__  # of the class, not of one above it
            refuse(name, unknown, [k for k in known if k != "self"])
        return function(*args, **kwargs)

    return cast(F, call)


def check_visible(where: str, device: Any) -> None:
    """ValueError for a GPU where torch sees none, in a sentence that torch's own errors are not."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU here"
        raise ValueError(
            f"{where}: device must be one that is there, got {device}: {why}; `qwen-image-fast doctor` says more"
        )


def keyword_names(function: Callable) -> list[str]:
    """The arguments that a function names."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [p.name for p in signature(function).parameters.values() if p.kind in named]


def one_dtype(torch_dtype: Any, dtype: Any) -> torch.dtype | None:
    """The type that weights become, given under either name; None, or "auto": as stored."""
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ValueError(f"from_pretrained: dtype must equal torch_dtype where both are given, got {dtype}")
    dtype = torch_dtype if dtype is None else dtype
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"from_pretrained: dtype must be a floating-point torch dtype or None, got {dtype!r}")
    return dtype


def part_dtypes(torch_dtype: Any, dtype: Any, parts: Iterable[str]) -> dict[str, torch.dtype | None]:
    """The type of each part: one for all, or a dict of parts with "default" for the rest (as stored, without it)."""
    given = torch_dtype if dtype is None else dtype
    if not isinstance(given, Mapping):
        return dict.fromkeys(parts, one_dtype(torch_dtype, dtype))
    parts = list(parts)
    refuse("from_pretrained: torch_dtype", set(given) - {*parts, "default"}, [*parts, "default"])
    return {name: one_dtype(given.get(name, given.get("default")), None) for name in parts}


def one_device(device: Any, device_map: Any, use_safetensors: bool | None) -> torch.device:
    """Where weights go, under either name; ValueError for what this package does not do."""
    if use_safetensors is False:
        raise ValueError("from_pretrained: use_safetensors must not be False: pickled weights are never read")
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        check_visible("from_pretrained", device)
        return torch.device(device)
    if isinstance(device_map, Mapping) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"from_pretrained: device_map must be one device for all weights, got {device_map!r}")
    check_visible("from_pretrained", device_map)
    return torch.device(device_map)


def check_saving(safe_serialization: bool, push_to_hub: bool = False, where: str = "save_pretrained") -> None:
    if not safe_serialization:
        raise ValueError(f"{where}: safe_serialization must be True: weights are written as safetensors only")
    if push_to_hub:
        refuse(where, ["push_to_hub"], [])
