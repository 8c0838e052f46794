"""`tokenkit report`: what it says of real runs and of broken ones, and how its page lies in a browser."""

import json
import shutil
from html.parser import HTMLParser

import pytest

from tests.browser import looked_at
from tests.commands.test_export import lora_run, root  # noqa: F401
from tokenkit.cli import main
from tokenkit.errors import ExitCode
from tokenkit.evaluation.report.charts import short, ticks
from tokenkit.evaluation.report.comparable import differences, heldout_text, text_of
from tokenkit.evaluation.report.folder import _without_secrets
from tokenkit.evaluation.report.page import page
from tokenkit.evaluation.report.parts import key_figures
from tokenkit.evaluation.report.writing import _fill_bits

HOSTILE = "</style><script>alert(1)</script>\"'&\x00\u202e<img src=http://a.example/x.png>"
VOID = {"meta", "link", "br", "circle", "line", "path"}


class Checked(HTMLParser):
    """Which elements there are, in order; and that all of them are closed."""

    def __init__(self, words):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(words)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not any(name.startswith("on") or name in ("src", "action", "data") for name, _ in attrs)
        assert dict(attrs).get("href", "data:,") == "data:,"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(root, lora_run, tmp_path_factory):  # noqa: F811
    """A report of a finished run, and of the same run as it was before its end."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(lora_run, folder / "cut", ignore=shutil.ignore_patterns("export", "outcome.json"))
    (folder / "texts").mkdir()
    (folder / "texts" / "eng.txt").write_text("All human beings are born free.", encoding="utf-8")
    scores = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01}}}
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text(json.dumps(scores), encoding="utf-8")
    words = ["report", str(lora_run), str(folder / "cut"), "--output", str(folder / "page.html")]
    words += [
        "--texts",
        str(folder / "texts"),
        "--results",
        *(str(folder / f"{n}.json") for n in ("one", "two")),
    ]
    assert main([*words, "--new-tokens", "4"]) == 0
    return folder


def test_all_parts_are_there_of_a_run_and_of_one_that_was_cut(whole):
    done, cut = json.loads((whole / "page.json").read_text())["runs"]
    assert (done["state"]["outcome"], cut["state"]["outcome"]) == ("done", "unknown")
    assert done["notes"] == cut["notes"] == []
    for run in (done, cut):
        bits = run["bits_per_byte"]
        assert bits["before_from"].startswith("step 0 of the run")
        assert 0 < bits["teacher"] < 20
        assert set(run["by_class"]["models"]) == {"teacher", "before", "after"}
        assert [one["text"] for one in run["bytes_per_token"]] == ["the run's held-out documents", "eng"]
        assert sum(run["embeddings"]["counts"].values()) == 400
        assert run["embeddings"]["from"] == "the run's own count"
        assert 0 < run["overlap"]["share_of_new"] < 1
        assert run["samples"][0]["prompt"]
        assert run["tasks"][0]["value"] == 0.5
        assert run["versions"]["torch"]
        for row in run["alignments"]:
            cell = next(cell for cell in row if cell["chunk"] >= 0 and len(cell["student"]) == 1)
            assert cell["teacher"]
    assert done["by_class"] == cut["by_class"], "one model, from its export and from its checkpoint"
    assert done["timings"]["seconds"] >= 0
    words = (whole / "page.html").read_text(encoding="utf-8")
    assert str(whole.parent) not in words, "no folder of this machine"
    for title in (
        "Curves",
        "Alignment",
        "Tasks",
        "What the model writes",
        "How the new embeddings were made",
    ):
        assert title in words
    assert "| arc\\_easy | acc | run | 0.5000 | 0.0100 |" in (whole / "page.md").read_text()


def test_it_is_one_page_that_loads_nothing_and_lies_well_on_a_telephone_and_in_the_dark(whole, tmp_path):
    """Seconds long: a browser starts twice."""
    Checked((whole / "page.html").read_text(encoding="utf-8"))
    for width, dark in ((390, False), (1280, True)):
        found = looked_at(whole / "page.html", tmp_path, width=width, dark=dark)
        assert found["inner"] == width >= found["width"], "no horizontal scroll"
        assert found["console"] == found["loaded"] == found["faint"] == []
        assert found["scripts"] == 0
        assert (found["background"] == "rgb(20, 22, 26)") == dark


def test_a_run_with_nothing_but_a_torn_file_and_texts_that_mean_harm(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 0, "bits_per_byte/student": 2.0}, {"step": 1, f"loss/{HOSTILE}": 1.0, "loss": "nan"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 2, "lo', encoding="utf-8")
    (folder / "config.yaml").write_text(
        json.dumps({"name": HOSTILE.replace("\x00", ""), "a": {"b": HOSTILE.replace("\x00", "")}})
    )
    (folder / "facts.json").write_text(json.dumps({"command": [HOSTILE], "parameters": HOSTILE, "began": 3}))
    (folder / "results_x.json").write_text('{"results": 3}')
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(out), "--quick"]) == 0
    assert "results_x.json holds no results of lm-eval" in capsys.readouterr().err
    run = json.loads(out.with_suffix(".json").read_text())["runs"][0]
    run |= {
        "samples": [{"prompt": HOSTILE, "text": HOSTILE}],
        "alignments": [[{"student": [HOSTILE], "teacher": [], "chunk": -1}]],
        "bytes_per_token": [{"text": HOSTILE, "bytes": 1, "old": 1.0, "new": 2.0}],
    }
    words = page({"runs": [run], "tokenkit": HOSTILE, "made": HOSTILE, "differences": [HOSTILE]})
    seen = Checked(words).seen
    assert not {"script", "img"} & set(seen)
    assert seen.count("style") == 1
    assert main(["report", str(folder), "--output", str(tmp_path / "more.html")]) == 0, "nothing to measure"


def test_a_run_that_saved_nothing_has_a_page_of_what_it_began_with():
    one = {"bits_per_byte": 2.0, "bits_per_byte_by_class": {"Latin": 2.0}, "bytes_per_token": 3.0}
    run = {
        "bits_per_byte": None,
        "by_class": {"bytes": 9, "models": {"before": one}, "text": {"name": "x", "digest": "y"}},
        "size": {},
        "timings": {},
    }
    _fill_bits(run)
    assert run["bits_per_byte"]["before"] == 2.0
    assert "after" not in run["bits_per_byte"]
    assert key_figures(run) == []


def test_what_is_over_different_text_or_questions_is_said():
    def run(name, *, size=100, data="a.txt", heldout=0.1, kinds=None, asked="10 questions"):
        config = {"data.dataset_name": data, "data.heldout.fraction": heldout, "seed": 3}
        return {
            "name": name,
            "bits_per_byte": {"bytes": size, "text": heldout_text(config, size)},
            "by_class": None if kinds is None else {"bytes": size, "text": text_of("k.txt", kinds)},
            "tasks": [{"task": "piqa", "metric": "acc", "value": 0.5, "asked": asked}],
        }  # fmt: skip

    assert differences([run("A", kinds="x")]) == []
    assert differences([run("A", kinds="x"), run("B", kinds="x")]) == []
    for other, table in (
        ({"size": 90}, "Bits per byte"), ({"data": "b.txt"}, "Bits per byte: not the same text (A: 100 by"),
        ({"heldout": 0.2}, "Bits per byte"), ({"kinds": "y"}, "Kinds of text"),
        ({"asked": ""}, "piqa: not the same questions (A: 10 questions; B: not said)"),
    ):  # fmt: skip
        (said,) = differences([run("A", kinds="x"), run("B", **({"kinds": None} | other))])
        assert said.startswith(table)
    named = heldout_text({"ppl_eval_data": "/some/where/b.txt", "data.dataset_name": "a.txt"}, None)
    assert named["name"] == "b.txt"


def test_settings_are_shown_and_secrets_are_not():
    found = _without_secrets(
        {"baseline.gold.uld_token_merge_strategy": "observed", "my_token": "abcdefgh1234"}
    )
    assert list(found.values()) == ["observed", "[redacted]"]


def test_a_scale_has_round_numbers():
    assert ticks(2.61, 2.78, 4) == [2.6, 2.65, 2.7, 2.75, 2.8]
    assert ticks(3.0, 3.0, 4) == [3.0]
    assert [short(v) for v in (0.00064, 2.5, 123456, 0.0)] == ["6.4e-4", "2.5", "123k", "0"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["RUN", "--output", "page.htm"], "must end in .html"),
        (["RUN", "RUN", "--output", "page.html"], "must name each run once"),
        (["nowhere", "--output", "page.html"], "runs: nowhere is no folder"),
        (["EMPTY", "--output", "page.html"], "holds no run"),
        (["RUN", "--output", "there.html"], "exists: give another --output"),
        (["RUN", "--output", "page.html", "--documents", "0"], "documents must be at least 1"),
        (["RUN", "--output", "page.html", "--text", "none.txt"], "text: none.txt does not exist"),
        (["RUN", "--output", "page.html", "--results", "none.json"], "results: none.json is no file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "EMPTY"):
        (tmp_path / name).mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "there.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    assert main(["report", *words, "--quick"]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
