"""Configuration files are found by path or by name; one that is missing is named with its neighbours."""

import pytest

from tokenkit.commands.eval_ensemble import EvalEnsembleConfig
from tokenkit.config import ConfigError, TrainConfig, parse_command_line
from tokenkit.config.forms import split_commas
from tokenkit.config.shipped import SHIPPED, find_config, read_configs, shipped_names


def test_shipped_files_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = SHIPPED / "data" / "text_file.yaml"
    for name in ("data/text_file", "data/text_file.yaml", "configs/data/text_file.yaml"):
        assert find_config(name) == path
    assert "data/text_file" in shipped_names()
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "text_file.yaml"
    own.touch()
    assert find_config("data/text_file").resolve() == own  # what lies here wins
    assert find_config("data") is None


def test_a_missing_file_lists_those_that_exist(tmp_path):
    (tmp_path / "here.yaml").touch()
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist.*here\.yaml.*shipped ones are"):
        read_configs([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match="did you mean cross_tokenizer_distill"):
        read_configs(["cross_tokenizer_distil"])


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ("[mine]", "mine.yaml leads in a circle"),
        ("{models: x}", "expected a list of files"),
        ("[1]", "expected a name, or `group: name`, got 1"),
        ("[nothing]", "configuration file nothing does not exist"),
    ],
)
def test_wrong_lists_of_files_are_refused(tmp_path, defaults, message):
    (tmp_path / "mine.yaml").write_text(f"defaults: {defaults}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_configs([tmp_path / "mine.yaml"])
    assert message in str(caught.value).replace(str(tmp_path) + "/", "")


def test_a_file_stands_behind_what_it_names_unless_it_says_otherwise(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 1", encoding="utf-8")
    for name, defaults, order in (("a", "[base]", ["base", "a"]), ("b", "[_self_, base]", ["b", "base"])):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: {defaults}", encoding="utf-8")
        written = read_configs([tmp_path / f"{name}.yaml"])
        assert [file.rpartition("/")[2] for file, _ in written] == [f"{stem}.yaml" for stem in order]


def test_commas_inside_brackets_and_quotes_part_nothing():
    assert split_commas("clm,[clm,alm_space]") == ["clm", "[clm,alm_space]"]
    assert split_commas("linear(0,1,5),'a,b'") == ["linear(0,1,5)", "a,b"]
    for wrong in ("a,,b", "[a,b", "a,'b"):
        with pytest.raises(ConfigError, match="cannot be cut"):
            split_commas(wrong)


@pytest.mark.parametrize(
    "words", [["models/gemma_llama_qwen"], ["models=gemma_llama_qwen"], ["+models=gemma_llama_qwen"]]
)
def test_a_file_of_models_serves_a_training_and_an_ensemble(words):
    config = parse_command_line(
        EvalEnsembleConfig, ["--config", "eval_lockstep", *words], program="", finds_paths=False
    )
    names = [source.pretrained_model_name_or_path for source in config.models]
    assert names == ["Qwen/Qwen2.5-1.5B", "outputs/gemma2_to_qwen2/export", "outputs/llama3_to_qwen2/export"]
    config = parse_command_line(
        TrainConfig, ["--config", "cross_tokenizer_distill", *words], program="", finds_paths=False
    )
    assert config.teacher.pretrained_model_name_or_path == "meta-llama/Llama-3.2-3B-Instruct"
