"""`tokenkit eval`: tasks of lm-eval on local documents, with the scores of lm-eval's own class.

Importing lm-eval takes seconds, once for all tests of a process.
"""

import gzip
import json

import pytest
import torch

from tests.tiny import TEXT, byte_level_bpe, tiny_folder
from tokenkit.cli import main
from tokenkit.config.benchmarks import LmEval
from tokenkit.errors import ConfigError, DataError, ExitCode
from tokenkit.evaluation.lm_eval import asking_of
from tokenkit.evaluation.lm_eval_tasks import load_tasks
from tokenkit.evaluation.run_code import pass_at_k, passes, with_prompt
from tokenkit.evaluation.task_data import read_rows, task_files
from tokenkit.evaluation.task_scores import labels
from tokenkit.tokenization.tokenizer import load_tokenizer

QUESTION = {"query": "Question: Where did the cats sit?", "choices": ["on the mat", "on a dog"], "gold": 0}
PLAIN = {
    "arc_easy": QUESTION | {"choices": ["a", "b", "on the mat", "d"], "gold": 2},
    "piqa": QUESTION | {"query": "Question: How?\n"},
    "boolq": {"query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
    "lambada_openai": {"context": "the dog ran after the", "continuation": "cats"},
    "openbook_qa": QUESTION | {"query": "The cats sat on", "choices": ["a", "b", "c", "the mat"], "gold": 3},
    "winogrande": {
        "context_options": ["The cat saw the dog, so the cat", "The cat saw the dog, so the dog"],
        "continuation": "ran.", "gold": 1,
    },
}  # fmt: skip
TARGETS = {"on the mat": 1, "on a dog": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents in the plainer forms, three of each."""
    folder = tmp_path_factory.mktemp("data")
    for name, row in PLAIN.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    truths = [{"question": "Where?", "mc1_targets": TARGETS, "mc2_targets": TARGETS | {"there": 1}}]
    (folder / "truthfulqa_mc.json").write_text(json.dumps(truths), encoding="utf-8")
    sums = "".join(
        json.dumps({"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}) + "\n"
        for n in range(7)
    )
    (folder / "gsm8k_test.jsonl").write_text(sums, encoding="utf-8")
    (folder / "wikitext.jsonl").write_text(json.dumps({"page": " = Cats = \n" + TEXT[0]}), encoding="utf-8")
    problem = {
        "task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one",
        "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n",
    }  # fmt: skip
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(problem))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def test_scores_are_those_of_the_stock_class(data, model, tmp_path, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = ["arc_easy", "piqa", "boolq", "lambada_openai", "winogrande", "truthfulqa_mc1", "wikitext"]
    output = tmp_path / "out"
    words = ["--tasks", *names, "gsm8k", "--task-data", str(data), "--max-new-tokens", "4", "--limit", "2"]
    assert main(["eval", str(model), *words, "--output", str(output), "--log-samples"]) == 0
    printed = capsys.readouterr()
    found = json.loads((output / "results.json").read_text())["results"]
    expected = simple_evaluate(
        HFLM(str(model), batch_size=4, device="cpu"),
        tasks=load_tasks(names, str(data)), limit=2, bootstrap_iters=0,
    )["results"]  # fmt: skip
    for name in names:
        for key, value in expected[name].items():
            if isinstance(value, float):
                assert found[name][key] == pytest.approx(value, rel=1e-6), (name, key)
    assert found["gsm8k"]["exact_match,strict-match"] == 0
    assert "| arc_easy" in printed.out
    assert "it/s" not in printed.err
    assert (output / "scores.png").read_bytes()[:4] == b"\x89PNG"
    first, *_ = map(json.loads, (output / "samples_gsm8k.jsonl").read_text().splitlines())
    assert first["arguments"][0][0].count("Question:") == 6, "five examples in front"
    assert first["arguments"][0][0].count("0 + 1?") == 1, "the question is no example of itself"
    assert main(["eval", str(model), *words, "--output", str(output)]) == ExitCode.DATA
    assert "is not empty" in capsys.readouterr().err


def test_documents_in_plainer_forms_have_the_fields_of_the_hub(data):
    def row(name):
        (path,) = task_files(data, name).values()
        return read_rows(path, name)[0]

    assert row("arc_easy")["question"] == "Where did the cats sit?"
    assert row("arc_easy")["answerKey"] == "C"
    assert row("openbookqa")["choices"]["text"][3] == "the mat"
    assert row("piqa") == {"goal": "How?", "sol1": "on the mat", "sol2": "on a dog", "label": 0}
    assert row("boolq") == {"passage": "It is.", "question": "is it", "label": 1}
    assert row("lambada_openai") == {"text": "the dog ran after the cats"}
    assert row("winogrande")["sentence"] == "The cat saw the dog, so the _ ran."
    assert row("winogrande")["answer"] == "2"
    assert row("truthfulqa_mc1")["mc1_targets"] == {"choices": list(TARGETS), "labels": [1, 0]}
    assert row("gsm8k")["question"] == "0 + 1?"


def test_of_the_mmlu_each_subject_reads_its_own(tmp_path):
    rows = [{"subject": s, "question": s, "choices": list("abcd"), "answer": 0} for s in ("anatomy", "law")]
    (tmp_path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["question"] for row in read_rows(tmp_path / "mmlu.jsonl", "mmlu_anatomy")] == ["anatomy"]
    with pytest.raises(ValueError, match="no document whose subject is astronomy"):
        read_rows(tmp_path / "mmlu.jsonl", "mmlu_astronomy")


def test_a_program_has_limits():
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("x = bytearray(4 << 30)")
    assert not passes("open('x', 'wb').write(bytes(2 << 20))")


def test_programs_are_counted():
    tests = ["def check(f):\n    assert f() == 1\ncheck(one)"] * 2
    document = {"prompt": "def one():\n"}
    programs = with_prompt(
        [["    return 1\n```\nmore", "    return 2\n"], ["    return 1"] * 2], [document] * 2
    )
    assert pass_at_k(tests, programs, [1, 2]) == {"pass@1": 0.75, "pass@2": 1.0}


def test_a_task_that_runs_programs_must_be_allowed_to(data):
    with pytest.raises(ConfigError, match="runs programs that the model writes"):
        load_tasks(["humaneval"], str(data))
    (task,) = load_tasks(["humaneval"], str(data), allow_code=True)
    document = task.eval_docs[0]
    (programs,) = with_prompt([["    return 1\n"]], [document])
    assert task.process_results(document, [programs]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["arc_easy", "arc_easy"], "arc_easy is asked for twice"),
        (["none.yaml"], "the task file none.yaml does not exist"),
        (["hellaswag"], "no file there has the documents of hellaswag: expected hellaswag.jsonl"),
    ],
)
def test_tasks_that_cannot_be_had(data, names, words):
    with pytest.raises((ConfigError, DataError, FileNotFoundError), match=words):
        load_tasks(names, str(data))


def test_without_a_network_documents_come_from_files(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"of arc_easy cannot be had.*--task-data DIR reads them"):
        load_tasks(["arc_easy"])


def test_an_own_file_is_a_task(data, tmp_path):
    rows = data / "piqa.jsonl"
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: query\ndoc_to_choice: choices\n"
        "doc_to_target: gold\n"
    )
    (task,) = load_tasks([str(tmp_path / "own.yaml")])
    assert len(task.eval_docs) == 3


def test_options_become_what_is_asked(tmp_path):
    options = LmEval(
        max_length=8, add_bos=True, chat_template_mode="surround_instruct", temperature=0.5, num_beams=2,
        max_new_tokens=3,
    )  # fmt: skip
    tokens = byte_level_bpe(tmp_path / "bpe")
    subwords, single = (asking_of(options, load_tokenizer(name), seed=3) for name in (str(tokens), "byte"))
    assert (subwords.max_length, subwords.add_bos, subwords.bytes_per_token) == (8, True, 1)
    assert (single.bytes_per_token, single.seed) == (4, 3)
    assert options.generation == {
        "temperature": 0.5, "do_sample": True, "num_beams": 2, "max_gen_toks": 3,
    }  # fmt: skip
    assert LmEval(chat_template_mode="direct_encode_no_force_bos").forces_bos is False
    assert LmEval().generation == {}
    assert LmEval().forces_bos is None


def test_the_model_is_opened_as_it_is_asked_for(data, model, tmp_path, monkeypatch, capsys):
    asked = {}

    def opening(name, **given):
        asked.update(given, name=name)
        raise DataError("seen")

    monkeypatch.setattr("tokenkit.evaluation.opened.open_model", opening)
    words = {
        "tasks": "piqa", "task-data": data, "output": tmp_path / "out", "tokenizer-name": "byte",
        "base-model": "org/base", "base-tokenizer": "org/own", "device": "cpu", "dtype": "bfloat16",
        "trust-remote-code": "true",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in words.items()]
    assert main(["eval", str(model), *flags]) == ExitCode.DATA
    places = asked.pop("places")
    assert (places.base_model, places.base_tokenizer) == ("org/base", "org/own")
    assert asked == {
        "name": str(model), "tokenizer_name": "byte", "device": "cpu", "dtype": torch.bfloat16,
        "trust_remote_code": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere/at/all", "--tasks", "piqa"], "does not exist"),
        (["nowhere", "--tasks", "piqa"], "models: model folder nowhere does not exist, and offline"),
        (["org/a"], "tasks is empty"),
        (["org/a", "--tasks", "piqa", "--limit", "0"], "limit must be at least 1"),
        (["org/a", "--tasks", "piqa", "--device", "tpu"], "device must be cpu, cuda or cuda:N"),
        (["org/a", "org/a", "--tasks", "piqa"], "must name each model once"),
        (["org/a", "--tasks", "piqa", "--task-data", "nowhere"], "task_data: nowhere does not exist"),
        (
            ["org/a", "--tasks", "piqa", "--add-bos", "--chat-template-mode", "direct_encode_no_force_bos"],
            "leaves BOS out",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, reason):
    output = ["--output", str(tmp_path / "out")]
    assert main(["eval", *words, *output]) in (ExitCode.CONFIG, ExitCode.DATA)
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_models_of_one_name_have_labels_of_their_own():
    assert labels(["a/model", "b/model", "c/export"]) == {
        "a/model": "model", "b/model": "model-2", "c/export": "c_export",
    }  # fmt: skip
