"""Learning rates of the quickstart's transfers, tuned alike: `RATES` of examples/quickstart.py.

    python bench/quickstart_rates.py --output DIR --save bench/results/cpu/quickstart_rates.json

One teacher; each loss at each of its rates, then at the best with further seeds. Bits per byte of
documentation that no run saw, after transfers on source code.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from harness import print_table, save
from quickstart import bits_per_byte, make_teacher, transfer

RATES = {"clm": (3e-4, 1e-4, 3e-5, 1e-5), "alm_unconstrained": (1e-3, 3e-4, 1e-4)}
"""Until the best lies inside."""
SEEDS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--save", type=Path, help="file of results")
    parser.add_argument("--teacher-steps", type=int, default=220)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    make_teacher(arguments.output, arguments.teacher_steps)
    facts: dict[str, float] = {}  # CLM alone has no teacher

    def measured(loss: str, rate: float, seed: int) -> float:
        name = f"{loss}_{rate:g}_{seed}"
        run = transfer(arguments.output, loss, rate, arguments.steps, output=name, seed=seed)
        lines = bits_per_byte(run)
        facts["start"] = lines[0]["bits_per_byte/student"]
        if loss != "clm":
            facts["teacher"] = lines[0]["bits_per_byte/teacher"]
        return lines[-1]["bits_per_byte/student"]

    rows: dict[str, dict[str, object]] = {}
    for loss, rates in RATES.items():
        by_rate = {rate: measured(loss, rate, 0) for rate in rates}
        best = min(by_rate, key=by_rate.__getitem__)
        seeds = {f"seed {seed}": measured(loss, best, seed) for seed in SEEDS}
        rows[loss] = {f"{rate:g}": value for rate, value in by_rate.items()} | {"best": f"{best:g}"} | seeds
    print_table(rows)
    print(facts)
    if arguments.save:
        save(arguments.save, "cpu", {"rows": rows, **facts, "steps": arguments.steps})


if __name__ == "__main__":
    main()
