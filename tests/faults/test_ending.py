"""Whoever ends a run, outcome.json says who and why; nobody waits for ever."""

import os
import signal
import time

import pytest
import torch

from tests.faults.registry import fault
from tests.ranks import KILLED, start_ranks, wait_ranks
from tokenkit import parallel
from tokenkit.data.mix import Mix
from tokenkit.errors import (
    DataError,
    ExitCode,
    OtherRankError,
    SilenceError,
    StoppedError,
    StuckError,
    exit_code,
)
from tokenkit.run.ending import (
    Ending,
    Outcome,
    _Beats,
    _first_line,
    _record,
    begin_outcome,
    ending,
    read_outcome,
    write_outcome,
)
from tokenkit.training import loop
from tokenkit.training.reports import Reports
from tokenkit.training.session import Session, StopRequest


@pytest.fixture(autouse=True)
def heard():
    """Signals that whoever started the tests ignores (nohup, a shell's background) are heard here."""
    default = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
    default[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in default.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fail(world):
    if world.rank == 1:
        raise DataError("row 7 is torn")


def die(world, victim=1):
    if world.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)


def die_first(world):
    die(world, 0)


def stop_moving(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def sleep(world):
    if world.rank == 1:
        time.sleep(30)


def fail_together(world):
    with world.together("read"):
        fail(world)


def rank_that(world, folder, do, doing, seconds):
    """Take steps; in the third of them `do` happens. Exit with the code that the door would exit with."""
    with world.together("begin"):
        if world.is_main:
            begin_outcome(folder)
    try:
        with ending(folder, world, seconds) as state:
            state.step = 2
            state.at(doing)
            world.barrier()
            do(world)
            state.at(f"{doing} again")
            world.barrier()
    except (DataError, OtherRankError, SilenceError) as error:
        raise SystemExit(exit_code(error)) from error


def end_of(do, folder, *, doing="step 3", seconds=30.0, collective=30.0, stopped=()):
    ranks = start_ranks(
        rank_that, 2, folder, do, doing, seconds, always_shard=False, collective_timeout=collective
    )
    if stopped:
        while read_outcome(folder).get("outcome") in (None, "running"):
            time.sleep(0.05)
        os.kill(ranks.pids[1], signal.SIGKILL)
    return wait_ranks(ranks), read_outcome(folder)


@fault(
    "Another rank fails",
    "every rank ends with the first one's code; outcome.json has its words and number",
    code="the first one's",
    kept="the last checkpoint",
)
@pytest.mark.parametrize("do", [fail, fail_together])
def test_the_words_and_the_code_are_those_of_the_rank_that_failed(do, tmp_path):
    codes, outcome = end_of(do, tmp_path)
    assert codes == [65, 65]
    assert (outcome["code"], outcome["rank"], outcome["step"]) == (65, 1, 2)
    assert "row 7 is torn" in outcome["reason"]
    assert os.listdir(tmp_path) == ["outcome.json"]


@fault(
    "A rank is killed, crashes or is out of the machine's memory",
    "the others name it, its host, process and step, at once",
    code=1,
    kept="the last checkpoint",
)
@pytest.mark.parametrize(("do", "victim"), [(die, 1), (die_first, 0)])
def test_a_rank_that_is_gone_is_named_by_those_that_are_left(do, victim, tmp_path):
    codes, outcome = end_of(do, tmp_path)
    assert codes[victim] == KILLED
    assert codes[1 - victim] == outcome["code"] == 1
    assert f"rank {victim} (host " in outcome["reason"]
    assert "after step 2, step 3) is gone: it was killed" in outcome["reason"]


@fault(
    "A rank hangs: stopped, swapping, its machine gone",
    "after hang_timeout the others name it, what it was at and what they waited for",
    code=1,
    kept="the last checkpoint",
)
@pytest.mark.parametrize("doing", ["step 3", "loading"])
def test_a_rank_that_is_silent_is_named_after_the_timeout(doing, tmp_path):
    codes, outcome = end_of(stop_moving, tmp_path, doing=doing, seconds=1.0, stopped=[1])
    assert codes == [1, KILLED]
    assert f"after step 2, {doing}) has been silent for" in outcome["reason"]
    assert f"this rank waited at {doing} again; start again with --resume" in outcome["reason"]


def test_a_rank_that_lives_but_does_not_come_on_is_named(tmp_path):
    codes, outcome = end_of(sleep, tmp_path, seconds=0.5, collective=0.5)
    assert codes == [1, 1]
    assert (outcome["code"], outcome["rank"]) == (1, 1)
    assert "after step 2, step 3) has not come on for 0.5 s (hang_timeout)" in outcome["reason"]


def test_a_step_that_never_ends_is_left_even_where_no_collective_says_so(tmp_path):
    codes, outcome = end_of(sleep, tmp_path, seconds=0.5)
    assert codes == [1, 1]
    assert "no rank came on for 0.75 s (hang_timeout): this rank waited at step 3" in outcome["reason"]


@fault(
    "Killed after a run that had ended otherwise was resumed",
    "outcome.json says running, code 1: it never shows an earlier end",
    code="-9",
    kept="the last checkpoint",
)
def test_an_old_outcome_does_not_outlive_the_start_of_a_new_run(tmp_path):
    write_outcome(tmp_path, Outcome(ExitCode.NUMERICS, "loss clm is not finite", 5))
    (tmp_path / ".lock-rank-00007").touch()
    begin_outcome(tmp_path)
    outcome = read_outcome(tmp_path)
    assert (outcome["outcome"], outcome["code"]) == ("running", 1)
    assert "go on with --resume" in outcome["reason"]
    assert os.listdir(tmp_path) == ["outcome.json"]


def hang_behind(monkeypatch, documents, then=lambda: None):
    """Let the data give some documents and then nothing more."""
    real = Mix.__next__

    def wait_behind(mix):
        if mix.documents >= documents:
            then()
            time.sleep(60)
        return real(mix)

    monkeypatch.setattr(Mix, "__next__", wait_behind)


@fault(
    "The data hangs (disk, network)",
    "after hang_timeout: the rank, its host and process, the data set and the row it waits for",
    code=1,
    kept="the last checkpoint",
)
def test_data_that_does_not_come_ends_the_run(make_config, tmp_path, monkeypatch):
    hang_behind(monkeypatch, 8)
    with pytest.raises(StuckError, match=r"rank 0 \(host .*, process \d+\) has waited 1 s for data"):
        loop.train(make_config(hang_timeout=1, losses=["clm"], data__num_workers=1))
    outcome = read_outcome(tmp_path / "run")
    assert (outcome["code"], outcome["step"]) == (1, 2)
    assert "data.jsonl, row " in outcome["reason"]


@fault(
    "SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C while training, also while the data hangs",
    "the step ends, all is saved, on all ranks",
    code=75,
    kept="every step",
)
def test_a_signal_is_heard_while_the_run_waits_for_data(make_config, tmp_path, monkeypatch):
    hang_behind(monkeypatch, 8, then=lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert loop.train(make_config(losses=["clm"])) == 75
    assert read_outcome(tmp_path / "run")["reason"].startswith("stopped by SIGHUP after step 2")
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def test_a_signal_that_came_to_another_rank_first_breaks_off_no_save(
    make_config, tmp_path, monkeypatch, capfd
):
    save = loop._save

    def be_told_late(training):
        os.kill(os.getpid(), signal.SIGTERM)
        save(training)

    monkeypatch.setattr(Session, "any_rank", lambda session, flag: session.ending.step == 1)
    monkeypatch.setattr(loop, "_save", be_told_late)
    assert loop.train(make_config(losses=["clm"])) == 75
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
    assert "stopped by SIGTERM after step 1: go on with --resume" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_waits_for_the_step_and_ends_what_is_no_step(number):
    with StopRequest() as stop:
        with stop.waiting_for_step("all is saved"):
            os.kill(os.getpid(), number)
        assert stop.asked == number.name
    with StopRequest() as stop:
        with stop.waiting_for_step("all is saved"):
            pass
        with pytest.raises(StoppedError, match=f"stopped by {number.name}: all is saved"):
            os.kill(os.getpid(), number)


@fault(
    "A signal while models load, or while the export is written",
    "the work at hand ends at once; --resume begins it again",
    code=75,
    kept="every step",
)
@pytest.mark.parametrize("where", ["loop.build", "exporting.export_huggingface"])
def test_a_signal_outside_the_steps_ends_the_run_at_once(make_config, tmp_path, monkeypatch, where):
    def be_stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(f"tokenkit.training.{where}", be_stopped)
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as caught:
        loop.train(make_config(steps=1, losses=["clm"]))
    assert exit_code(caught.value) == 75
    outcome = read_outcome(tmp_path / "run")
    assert (outcome["code"], outcome["outcome"]) == (75, "preempted")
    assert not (tmp_path / "run" / ".lock").exists()


@fault(
    "Ctrl-C a second time",
    "ends at once; within a second of the first it counts as the same (torchrun passes it on too)",
    code=130,
    kept="the last checkpoint",
)
def test_the_second_interruption_is_not_asked_to_wait(monkeypatch):
    with StopRequest() as stop, stop.waiting_for_step("nothing"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGINT"
        monkeypatch.setattr("tokenkit.training.session.SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt, match="interrupted again") as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert exit_code(caught.value) == 130


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@fault(
    "A user's loss, the optimizer or a bug raises",
    "outcome.json has its kind and words",
    code=1,
    kept="the last checkpoint",
)
def test_a_fault_of_the_code_is_in_the_outcome(make_config, tmp_path, monkeypatch):
    def break_down(*args, **kwargs):
        raise KeyError("no such thing")

    monkeypatch.setattr(Reports, "step", break_down)
    with pytest.raises(KeyError):
        loop.train(make_config(losses=["clm"]))
    outcome = read_outcome(tmp_path / "run")
    assert (outcome["code"], outcome["outcome"], outcome["reason"]) == (
        1,
        "fault",
        "KeyError: 'no such thing'",
    )


def test_files_opened_to_watch_the_ranks_are_linear_in_them(tmp_path, monkeypatch):
    begin_outcome(tmp_path)
    worlds = [parallel.World(rank, 40, torch.device("cpu"), None) for rank in range(40)]
    monkeypatch.setattr(_Beats, "_watch", lambda beats: None)  # no clock: each round is called here
    beats = [_Beats(Ending(tmp_path, world, 5.0)) for world in worlds]
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(path) or real(path, *args))
    try:
        assert [one._stopped() for one in beats] == [[]] * 40
        assert len(opened) <= 2 * 40
        os.utime(beats[7].path, (0, 0))
        (words,) = beats[6]._stopped()
        assert words.startswith("rank 7 (host ")
        assert beats[20]._stopped() == []  # rank 7 is not its own to watch
        state = beats[6].state
        _record(state, SilenceError(f"{words}: this rank waited at step 3; start again with --resume"))
        assert beats[20]._stopped() == [words]
    finally:
        for one in beats:
            one.stop()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "[/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4",
            "Connection closed",
        ),
        ("[/src/gloo/unbound_buffer.cc:81] Timed out waiting 500ms for recv", "Timed out waiting 500ms"),
        ("NCCL error: " + "x" * 400 + "\nmore", "NCCL error: xxx"),
    ],
)
def test_what_gloo_says_is_told_in_a_short_line(said, line):
    words = _first_line(RuntimeError(said))
    assert words.startswith(line)
    assert len(words) <= 120


def test_a_signal_that_comes_while_the_ranks_agree_on_the_end_is_not_lost(make_config, monkeypatch):
    agree = Session.any_rank

    def be_told_last(session, flag):
        found = agree(session, flag)
        if session.ending.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Session, "any_rank", be_told_last)
    with pytest.raises(StoppedError, match="stopped by SIGTERM: all steps are taken and saved"):
        loop.train(make_config(steps=1, losses=["clm"], eval_interval=10, save_interval=10))
