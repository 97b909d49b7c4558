"""`qwen-image-fast edit`, `layers` and `controlnet`: pictures from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_image_fast import __version__
from qwen_image_fast.cli import common
from qwen_image_fast.cli.errors import BAD_INPUT, CommandError, failing
from qwen_image_fast.output_files import OutputFiles

if TYPE_CHECKING:
    from PIL import Image

EDIT: dict[str, Any] = {
    **common.DEFAULTS,
    "model": "Qwen/Qwen-Image-Edit-2511",
    "image": None,
    "mask": None,
    "strength": 1.0,
    "size": None,
    "megapixel": False,
}
LAYERS: dict[str, Any] = {
    **common.DEFAULTS,
    "prompt": "",
    "model": "Qwen/Qwen-Image-Layered",
    "image": None,
    "count": 4,
    "resolution": 640,
    "exact": False,
}
CONTROLNET: dict[str, Any] = {
    **common.DEFAULTS,
    "model": "Qwen/Qwen-Image",
    "net": "InstantX/Qwen-Image-ControlNet-Union",
    "control": None,
    "mask": None,
    "scale": 1.0,
    "size": None,
}
EDITING_MODELS = ("QwenImageEditPlusPipeline", "QwenImageEditPipeline", "QwenImageEditInpaintPipeline")
Compare = Annotated[bool, typer.Option("--compare", help="Also write what went in and what came out side by side.")]
Images = Annotated[list[Path] | None, typer.Option(help="A picture; several times for several references.")]
Controls = Annotated[
    list[Path] | None, typer.Option(help="Edges, depth, a pose ...; with --mask the picture itself; several times.")
]
Size = Annotated[str | None, typer.Option(help="WxH, any size.", show_default="that of the last picture")]
Strength = Annotated[
    float | None, typer.Option(min=0, max=1, help="With a mask: share of the steps taken.", show_default="1")
]


def edit(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to do.")] = None,
    image: Images = None,
    from_image: common.FromImage = None,
    mask: Annotated[Path | None, typer.Option(help="Change only what is white in this picture.")] = None,
    strength: Strength = None,
    model: Annotated[str | None, typer.Option(help=common.MODEL_HELP, show_default=EDIT["model"])] = None,
    negative_prompt: common.Negative = None,
    cfg: common.Cfg = None,
    size: Size = None,
    megapixel: Annotated[bool, typer.Option("--megapixel", help="Resize to about a megapixel, as diffusers.")] = False,
    steps: common.Steps = None,
    seed: common.Seed = None,
    images: common.Images = 1,
    output: common.Output = Path("."),
    overwrite: common.Overwrite = False,
    compare: Compare = False,
    dtype: common.Dtype = None,
    device: common.Device = "auto",
    lightning: common.Lightning = None,
    lora: common.Lora = None,
    free_modulation: common.FreeModulation = False,
    quiet: common.Quiet = False,
    as_json: common.JSON = False,
) -> None:
    """Edit pictures by an instruction; the result keeps the exact size."""
    import qwen_image_fast as q

    chosen = common.parameters(context, EDIT, from_image)
    common.check_prompt(chosen["prompt"], "")
    common.settle(chosen, device)
    pictures = _pictures("image", chosen["image"], from_image)
    call: dict[str, Any] = {"image": pictures, "preserve_size": not chosen["megapixel"], **_size(chosen["size"])}
    name = _model_of(chosen, EDITING_MODELS)
    cls: Any = q.QwenImageEditPlusPipeline
    if chosen["mask"] is not None:
        cls, call["strength"] = q.QwenImageEditInpaintPipeline, chosen["strength"]
        call["mask_image"] = _mask(chosen["mask"], pictures, from_image)
        from qwen_image_fast.pipelines.conditions import first_step

        with failing(BAD_INPUT, ValueError):
            first_step(chosen["steps"], chosen["strength"])
    elif name == "QwenImageEditPipeline":
        cls = q.QwenImageEditPipeline
    if cls is not q.QwenImageEditPlusPipeline:
        if len(pictures) != 1:
            raise CommandError(f"--image must be given once for this model or with --mask, got {len(pictures)}")
        call["image"] = pictures[0]
    # No result is larger than the size asked for or the last picture.
    width, height = (call["width"], call["height"]) if chosen["size"] else pictures[-1].size
    files = _files(output, overwrite, images, images * (width * height * 3 + 1024))
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = common.load_pipeline(cls, chosen, free_modulation)
    found = _run(pipe, chosen, seconds, {**call, "num_images_per_prompt": images}, progress=not (quiet or as_json))
    made = []
    for result, own_seed in zip(found.images, found.seeds, strict=True):
        made += _write(files, result, own_seed, chosen, quiet and not as_json, pictures if compare else None)
    common.report_made(made, chosen, seconds, quiet, as_json)


def layers(
    context: typer.Context,
    image: Annotated[Path | None, typer.Argument(help="The picture to take apart.")] = None,
    from_image: common.FromImage = None,
    prompt: Annotated[str | None, typer.Option(help="Its caption; without one, the model writes it.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Layers.", show_default="4")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="640 or 1024: side of a square of the same area.", show_default="640")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact-size", help="Keep the picture's size instead.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder or hub name.", show_default=LAYERS["model"])] = None,
    negative_prompt: common.Negative = None,
    cfg: common.Cfg = None,
    steps: common.Steps = None,
    seed: common.Seed = None,
    output: common.Output = Path("."),
    overwrite: common.Overwrite = False,
    compare: Compare = False,
    dtype: common.Dtype = None,
    device: common.Device = "auto",
    lora: common.Lora = None,
    free_modulation: common.FreeModulation = False,
    quiet: common.Quiet = False,
    as_json: common.JSON = False,
) -> None:
    """Take a picture apart into transparent layers, back to front."""
    import qwen_image_fast as q

    chosen = common.parameters(context, LAYERS, from_image)
    common.settle(chosen, device)
    if chosen["resolution"] not in (640, 1024):
        raise CommandError(f"--resolution must be 640 or 1024, got {chosen['resolution']}")
    (picture,) = _pictures("image", chosen["image"] and [chosen["image"]], from_image)
    _model_of(chosen, ("QwenImageLayeredPipeline",))
    count = chosen["count"]
    pixels = picture.width * picture.height if chosen["exact"] else chosen["resolution"] ** 2
    files = _files(output, overwrite, count, count * pixels * 4)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = common.load_pipeline(q.QwenImageLayeredPipeline, chosen, free_modulation)
    call = {"image": picture, "layers": count, "resolution": chosen["resolution"], "preserve_size": chosen["exact"]}
    found = _run(pipe, chosen, seconds, call, progress=not (quiet or as_json))
    chosen["prompt"] = found.prompts[0]  # the caption, if the model wrote it
    made = []
    for k, layer in enumerate(found.images[0]):
        beside = [picture, *found.images[0][:-1]] if compare and k == count - 1 else None
        made += _write(files, layer, found.seeds[0], {**chosen, "layer": k + 1}, quiet and not as_json, beside)
    common.report_made(made, chosen, seconds, quiet, as_json)


def controlnet(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    control: Controls = None,
    from_image: common.FromImage = None,
    mask: Annotated[Path | None, typer.Option(help="Inpainting: make anew what is white in this picture.")] = None,
    scale: Annotated[float | None, typer.Option(min=0, help="Weight of the control.", show_default="1")] = None,
    net: Annotated[str | None, typer.Option(help="Folder or hub name.", show_default=CONTROLNET["net"])] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name.", show_default=CONTROLNET["model"])] = None,
    negative_prompt: common.Negative = None,
    cfg: common.Cfg = None,
    size: Annotated[str | None, typer.Option(help="WxH, multiples of 16.", show_default="that of the control")] = None,
    steps: common.Steps = None,
    seed: common.Seed = None,
    images: common.Images = 1,
    output: common.Output = Path("."),
    overwrite: common.Overwrite = False,
    compare: Compare = False,
    dtype: common.Dtype = None,
    device: common.Device = "auto",
    lightning: common.Lightning = None,
    lora: common.Lora = None,
    free_modulation: common.FreeModulation = False,
    quiet: common.Quiet = False,
    as_json: common.JSON = False,
) -> None:
    """Make pictures led by control pictures, or inpaint with an inpainting ControlNet."""
    import qwen_image_fast as q

    chosen = common.parameters(context, CONTROLNET, from_image)
    common.check_prompt(chosen["prompt"], "")
    common.settle(chosen, device)
    pictures = _pictures("control", chosen["control"], from_image)
    if chosen["mask"] is not None and len(pictures) != 1:
        raise CommandError(f"--control must be given once with --mask, got {len(pictures)}")
    sides = _size(chosen["size"]) or dict(zip(("width", "height"), (max(16, n // 16 * 16) for n in pictures[0].size)))
    common.check_size(**sides)
    shown = pictures if len(pictures) > 1 else pictures[0]
    call: dict[str, Any] = {"control_image": shown, "controlnet_conditioning_scale": chosen["scale"], **sides}
    cls: Any = q.QwenImageControlNetPipeline
    if chosen["mask"] is not None:
        cls, call["control_mask"] = q.QwenImageControlNetInpaintPipeline, _mask(chosen["mask"], pictures, from_image)
    common.model_class(chosen["model"])
    files = _files(output, overwrite, images, images * sides["width"] * sides["height"] * 3)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
            place = {"torch_dtype": common.torch_dtype(chosen["dtype"]), "device": chosen["device"]}
            loaded = q.QwenImageControlNetModel.from_pretrained(chosen["net"], **place)
        pipe = common.load_pipeline(cls, chosen, free_modulation, controlnet=loaded)
    found = _run(pipe, chosen, seconds, {**call, "num_images_per_prompt": images}, progress=not (quiet or as_json))
    made = []
    for result, own_seed in zip(found.images, found.seeds, strict=True):
        made += _write(files, result, own_seed, chosen, quiet and not as_json, pictures if compare else None)
    common.report_made(made, chosen, seconds, quiet, as_json)


def _pictures(option: str, paths: list[str] | None, from_image: Path | None) -> list[Image.Image]:
    if not paths:
        raise CommandError(f"nothing to work on: give --{option} or --from-image")
    return [_open(path, option, from_image) for path in paths]


def _mask(path: str, pictures: list[Image.Image], from_image: Path | None) -> Image.Image:
    from qwen_image_fast.pipelines.masks import check_ratio

    mask = _open(path, "mask", from_image)
    with failing(BAD_INPUT, ValueError):
        check_ratio("--mask", mask, pictures[0])
    return mask


def _open(path: str, option: str, from_image: Path | None) -> Image.Image:
    """The first frame, upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        source = "" if from_image is None else f"; if {from_image} was made from a file that has moved, give --{option}"
        raise CommandError(f"there is no picture {path}{source}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise CommandError(f"{path} could not be read as a picture: {error}") from error


def _model_of(chosen: dict[str, Any], classes: tuple[str, ...]) -> str:
    """The pipeline class of the model, which must be one of these."""
    _, name = common.model_class(chosen["model"])
    if name not in classes:
        raise CommandError(f"--model must hold a {' or '.join(classes)}, {chosen['model']} holds a {name}")
    return name


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    if (size := common.size_of(text)) is None or min(size) < 1:
        raise CommandError(f"--size must be WIDTHxHEIGHT, got {text}")
    return {"width": size[0], "height": size[1]}


def _files(output: Path, overwrite: bool, count: int, needed: int) -> OutputFiles:
    with failing(BAD_INPUT, ValueError):
        files = OutputFiles(output, overwrite, count)
    files.check_space(needed)
    return files


def _run(pipe: Any, chosen: dict[str, Any], seconds: dict[str, float], call: dict[str, Any], progress: bool):
    found = pipe(
        prompt=chosen["prompt"],
        negative_prompt=chosen["negative_prompt"] if chosen["cfg"] > 1 else None,
        true_cfg_scale=chosen["cfg"],
        num_inference_steps=chosen["steps"],
        seed=chosen["seed"],
        max_sequence_length=chosen["max_sequence_length"],
        progress=progress,
        **call,
    )
    for stage, spent in pipe.times.items():
        seconds[stage] = seconds.get(stage, 0.0) + spent
    return found


def _write(files, image: Image.Image, seed: int, chosen: dict[str, Any], say: bool, beside: list[Image.Image] | None):
    """Write one picture, and with `beside` a second file with those pictures at its left."""
    own = {"width": image.width, "height": image.height, "seed": seed, "version": __version__}
    path = files.write(image, {**chosen, **own})
    made = [{"file": str(path), "seed": seed, "prompt": chosen["prompt"]}]
    if beside is not None:
        together = side_by_side([*beside, image])
        named = path.with_name(f"{path.stem}-compare.png")
        other = OutputFiles(named, files.overwrite, 1).write(together, {**chosen, **own})
        made.append({"file": str(other), "seed": seed, "prompt": chosen["prompt"]})
    if say:
        for m in made:
            print(m["file"], flush=True)
    return made


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, in the height of the last one, transparency over a checkerboard of light greys."""
    from PIL import Image

    from qwen_image_fast.pictures import to_rgba

    height = pictures[-1].height
    scaled = [to_rgba("picture", p).resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    row = Image.new("RGBA", (sum(p.width for p in scaled) + 8 * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        board = Image.new("L", (-(-picture.width // 8), -(-height // 8)))
        board.putdata([255 if (x + y) % 2 else 208 for y in range(board.height) for x in range(board.width)])
        ground = board.resize((board.width * 8, board.height * 8), Image.Resampling.NEAREST)
        ground = ground.crop((0, 0, *picture.size)).convert("RGBA")
        row.paste(Image.alpha_composite(ground, picture), (left, 0))
        left += picture.width + 8
    return row.convert("RGB")
