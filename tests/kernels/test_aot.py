"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spilling, within shared memory.

By default the kernels whose launch is the same on all three are compiled for sm_90 alone;
`TOKENKIT_AOT=all python -m pytest tests/kernels/test_aot.py` compiles each for each; `TOKENKIT_AOT=sweep`
launches over dtypes, sizes that divide nothing, bias, softcap, subset and shares, of which the default has
a sample.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HOW = {"all": [], "sweep": ["--sweep"]}.get(os.environ.get("TOKENKIT_AOT", ""), ["--less"])
TRITON = tuple(map(int, version("triton").split(".")[:2]))
STACK_BYTES = (
    0 if TRITON < (3, 8) else 16
)  # with 3.8 four of 156 keep a number or two there, all else being equal
SWEPT_BYTES = 64  # a few launches of the sweep keep a number or two there: ragged and capped, or of 32 bits
REGISTERS = 128 if TRITON < (3, 8) else 144
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # most that one block may have


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.aot", *HOW]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_every_kernel_compiles_for_every_architecture(records):
    kernels = {record["kernel"].split()[0] for record in records}
    assert kernels == {
        "fold",
        "dlogits",
        *([] if HOW == ["--sweep"] else ["rescale", "span_sum", "difference", "peer"]),
        "sorted",
        "ensemble",
        "divergence",
        "projected",
        "head",
        "fused",
    }
    for kernel in {"fused"} if HOW == ["--less"] else kernels:
        found = {record["sm"] for record in records if record["kernel"].startswith(kernel)}
        assert found == set(SHARED_BYTES), kernel


def test_nothing_spills(records):
    assert [
        r for r in records if r["local"] or r["stack"] > (SWEPT_BYTES if r["swept"] else STACK_BYTES)
    ] == []


def test_shared_memory_and_registers_fit(records):
    assert [r for r in records if r["shared"] > SHARED_BYTES[r["sm"]]] == []
    tiles = ("fused", "peer pick")  # those hold a tile of a product
    others = [r["registers"] for r in records if not (r["swept"] or r["kernel"].startswith(tiles))]
    assert max(others, default=0) <= REGISTERS, "two blocks of 256 threads no longer fit an SM"


def test_descriptors_become_bulk_copies_where_the_architecture_has_them(records):
    names = ("fused statistics", "fused gradient")
    for r in records:
        assert r["tma"] == (r["sm"] >= 90 and r["kernel"].startswith(names)), r
