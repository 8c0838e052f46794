"""The GPU check delivers what it measured, whatever fails: here with stages that hang, die and lie."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenkit.kernels import launch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

gpu_check = importlib.import_module("gpu_check")
gpu_stages = importlib.import_module("gpu_stages")
SUMMARY_LINES, Check, Results, Stage, summary = (
    getattr(gpu_check, name) for name in ("SUMMARY_LINES", "Check", "Results", "Stage", "summary")
)

STAGES = """
import json, os, subprocess, sys, time
stage, results = sys.argv[1:3]
with open(results, "a") as file:
    file.write(json.dumps({"stage": stage, "name": "before", "headline": True, "ms": 1.0}) + "\\n")
if stage == "hangs":
    child = subprocess.Popen(["sleep", "600"])
    open(results + ".pid", "w").write(str(child.pid))
    time.sleep(600)
if stage == "dies":
    os.kill(os.getpid(), 11)
if stage == "falls" and "--fallback" not in sys.argv:
    raise RuntimeError("no such kernel")
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Stages of a file of our own."""
    (tmp_path / "gpu_stages.py").write_text(STAGES)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    monkeypatch.setattr(gpu_check, "clocks", lambda: "")
    return Check(tmp_path, time.monotonic() + 60, dry_run=False)


def of(name, seconds=20, keeps=0, *, falls_back=False):
    return Stage(name, seconds, "", keeps, falls_back)


def test_a_stage_that_dies_leaves_what_it_found_and_the_next_runs(check):
    assert check.run([of("dies"), of("good")]) == 1
    lines = check.results.read()
    assert [(x["stage"], x.get("failed"), x.get("done")) for x in lines if "name" not in x] == [
        ("dies", "exit code -11", None),
        ("good", None, True),
    ]
    assert [x["stage"] for x in lines if x.get("name") == "before"] == ["dies", "good"]


def test_a_stage_that_hangs_is_killed_with_its_children(check, tmp_path):
    assert check.attempt(of("hangs"), 1.5)
    assert check.results.read()[-1]["failed"] == "over its limit of 2 s"
    child = int((tmp_path / "results.jsonl.pid").read_text())
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True, check=False
    )
    assert state.stdout.strip()[:1] in ("", "Z")


def test_a_stage_whose_kernels_do_not_launch_runs_again_with_fallbacks(check):
    assert check.run([of("falls", falls_back=True)]) == 0
    failed, done = (x for x in check.results.read() if "name" not in x)
    assert "no such kernel" in failed["tail"]
    assert done["flags"] == ["--fallback"]


def test_what_matters_most_keeps_its_time(check):
    check.deadline = time.monotonic() + 15
    check.run([of("cheap", seconds=10, keeps=1), of("dear", seconds=12, keeps=5)])
    assert [(x["stage"], "skipped" in x) for x in check.results.read() if "name" not in x] == [
        ("cheap", True),
        ("dear", False),
    ]


def test_the_summary_is_short_and_ends_with_the_stages():
    headlines = [{"stage": "a", "name": f"n{i}", "headline": True, "ms": 1.5} for i in range(200)]
    ends = [{"stage": "a", "done": True, "seconds": 1.0, "flags": []}, {"stage": "b", "skipped": "none left"}]
    lines = summary([*headlines, *ends])
    assert len(lines) <= SUMMARY_LINES
    assert lines[0].split() == ["a", "n0:", "ms=1.5"]
    assert "more in results.jsonl" in lines[-4]
    assert lines[-1].startswith("b            skipped")


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add("a", ms=1.0)
    with results.path.open("a") as file:
        file.write('{"stage": "b", "m')
    assert results.read() == [{"stage": "a", "ms": 1.0}]


def test_a_dry_run_of_the_whole_driver(tmp_path):
    """Two processes that import torch: the others run below, in this one."""
    words = ["--dry-run", "--output", str(tmp_path), "--stages", "ceilings"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_check.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "product of 8192^3" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ceilings     ok")


@pytest.mark.parametrize("name", [stage.name for stage in gpu_check.STAGES])
def test_every_stage_runs_on_a_cpu(tmp_path, monkeypatch, name):
    """Up to ten seconds each: what they run exists for a GPU alone, nothing else would notice its decay."""
    stage = gpu_stages.Stage(name, Results(tmp_path / "results.jsonl"), dry_run=True)
    monkeypatch.setattr(launch, "INTERPRET", launch.INTERPRET)  # some stages turn it on
    monkeypatch.setattr(stage, "child", lambda words, seconds: gpu_stages.run(words, stage) or "")
    gpu_stages.STAGES[name](stage)
    lines = stage.results.read()
    assert lines
    assert [x for x in lines if x.get("failed")] == ([lines[0]] if name == "counters" else [])
