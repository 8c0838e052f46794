"""What is shipped is complete: the kernels are real files in the wheel, and it works anywhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked():
    """Files of the repository as git sees them, with those of the working tree that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if os.path.lexists(ROOT / name)]


def build(kind, source, folder):
    """Run one step of the build backend, in a process of its own since it changes global state."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from the sdist), from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    sdist = build("sdist", copy, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder), build("wheel", copy, folder / "again")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel unpacked, as pip would do it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(folder)
    return folder


def sources_of_the_package():
    names = {name for name in tracked() if name.endswith(".py")}
    kernels = {f"tokenkit/{name}" for name in names if name.startswith("kernels/")}
    return kernels | {name for name in names if name.startswith("tokenkit/")}


def test_wheels_from_tree_and_archive_hold_every_module_and_nothing_else(built):
    for wheel in built[1:]:
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        configs = {f"tokenkit/{name}" for name in tracked() if name.startswith("configs/")}
        assert names == sources_of_the_package() | configs | {"tokenkit/py.typed"}


def test_kernels_are_real_files_in_wheel_and_archive(built):
    with zipfile.ZipFile(built[1]) as archive:
        assert "def linear_logprob" in archive.read("tokenkit/kernels/linear_logprob/operation.py").decode()
    with tarfile.open(built[0]) as archive:
        kernels = [member for member in archive.getmembers() if "/kernels/" in member.name]
        assert kernels
        assert all(member.isreg() or member.isdir() for member in kernels)


def test_the_licence_travels_with_the_wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
        assert "Apache License" in archive.read(name).decode()
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert {"train", "eval", "export", "flash", "dev"} <= {
        line.removeprefix("Provides-Extra: ")
        for line in metadata.splitlines()
        if line.startswith("Provides-Extra")
    }


def elsewhere(installed, tmp_path, *arguments):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(installed)
    }
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )


def test_the_wheel_works_from_elsewhere(installed, tmp_path):
    program = "import tokenkit.losses, tokenkit.kernels.linear_logprob as kernel; print(kernel.__file__)"
    result = elsewhere(installed, tmp_path, "-c", program)
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout


def test_the_command_of_the_wheel_answers(installed, tmp_path):
    entry = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "tokenkit = tokenkit.cli:main" in entry
    result = elsewhere(installed, tmp_path, "-m", "tokenkit.cli", "train", "--help")
    assert result.returncode == 0, result.stderr
    assert "--losses" in result.stdout
    shipped = ("--config", "cross_tokenizer_distill", "data/text_file", "--print-config")
    result = elsewhere(installed, tmp_path, "-m", "tokenkit.cli", "train", *shipped)
    assert result.returncode == 0, result.stderr
    assert "name: cross_tokenizer_distill" in result.stdout


def test_the_version_is_said_once():
    from tokenkit import __version__

    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text()


def test_the_symlink_is_kept_by_git():
    listed = subprocess.run(
        ["git", "ls-files", "-s", "tokenkit/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.startswith("120000 ")
    assert (ROOT / "tokenkit" / "kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("script", ["environment.sh", "tests/run.sh", "tests/quantised.sh", ".ci/run"])
def test_the_scripts_are_valid_and_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    env = os.environ | {"PYTHON": str(old), "TOKENKIT_VENV": str(tmp_path / "venv")}
    result = subprocess.run(
        ["bash", str(ROOT / "environment.sh")], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed; found: Python 3.8.1" in result.stderr
    assert not (tmp_path / "venv").exists()
