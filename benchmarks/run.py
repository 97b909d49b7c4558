"""Run the benchmarks: `python -m benchmarks.run [suite ...] [--quick] [--device cuda]`.

Writes benchmarks/results/<date>-<processor or GPU>.json and .png and prints the tables. A missed bar is said, but never
an error: a busy machine would make it one.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    bench_block,
    bench_editing,
    bench_loading,
    bench_lora,
    bench_ops,
    bench_pipeline,
    bench_training,
    bench_transformer,
    bench_vae,
)
from benchmarks.harness import Case, Report, Settings, describe_machine, measure_roofs, slug
from benchmarks.report import plot, print_report

SUITES = {
    m.SUITE: m
    for m in (
        bench_ops,
        bench_block,
        bench_transformer,
        bench_editing,
        bench_training,
        bench_lora,
        bench_pipeline,
        bench_loading,
        bench_vae,
    )
}
# A block takes seconds on a CPU; few rounds are enough where a sample is long.
ROUNDS = {
    "ops": 15, "block": 7, "transformer": 25, "editing": 9, "training": 9, "lora": 9, "pipeline": 7, "loading": 3,
    "vae": 5,
}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="three rounds, nothing compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.suites) - SUITES.keys():
        parser.error(f"suites must be of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    return options


def settings_of(suite: str, options: argparse.Namespace) -> Settings:
    if options.quick:
        return Settings(options.device, rounds=3, warmup=1, compile=False, quick=True)
    return Settings(options.device, rounds=ROUNDS[suite], warmup=2)


def main(arguments: list[str] | None = None) -> Report:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = options.suites or list(SUITES)
    console = Console(width=160)
    machine = describe_machine(options.device)
    roofs = measure_roofs(settings_of("ops", options))
    cases: list[Case] = []
    for suite in chosen:
        for case in SUITES[suite].cases(settings_of(suite, options)):
            cases.append(case)
            ratios = ", ".join(f"{name} {value:.2f}x" for name, value in case.speedups.items())
            console.print(f"{case.name}: {ratios or (case.note if case.agrees else 'results differ, no speed-up')}")
    date = datetime.date.today().isoformat()
    bars = [bar for suite in chosen for bar in SUITES[suite].bars(cases)]
    report = Report(date, machine, roofs, cases, bars)
    parts = [] if not options.suites else chosen
    name = "-".join([date, slug(machine["device"]), *parts, *(["quick"] if options.quick else [])])
    report.save(options.output / f"{name}.json")
    plot(report, options.output / f"{name}.png")
    print_report(report, console)
    return report


if __name__ == "__main__":
    main()
