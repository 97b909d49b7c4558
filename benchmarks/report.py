"""A report as a table in the terminal and as a chart."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import BASELINE, Bar, Case, Report


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def print_report(report: Report, console: Console) -> None:
    """The machine, one table per suite, the stages of whole pipelines, and the bars."""
    machine = report.machine
    console.print(f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads")
    console.print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    build = machine["build_info"]
    console.print(f"compiled core {build['version']}: {build['cpu_in_use']} kernels in use, {build['compiler']}")
    for name, value in report.roofs.items():
        console.print(f"roof, {name}: {value / 1e9:.1f} {'GB/s' if name == 'copy' else 'GFLOP/s'}")
    for suite in dict.fromkeys(case.suite for case in report.cases):
        console.print(suite_table(suite, [c for c in report.cases if c.suite == suite], report))
    for case in report.cases:
        for variant, stages in case.stages.items():
            parts = ", ".join(f"{name} {seconds(t)}" for name, t in stages.items())
            console.print(f"{case.name}, {variant}: {parts}")
    console.print(bar_table(report.bars))


def suite_table(suite: str, cases: list[Case], report: Report) -> Table:
    table = Table(title=suite, title_justify="left")
    table.add_column("case", overflow="fold")
    table.add_column("variant", overflow="fold")
    for column in ("median", "quartiles", "speed-up", "rate", "of roof", "memory"):
        table.add_column(column, justify="right")
    for case in cases:
        shown = case.name if case.agrees else f"{case.name}\n[red]results differ by {case.difference:.2g}[/red]"
        for i, (variant, timing) in enumerate(case.timings.items()):
            table.add_row(
                shown if i == 0 else "",
                variant,
                seconds(timing.median),
                f"{seconds(timing.low)} - {seconds(timing.high)}",
                f"{case.speedups[variant]:.2f}x" if variant in case.speedups else "",
                rate(case, timing.median),
                f"{case.roof[variant]:.0%}" if variant in case.roof else "",
                f"{case.memory[variant] / 1e6:.0f} MB" if variant in case.memory else "",
            )
        table.add_section()
    return table


def rate(case: Case, median: float) -> str:
    if case.flops:
        return f"{case.flops / median / 1e9:.0f} GFLOP/s"
    return f"{case.bytes / median / 1e9:.1f} GB/s" if case.bytes else ""


def bar_table(bars: list[Bar]) -> Table:
    table = Table(title="bars", title_justify="left")
    for column, justify in (("bar", "left"), ("goal", "right"), ("measured", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for bar in bars:
        sign = "<=" if bar.at_most else ">="
        value = "-" if bar.measured is None else f"{bar.measured:.2f}x"
        colour = {"reached": "green", "missed": "red"}.get(bar.verdict, "yellow")
        table.add_row(bar.name, f"{sign} {bar.goal:.2f}x", value, f"[{colour}]{bar.verdict}[/{colour}]")
    return table


def plot(report: Report, path: Path) -> None:
    """Horizontal bars of the speed-up over diffusers eager; a black line marks the goal where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(case, variant, value) for case in report.cases for variant, value in case.speedups.items()]
    if not rows:
        return
    colours = {"ours": "#2a6fbb", "diffusers compiled": "#b8b8b8"}
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.27 * len(rows)))
    for y, (case, variant, value) in enumerate(rows):
        axes.barh(y, value, color=colours.get(variant, "#7fb2e5"), height=0.75)
        axes.text(value, y, f" {value:.2f}", va="center", fontsize=7)
        if variant in case.goals:
            axes.plot([case.goals[variant]] * 2, [y - 0.5, y + 0.5], color="black", linewidth=2)
    axes.axvline(1, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{case.name}: {variant}" for case, variant, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed-up over {BASELINE} eager (dashed: 1, black: goal)")
    axes.set_title(f"{report.machine['device']}, torch {report.machine['versions']['torch']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
