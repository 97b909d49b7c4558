"""`qwen-image-fast serve`: everything that can be known is checked, and the port taken, before the model is read."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_image_fast.cli import common
from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, err, failing
from qwen_image_fast.cli.progress import Progress
from qwen_image_fast.extras import needed_for
from qwen_image_fast.folders import local_folder, read_json, resolve_folder
from qwen_image_fast.model_defaults import GENERATION_FILE, model_class
from qwen_image_fast.parallel.split import Split, parse_split
from qwen_image_fast.serving.settings import is_loopback

LISTEN, WHO, LIMITS = "Where it listens", "Who may ask", "Limits"


def serve(
    model: Annotated[str, typer.Option(help="Folder or hub name; tiny: the model that comes with the package.")],
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=LISTEN)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=LISTEN)] = 8000,
    name: Annotated[list[str] | None, typer.Option(help="Another name of the model in requests.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME=FILE: a LoRA that requests may name.")] = None,
    controlnet: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: a ControlNet that requests may name.")
    ] = None,
    transformer: Annotated[str | None, typer.Option(help="The transformer's weights, in a file.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on a GPU or in 8 bits, else float32.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="The transformer in 8 or 4 bits: int8 or int4.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU, if we have kernels.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model, on the CPU.")] = None,
    wave_tokens: Annotated[int | None, typer.Option(min=64, help="Of one step of all that share it.")] = None,
    parallel: Annotated[
        str | None, typer.Option(help="guidance=2,ulysses=4: GPUs that make each picture together; auto: all of them.")
    ] = None,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Tiles of 256 pixels: less memory, other pixels; see --parallel.")
    ] = False,
    api_key_file: Annotated[Path | None, typer.Option(help="JSON list of keys.", rich_help_panel=WHO)] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen for other machines without keys.", rich_help_panel=WHO)
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that it is asked under.", rich_help_panel=WHO)
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="https://... of a page that may ask.", rich_help_panel=WHO)
    ] = None,
    image_url_host: Annotated[
        list[str] | None, typer.Option(help="A host that pictures are fetched from.", rich_help_panel=WHO)
    ] = None,
    max_wait: Annotated[
        float, typer.Option(min=0.001, help="Seconds until done, above which 429.", rich_help_panel=LIMITS)
    ] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for what runs, when it ends.", rich_help_panel=LIMITS)
    ] = 120.0,
    keep_seconds: Annotated[
        float, typer.Option(min=0.001, help="How long results are kept.", rich_help_panel=LIMITS)
    ] = 600.0,
    keep_mb: Annotated[int, typer.Option(min=1, help="Megabytes of results kept.", rich_help_panel=LIMITS)] = 512,
    keep_in: Annotated[
        Path | None, typer.Option(help="Folder of the results kept; default: memory.", rich_help_panel=LIMITS)
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """Serve pictures over HTTP by OpenAI's images API."""
    with needed_for("qwen-image-fast serve"):
        import python_multipart  # noqa: F401  what reads forms, first asked for by a request

        err.print(f"{model}: loading the server", markup=False, highlight=False, soft_wrap=True)
        from qwen_image_fast.serving import logs, settings
        from qwen_image_fast.serving.run import listen, log_end, run
    if not settings.is_loopback(host) and api_key_file is None and not insecure:
        raise CommandError(
            f"--host {host} lets other machines in: give --api-key-file, or --insecure where all of them may"
        )
    with failing(BAD_INPUT, ValueError, OSError):
        keys = [] if api_key_file is None else settings.read_keys(api_key_file)
        loras = dict(settings.named_sources(lora or [], "LoRA"))
        nets = dict(settings.named_sources(controlnet or [], "ControlNet"))
    _check_effect(host, api_key_file, insecure, allow_host or [])
    names = [model, *(name or [])]
    for other in name or []:
        if not other.strip() or names.count(other) > 1:
            raise CommandError(
                f"--name must be another name of the model, given once, got {other.strip() or 'nothing'}"
            )
    _check_names("--allow-host", allow_host or [])
    _check_names("--image-url-host", image_url_host or [])
    common.check_device(device)
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise CommandError(f"--threads must be at most {cores}, the processors of this machine, got {threads}")
    if dtype != "auto":
        common.check_dtype(dtype)
    if precision not in (None, "int8", "int4"):
        raise CommandError(f"--precision must be int8 or int4, got {precision}")
    origins = [origin.lower() for origin in cors_origin or []]
    for origin in origins:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise CommandError(f"--cors-origin must be like https://example.com, got {origin}")
    transformer = _find(loras, transformer)
    if keep_in is not None:
        if keep_in.exists() and not keep_in.is_dir():
            raise CommandError(f"--keep-in must be a folder, got the file {keep_in}")
        try:
            keep_in.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=keep_in).close()
        except OSError as error:
            raise CommandError(f"--keep-in {keep_in} cannot be written: {error.strerror}") from error
    folder, cls = _folder(model)
    if parallel not in (None, "auto"):
        _parse(parallel, None, folder)
    with failing(BAD_INPUT, OSError):
        socket = listen(host, port)
    place = socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{place}"
    err.print(f"{address}  {model} is being loaded", highlight=False, soft_wrap=True)
    progress = Progress(sys.stderr.isatty())
    with progress:
        progress.stage("load torch and look at the files")
        _check_files(model, cls, transformer, loras, nets)
        for sentence in _doubtful(cls, loras):
            progress.note(sentence)
        chosen = device if device == "cpu" else common.device_name(device)
        dtype = dtype if dtype != "auto" else "bfloat16" if chosen != "cpu" or precision else "float32"
        _check_numbers(model, transformer, chosen, dtype, precision)
        split = Split() if parallel is None else _split(parallel, chosen, folder, progress)
        copied = ("transformer", "vae") if vae_tiling else ("transformer",)
        _check_memory(folder, cls, transformer, chosen, dtype, precision, split.ranks, copied)
        told: dict[str, Any] = {"wave_tokens": wave_tokens or (2048 if chosen == "cpu" else 8192)}
        told |= {"guidance": split.guidance, "ulysses": split.ulysses, "vae_tiling": vae_tiling, "precision": precision}
        served = settings.Model(
            name=model, names=name or [], loras=loras, controlnets=nets, transformer=transformer, device=chosen,
            dtype=dtype, threads=threads, **told,
        )  # fmt: skip
        logs.to_stderr(around=progress.aside)

        def ready() -> None:
            progress.close()
            if progress.show:
                err.print(_ready(address, dtype, precision), highlight=False, soft_wrap=True)

        def ending(requests: int) -> None:
            progress.close()
            if progress.show:
                sys.stderr.write("\r\x1b[2K")  # the terminal's ^C
                err.print(_ending(requests, drain_timeout), highlight=False, soft_wrap=True)
            else:
                log_end(requests)

        progress.stage(f"load {model}")
        run(
            settings.Settings(
                model=served, host=host, port=place, keys=keys, hosts=allow_host or [], origins=origins,
                url_hosts=image_url_host or [], log_prompts=log_prompts, store_folder=keep_in,
                limits=settings.Limits(wait=max_wait, drain=drain_timeout, store_seconds=keep_seconds,
                                       store_bytes=keep_mb * settings.MEGABYTE),
            ),
            [socket],
            ready,
            ending,
        )  # fmt: skip


def _ready(address: str, dtype: str, precision: str | None) -> str:
    layers = "" if precision is None else f", large layers in {precision}"
    return f"{address}  ready in {dtype}{layers}: a page at this address, the images API below /v1"


def _ending(requests: int, drain: float) -> str:
    if not requests:
        return "ending: no request is waiting"
    what = "1 request is" if requests == 1 else f"{requests} requests are"
    return f"ending: {what} answered first, in {drain:g} seconds at most; Ctrl-C again ends them as well"


def _check_effect(host: str, keys: Path | None, insecure: bool, names: list[str]) -> None:
    """CommandError for what would do nothing beside the others."""
    if insecure and keys is not None:
        raise CommandError("--insecure has no effect with --api-key-file: nobody may ask without a key")
    if insecure and is_loopback(host):
        raise CommandError(f"--insecure has no effect on {host}, which this machine alone reaches; see --host")
    if names and keys is not None:
        raise CommandError("--allow-host has no effect with --api-key-file: who has a key may ask under any name")


def _check_names(option: str, names: list[str]) -> None:
    """CommandError for what no host is called, such as an address with its scheme or port."""
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", name):
            raise CommandError(
                f"{option} must be a name without scheme and port, such as example.com, got {name or 'nothing'}"
            )


def _find(loras: dict[str, str], transformer: str | None) -> str | None:
    """The files, in the mapping and returned; CommandError where one is not there."""
    from qwen_image_fast.cli.inputs import lora_file, weight_file

    for name, source in loras.items():
        loras[name] = lora_file(source)
    return None if transformer is None else weight_file(transformer)


def _check_files(model: str, cls: str, transformer: str | None, loras: dict[str, str], nets: dict[str, str]) -> None:
    """CommandError for files and folders that hold something else, or of another transformer."""
    if transformer or loras or nets:
        import qwen_image_fast
        from qwen_image_fast.cli import checks

        checks.check_files("transformer", [transformer] if transformer else [])
        own = checks.empty_transformer(model, transformer)
        checks.check_loras(loras.values(), model, own, getattr(qwen_image_fast, cls))
        for source in nets.values():
            checks.check_net(source, None, own, "controlnet")


def _doubtful(cls: str, loras: dict[str, str]) -> Iterator[str]:
    """A sentence on each LoRA that was trained on edits alone, which requests for new pictures may name, too."""
    if loras and cls != "QwenImageLayeredPipeline":
        from qwen_image_fast.cli.checks import of_edits_alone

        for name, source in loras.items():
            if of_edits_alone(source):
                yield (
                    f"--lora {name}={source} was trained on edits alone: without a picture to change it may do little, "
                    "or something else"
                )


def _folder(model: str) -> tuple[Path, str]:
    """The model's folder, which is downloaded where it is not here, and the pipeline that it names."""
    with failing(FAILED, ConnectionError, PermissionError), failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        if local_folder(model) is None:
            err.print(f"find {model}", highlight=False)
        folder = resolve_folder(model, allow_patterns=["model_index.json", GENERATION_FILE, "transformer/config.json"])
        found = model_class(folder, model)
    served = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline")
    if found not in served:
        raise CommandError(f"--model must hold a {' or '.join(served)}, {model} holds a {found}")
    return folder, found


def _split(parallel: str, device: str, folder: Path, progress: Progress) -> Split:
    """CommandError where there are not as many GPUs, or the model cannot be split so."""
    gpus = None
    if device != "cpu":
        import torch

        gpus = torch.cuda.device_count() - int(device.partition(":")[2] or 0)
    elif parallel == "auto":
        raise CommandError("--parallel auto counts GPUs, and the model is on the CPU: say guidance=2, or ulysses=2")
    found = _parse(parallel, gpus if parallel == "auto" else None, folder)
    if gpus is not None and found.ranks > gpus:
        raise CommandError(f"--parallel {parallel} needs {found.ranks} GPUs, and there are {gpus}")
    if found.ranks == 1:
        why = "there is one GPU" if parallel == "auto" else "one process is what there is without it"
        with progress.aside():
            err.print(f"--parallel {parallel} has no effect: {why}", highlight=False, soft_wrap=True)
    return found


def _parse(parallel: str, gpus: int | None, folder: Path) -> Split:
    with failing(BAD_INPUT, ValueError, OSError):
        config = read_json(folder / "transformer" / "config.json")
        return parse_split("--parallel", parallel, gpus, config["num_attention_heads"])


def _check_numbers(model: str, transformer: str | None, device: str, dtype: str, precision: str | None) -> None:
    """CommandError where the transformer's large layers, or its modulation vectors, cannot be in these types."""
    from qwen_image_fast.cli.checks import check_numbers
    from qwen_image_fast.models.precision import check_precision
    from qwen_image_fast.models.stored_modulation import AGAIN

    with failing(BAD_INPUT, ValueError):
        check_precision("--precision", precision, device)
    stored = check_numbers(model, transformer, common.torch_dtype(dtype), precision)
    if stored is not None and not stored.offered():
        raise CommandError(
            "the modulation weights were left out of this transformer, and no schedule that can be asked for is stored "
            f"in it: make the file again, by {AGAIN}"
        )


def _check_memory(
    folder: Path, cls: str, transformer: str | None, device: str, dtype: str, precision: str | None, ranks: int,
    copied: tuple[str, ...],
) -> None:  # fmt: skip
    """CommandError where the weights alone are more than there is, before they are read; those that are here.

    ranks: processes that read the parts `copied`, each for itself.
    """
    import torch

    import qwen_image_fast
    from qwen_image_fast.checkpoint import has_weights
    from qwen_image_fast.pipelines.parts import WEIGHTS
    from qwen_image_fast.pipelines.residence import part_size, stored_weights

    pipeline = getattr(qwen_image_fast, cls)
    files = {} if transformer is None else {"transformer": [Path(transformer)]}
    files = {name: paths for name, paths in files.items() if all(map(Path.is_file, paths))}
    read = [n for n, base in WEIGHTS.items() if n in pipeline.parts and has_weights(folder / n, base)]
    needed = 0
    with failing(BAD_INPUT, ValueError):
        stored = stored_weights(pipeline, folder, [n for n in read if n not in files], files, {})
        for name, of in stored.items():
            size = part_size(name, of.used, common.torch_dtype(dtype), torch.device(device), False, precision)
            needed += size.kept * (ranks if device == "cpu" and name in copied else 1)
    free = _free(device)
    if needed > free:
        where = "this machine" if device == "cpu" else device
        raise CommandError(
            f"the weights take {needed / 2**30:.1f} GiB in {dtype}{f' and {precision}' if precision else ''}, and "
            f"{where} has {free / 2**30:.1f} GiB free", FAILED
        )  # fmt: skip


def _free(device: str) -> int:
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    with open("/proc/meminfo") as file:
        found = dict(line.split(":", 1) for line in file)
    return int(found["MemAvailable"].split()[0]) * 1024
