"""Tokens that a run adds: their first rows, training, a resume, the export, and templates that use them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import KILLED, run_ranks, start_ranks, wait_ranks
from tests.tiny import TEXT
from tests.training.test_resume import run_in_rank
from tokenkit.embeddings.rows import row_sources
from tokenkit.errors import ExitCode
from tokenkit.parallel import World
from tokenkit.tokenization.chat.encode import document_from_row, encode_documents
from tokenkit.training.build import build

SINGLE = World(0, 1, torch.device("cpu"), None)
END, UNUSED = "<|done|>", "<|unused|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|done|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": TEXT[1]}]


@pytest.fixture
def settings(workspace, tmp_path):
    """A target whose template ends turns with a token that it does not have, and conversations."""
    for name in ("target", "model"):
        shutil.copytree(workspace / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lines = [json.dumps({"messages": [TALK[i % 2] | {"role": TALK[0]["role"]}, TALK[1]]}) for i in range(40)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {
        "student__pretrained_model_name_or_path": tmp_path / "model",
        "target_tokenizer_name": tmp_path / "target",
        "data__dataset_name": tmp_path / "talks.jsonl",
        "tokens_to_add": [END, UNUSED],
        "max_length_new": 128,
        "max_length_teacher": 128,
    }


def rows_of(parts):
    control = parts.tokenizers.target.control
    return parts.student.embedding.weight.detach()[[control[END], control[UNUSED]]].clone()


def test_added_tokens_are_made_trained_resumed_exported_and_written(make_config, settings, tmp_path):
    first = build(make_config(**settings), SINGLE)
    target, old = first.tokenizers.target, first.tokenizers.old
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = row_sources(old, target).rows(model.get_input_embeddings().weight, target.vocab_size)
    begin = rows_of(first)
    torch.testing.assert_close(begin, expected[[target.control[END], target.control[UNUSED]]].detach())
    pieces = old.try_encode_batch([END], before="text")[0].ids
    torch.testing.assert_close(begin[0], model.get_input_embeddings().weight[pieces].mean(0).detach())

    done = [ExitCode.DONE]
    whole = make_config(**settings, output_dir=tmp_path / "whole")
    assert run_ranks(run_in_rank, 1, whole, None, always_shard=False) == done
    broken = make_config(**settings, output_dir=tmp_path / "broken", resume="true")
    assert KILLED in wait_ranks(start_ranks(run_in_rank, 1, broken, 3, always_shard=False))
    assert run_ranks(run_in_rank, 1, broken, None, always_shard=False) == done
    exported = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export") for name in ("whole", "broken")
    ]
    weights = [model.get_input_embeddings().weight.detach() for model in exported]
    assert torch.equal(*weights)
    assert not torch.allclose(weights[0][target.control[END]], begin[0], atol=1e-3)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "export")
    for string in (END, UNUSED):
        assert tokenizer(f"a{string}b", add_special_tokens=False)["input_ids"][1] == target.control[string]
    ((tokens,),) = encode_documents([document_from_row({"messages": TALK})], [target])
    assert tokenizer.apply_chat_template(TALK, return_dict=False) == tokens.ids.tolist()
    assert tokens.ids.tolist().count(target.control[END]) == 2
    assert tokens.trained[-1]
    assert tokens.ids[-1] == target.control[END]
    assert exported[0].generation_config.eos_token_id == sorted([target.eos_id, target.control[END]])
