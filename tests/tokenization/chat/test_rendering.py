"""The process that renders chat templates: started once, out of reach of the run's signals, replaced."""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat import rendering
from tokenkit.tokenization.chat.rendering import render

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
HI = [{"role": "user", "content": "Hi"}]


def written():
    return render(TEMPLATE, HI, names={})


def worker():
    return rendering._worker()._process


def test_it_is_started_once_for_all_threads():
    written()
    first = worker().pid
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: written(), range(20))) == ["user: Hi"] * 20
    assert worker().pid == first


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="there are no groups of processes")
def test_signals_to_the_group_of_a_run_do_not_reach_it():
    written()
    assert os.getpgid(worker().pid) != os.getpgid(0)


def test_one_that_died_by_itself_is_replaced_without_a_lost_row():
    written()
    worker().terminate()
    worker().wait()
    assert written() == "user: Hi"


@pytest.mark.parametrize(("python", "said"), [("/bin/false", "ended with code"), ("", "sys.executable")])
def test_one_that_cannot_be_started_is_said(monkeypatch, python, said):
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(rendering, "_workers", {})
    with pytest.raises(TemplateError, match=said):
        written()


def _in_child(queue):
    queue.put((written(), worker().pid))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_starts_its_own():
    written()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    text, pid = queue.get()
    child.join(20)
    assert child.exitcode == 0
    assert text == "user: Hi"
    assert pid != worker().pid
    assert written() == "user: Hi"
