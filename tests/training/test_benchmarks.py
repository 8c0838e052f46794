"""Benchmarks inside a training: the figures of `tokenkit eval` on the exported model, on any ranks."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import TEXT
from tokenkit.cli import main
from tokenkit.config.benchmarks import LmEval
from tokenkit.errors import ConfigError
from tokenkit.evaluation.lm_eval import Asking, language_model
from tokenkit.parallel import World
from tokenkit.training.benchmarks import Benchmarks, StudentScorer
from tokenkit.training.build import build
from tokenkit.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    rows = [{"query": text, "choices": ["the dog", text[:20]], "gold": 0} for text in TEXT[:5]]
    texts = [{"context": text[:-6], "continuation": "cats"} for text in TEXT[:5]]
    for name, lines in (("piqa", rows), ("lambada_openai", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def test_tasks_are_measured_on_the_way(make_config, data, tmp_path):
    asked = {"eval__tasks": ["piqa", "lambada_openai"], "eval__task_data": data, "eval__limit": 3}
    config = make_config(
        **asked, eval__batch_size=2, eval__num_fewshot=1, steps=2, eval_interval=1,
        pad_to_multiple_of=1,  # lm-eval counts rows of padding, the run does not
    )  # fmt: skip
    assert train(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "task_score/piqa/acc" in line]
    assert [line["step"] for line in measured] == [0, 1, 2]
    words = ["--tasks", "piqa", "lambada_openai", "--task-data", str(data), "--limit", "3"]
    words += ["--num-fewshot", "1", "--output", str(tmp_path / "scores")]
    assert main(["eval", str(tmp_path / "run"), *words]) == 0
    found = json.loads((tmp_path / "scores" / "results.json").read_text())["results"]
    last = measured[-1]
    assert found["piqa"]["acc_norm,none"] == last["task_score/piqa/acc_norm"]
    assert found["lambada_openai"]["perplexity,none"] == pytest.approx(
        last["task_cost/lambada_openai/perplexity"], rel=1e-4
    )
    assert measured[0]["task_cost/lambada_openai/perplexity"] != last["task_cost/lambada_openai/perplexity"]
    skipping = make_config(**asked | {"eval__task_data": tmp_path}, skip_lm_eval="true", dry_run="true")
    assert train(skipping) == 0, "nothing is read"


def scores(world, config):
    parts = build(config, world)
    return Benchmarks.load(config.evaluation.eval).run(parts.run.model, parts.tokenizers.target, world)


def test_ranks_share_the_work_of_a_sharded_student(make_config, data):
    config = make_config(
        eval__tasks=["piqa", "lambada_openai"],
        eval__task_data=data,
        eval__batch_size=2,
        train_model_mode="full",
    )
    first, second = run_ranks(scores, 2, config)
    (alone,) = run_ranks(scores, 1, config)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)


def test_beams_are_for_checkpoints(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    with pytest.raises(
        ConfigError, match=r"num_beams 3, .*: ask for it with `tokenkit eval` on a checkpoint"
    ):
        Benchmarks.load(LmEval(tasks=("gsm8k",), task_data=str(tmp_path), num_beams=3))
    Benchmarks.load(LmEval(tasks=("gsm8k",), task_data=str(tmp_path)))


TEXTS = ["The cat", "Once upon a time there", "A", "The dog ran home and", "It"]


def written(world, config):
    parts = build(config, world)
    model, tokenizer = parts.run.model.eval(), parts.tokenizers.target
    asking = Asking(batch_size=2, seed=3)
    scorer = StudentScorer(model, 64, world)
    lm = language_model(scorer, tokenizer.to_huggingface(), asking, world)
    greedy = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    drawn = greedy | {"do_sample": True, "temperature": 0.7}
    found = [
        lm.generate_until([SimpleNamespace(args=(text, how)) for text in TEXTS]) for how in (greedy, drawn)
    ]
    if world.mesh is None:
        for text, got in zip(TEXTS, found[0], strict=True):
            ids_1T = torch.tensor([lm.tok_encode(text)])
            how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            new = model.student.causal_lm.generate(ids_1T, **how)[0, ids_1T.shape[1] :]
            assert got == lm.tokenizer.decode(new, skip_special_tokens=True)
    return found


def test_ranks_write_what_one_process_writes(make_config):
    """Greedily also what transformers' `generate` writes with a cache; drawn, whatever the processes."""
    config = make_config(train_model_mode="full")
    alone = written(World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None), config)
    assert run_ranks(written, 2, config) == [alone, alone]
    assert any(alone[0])
