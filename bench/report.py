"""Seconds of `tokenkit report` on a run, in a process of its own, imports included.

    python bench/report.py RUN --texts $TOKENKIT_DATA/text/udhr --save bench/results/cpu/report.json

With models, and with `--quick`. A busy machine moves the seconds by the clock, hardly those of the processor.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import print_table, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--texts", type=Path, help="folder of one text for each language")
    parser.add_argument("--save", type=Path, help="file of results")
    arguments = parser.parse_args()
    more = ["--texts", str(arguments.texts)] if arguments.texts else []
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("whole", more), ("quick", ["--quick"])):
            output = Path(folder) / f"{name}.html"
            clock, processor = timed(["report", str(arguments.run), "--output", str(output), *options])
            rows[name] = {
                "seconds": round(clock, 1),
                "seconds of the processor": round(processor, 1),
                "kilobytes of the page": output.stat().st_size // 1000,
            }
    print_table(rows)
    if arguments.save:
        save(arguments.save, "cpu", {"rows": rows})


def timed(words: list[str]) -> tuple[float, float]:
    """Run a command and return its seconds by the clock and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "tokenkit.cli", *words], check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
