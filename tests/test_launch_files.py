"""The files of examples/launch: their commands and codes are ours, Slurm queues again what may help."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.faults.registry import fault
from tokenkit.errors import ExitCode

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
HOPELESS = {ExitCode.CONFIG, ExitCode.DATA, ExitCode.NUMERICS, ExitCode.MEMORY, ExitCode.DISK}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def stand_ins(folder, **bodies):
    """Write commands that do no more than their bodies; return the PATH on which they come first."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_script(name, path, *more, **environment):
    known = {"CONFIG": "run.yaml", "OUTPUT": "out", "PATH": path} | environment
    return subprocess.run(
        ["bash", str(LAUNCH / name), *more], env=os.environ | known, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["one_node.sh", "many_nodes.sh"])
def test_the_scripts_start_the_run_through_launch(name, tmp_path):
    path = stand_ins(tmp_path, python="printf '%s\\n' \"$@\"")
    nodes = {"NODES": "2", "HEAD": "node-0", "RUN_ID": "run-1"}
    words = run_script(name, path, "--steps", "7", **nodes).stdout.splitlines()
    assert words[:3] == ["-m", "tokenkit.launch", "out"]
    command = words[words.index("--") + 1 :]
    assert command[0] == "torchrun"
    assert command[command.index("--signals-to-handle") + 1] == SIGNALS
    assert command[command.index("--max-restarts") + 1] == "0"
    assert command[command.index("tokenkit.train") :][1:] == (
        "--config run.yaml --output out --resume --steps 7".split()
    )
    assert ("--rdzv-endpoint" in command) == (name == "many_nodes.sh")
    if name == "many_nodes.sh":
        missing = run_script(name, path, NODES="2", HEAD="node-0", RUN_ID="")
        assert missing.returncode == 1
        assert "RUN_ID: a name of this start, new each time" in missing.stderr


@fault(
    "A Slurm job is preempted or reaches its limit (examples/launch/slurm.sh)",
    "the steps hear SIGUSR1 or SIGTERM, save and end with 75; the job is queued again",
    code=75,
    kept="every step",
)
@pytest.mark.parametrize(
    ("code", "starts", "again"),
    [(75, 40, True), (1, 0, True), (1, 5, False), (64, 0, False), (70, 0, False), (0, 0, False)],
)
def test_slurm_queues_again_what_may_help(code, starts, again, tmp_path):
    path = stand_ins(
        tmp_path,
        srun=f'echo "$@" >> "{tmp_path}/srun.log"; env >> "{tmp_path}/srun.log"; exit {code}',
        scontrol=f'echo "$@" >> "{tmp_path}/scontrol.log"; [ "$1" = requeue ] || printf "node-7\\nnode-8\\n"',
    )
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_RESTART_COUNT": str(starts), "SLURM_SUBMIT_DIR": "/repo", "SLURM_GPUS_ON_NODE": "8"}
    done = run_script("slurm.sh", path, "--steps", "7", **slurm)
    assert done.returncode == code, done.stderr
    assert ("requeue 41" in (tmp_path / "scontrol.log").read_text()) == again
    told = (tmp_path / "srun.log").read_text().splitlines()
    assert told[0] == "--kill-on-bad-exit=1 bash /repo/examples/launch/many_nodes.sh --steps 7"
    assert {"HEAD=node-7", "NODES=2", "GPUS=8", f"RUN_ID=41.{starts}", "OUTPUT=out"} <= set(told)


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def test_kubernetes_runs_the_same_command_and_gives_it_time_to_save():
    (torch_job,) = documents("pytorchjob.yaml")
    runtime, train_job = documents("trainjob.yaml")
    worker = torch_job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command == train_job["spec"]["trainer"]["command"]
    assert command[:3] == ["python", "-m", "tokenkit.launch"]
    assert command[command.index("--signals-to-handle") + 1] == SIGNALS
    assert "--resume" in command
    assert command[3] == command[command.index("--output") + 1]
    grace = int(command[command.index("--shutdown-timeout") + 1])
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    for one in (pod, job["template"]["spec"]):
        assert one["terminationGracePeriodSeconds"] > grace
        assert one["automountServiceAccountToken"] is False
    assert worker["replicas"] == torch_job["spec"]["elasticPolicy"]["minReplicas"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == {int(code) for code in HOPELESS}
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert train_job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]


def test_skypilot_runs_the_script_of_many_nodes():
    (task,) = documents("skypilot.yaml")
    assert task["run"].splitlines()[-1] == "bash examples/launch/many_nodes.sh"
    assert task["envs"]["OUTPUT"].startswith(next(iter(task["file_mounts"])))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.sh")), ids=lambda file: file.name)
def test_bash_reads_every_script(file):
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True).stderr == b""
