"""`python -m tests.faults.kills`: SIGKILL a training at random moments; its curve must be the unbroken one's.

The whole way of `tokenkit train`, on the tests' small transfer: forked gloo ranks (torch is imported once),
one of them or all killed at a random moment of each life, loading and export included, and started again
with `--resume`. A run that came to its end before all kills were spent is compared, and begins anew.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.training.conftest import config_in, write_workspace
from tokenkit import parallel
from tokenkit.run.metrics import without_times
from tokenkit.training import loop

STEPS = 40


def train_in_rank(world, config):
    parallel.start = lambda **_: world
    return int(loop.train(config))


def what_is_left(folder):
    """Return the curve without its times, and the bytes of the model."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [without_times(line) for line in lines]
    return curve, (folder / "export" / "model.safetensors").read_bytes()


def was_at(folder):
    """Say what the killed were at."""
    if any((folder / "checkpoints").glob(".tmp-*")):
        return "a checkpoint half written"
    doing = "before the run had a folder"
    for path in sorted(folder.glob(".lock-rank-*")):
        with suppress(ValueError, KeyError):
            doing = json.loads(path.read_text())["doing"].rstrip(" 0123456789")
    return doing


def wait_for_a_step(folder, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and "step" not in was_at(folder):
        time.sleep(0.01)


def one_life(config, folder, ranks, longest, rng):
    """Start the run, kill it at a random moment; return what it was at, None where it ended before."""
    started = start_ranks(train_in_rank, ranks, config, always_shard=False)
    if (
        rng.random() < 0.8
    ):  # loading takes most of so short a life: the others are counted from the first step
        wait_for_a_step(folder, seconds=60)
    time.sleep(rng.uniform(0, longest))
    for pid in started.pids if rng.random() < 0.5 else [rng.choice(started.pids)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    codes = wait_ranks(started, timeout=300)
    shutil.rmtree(started.folder)
    return was_at(folder) if KILLED in codes else None


def main(kills, ranks, seed, mode):
    rng, where = random.Random(seed), Counter()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    (root / "transfer").mkdir()
    workspace = write_workspace(root / "transfer")
    changes = {
        "steps": STEPS,
        "save_interval": 1,
        "eval_interval": 20,
        "train_model_mode": mode,
        "model_lora_dropout": 0.1 if mode == "lora" else 0.0,
        "async_save": "true",
        "resume": "true",
    }
    configs = {name: config_in(workspace, root / name, **changes) for name in ("whole", "broken")}
    begun = time.monotonic()
    run_ranks(train_in_rank, ranks, configs["whole"], timeout=900, always_shard=False)
    seconds, whole, same, folder = time.monotonic() - begun, what_is_left(root / "whole"), 0, root / "broken"
    while (landed := where.total()) < kills or folder.exists():
        if landed < kills:
            doing = one_life(configs["broken"], folder, ranks, 0.5 * seconds, rng)
            where.update([] if doing is None else [doing])
            print(f"{where.total()} kills, {same} runs to their end; the last: {doing}", flush=True)
            is_done = doing is None
        else:
            run_ranks(train_in_rank, ranks, configs["broken"], timeout=900, always_shard=False)
            is_done = True
        if is_done and (folder / "export" / "config.json").exists():
            if what_is_left(folder) != whole:
                raise SystemExit(f"{folder} is not the unbroken run {root / 'whole'}: both are kept")
            same += 1
            shutil.rmtree(folder)
    print(
        f"{landed} kills on {ranks} ranks, {mode}: {same} runs of {STEPS} steps came to their end, each with"
    )
    print(f"the curve and the exported weights of the unbroken run, bit for bit. Killed at: {dict(where)}")
    shutil.rmtree(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["full", "lora"], default="lora")
    options = parser.parse_args()
    main(options.kills, options.ranks, options.seed, options.mode)
