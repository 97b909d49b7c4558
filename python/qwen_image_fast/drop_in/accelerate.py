"""The drop-in for diffusers: `accelerate(pipe)` and `restore(pipe)`.

An object is accelerated by giving it another class: a subclass of the one it has, under the same name, whose forward is
ours. Nothing is copied, so the parameters, their names and their memory stay those of the user's pipeline, and
`isinstance`, `state_dict`, `save_pretrained`, LoRA adapters and offloading go on working. What may not be replaced,
because a hook or an attention processor of the user would no longer run, is decided at every call: the transformer then
runs diffusers' own forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from qwen_image_fast.drop_in.branches import share_work
from qwen_image_fast.drop_in.graphs import add_graphs, check_graphs
from qwen_image_fast.drop_in.memory import said, stream_accelerated, streaming_device
from qwen_image_fast.drop_in.obstacle import obstacle
from qwen_image_fast.drop_in.pipeline import add_text_hook, remove_text_hook
from qwen_image_fast.drop_in.precision import compute_in_8_bits, put_back
from qwen_image_fast.drop_in.report import Report
from qwen_image_fast.drop_in.swap import fast_class, swap, unswap, vae_classes
from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.drop_in.vae import FastCausalConv3d, FastResample
from qwen_image_fast.drop_in.vae_flops import decoding_flops
from qwen_image_fast.extras import needed_for
from qwen_image_fast.keywords import hinted
from qwen_image_fast.models.precision import check_precision
from qwen_image_fast.models.streamed_parts import restore_parts
from qwen_image_fast.models.vae_conv import Convolution
from qwen_image_fast.parallel.ranks import start_ranks
from qwen_image_fast.sizes import parse_bytes

logger = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds after which the absence of another process is an error

OLDEST_DIFFUSERS = (0, 37)  # as in pyproject.toml; transformers of before have neither layers nor references


@hinted
def accelerate(
    pipe: Any,
    convolution: Convolution = "auto",
    precision: str | None = None,
    memory_limit: int | str | None = None,
    parallel: str | Mapping[str, int] | None = None,
    cuda_graphs: bool = False,
) -> Report:
    """Make a diffusers Qwen-Image pipeline faster in place; the images stay the same up to rounding.

    Args:
        pipe: one of diffusers' Qwen-Image pipelines, a modular pipeline of that family, or only its transformer or VAE.
        convolution: how the VAE convolves images on a CPU: "auto", by Winograd's algorithm where it is faster, or
            "exact", directly everywhere.
        precision: "int8" lets the transformer's large layers compute in 8 bits on a CPU (docs/quantization.md): an
            approximation. The pipeline's own stay in memory, or in the file that diffusers mapped, until `restore`.
        memory_limit: bytes or "20GB" of the GPU: the pipeline is put there, and blocks that do not fit are streamed
            from pinned memory of the host (docs/memory.md). Not yet run on a GPU. Load LoRAs before.
        parallel: the processes that torchrun started make each picture together: "auto", or how many groups share the
            branches of guidance, and how many processes of each the tokens, such as "guidance=2,ulysses=4". Every one
            makes the same calls, with generators of the same seeds (docs/distributed.md). Not yet run on GPUs.
        cuda_graphs: calls of the transformer by the pipeline's loop are captured once for a shape and replayed, so that
            Python queues a step at once. Not yet run on a GPU.

    Returns:
        What was replaced, and what was left alone and why. Parts that are accelerated already are listed as such; of
        the VAE's convolutions the last call decides.

    Raises:
        ImportError: diffusers is not installed, or too old.
        TypeError: `pipe` is something else.
        ValueError: `convolution` is neither; `precision` is unknown, or cannot be had for this pipeline; `memory_limit`
            is too small, or there is no GPU; `parallel` does not fit the processes or the model; `cuda_graphs` without
            a GPU or a pipeline, or with weights that are streamed or work that is shared.
    """
    _require_diffusers()
    if memory_limit is not None:
        limit, device = parse_bytes(memory_limit), streaming_device()
    if convolution not in get_args(Convolution):
        raise ValueError(f"accelerate: convolution must be 'auto' or 'exact', got {convolution!r}")
    parts = _parts(pipe)
    if precision is not None:
        _check_precision(precision, parts)
    if cuda_graphs:
        check_graphs(parts, memory_limit, parallel)
    ranks = None
    if parallel is not None:
        if "transformer" not in parts:
            raise ValueError(f"accelerate: parallel must be None without a transformer, got {parallel!r}")
        ranks = start_ranks("accelerate", parallel, parts["transformer"], PATIENCE)
    report = Report()
    for name, part in parts.items():
        _accelerate_part(name, part, convolution, report)
        if name == "vae":
            for module in _modules(part):
                if isinstance(module, (FastCausalConv3d, FastResample)) and module.convolution != convolution:
                    module.convolution = convolution
        if name == "transformer" and precision is not None:
            compute_in_8_bits(part, report, precision)
    if ranks is not None:
        share_work(parts, ranks, report)
    if memory_limit is not None:
        report.replaced += said(stream_accelerated(_models(pipe, parts), limit, device))
    if cuda_graphs:
        add_graphs(parts, report)
    if getattr(pipe, "controlnet", None) is not None:
        report.left_alone.append(("controlnet", "there is no faster version of it here"))
    return report


def restore(pipe: Any) -> None:
    """Undo `accelerate(pipe)`: afterwards every part runs diffusers' code again, with the same bits as before.

    A part that another pipeline shares is restored for both. Where nothing is accelerated, a warning says so.
    """
    _require_diffusers()
    parts = _parts(pipe)
    streamed = restore_parts(_models(pipe, parts))
    changed = [streamed, *(put_back(part) for name, part in parts.items() if name == "transformer")]
    changed += [unswap(module) for part in parts.values() for module in _modules(part)]
    if "pipeline" in parts:
        changed.append(remove_text_hook(_unwrap(getattr(pipe, "text_encoder", None))))
    if not any(changed):
        logger.warning("restore: nothing to undo, this %s is not accelerated", type(pipe).__name__)


def _check_precision(precision: str, parts: dict[str, Any]) -> None:
    transformer = parts.get("transformer")
    if transformer is None:
        raise ValueError(f"accelerate: precision must be None without a transformer, got {precision!r}")
    check_precision("accelerate", precision, transformer.device)
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError(
            f"accelerate: precision must be None for a transformer with a quantisation of its own, got {precision!r}"
        )


def _require_diffusers() -> None:
    with needed_for("accelerate"):
        import diffusers
    if tuple(int(n) for n in diffusers.__version__.split(".")[:2]) < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise ImportError(f"accelerate: diffusers must be {oldest} or newer, got {diffusers.__version__}")


def _parts(pipe: Any) -> dict[str, Any]:
    """The objects in `pipe` that may be accelerated, by name."""
    from diffusers import DiffusionPipeline, ModularPipeline, QwenImageTransformer2DModel

    if isinstance(pipe, nn.Module):
        model = _unwrap(pipe)
        for name, cls in (("transformer", QwenImageTransformer2DModel), ("vae", vae_classes())):
            if isinstance(model, cls):
                return {name: model}
    elif isinstance(pipe, (DiffusionPipeline, ModularPipeline)) and "QwenImage" in type(pipe).__name__:
        found = {name: _unwrap(getattr(pipe, name, None)) for name in ("transformer", "vae")}
        return {name: part for name, part in found.items() if part is not None} | {"pipeline": pipe}
    raise TypeError(
        "accelerate: pipe must be a diffusers Qwen-Image pipeline, or its transformer or VAE, "
        f"got {type(pipe).__module__}.{type(pipe).__name__}"
    )


def _models(pipe: Any, parts: dict[str, Any]) -> dict[str, nn.Module]:
    """All models of a pipeline, or the one that was given."""
    found = {**getattr(pipe, "components", {}), **parts}
    return {name: _unwrap(part) for name, part in found.items() if isinstance(_unwrap(part), nn.Module)}


def _unwrap(module: Any) -> Any:
    """The module inside of `torch.compile(module)`."""
    return getattr(module, "_orig_mod", module)


def _modules(part: Any) -> list[Any]:
    return list(part.modules()) if isinstance(part, nn.Module) else [part]


def _accelerate_part(name: str, part: Any, convolution: Convolution, report: Report) -> None:
    if isinstance(part, Swapped):
        report.left_alone.append((name, "it is accelerated already"))
    elif fast_class(type(part)) is None and name == "pipeline":
        why = f"the loop of {type(part).__name__} is not known here: modulation vectors are computed at every call"
        report.left_alone.append((name, why))
    elif fast_class(type(part)) is None:
        what = f"{type(part).__module__}.{type(part).__name__}"
        report.left_alone.append((name, f"its class, {what}, is none that is known here"))
    elif not swap(part):
        report.left_alone.append((name, "something unknown replaced its forward on the object"))
    elif name == "vae":
        _vae_details(part, convolution, report)
    else:
        _DETAILS[name](part, report)


def _transformer_details(transformer: Any, report: Report) -> None:
    if why := obstacle(transformer):
        report.left_alone.append(("transformer", f"{why}; as long as this is so, diffusers' own forward runs"))
        return
    report.replaced.append("transformer: fused forward without padding; the last block computes the image only")
    report.kept_per_step = transformer.modulation_bytes()
    if any(block._compiled_call_impl is not None for block in transformer.transformer_blocks):
        why = "compile_repeated_blocks has no effect, because the fused forward calls no block"
        report.left_alone.append(("compiled blocks", why))


def _vae_details(vae: Any, convolution: Convolution, report: Report) -> None:
    layers = sum(swap(module) for module in vae.modules() if not isinstance(module, Swapped))
    theirs, ours = (flops / 1e12 for flops in decoding_flops(vae, convolution=convolution))
    report.replaced.append(
        f"vae: single images go through a 2-D network ({layers} layers replaced); the convolutions of a decoded "
        f"1024 x 1024 image take {ours:.2g} instead of {theirs:.2g} TFLOP, {1 - ours / theirs:.0%} are saved"
    )


def _pipeline_details(pipe: Any, report: Report) -> None:
    report.replaced.append(
        "pipeline: modulation vectors are computed once per time step of a schedule, one row for the whole batch"
    )
    text_encoder = _unwrap(getattr(pipe, "text_encoder", None))
    if type(text_encoder).__name__ != "Qwen2_5_VLForConditionalGeneration":
        report.left_alone.append(("text_encoder", f"it is a {type(text_encoder).__name__}"))
    elif "logits_to_keep" not in inspect.signature(type(text_encoder).forward).parameters:
        report.left_alone.append(("text_encoder", "this transformers computes the logits of all positions"))
    elif not add_text_hook(text_encoder):
        report.left_alone.append(("text_encoder", "it is accelerated already"))
    else:
        report.replaced.append(
            "text_encoder: while the pipeline encodes prompts, the vocabulary matrix multiplies one position of each "
            "prompt instead of all; other calls and generate() are unchanged"
        )


_DETAILS = {"transformer": _transformer_details, "pipeline": _pipeline_details}
