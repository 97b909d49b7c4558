"""`cache-latents` and what begins with `data`; what they need is imported when they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, err, failing
from qwen_image_fast.extras import MissingPackage, needed_for

if TYPE_CHECKING:
    from qwen_image_fast.training.recipe.curriculum import Curriculum

Recipe = Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe such as tiny/vae.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes such as optimizer.lr=1e-3.")]

data = typer.Typer(help="Look at training data.", no_args_is_help=True)


@contextmanager
def explained() -> Iterator[None]:
    """Bad recipes and missing packages end with exit code 2, a run that had to stop with 1."""
    try:
        # A stopped run is a RuntimeError; a bad recipe, or a resumed run that does not fit, is a ValueError.
        with (
            failing(BAD_INPUT, FileExistsError, FileNotFoundError, ValueError),
            failing(FAILED, RuntimeError),
            needed_for("training"),
        ):
            yield
    except MissingPackage:
        raise
    except ImportError as error:
        if error.name is None:  # the sentence of whoever needs the package
            raise CommandError(str(error)) from error
        text = f"{error}; `qwen-image-fast doctor` names the versions that are supported"
        raise CommandError(text) from error


def checked(
    recipe: str, overrides: list[str] | None, *, data: bool = True, run_folder: Path | None = None
) -> Curriculum:
    """The run of a recipe, all that it names found, before torch is imported.

    `run_folder`: must hold no run yet, and not lie in the data.
    """
    from qwen_image_fast.training.recipe.curriculum import read_curriculum
    from qwen_image_fast.training.recipe.names import (
        check_apart,
        check_data,
        check_models,
        check_start,
        check_unused,
        find_recipe,
    )

    chosen = read_curriculum(find_recipe(recipe), overrides or ())
    check_models(chosen)
    if data:
        check_start(chosen)
        check_data(chosen)
        if run_folder is not None:
            check_unused(run_folder.expanduser())
            check_apart(chosen, run_folder.expanduser())
    return chosen


def cache_latents(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.")] = Path("outputs/latents"),
    count: Annotated[int, typer.Option(help="Samples.", min=1)] = 10000,
) -> None:
    """Encode a recipe's samples once, for its field data.cache."""
    with explained():
        from qwen_image_fast.training.recipe.names import described, files_of

        chosen = checked(recipe, overrides)
        if files := files_of(chosen):
            err.print(f"{chosen.name}: looking at {files}", markup=False, soft_wrap=True)
        from qwen_image_fast.training.sources.survey import sources_of

        sources = sources_of(chosen)
        err.print(f"{chosen.name}: loading torch and {described(chosen)}", markup=False, soft_wrap=True)
        from qwen_image_fast.training.batches.latents import JOURNAL
        from qwen_image_fast.training.run import cache_latents as run

        try:
            run(recipe, overrides or (), out, count, sources)
        except KeyboardInterrupt:
            if (out.expanduser() / JOURNAL).exists():
                err.print(f"\nwhat is encoded is kept in {out}: the same command goes on", markup=False, soft_wrap=True)
            raise
    print(out)


def preview_samples(
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("preview.png"),
    recipe: Annotated[
        str, typer.Option(help="tiny, mixed, pure, compositional, complex, shapes, scenes, or a JSON file.")
    ] = "mixed",
    edits: Annotated[bool, typer.Option("--edits", help="Editing pairs instead of samples.")] = False,
    size: Annotated[int | None, typer.Option(help="Side in pixels: 256, or 64 for tiny; not for a JSON file.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="en or zh; may be repeated.")] = None,
    fonts: Annotated[list[str] | None, typer.Option(help="A font file or folder; may be repeated.")] = None,
    photos: Annotated[str | None, typer.Option(help="A folder of photographs for compositional samples.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Write a contact sheet of synthesised text-rendering data."""
    with explained():
        from qwen_image_fast.training.synthesis.preview import find_recipe, write_preview

        chosen = find_recipe(recipe, size, tuple(language or ("en",)), tuple(fonts or ()), photos)
        written = write_preview(chosen, out, seed=seed, count=count, edits=edits)
    print(f"{count} {'pairs' if edits else 'samples'} of {recipe} in {written}")


def filter_records(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML file with the fields of training/data/recipe.py; with --preset, also a source."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes such as quality.min_luma=0.1.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")] = Path("outputs/filtered"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode and judge.")] = 1,
    preset: Annotated[str, typer.Option(help="Defaults by purpose: pretrain, refine or lora.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go, and write nothing.")] = False,
    engine: Annotated[str, typer.Option(help="local, or ray: Ray Data, with --workers actors.")] = "local",
) -> None:
    """Filter a data set in the report's seven stages; shards, an audit of every score and examples go to OUT.

    A stopped run goes on with the same command.
    """
    with explained():
        err.print(f"{recipe}: loading the filters", markup=False, soft_wrap=True)
        from qwen_image_fast.training.data.cli import filter_command

        filter_command(recipe, overrides, out, workers, preset, dry_run, engine)


def report(folder: Annotated[Path, typer.Argument(help="The result of `data filter`.")]) -> None:
    """Write FOLDER/report.html: losses, score histograms with examples, balance, duplicates, in one page."""
    with explained():
        from qwen_image_fast.training.data.report import write_report

        print(write_report(folder))


def annotate_records(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with the fields of AnnotateRecipe in recipe.py.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes such as parallel=16.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")] = Path("outputs/annotated"),
    pilot: Annotated[
        int | None, typer.Option(min=1, help="Ask about so many records alone, such as 20, and write OUT/pilot.html.")
    ] = None,
) -> None:
    """Caption pictures by a vision-language model; a stopped run goes on with the same command."""
    with explained():
        err.print(f"{recipe}: loading what annotates", markup=False, soft_wrap=True)
        from qwen_image_fast.training.data.cli import annotate_command

        annotate_command(recipe, overrides, out, pilot)


def retrieve_records(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with the fields of RetrieveRecipe in recipe.py.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes such as model=tiny.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result.")] = Path("outputs/retrieved"),
) -> None:
    """Fill gaps of a taxonomy with the records of a pool that are nearest to texts or pictures.

    A stopped run goes on with the same command; another search in the same pool makes no vector again.
    """
    with explained():
        err.print(f"{recipe}: loading what retrieves", markup=False, soft_wrap=True)
        from qwen_image_fast.training.data.cli import retrieve_command

        retrieve_command(recipe, overrides, out)


def prefer(
    folder: Annotated[Path, typer.Argument(help="Pictures of which several have one prompt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of pairs to write.")] = Path("pairs.jsonl"),
    port: Annotated[int, typer.Option(help="Of the page on this machine; 0: any.", min=0, max=65535)] = 8765,
) -> None:
    """Compare pictures by keyboard in a browser; the pairs are for `train dpo --pairs`."""
    with explained():
        from qwen_image_fast.training.data.prefer import Comparisons, pairs_of, pictures_of, server

        if not folder.is_dir():
            raise CommandError(f"there is no folder {folder}")
        if out.is_dir() or not out.expanduser().parent.is_dir():
            raise CommandError(f"--out must be a file in a folder that is there, got {out}")
        comparisons = Comparisons(pairs_of(pictures_of(folder)), out.expanduser())
        try:
            page = server(comparisons, port)
        except OSError as error:
            raise CommandError(f"port {port} cannot be used: {error}; give another --port") from error
        with page:
            done, _ = comparisons.next()
            where = f"http://127.0.0.1:{page.server_address[1]}"
            err.print(f"{done} of {len(comparisons.pairs)} pairs compared; open {where}; Ctrl-C ends", markup=False)
            with suppress(KeyboardInterrupt):
                page.serve_forever()
        done, _ = comparisons.next()
        err.print(f"{done} of {len(comparisons.pairs)} pairs compared", markup=False)
    print(out)


def characters(
    table: Annotated[Path, typer.Argument(help="A folder of shards, or a JSON table of counts by character.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON recipe to write.")] = Path("rare.json"),
    power: Annotated[float, typer.Option(help="Of (most / count), in (0, 1].")] = 0.5,
    limit: Annotated[float, typer.Option(help="Largest weight, of characters with a count of 0, too.")] = 50.0,
    rarest: Annotated[int, typer.Option(min=1, help="How many characters.")] = 1000,
) -> None:
    """Write a synthesis recipe that draws rare Chinese characters more often the rarer they are."""
    with explained():
        err.print(f"{table}: counting characters", markup=False, soft_wrap=True)
        import json

        from qwen_image_fast.files import numbered, write_new
        from qwen_image_fast.training.synthesis.rare import rare_recipe, read_counts

        counts = read_counts(table)
        recipe = rare_recipe(counts, power=power, limit=limit, rarest=rarest)
        content = json.dumps(recipe, ensure_ascii=False, indent=1).encode()
        written = write_new(numbered(out), lambda file: file.write(content))
    print(f"{len(recipe['han'])} of {len(counts)} characters in {written}")


data.command("preview")(preview_samples)
data.command("characters")(characters)
data.command("filter")(filter_records)
data.command("report")(report)
data.command("annotate")(annotate_records)
data.command("retrieve")(retrieve_records)
data.command("prefer")(prefer)
