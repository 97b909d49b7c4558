"""`qwen-image-fast edit`, `layers` and `controlnet`: pictures from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen_image_fast import __version__, png_metadata
from qwen_image_fast.cli import common
from qwen_image_fast.cli.common import BAD_INPUT, CommandError, failing
from qwen_image_fast.pipelines.images import to_rgba

DEFAULTS: dict[str, Any] = {
    "negative_prompt": " ",
    "cfg": 4.0,
    "steps": 50,
    "seed": None,
    "max_sequence_length": 512,
    "dtype": "auto",
    "lightning": None,
}
Compare = Annotated[bool, typer.Option("--compare", help="Also write what went in and what came out side by side.")]
Size = Annotated[str | None, typer.Option(help="WxH, any size.", show_default="that of the last picture")]


def edit(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to do.")],
    image: Annotated[list[Path], typer.Option(help="A picture; several times for several references.")],
    mask: Annotated[Path | None, typer.Option(help="Change only what is white in this picture.")] = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="With a mask: share of the steps taken.")] = 1.0,
    model: Annotated[str, typer.Option(help=common.MODEL_HELP)] = "Qwen/Qwen-Image-Edit-2511",
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

    chosen = _chosen(context, device, images=[str(p) for p in image], mask=mask and str(mask), strength=strength)
    pictures = [_open(path) for path in image]
    call: dict[str, Any] = {"image": pictures, "preserve_size": not megapixel, **_size(size)}
    _, name = common.model_class(model)
    cls: Any = q.QwenImageEditPlusPipeline
    if mask is not None:
        cls, call["mask_image"], call["strength"] = q.QwenImageEditInpaintPipeline, _open(mask), strength
    elif name == "QwenImageEditPipeline":
        cls = q.QwenImageEditPipeline
    if cls is not q.QwenImageEditPlusPipeline:
        if len(pictures) != 1:
            raise CommandError(f"--image must be given once for this model or with --mask, got {len(pictures)}")
        call["image"] = pictures[0]
    # No result is larger than the size asked for or the last picture.
    width, height = (call["width"], call["height"]) if size else pictures[-1].size
    files = _files(output, overwrite, images, images * (width * height * 3 + 1024))
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = common.load_pipeline(cls, chosen, free_modulation, lora)
    found = _run(pipe, chosen, seconds, {**call, "num_images_per_prompt": images}, progress=not (quiet or as_json))
    made = []
    for result, own_seed in zip(found.images, found.seeds, strict=True):
        made += _write(files, result, own_seed, chosen, quiet and not as_json, pictures if compare else None)
    common.report_made(made, chosen, seconds, quiet, as_json)


def layers(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="The picture to take apart.")],
    prompt: Annotated[str, typer.Option(help="Its caption; without one, the model writes it.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Layers.")] = 4,
    resolution: Annotated[int, typer.Option(help="640 or 1024: side of a square of the same area.")] = 640,
    exact: Annotated[bool, typer.Option("--exact-size", help="Keep the picture's size instead.")] = False,
    model: Annotated[str, typer.Option(help="Folder or hub name.")] = "Qwen/Qwen-Image-Layered",
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

    chosen = _chosen(context, device, images=[str(image)], layers=count, resolution=resolution)
    picture = _open(image)
    common.model_class(model)
    files = _files(output, overwrite, count, count * resolution**2 * 4)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = common.load_pipeline(q.QwenImageLayeredPipeline, chosen, free_modulation, lora)
    call = {"image": picture, "layers": count, "resolution": resolution, "preserve_size": exact}
    found = _run(pipe, chosen, seconds, call, progress=not (quiet or as_json))
    made = []
    for k, layer in enumerate(found.images[0]):
        beside = [picture, *found.images[0][:-1]] if compare and k == count - 1 else None
        made += _write(files, layer, found.seeds[0], {**chosen, "layer": k + 1}, quiet and not as_json, beside)
    common.report_made(made, chosen, seconds, quiet, as_json)


def controlnet(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    control: Annotated[list[Path], typer.Option(help="Edges, depth, a pose ...; with --mask the picture itself.")],
    mask: Annotated[Path | None, typer.Option(help="Inpainting: make anew what is white in this picture.")] = None,
    scale: Annotated[float, typer.Option(min=0, help="Weight of the control pictures.")] = 1.0,
    net: Annotated[str, typer.Option(help="ControlNet, folder or hub name.")] = "InstantX/Qwen-Image-ControlNet-Union",
    model: Annotated[str, typer.Option(help="Folder or hub name.")] = "Qwen/Qwen-Image",
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

    chosen = _chosen(context, device, images=[str(p) for p in control], mask=mask and str(mask), net=net, scale=scale)
    pictures = [_open(path) for path in control]
    sides = _size(size) or dict(zip(("width", "height"), (max(16, n // 16 * 16) for n in pictures[0].size)))
    if mask is not None and len(pictures) != 1:
        raise CommandError(f"--control must be given once with --mask, got {len(pictures)}")
    shown = pictures if len(pictures) > 1 else pictures[0]
    call: dict[str, Any] = {"control_image": shown, "controlnet_conditioning_scale": scale, **sides}
    cls: Any = q.QwenImageControlNetPipeline
    if mask is not None:
        cls, call["control_mask"] = q.QwenImageControlNetInpaintPipeline, _open(mask)
    common.model_class(model)
    files = _files(output, overwrite, images, images * sides["width"] * sides["height"] * 3)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
            place = {"torch_dtype": common.torch_dtype(chosen["dtype"]), "device": chosen["device"]}
            loaded = q.QwenImageControlNetModel.from_pretrained(net, **place)
        pipe = common.load_pipeline(cls, chosen, free_modulation, lora, controlnet=loaded)
    found = _run(pipe, chosen, seconds, {**call, "num_images_per_prompt": images}, progress=not (quiet or as_json))
    made = []
    for result, own_seed in zip(found.images, found.seeds, strict=True):
        made += _write(files, result, own_seed, chosen, quiet and not as_json, pictures if compare else None)
    common.report_made(made, chosen, seconds, quiet, as_json)


def _chosen(context: typer.Context, device: str, **more) -> dict[str, Any]:
    """The parameters of the pictures: defaults, presets of Lightning, what was given, and `more`."""
    given = {name: value for name, value in context.params.items() if name in DEFAULTS and value is not None}
    lightning = given.get("lightning")
    presets = {} if lightning is None else {"steps": lightning, "cfg": 1.0}
    own = {"command": context.info_name, "model": context.params["model"], "prompt": context.params["prompt"]}
    chosen = {**DEFAULTS, **presets, **given, **own, **more}
    common.settle(chosen, device)
    return chosen


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise CommandError(f"there is no picture {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise CommandError(f"{path} could not be read as a picture: {error}") from error


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    if (size := common.size_of(text)) is None or min(size) < 1:
        raise CommandError(f"--size must be WIDTHxHEIGHT, got {text}")
    return {"width": size[0], "height": size[1]}


def _files(output: Path, overwrite: bool, count: int, needed: int) -> png_metadata.OutputFiles:
    with failing(BAD_INPUT, ValueError):
        files = png_metadata.OutputFiles(output, overwrite, count)
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
        other = path.with_name(f"{path.stem}-compare.png")
        png_metadata.write_png(other, together, {**chosen, **own})
        made.append({"file": str(other), "seed": seed, "prompt": chosen["prompt"]})
    if say:
        for m in made:
            print(m["file"], flush=True)
    return made


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, in the height of the last one, transparency over a checkerboard of light greys."""
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
