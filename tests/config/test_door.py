"""`tokenkit configs` and `tokenkit completion`: list, copy, convert, and what shells are told."""

import shutil
import subprocess

import pytest

from tokenkit.cli import DOORS, main
from tokenkit.commands.completion import CONFIGURED
from tokenkit.config import ALIASES, TrainConfig, read_config
from tokenkit.config.convert import DEFAULTS, RENAMED, WITHOUT_EFFECT
from tokenkit.config.schema import leaves
from tokenkit.config.shipped import SHIPPED, shipped_names
from tokenkit.errors import ExitCode

THEIRS = """
losses: [sft, alm_unconstrained]
loss_weights: null
steps: 5_000
warmup_steps: 2_000
name: unnamed
output: outputs/x
num_workers: 16
log_interval: 10
max_teacher_length: 512
n_model_parallel: 8
bce_temp: 100.0
loss_mask_mode: dolly
debug: true
export_to_gcs_bucket: my-bucket
hypernet: {architecture: identity, num_layers: 1, residual: true, residual_alpha: 1, use_attention: true}
optimizer: {type: adamw, weight_decay: 0.01, b1: 0.9, b2: 0.95, eps: 1.e-8, grad_acc_steps: 4,
  learning_rate: 1.e-5, max_grad_norm: null, param_groups: [{pattern: embed, lr_scale: 10.}]}
eval: {tasks: [arc_easy], lengths: [128, 256], tokens_per_batch: 8192, confirm_run_unsafe_code: true}
data: {batch_size: 64, kind: hf, mix_languages: false, streaming: false, shuffle_buffer_size: inf,
  dataset_configs: [{path: allenai/tulu-3-sft-mixture, name: default, type: chat}]}
student: {pretrained_model_name_or_path: m, tokenizer_name: "m:source=Llama3"}
target_tokenizer_name: "q:source=Qwen2:target=Llama3"
"""


def test_the_list_names_every_file(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == shipped_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_copies_never_overwrite(tmp_path, capsys):
    assert main(["configs", "copy", "zett", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine.yaml").read_text() == (SHIPPED / "zett.yaml").read_text()
    assert main(["configs", "copy", "zett", str(tmp_path / "mine.yaml")]) == ExitCode.DATA
    assert main(["configs", "copy", "zett", str(tmp_path)]) == 0
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "zett.yaml").touch()
    assert main(["configs", "copy", "all", str(tmp_path / "all")]) == ExitCode.DATA
    assert [file.name for file in (tmp_path / "all").iterdir()] == ["zett.yaml"]
    capsys.readouterr()
    assert main(["configs", "show", "zett"]) == 0
    assert capsys.readouterr().out == (SHIPPED / "zett.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["copi"], "did you mean copy?"),
        (["copy", "zett"], "takes 2 words, got 1"),
        (["show", "zet"], "did you mean zett?"),
    ],
)
def test_mistakes_name_what_is_near(words, message, capsys):
    assert main(["configs", *words]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err


def test_a_file_that_is_missing_is_told_from_those_of_other_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mkdocs.yml", "mine.yaml"):
        (tmp_path / name).touch()
    assert main(["train", "--config", "yours.yaml"]) != 0
    error = capsys.readouterr().err
    assert "mine.yaml" in error
    assert "mkdocs" not in error


def test_a_flag_without_its_value_says_so(capsys):
    assert main(["train", "--student"]) == ExitCode.CONFIG
    assert "takes one value (text), got none" in capsys.readouterr().err


def test_a_configuration_of_the_jax_program_is_converted(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(THEIRS, encoding="utf-8")
    words = ["configs", "convert", str(tmp_path / "old.yaml"), str(tmp_path / "new.yaml")]
    assert main(words) == 0
    said = capsys.readouterr().err
    for line in (
        "optimizer.b1 is optimizer.beta1",
        "export_to_gcs_bucket has no effect here",
        "eval.lengths has no effect here",
        "loss_mask_mode dolly is assistant",
        "debug shows the traceback",
        "seed is not set, and their default 1234 is written out",
    ):
        assert line in said
    quiet = []
    config = read_config(TrainConfig, [tmp_path / "new.yaml"], say=quiet.append)
    assert not [line for line in quiet if "is read as" in line]
    assert (config.schedule.steps, config.schedule.batch_size) == (5000, 64)
    assert (config.optimizer.beta2, config.optimizer.max_grad_norm) == (0.95, 0)
    assert config.optimizer.param_groups[0].lr_scale == 10
    assert [(source.path, source.subset) for source in config.data.datasets] == [
        ("allenai/tulu-3-sft-mixture", "default")
    ]
    assert (config.run.seed, config.training.dtype) == (1234, "bfloat16")
    assert main(words) == ExitCode.DATA
    assert "is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz: 1", "unknown field stepz"),
        ("optimizer: {b3: 1}", "unknown field optimizer.b3"),
        ("steps: many", "steps: expected an integer"),
        ("data: {dataset_configs: [1]}", "each needs a path"),
        ("# nothing", "holds no field"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, line, message, capsys):
    (tmp_path / "old.yaml").write_text(line, encoding="utf-8")
    assert (
        main(["configs", "convert", str(tmp_path / "old.yaml"), str(tmp_path / "new.yaml")])
        == ExitCode.CONFIG
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


def test_the_tables_of_the_converter_lead_to_fields():
    names = {leaf.name for leaf in leaves(TrainConfig)}
    assert {*RENAMED.values(), *DEFAULTS} <= names
    assert not (set(RENAMED) | set(WITHOUT_EFFECT) - {"eval", "ppl_eval_data"}) & set(ALIASES)
    page = (SHIPPED.parents[1] / "docs" / "configs.md").read_text(encoding="utf-8")
    assert [name for name in (*RENAMED, *WITHOUT_EFFECT, *DEFAULTS) if f"`{name}`" not in page] == []


def offered(script, words):
    """What bash would offer for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n_tokenkit"
    program = f"{script}\n{asked}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_bash_offers_commands_flags_values_and_files(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert offered(script, ["tokenkit", "tr"]) == ["train", "train-hypernet"]
    assert offered(script, ["tokenkit", "train", "--dtype", ""]) == ["float32", "float16", "bfloat16"]
    assert offered(script, ["tokenkit", "zett", "--config", "ze"]) == ["zett"]
    assert "--optimizer.learning-rate" in offered(script, ["tokenkit", "train", "--opt"])
    assert offered(script, ["tokenkit", "sweep", "--job"]) == ["--jobs"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
def test_fish_offers_commands_flags_and_values(capsys, tmp_path):
    main(["completion", "fish"])
    (tmp_path / "offered.fish").write_text(capsys.readouterr().out, encoding="utf-8")

    def offers(line):
        words = ["fish", "--no-config", "-c", f"source offered.fish; complete -C '{line}'"]
        ran = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
        return [shown.partition("\t")[0] for shown in ran.stdout.splitlines()]

    assert offers("tokenkit tr") == ["train", "train-hypernet"]
    assert sorted(offers("tokenkit train --dtype ")) == ["bfloat16", "float16", "float32"]
    assert "--optimizer.learning-rate" in offers("tokenkit train --opt")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_takes_the_script(capsys, tmp_path):
    main(["completion", "zsh"])
    (tmp_path / "offered.zsh").write_text(capsys.readouterr().out, encoding="utf-8")
    words = ["zsh", "-f", "-c", "source ./offered.zsh && whence -w _tokenkit && print $_comps[tokenkit]"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout == "_tokenkit: function\n_bash_complete -o default -F _tokenkit\n"


def test_other_shells_have_a_script_too(capsys):
    for shell, text in (("zsh", "bashcompinit"), ("fish", "-l optimizer.learning-rate")):
        assert main(["completion", shell]) == 0
        assert text in capsys.readouterr().out
    assert main(["completion", "csh"]) == ExitCode.CONFIG
    assert set(CONFIGURED) | {"sweep", "estimate", "doctor", "configs", "completion"} == set(DOORS)
