"""torchrun's own restarts: the second start is not led to the processes of the first."""

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.registry import fault
from tests.ranks import _free_port

ROOT = Path(__file__).parents[2]


# some seconds: torchrun and four ranks import torch. What it keeps between starts cannot be had without it
@fault(
    "A rank dies under `torchrun --max-restarts`, on one node",
    "all ranks start again and find each other; with `--resume` they go on",
    code="the second start's",
    kept="the last checkpoint",
)
def test_ranks_that_torchrun_starts_again_find_each_other(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    words += ["--monitor-interval", "0.05", "--master-port", str(_free_port())]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*words, str(Path(__file__).with_name("restarted.py")), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    begun = {f"begun-{attempt}-{rank}" for attempt in "01" for rank in "01"}
    assert {path.name for path in tmp_path.iterdir()} == begun | {"step", "ended-1-0", "ended-1-1"}
