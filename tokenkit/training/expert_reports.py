"""What a run says of the use of its experts: numbers, a picture, a file beside each checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenkit.disk import write_durably
from tokenkit.models.expert_usage import ExpertUsage, metrics_of, too_small
from tokenkit.parallel import World
from tokenkit.run.curves import draw_heatmap
from tokenkit.training.reports import Reports

HEATMAP = "expert_usage.png"
COLUMNS = 20  # experts of a layer in the picture


@dataclass
class ExpertReports:
    """The newest window of a run. A resumed run begins a new one."""

    usage: ExpertUsage
    folder: Path
    step: int = 0
    found: dict[int, dict[str, Any]] = field(default_factory=dict)
    has_warned: bool = False

    def after_step(self, step: int, reports: Reports, world: World) -> None:
        """Report a window that ends with this optimizer step; every rank calls it."""
        if step % self.usage.every:
            return
        added = world.all_reduce(self.usage.counters(), step)
        self.step, self.found = step, self.usage.statistics(added)
        if not world.is_main:
            return
        reports.record.write(step, metrics_of(self.found))
        self._draw()
        reports.record.trackers.show(
            step,
            {f"expert_usage/layer_{n}_histogram": added[f"count#{n}"].tolist() for n in self.found},
            {"expert_usage/hot_experts": (("layer", "expert", "uses"), self._hot())},
            {"expert_usage/top_experts_heatmap": self.folder / HEATMAP},
        )
        if not self.has_warned and (words := too_small(self.found, self.usage.every)) is not None:
            self.has_warned = True
            reports.progress.note(words)

    def _hot(self) -> list[list[int]]:
        return [[n, expert, uses] for n, stats in self.found.items() for expert, uses in stats["hot_experts"]]

    def _draw(self) -> None:
        rows = {
            f"layer {number}": [uses / max(stats["mean"], 1e-9) for _, uses in stats["top"][:COLUMNS]]
            for number, stats in self.found.items()
        }
        draw_heatmap(self.folder / HEATMAP, rows, "the most used experts of each layer, times the mean")

    def newest(self) -> str | None:
        """Return the newest window as a file holds it; None: there was none yet."""
        if not self.found:
            return None
        about = {"step": self.step, "window": self.usage.every, "threshold": self.usage.threshold}
        layers = {str(number): stats for number, stats in self.found.items()}
        return json.dumps({**about, "layers": layers}, indent=1) + "\n"

    def after_checkpoint(self, step: int, window: str | None, world: World) -> None:
        """Write what was the newest window when the checkpoint of this step was taken beside it."""
        if window is not None and world.is_main:
            write_durably(self.folder / "checkpoints" / f"expert_stats_{step:08d}.json", window)
