"""`python -m tests.faults.two_nodes`: two machines in one, of which one is cut off and comes back.

Two network namespaces with a cable between them (root is needed), a torchrun agent and a rank in each, the
command of examples/launch/many_nodes.sh. After some steps the cable is pulled: both sides must end, and say
so. Then it is plugged in again and both are started once more, as a scheduler would: the curve must be that
of the unbroken run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.training.conftest import config_in, write_workspace
from tokenkit.config import to_yaml
from tokenkit.run.metrics import without_times

ROOT = Path(__file__).parents[2]
NAMES, ADDRESSES, PORT = ("tokenkit-a", "tokenkit-b"), ("10.77.0.1", "10.77.0.2"), 29411
STEPS, CUT_AFTER, HANG_TIMEOUT = 60, 12, 15


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def lay_cable():
    """Make both namespaces and a cable; each end is called `wire`."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("-n", NAMES[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", NAMES[1])
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
        for link in ("lo", "wire"):
            ip("-n", name, "link", "set", link, "up")


def start(config, output, run_id):
    """Start a node in each namespace."""
    nodes = []
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        told = {"CONFIG": str(config), "OUTPUT": str(output), "NODES": "2", "HEAD": ADDRESSES[0], "GPUS": "1"}
        told |= {"RUN_ID": run_id, "PORT": str(PORT), "ADDRESS": address, "GRACE": "20"}
        environment = os.environ | told | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "wire"}
        log = (output.parent / f"{run_id}-{name}.log").open("wb")
        command = ["ip", "netns", "exec", name, "bash", str(ROOT / "examples/launch/many_nodes.sh")]
        nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return nodes


def curve(output):
    path = output / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [without_times(line) for line in lines]


def main():
    root = Path(tempfile.mkdtemp(prefix="two-nodes-"))
    (root / "transfer").mkdir()
    workspace = write_workspace(root / "transfer")
    changes = {"steps": STEPS, "save_interval": 5, "eval_interval": STEPS, "hang_timeout": HANG_TIMEOUT}
    outputs = {name: root / name for name in ("whole", "broken")}
    for name, output in outputs.items():
        config = config_in(workspace, output, **changes, distributed_backend="gloo", async_save="true")
        (root / f"{name}.yaml").write_text(to_yaml(config))
    try:
        lay_cable()
        codes = [node.wait() for node in start(root / "whole.yaml", outputs["whole"], "whole")]
        print(f"unbroken: exit codes {codes}, {len(curve(outputs['whole']))} lines", flush=True)
        if codes != [0, 0]:
            raise SystemExit(f"the unbroken run failed: look at {root}")
        nodes = start(root / "broken.yaml", outputs["broken"], "first")
        while len(curve(outputs["broken"])) < CUT_AFTER:
            time.sleep(0.05)
            if any(node.poll() is not None for node in nodes):
                raise SystemExit(f"a node ended by itself: {root}")
        ip("-n", NAMES[1], "link", "set", "wire", "down")
        cut, ends = time.monotonic(), []
        for node in nodes:
            code = node.wait()
            ends.append((code, round(time.monotonic() - cut)))
        outcome = json.loads((outputs["broken"] / "outcome.json").read_text())
        print(
            f"cut off after {CUT_AFTER} lines: (exit code, seconds) {ends}; {outcome['reason']}", flush=True
        )
        ip("-n", NAMES[1], "link", "set", "wire", "up")
        begun = time.monotonic()
        codes = [node.wait() for node in start(root / "broken.yaml", outputs["broken"], "second")]
        print(f"back: exit codes {codes} in {time.monotonic() - begun:.0f} s", flush=True)
        if codes != [0, 0] or curve(outputs["broken"]) != curve(outputs["whole"]):
            raise SystemExit(f"not the unbroken run: everything is kept in {root}")
        print("the curve is that of the unbroken run, bit for bit")
        shutil.rmtree(root)
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


if __name__ == "__main__":
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("two_nodes needs root and iproute2's ip")
    main()
