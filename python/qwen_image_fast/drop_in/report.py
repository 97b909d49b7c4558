"""What `accelerate` did, for people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What was replaced, and what was not.

    Attributes:
        replaced: one sentence per part. left_alone: (part, reason).
        memory_freed: bytes of parameters that were released; accelerate releases none.
        kept_per_step: bytes that the modulation vectors of one time step take while they are kept.
        added: bytes of weights in 8 bits; the pipeline's own stay beside them, for `restore`.
    """

    replaced: list[str] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    memory_freed: int = 0
    kept_per_step: int = 0
    added: int = 0

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("replaced", text) for text in self.replaced]
        rows += [("left alone", f"{what}: {why}") for what, why in self.left_alone]
        if self.added:
            rows.append(
                ("parameters", f"{self.added} bytes in 8 bits; the pipeline's own stay beside them for restore")
            )
        else:
            rows.append(("parameters", "all are shared with the pipeline as it was, none is copied"))
        rows.append(("memory", f"{self.memory_freed} bytes of parameters freed"))
        if self.kept_per_step:
            kept = f"{self.kept_per_step} bytes of modulation vectors kept per time step of the last schedule"
            rows.append(("memory", kept))
        return rows

    def __str__(self) -> str:
        return "\n".join(["qwen_image_fast.accelerate", *(f"  {kind:<10}  {text}" for kind, text in self._rows())])

    def __rich__(self):
        from rich.table import Table

        table = Table("", "what", title="qwen_image_fast.accelerate")
        for row in self._rows():
            table.add_row(*row)
        return table
