"""A disk that takes no more, and folders that are not what they seem: said, and nothing is lost."""

import errno
import json
import os
import resource
import signal

import pytest

from tests.faults.registry import fault
from tests.ranks import run_ranks, start_ranks, wait_ranks
from tokenkit import cli, parallel
from tokenkit.disk import blaming_disk, is_disk_trouble
from tokenkit.errors import CheckpointError, DiskError, ExitCode
from tokenkit.run import curves, metrics
from tokenkit.run import folder as run_folder
from tokenkit.run.ending import Outcome, begin_outcome, read_outcome, write_outcome
from tokenkit.run.folder import RunLock, prepare_output
from tokenkit.run.metrics import MetricsFile
from tokenkit.training import loop
from tokenkit.training.reports import Reports


def limit_files(limit):
    """Let no file of this process grow over so many bytes, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def limit_after_step_2(world, config):
    parallel.start = lambda **_: world
    report = Reports.step

    def report_and_limit(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        limit_files(3000 if step == 2 else resource.RLIM_INFINITY)

    Reports.step = report_and_limit
    try:
        loop.train(config)
    except OSError as error:
        limit_files(resource.RLIM_INFINITY)
        return [cli.exit_code(error), cli.one_line(error)]
    return []


@fault(
    "The disk is full, or files are limited (ulimit -f), when a checkpoint is written",
    "the file, the reason, the bytes that are free and the remedy are said; outcome.json too",
    code=74,
    kept="the last checkpoint",
)
def test_a_save_that_finds_no_room_says_so(make_config, tmp_path):
    ((code, line),) = run_ranks(limit_after_step_2, 1, make_config(losses=["clm"]), always_shard=False)
    assert code == read_outcome(tmp_path / "run")["code"] == 74
    assert "rank 0 could not save" in line
    assert "checkpoints/step_00000002" in line
    assert "bytes are free there; make room, then go on with --resume" in line
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def write_lines(world, folder):
    file = MetricsFile(folder, step=0, is_main=True)
    file.write(1, {"loss": 1.0})
    limit_files(file.path.stat().st_size + 5)
    try:
        file.write(2, {"loss": 1.0})
    except DiskError as error:
        limit_files(resource.RLIM_INFINITY)
        file.close()
        return cli.one_line(error)
    return ""


@fault(
    "The disk is full when a line of metrics.jsonl is written",
    "the same",
    code=74,
    kept="the last checkpoint",
)
def test_a_line_that_finds_no_room_says_so(tmp_path):
    (line,) = run_ranks(write_lines, 1, tmp_path, always_shard=False)
    assert "metrics.jsonl, of 25 bytes, could not be written: File too large" in line
    assert [values["step"] for values in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1]


def full(path, content):
    raise DiskError(f"{path} could not be written: No space left on device")


@fault(
    "The disk is full when outcome.json is written",
    "it is written in the room that it took at the start; if even that fails, standard error has its words",
    code="the run's own",
    kept="the first reason",
)
def test_the_outcome_finds_room_on_a_full_disk(tmp_path, monkeypatch):
    begin_outcome(tmp_path)
    monkeypatch.setattr("tokenkit.run.ending.write_durably", full)
    write_outcome(tmp_path, Outcome(ExitCode.NUMERICS, "loss clm: " + "ä" * 5000, 17))
    outcome = read_outcome(tmp_path)
    assert (outcome["code"], outcome["step"]) == (70, 17)
    assert "characters ..." in outcome["reason"]
    (tmp_path / "outcome.json").unlink()
    with pytest.raises(DiskError):
        write_outcome(tmp_path, Outcome(ExitCode.NUMERICS, "loss clm", 17))


def test_where_the_outcome_cannot_be_written_the_first_error_is_the_one_that_is_raised(
    make_config, monkeypatch, capsys
):
    def break_down(*args):
        monkeypatch.setattr("tokenkit.run.ending.write_outcome", full)
        monkeypatch.setattr(MetricsFile, "close", lambda self: full("metrics.jsonl", ""))
        raise ZeroDivisionError("the reason")

    monkeypatch.setattr(loop, "_one_step", break_down)
    with pytest.raises(ZeroDivisionError, match="the reason"):
        loop.train(make_config(losses=["clm"]))
    said = capsys.readouterr().err
    assert "metrics.jsonl could not be written: No space left on device" in said
    assert "outcome.json could not be written (" in said
    assert "it would have said: numerics, ZeroDivisionError: the reason" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        Exception('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_libraries_that_say_it_in_their_own_words_are_understood(error, tmp_path):
    words = r"export, of 12 bytes, could not be written: .*free there; make room"
    with pytest.raises(DiskError, match=words), blaming_disk(tmp_path / "export", 12):
        raise error
    assert not is_disk_trouble(ValueError("no"))


@fault(
    "The output folder, or metrics.jsonl, is removed while the run goes on",
    "said at the next line of metrics, or the next save",
    code=74,
    kept="what was not removed",
)
def test_a_folder_that_is_removed_ends_the_run(make_config, tmp_path, monkeypatch):
    file = MetricsFile(tmp_path, step=0, is_main=True)
    file.write(1, {"loss": 1.0})
    file.path.unlink()
    with pytest.raises(DiskError, match="was removed while the run went on"):
        file.write(2, {"loss": 1.0})
    file.close()

    step = loop._one_step

    def remove_lock(training):
        training.session.lock.path.unlink(missing_ok=True)
        step(training)

    monkeypatch.setattr(loop, "_one_step", remove_lock)
    with pytest.raises(DiskError, match=r"\.lock is gone or of another run"):
        loop.train(make_config(losses=["clm"], save_interval=1))


@fault(
    "A name that the run writes (metrics.jsonl, checkpoints, export, ...) is a link in its folder",
    "refused at the start; nothing is written through it",
    code=65,
    kept="what it points to",
)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "curves.png", "checkpoints", "export", "config.yaml", "outcome.json", ".lock"]
)
@pytest.mark.parametrize("is_dangling", [True, False])
def test_links_are_refused_at_the_start(name, is_dangling, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    if not is_dangling:
        outside.write_text("precious")
    (folder / name).symlink_to(outside)
    with pytest.raises(FileExistsError, match=f"{name} is a link, and the run would write through it"):
        prepare_output(folder, resume=True)
    with pytest.raises(OSError, match=r"link|Not a directory|symbolic"):
        RunLock(folder).__enter__() if name == ".lock" else os.open(folder / name, os.O_NOFOLLOW)
    assert not outside.exists() if is_dangling else outside.read_text() == "precious"


def test_a_link_that_is_made_later_is_not_followed_by_the_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    outside = tmp_path / "outside"
    for name in (".curves.png", "curves.png"):
        (tmp_path / name).symlink_to(outside)
    curves.draw_curves(tmp_path)
    assert not outside.exists()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "curves.png").is_symlink()


def test_an_export_that_is_a_link_is_refused_before_training(make_config, tmp_path):
    (tmp_path / "elsewhere").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="is a link, and an export is moved to its name"):
        loop.train(make_config(export_to=tmp_path / "elsewhere"))


def hold(world, folder):
    with RunLock(folder):
        (folder / "held").touch()
        signal.pause()


@fault(
    "A second run in the same folder, also from another container of the machine",
    "told who holds it; the lock of a run that is gone is taken over at once",
    code=65,
    kept="the first run",
)
def test_the_kernel_keeps_the_lock_whatever_the_file_says_of_its_owner(tmp_path, monkeypatch):
    ranks = start_ranks(hold, 1, tmp_path, always_shard=False)
    while not (tmp_path / "held").exists():
        pass
    try:
        monkeypatch.setattr(run_folder.socket, "gethostname", lambda: "another-container")
        with pytest.raises(BlockingIOError, match="in use by another run"):
            RunLock(tmp_path).__enter__()
        (tmp_path / ".lock").write_text(json.dumps({**run_folder.identity(), "pid": 10**30}))
        with pytest.raises(BlockingIOError):
            RunLock(tmp_path).__enter__()
    finally:
        os.kill(ranks.pids[0], signal.SIGKILL)
        wait_ranks(ranks)
    with RunLock(tmp_path):
        pass


@fault(
    "A finished run is resumed with other options",
    "refused, with each difference",
    code=64,
    kept="everything",
)
def test_a_finished_run_with_other_options_is_not_called_done(make_config, tmp_path):
    assert loop.train(make_config(steps=1, losses=["clm"])) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=r"finished run of another.*\n.*learning_rate: 0\.01 -> 0\.5"):
        loop.train(make_config(steps=1, losses=["clm"], resume="true", optimizer__learning_rate=0.5))
    assert loop.train(make_config(steps=1, losses=["clm"], resume="true", logging_interval=7)) == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_a_checkpoint_of_another_kind_keeps_the_code_of_data():
    assert cli.exit_code(CheckpointError("torn")) == 65
