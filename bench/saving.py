"""How long training stands still for a checkpoint: a save that it waits for, and one behind it (async_save).

    python bench/saving.py
    python bench/saving.py --millions 50 --save bench/results/cpu/saving.json

One process, a layer of so many million float32 parameters with AdamW's two moments. Both ways take turns in
one folder; between two saves a step is taken. Wall time: it is what training waits.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import print_table, save

from tokenkit import parallel
from tokenkit.run import checkpoint
from tokenkit.run.saving import Background

ALONE = parallel.World(0, 1, torch.device("cpu"), None)
WIDTH = 1000


def measure(millions: int, repetitions: int, root: Path) -> dict[str, dict[str, float]]:
    """Return the median seconds that training stood still, and that a checkpoint took in all."""
    layer = torch.nn.Linear(WIDTH, millions * 1000, bias=False)
    state = checkpoint.State(layer, torch.optim.AdamW(layer.parameters()))
    background, identity = Background(ALONE, 600.0), checkpoint.Identity({})
    still: dict[str, list[float]] = {"waited for": [], "behind training": []}
    whole: dict[str, list[float]] = {name: [] for name in still}
    for repetition in range(repetitions + 1):
        for name in still:
            layer(torch.randn(4, WIDTH)).square().mean().backward()
            state.optimizer.step()
            state.step += 1
            began = time.perf_counter()
            if name == "waited for":
                checkpoint.save(root, state, identity, ALONE)
            else:
                background.begin(root, state, identity, 2)
            stood = time.perf_counter() - began
            background.finish()
            if repetition:  # the first makes files and memory warm
                still[name].append(stood)
                whole[name].append(time.perf_counter() - began)
    mebibytes = 3 * 4 * millions * 1e6 / 2**20
    return {
        name: {
            "MiB": round(mebibytes),
            "s, stood still": round(statistics.median(still[name]), 3),
            "s, until whole": round(statistics.median(whole[name]), 3),
        }
        for name in still
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=int, default=20, help="parameters")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.millions, options.repetitions, Path(folder) / "checkpoints")
    print_table(rows)
    if options.save:
        save(options.save, "cpu", {"millions": options.millions, "rows": rows})


if __name__ == "__main__":
    main()
