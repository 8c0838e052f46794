"""Every option of every command changes something, is said to be without effect, or is refused."""

import ast
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.option_cases import ACTS, HERE, IDLE, NEEDED, NEVER, ROWS, SAME_ROWS
from tests.option_tests import ELSEWHERE
from tests.tiny import TEXT, sentencepiece_bpe, tiny_folder
from tokenkit.commands import zett
from tokenkit.commands.pair_stats import main as pair_stats
from tokenkit.commands.zett import ZettConfig
from tokenkit.config import ConfigError, TrainConfig, read_config
from tokenkit.config.effects import RULES
from tokenkit.config.later import feature_of
from tokenkit.config.schema import leaves
from tokenkit.pairing.mining import mine_mapping
from tokenkit.parallel import World
from tokenkit.run.metrics import run_name
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.build import build
from tokenkit.training.loop import train
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
ROOT = Path(__file__).parents[1]


def said(schema, **settings):
    """What is said about a configuration, in one text; "refused" if it is."""
    lines = []
    try:
        read_config(schema, (), NEEDED[schema] | settings, say=lines.append)
    except (ConfigError, ValueError) as error:
        return f"refused: {error}"
    return "\n".join(lines)


CASES = [(schema, name) for schema, fields in IDLE.items() for name in fields]


@pytest.mark.parametrize(("schema", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_what_nothing_reads_is_said_or_refused(schema, name):
    value, context = IDLE[schema][name]
    text = said(schema, **context, **{name: value})
    assert text.startswith("refused") or f"{name}" in text.partition("without effect here: ")[2], text


@pytest.mark.parametrize("losses", [["baseline_gold"], ["clm", "baseline_gold"]])
@pytest.mark.parametrize("name", ["kd_temp", "teacher_temperature"])
def test_temperatures_of_other_baselines_are_said_beside_gold(name, losses):
    text = said(TrainConfig, losses=losses, **{f"baseline.{name}": 2.0})
    assert f"without effect here: baseline.{name} (read by baseline_" in text
    assert said(TrainConfig, losses=["baseline_gold", "baseline_gold_js"], **{f"baseline.{name}": 2.0}) == ""


def test_nothing_is_said_of_defaults_of_what_acts_or_of_a_configuration_that_is_read_back():
    assert said(TrainConfig, losses=["clm"], **{"baseline.kd_temp": 1.0, "model_lora_rank": 64}) == ""
    assert said(TrainConfig, **{"losses": ["clm", "baseline_uld"], "baseline.kd_temp": 2.0}) == ""
    assert said(TrainConfig, binarization_temp=3.0, losses=["sft", "alm_greedy"]) == ""
    every = {leaf.name: leaf.default for leaf in leaves(ZettConfig) if not leaf.is_required}
    assert said(ZettConfig, **every) == ""


def test_all_options_without_effect_are_in_one_line_with_what_would_read_them():
    settings = {"losses": ["clm"], "renyi_alpha": 0.3, "model_lora_rank": 2, "model_lora_alpha": 4.0}
    (line,) = said(TrainConfig, **settings, train_model_mode="full").splitlines()
    assert "model_lora_rank, model_lora_alpha (read with train_model_mode lora)" in line
    assert "renyi_alpha (read by alm_diff_fn renyi in an ALM loss)" in line


def test_data_sets_of_a_mix_are_looked_at_one_by_one(tmp_path):
    local = {"path": str(tmp_path), "subset": "x"}
    text = said(TrainConfig, **{"data.dataset_name": None, "data.datasets": [local, {"path": "org/hub"}]})
    assert "data.datasets.subset (read of a hub data set)" in text
    assert "weight" not in text


@pytest.mark.parametrize("schema", NEEDED, ids=lambda schema: schema.__name__)
def test_every_field_is_accounted_for(schema):
    acts = ACTS if schema is TrainConfig else {}
    elsewhere = ELSEWHERE[schema]
    for reference in set(elsewhere.values()):
        file, _, test = reference.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, reference
    fields = {leaf.name for leaf in leaves(schema) if feature_of(leaf.name) is None}
    known = set(acts) | set(elsewhere) | NEVER.get(schema, set())
    assert fields - known == set(), (
        "say in ACTS or ELSEWHERE what these change, and in IDLE where they do not"
    )
    assert (set(acts) | set(IDLE[schema])) - {leaf.name for leaf in leaves(schema)} == set()
    for rule in RULES.get(schema.__name__, ()):
        for name in rule.names:
            matched = [
                field for field in fields if field == name or (name[-1] in "._" and field.startswith(name))
            ]
            assert matched, f"{name} of a rule is no field"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files that options name."""
    folder = tmp_path_factory.mktemp("effects")
    tiny_folder(folder / "model", tie_word_embeddings=False)
    tiny_folder(folder / "tied", tie_word_embeddings=True)
    tiny_folder(folder / "other", seed=3, hidden_size=48)
    sentencepiece_bpe(folder / "target")
    rows = [{"text": text, "other": text[:20]} for text in TEXT] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    talk = [{"role": "user", "content": "The cats?"}, {"role": "assistant", "content": "Sat on the mat."}]
    lines = [json.dumps({"messages": talk}) if i % 3 else "no row" for i in range(60)]
    (folder / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    student, teacher = (load_tokenizer(str(folder / name)) for name in ("target", "model"))
    np.save(folder / "mapping.npy", mine_mapping(student, teacher).teacher_V)
    words = [
        "--teacher-tokenizer-name",
        str(folder / "model"),
        "--target-tokenizer-name",
        str(folder / "target"),
    ]
    words += ["--data.dataset-name", str(folder / "text.txt"), "--output", str(folder / "pair")]
    assert pair_stats(words) == 0
    paths = {
        "student.pretrained_model_name_or_path": "tied", "teacher.pretrained_model_name_or_path": "other",
        "mined_mapping_path": "mapping.npy", "tokenizer_pair_data_path": "pair", "ppl_eval_data": "text.txt",
        "data.dataset_name": "talks.jsonl", "data.datasets": "text.txt",
        "data.heldout.dataset_name": "text.txt",
    }  # fmt: skip
    return folder, {name: str(folder / path) for name, path in paths.items()}, {}


def filled(settings, paths):
    """Put the file of an option in the place of HERE."""
    result = {name: paths[name] if value is HERE else value for name, value in settings.items()}
    if any(source.get("path") is HERE for source in result.get("data.datasets", ())):
        result["data.datasets"] = [{"path": paths["data.datasets"]}]
    return result


def fingerprint(made, settings, name=None):
    """What two steps under these settings do and leave; "refused" where they are."""
    folder, paths, known = made
    settings = {
        "student.pretrained_model_name_or_path": str(folder / "model"),
        "losses": ["clm", "alm_unconstrained"],
        "target_tokenizer_name": str(folder / "target"), "data.dataset_name": str(folder / "rows.jsonl"),
        "data.heldout.fraction": 0.1, "data.num_workers": 0, "max_length_new": 48, "max_length_teacher": 64,
        "batch_size": 4, "steps": 4, "train_model_mode": "none", "optimizer.learning_rate": 0.01,
    } | filled(settings, paths)  # fmt: skip
    key = json.dumps(settings, sort_keys=True)
    if key not in known:
        known[key] = _fingerprint(settings, name)
    return known[key]


def _fingerprint(settings, name):
    lines = []
    try:
        config = read_config(TrainConfig, (), settings, say=lines.append)
        assert not any(name and name in re.sub(r"\(read [^)]*\)", "", line) for line in lines), lines
        torch.manual_seed(config.run.seed)
        parts = build(config, SINGLE)
        run, reports, batches = parts.run, [], []
        slow = {"gradnorm", "ema", "baseline_dskd"}  # what acts through later steps
        for _ in range(5 if slow & set(map(str, [*settings.values(), *settings["losses"]])) else 2):
            micro_batches = next(parts.batches)
            reports.append(dataclasses.astuple(train_step(run, micro_batches)))
            batches.append([batch.student.ids_BT.shape for batch in micro_batches])
            run.step += 1
        parts.batches.close()
    except ValueError as error:
        return f"refused: {error}"
    digest = hashlib.sha256()
    for name, parameter in run.model.named_parameters():
        digest.update(f"{name} {parameter.requires_grad} {parameter.dtype}".encode())
        digest.update(parameter.detach().float().numpy().tobytes())
    how = [
        run.optimizer.defaults["fused"], parts.student.causal_lm.is_gradient_checkpointing,
        parts.student.config._attn_implementation, config.data.num_workers,
        [getattr(loss.options, "workspace_bytes", None) for loss in run.model.losses.values()],
    ]  # fmt: skip
    heldout = [(h.num_bytes, h.batch.teacher.ids_BT.shape) for h in parts.heldout]
    return repr((reports, batches, heldout, how, parts.tokenizers.fingerprints, digest.hexdigest()))


@pytest.mark.parametrize("name", ACTS)
def test_what_is_read_changes_a_run(made, name):
    """Most of this file's time: a hundred small runs of three steps show it of every field."""
    value, context = ACTS[name]
    assert fingerprint(made, context) != fingerprint(made, {**context, name: value}, name)


@pytest.mark.parametrize(
    ("name", "case"), [*ROWS.items(), *SAME_ROWS.items()], ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_zett_reads_changes_the_rows(made, name, case):
    folder = made[0]
    value, context = case
    rows = []
    for settings in (context, {**context, name: value}):
        settings = {
            "model.pretrained_model_name_or_path": "model",
            "target_tokenizer_name": "target",
        } | settings
        paths = {
            key: str(folder / settings[key]) for key in settings if (folder / str(settings[key])).exists()
        }
        config = read_config(ZettConfig, (), settings | paths | {"output": "out"}, say=lambda line: None)
        tokenizers = zett.load_tokenizers(config)
        model = zett.load_model(config, tokenizers[0])
        zett.move(
            config,
            model,
            tokenizers,
            config.method,
            zett.init_options(config, tokenizers[1], [config.method]),
        )
        rows.append([model.embedding.weight, model.output.weight, torch.tensor(float(model.is_tied))])
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert same == (case is SAME_ROWS.get(name))


def test_flash_attention_is_the_attention_of_that_name():
    settings = NEEDED[TrainConfig] | {"use_flash_attention": True, "dtype": "bfloat16"}
    assert read_config(TrainConfig, (), settings).training.attention == "flash_attention_2"


def test_a_run_is_called_what_the_user_calls_it(made, tmp_path, monkeypatch, capsys):
    """And everything of its course is printed where no bar is."""
    folder = made[0]
    settings = {
        "student.pretrained_model_name_or_path": str(folder / "model"),
        "losses": ["clm", "alm_unconstrained"], "loss_weights": [1.0, 1e-3],
        "target_tokenizer_name": str(folder / "target"), "data.dataset_name": str(folder / "rows.jsonl"),
        "data.heldout.fraction": 0.1, "data.num_workers": 0, "max_length_new": 48, "max_length_teacher": 64,
        "batch_size": 4, "steps": 4, "train_model_mode": "none", "optimizer.learning_rate": 0.01,
        "name": "A new hope", "output_dir": str(tmp_path / "run"), "export_to": str(tmp_path / "out"),
        "logging_interval": 2, "eval_interval": 3,
    }  # fmt: skip
    config = read_config(TrainConfig, (), settings)
    assert train(config) == 0
    assert "# A new hope\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert run_name(tmp_path / "run", {"name": "A new hope"}) == "A new hope"
    assert run_name(tmp_path / "run", {"name": "tokenkit"}) == "run"
    said = capsys.readouterr().err
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    numbers = [line.split()[1] for line in steps]
    assert numbers == ["0/4", "2/4", "3/4", "4/4", "4/4"], "measured at 0, 3 and 4, logged at 2 and 4"
    assert re.search(
        r"loss \d.*clm \d.*alm_unconstrained \d.*\(excess .* chunks, .*% of all\).*tokens/s.*left", steps[1]
    )
    assert re.search(r"bits per byte on held-out text: student [\d.]+ -> [\d.]+, teacher [\d.]+", said)
    assert re.search(r"loss alm_unconstrained gives [\d.]+% of the gradient \(clm \d+%\)", said), "once"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "loss" in line)
    floor = logged["loss/alm_unconstrained"] - logged["excess/alm_unconstrained"]
    assert 0 < floor < 0.7
    assert 0 < logged["chunk_share/alm_unconstrained"] <= 1
    assert sum(logged[f"gradient_share/{name}"] for name in ("clm", "alm_unconstrained")) == pytest.approx(1)
    assert sum("gradient_share/clm" in line for line in lines) == 1
