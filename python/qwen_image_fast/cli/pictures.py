"""`qwen-image-fast generate`, `edit`, `layers` and `controlnet`: one way from what is given to PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_fast import __version__
from qwen_image_fast.cli import common
from qwen_image_fast.cli.common import memory_bytes
from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, failing, is_out_of_memory
from qwen_image_fast.cli.options import COMMAND_OF, KINDS_OF, Run, command, flag, kind_of, named, positional
from qwen_image_fast.cli.threads import share_or_not
from qwen_image_fast.folders import local_folder
from qwen_image_fast.model_defaults import generation_of, model_class
from qwen_image_fast.output_files import OutputFiles
from qwen_image_fast.request import KINDS, Request, make
from qwen_image_fast.request_fields import RequestError

if TYPE_CHECKING:
    from qwen_image_fast.cli.progress import Progress
    from qwen_image_fast.output_files import OutputFiles

MANY_TOKENS = 4 * 83 * 83  # in all, four times those of 1328x1328
LARGE = 8192  # of one picture: what the released schedules know


def draw(name: str, given: dict[str, Any], run: Run) -> None:
    """`_draw`, with advice that fits where memory runs out."""
    try:
        _draw(name, given, run)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fields = KINDS[kind_of(name, given)].model_fields
        less = ["a smaller --size"] if "width" in fields else []
        less += [f"fewer {flag('images')}"] if given.get("images", 1) > 1 else []
        less += ["a smaller --batch"] if run.batch > 1 else []
        less += [] if run.free_modulation or run.memory else ["--free-modulation"]
        less += [] if run.memory else ["--memory"]
        advice = f"; {' or '.join(less)} needs less" if less else ""
        raise CommandError(f"out of memory{advice} ({error})", FAILED) from error


def _draw(name: str, given: dict[str, Any], run: Run) -> None:
    """Make the pictures of a command and write them as PNG, with the parameters inside."""
    from qwen_image_fast.cli.progress import Progress

    seconds: dict[str, float] = {}
    with Progress(not (run.quiet or run.as_json)) as progress:
        prompts = _prompts(given, run)
        kind, stored = _stored(name, given, run, progress)
        _check_given(name, kind, given, stored, run)
        common.check_device(run.device)
        given |= {"prompt": prompts[0]} if prompts else {}
        request, opened, class_name = _request(kind, given, stored, run, progress)
        prompts = prompts or [request.prompt]
        files = _files(request, len(prompts), run)
        width, height = request.size(opened)
        files.check_space(files.count * (width * height * (4 if kind == "layers" else 3) + 1024))
        _warn(request, opened, progress)
        with common.timed(seconds, "load"):
            progress.stage(f"load {given.get('model', request.model)}")
            pipe, about = _load(request, opened, class_name, run, progress)
        share_or_not(pipe.transformer, request.tokens(opened), min(run.batch, len(prompts)) * request.each)
        pipe.on_stage = progress.stage
        made: list[dict[str, Any]] = []
        for first in range(0, len(prompts), run.batch):
            together = prompts[first : first + run.batch]
            found = _call(pipe, request, opened, together, first, len(prompts), run.batch, progress)
            for stage, spent in pipe.times.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            with common.timed(seconds, "write"):
                for i, (result, seed) in enumerate(zip(found.images, found.seeds, strict=True)):
                    prompt = (found.prompts if kind == "layers" else together)[i // request.each]
                    own = {**about, "prompt": prompt, "seed": seed}
                    made += _write(files, result, own, opened, run, progress)
    common.report_made(made, about, seconds, run.quiet, run.as_json)


def _prompts(given: dict[str, Any], run: Run) -> list[str]:
    """Of the file, or the one that is given; none: that of the picture to repeat."""
    if run.prompts_file is None:
        return [given["prompt"]] if "prompt" in given else []
    from qwen_image_fast.cli.inputs import prompts_of

    if "prompt" in given:
        raise CommandError("give either a prompt or --prompts-file, got both")
    return prompts_of(run.prompts_file)


def _stored(name: str, given: dict[str, Any], run: Run, progress: Progress) -> tuple[str, dict[str, Any]]:
    """The kind of the request, and the fields of the picture that is repeated."""
    if run.from_image is None:
        return kind_of(name, given), {}
    from qwen_image_fast.folders import nearest_file
    from qwen_image_fast.png_metadata import read_request

    path = run.from_image = run.from_image.expanduser()
    if not path.exists():
        raise CommandError(f"there is no picture {path}{nearest_file(path)}")
    if path.is_dir():
        raise CommandError(f"{path} is a folder; name a PNG picture in it")
    with failing(BAD_INPUT, ValueError, OSError):
        request, stored, unknown = read_request(path)
    if COMMAND_OF[request.kind] != name:
        again = f"qwen-image-fast {COMMAND_OF[request.kind]} --from-image {path}"
        raise CommandError(f"{path} was made by `{COMMAND_OF[request.kind]}`: `{again}` repeats it")
    if unknown:
        progress.note(f"{path} was made by another version: its {', '.join(unknown)} cannot be repeated")
    return kind_of(name, {**stored, **given}), stored


def _check_given(name: str, kind: str, given: dict[str, Any], stored: dict[str, Any], run: Run) -> None:
    """What is missing, and options that would do nothing."""
    cls = KINDS[kind]
    have = {**stored, **given, **({"prompt": ""} if run.prompts_file else {})}
    more = ", --prompts-file" if name != "layers" else ""
    if not any(field in have for field in ("prompt", *cls.inputs)) or ("prompt" not in have and kind == "text"):
        first = positional(cls)
        raise CommandError(f"nothing to make: give a {named(cls)(first)}{more} or --from-image")
    if "prompt" not in have and kind != "layers":
        raise CommandError(f"nothing to make: give a prompt{more} or --from-image")
    for field in cls.inputs:
        if field not in have:
            if kind == "inpaint":
                raise CommandError(f"--mask needs {flag(field)}, the picture to change")
            raise CommandError(f"nothing to work on: give {flag(field)} or --from-image")
    for field in given:
        if field not in cls.model_fields and field != "size":
            needed = next(KINDS[k].inputs[0] for k in KINDS_OF[name] if field in KINDS[k].model_fields)
            raise CommandError(f"{flag(field)} has no effect without {flag(needed)}")
    if run.memory is not None:
        with failing(BAD_INPUT, ValueError):
            memory_bytes(run.memory)
    if run.compare and not cls.inputs:
        raise CommandError("--compare has no effect without a picture that goes in")
    if run.batch > 1 and run.prompts_file is None:
        raise CommandError("--batch has no effect without --prompts-file")
    if run.batch > 1 and len(have.get("control", ())) > 1:
        raise CommandError("--batch must be 1 with several --control")


def _request(
    kind: str, given: dict[str, Any], stored: dict[str, Any], run: Run, progress: Progress
) -> tuple[Request, dict[str, Any], str]:
    """The request, its opened pictures and the class of its pipeline."""
    cls = KINDS[kind]
    try:
        model = str(given.get("model", stored.get("model", cls.model_fields["model"].default)))
        early = make(kind, given, stored)  # what is wrong with any model is said before one is looked for
        if not run.output.endswith("/"):
            _files(early, 1, run)
        with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
            elsewhere = local_folder(model) is None
        from qwen_image_fast.cli.inputs import model_folder, settled

        places, opened = settled(early, run.from_image, progress.note)
        if elsewhere:
            progress.stage(f"find {model}")
        folder = model_folder(model)
        with failing(BAD_INPUT, FileNotFoundError):
            found = model_class(folder, model)
        request = make(kind, given, stored, generation_of(folder, found))
        return request.model_copy(update=places), opened, request.pipeline(found)
    except RequestError as error:
        name = named(cls, by_size="size" in given and not {"width", "height"} & given.keys())
        raise CommandError(error.named(name)) from error


def _files(request: Request, prompts: int, run: Run) -> OutputFiles:
    """Names for the results; a folder that ends with / is made."""
    output = Path(run.output).expanduser()
    if run.output.endswith("/"):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            name = run.output.rstrip("/")
            raise CommandError(f"--output {run.output} must be a folder, {name} is a file: leave the / out") from error
        except NotADirectoryError as error:
            raise CommandError(f"the folder {output} could not be made: a part of it is a file") from error
        except OSError as error:
            raise CommandError(f"the folder {output} could not be made: {error.strerror}") from error
    with failing(BAD_INPUT, ValueError):
        return OutputFiles(output, run.overwrite, prompts * getattr(request, "count", request.each))


def _warn(request: Request, opened: Mapping[str, Any], progress: Progress) -> None:
    """Of work that takes long, before it does; how long, the first step tells."""
    parts = request.parts(opened)
    if (tokens := sum(parts)) > MANY_TOKENS or max(parts) > LARGE:
        width, height = request.size(opened)
        less = "--megapixel or a smaller --size" if request.kind == "edit" else "a smaller --size"
        progress.note(
            f"{width}x{height} pixels with all that goes in are {tokens} tokens, {tokens / 83**2:.1f} times those of "
            f"1328x1328, and attention takes the square of that: the first step tells how long, {less} less"
        )


def _load(
    request: Request, opened: Mapping[str, Any], class_name: str, run: Run, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device and in its dtype, with LoRAs and the Lightning schedule, and what a PNG says of it."""
    import qwen_image_fast as q
    from qwen_image_fast.cli.checks import check_before_loading, doubtful_loras
    from qwen_image_fast.cli.room import check_room

    device = common.device_name(run.device)
    pipeline = getattr(q, class_name)
    small = device != "cpu" or request.precision
    dtype = request.dtype if request.dtype != "auto" else "bfloat16" if small else "float32"
    place = {"torch_dtype": common.torch_dtype(dtype), "device": device}
    check_before_loading(request, opened, pipeline, place["torch_dtype"])
    for sentence in doubtful_loras(request):
        progress.note(sentence)
    check_room(request, opened, pipeline, device, place["torch_dtype"], run.batch, run.memory is not None)
    parts: dict[str, Any] = {n: f for n in ("transformer", "text_encoder", "vae") if (f := getattr(request, n))}
    if request.kind == "controlnet":
        with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
            parts["controlnet"] = q.QwenImageControlNetModel.from_pretrained(request.net, **place)  # type: ignore[attr-defined]
    load = pipeline.from_pretrained
    if request.precision is not None:
        from qwen_image_fast.models.precision import check_precision

        with failing(BAD_INPUT, ValueError):
            check_precision("--precision", request.precision, device)
        parts["precision"] = request.precision
    parts |= {} if run.memory is None else {"memory_limit": memory_bytes(run.memory)}
    pipe = load(request.model, **place, free_modulation_weights=run.free_modulation, **parts)
    with failing(BAD_INPUT, ValueError, FileNotFoundError):
        adapters = {pipe.load_lora_weights(lora.name): lora.scale for lora in request.lora}
        if adapters:
            pipe.set_adapters(list(adapters), list(adapters.values()))
    if lightning := getattr(request, "lightning", None):
        pipe.use_schedule(f"lightning-{lightning}")
    without = {name for name, other in request.needs.items() if getattr(request, other) is None}
    fields = request.model_dump(exclude={"images", *without}, exclude_none=True)
    return pipe, {**fields, "dtype": dtype, "device": device, "version": __version__}


def _call(
    pipe: Any, request: Request, opened: Mapping[str, Any], together: list[str], first: int, prompts: int, batch: int,
    progress: Progress,
) -> Any:  # fmt: skip
    """One call of the pipeline, for some of the prompts."""
    last = first + len(together)
    which = f"prompt {last}" if len(together) == 1 else f"prompts {first + 1} to {last}"
    progress.call(f"{which} of {prompts}" if prompts > 1 else "", request.steps_taken, -(-(prompts - last) // batch))
    arguments = request.call(opened)
    if request.seed is not None:
        arguments["seed"] = request.seed + first * request.each
    arguments["prompt"] = together[0] if len(together) == 1 else together
    watch = {"callback_on_step_end": progress.step, "callback_on_step_end_tensor_inputs": ()}
    return pipe(**arguments, **(watch if progress.show else {}), progress=False)


def _write(
    files: OutputFiles, result: Any, about: dict[str, Any], opened: Mapping[str, Any], run: Run, progress: Progress
) -> list[dict[str, Any]]:
    """Write a picture, or the layers of one, and with `--compare` a file with what went in beside it."""
    layers = result if isinstance(result, list) else [result]
    went_in = opened.get("image", opened.get("control"))
    made = []
    for k, image in enumerate(layers):
        own = {**about, "layer": k + 1} if isinstance(result, list) else about
        paths = [_kept(files, files.write(image, own), progress)]
        if run.compare and k == len(layers) - 1:
            from qwen_image_fast.cli.compare import side_by_side

            beside = [*(went_in if isinstance(went_in, list) else [went_in]), *layers[:k]]
            other = paths[0].with_name(f"{paths[0].stem}-compare.png")
            more = OutputFiles(other, run.overwrite, 1)
            paths.append(_kept(more, more.write(side_by_side([*beside, image]), own), progress))
        made += [{"file": str(path), "seed": own["seed"], "prompt": own["prompt"]} for path in paths]
        for path in paths if not run.as_json else []:
            progress.say(str(path) if run.quiet else f"{path}  seed {own['seed']}")
    return made


def _kept(files: OutputFiles, written: Path, progress: Progress) -> Path:
    """Say where another file had the name that was asked for."""
    if files.single is not None and written != files.single:
        progress.note(f"{files.single} is there and stays: written as {written}; --overwrite replaces it")
    return written


generate = command("generate", "Make pictures from prompts, or change one, and write them as PNG.", draw)
edit = command("edit", "Edit pictures by an instruction; the result keeps the exact size.", draw)
layers = command("layers", "Take a picture apart into transparent layers, back to front.", draw)
controlnet = command(
    "controlnet", "Make pictures led by control pictures, or inpaint with an inpainting ControlNet.", draw
)
