import subprocess
import sys

import pytest

from tokenkit.commands.align import SHOWN_TOKENS, main
from tokenkit.errors import ExitCode

PAIR = ["--student", "byte", "--teacher", "byte:target=Llama3"]


def test_a_text_is_shown_with_its_numbers(capsys):
    assert main([*PAIR, "--text", "the cat"]) == 0
    out = capsys.readouterr().out
    assert "student" in out
    assert "text bytes" in out
    assert "100.00 %" in out


def test_pictures_are_written_only_when_asked_and_never_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*PAIR, "--text", "the cat"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main([*PAIR, "--text", "the cat", "--output", "new/pictures"]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "new/pictures").iterdir()}
    assert sorted(written) == ["alignment.html", "alignment.png"]
    assert main([*PAIR, "--text", "another", "--output", "new/pictures"]) == ExitCode.DATA
    assert "exists: give --output another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "new/pictures").iterdir()} == written


def test_a_file_is_counted_whole(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("one two\n\nthree\n\n" + "four " * 200)
    assert main([*PAIR, "--file", str(path), "--chunks", "space"]) == 0
    out = capsys.readouterr().out
    assert "documents                │ 3 " in out
    assert "three" not in out


def test_a_long_text_is_shown_in_part_and_counted_whole(capsys):
    assert main([*PAIR, "--text", "z" * 3000]) == 0
    out = capsys.readouterr().out
    assert SHOWN_TOKENS - 5 <= out.count("z") / 2 <= SHOWN_TOKENS
    assert "3,000" in out


def test_templates_can_be_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    same = "byte:target=Llama3"
    options = ["--student", same, "--teacher", same, "--chat-template-mode", "surround_instruct"]
    assert main([*options, "--text", "hi"]) == 0
    assert "<|start_header_id|>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (PAIR, ExitCode.CONFIG, "give --text or --file"),
        ([*PAIR, "--text", "a", "--file", __file__], ExitCode.CONFIG, "give --text or --file"),
        ([*PAIR, "--text", "  "], ExitCode.CONFIG, "empty document"),
        ([*PAIR, "--file", "/nowhere.txt"], ExitCode.DATA, "/nowhere.txt does not exist"),
        ([*PAIR, "--text", "a", "--limit", "0"], ExitCode.CONFIG, "limit must be at least 1"),
        ([*PAIR, "--text", "a", "--chat-template-mode", "x"], ExitCode.CONFIG, "chat_template_mode"),
        ([*PAIR, "--text", "a", "--chunk", "space"], ExitCode.CONFIG, "did you mean chunks?"),
        (["--student", "./no/such", "--teacher", "byte", "--text", "a"], ExitCode.DATA, "no/such"),
        (["--student", "byte:target=Lama", "--teacher", "byte", "--text", "a"], ExitCode.CONFIG, "Lama"),
    ],
)
def test_wrong_input_is_one_line_and_the_exit_code_of_its_kind(capsys, options, code, message):
    assert main(options) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("tokenkit: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_does_not_import_what_it_does_not_need():
    code = (
        "import sys\n"
        "from tokenkit.commands.align import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
