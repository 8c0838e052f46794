"""The front door: what `import tokenkit` offers, of plain Hugging Face models.

Faults tried: targets not shifted; the mean over all positions; `vocab_size` of a side left out; the
model left in evaluation mode; a name missing from `__all__`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import tokenkit
from tests.tiny import TEXT, byte_level_bpe, sentencepiece_bpe, tiny_model

ROOT = Path(__file__).parents[1]


def test_every_name_is_found_and_an_editor_knows_it():
    assert set(tokenkit.__all__) == {*tokenkit.PLACES, "__version__"} <= set(dir(tokenkit))
    for name in tokenkit.__all__:
        assert getattr(tokenkit, name) is not None
    guarded = next(
        n for n in ast.parse((ROOT / "tokenkit/__init__.py").read_text()).body if isinstance(n, ast.If)
    )
    typed = {alias.name for node in guarded.body for alias in node.names}
    assert typed == set(tokenkit.PLACES)


def test_a_name_that_is_not_there_names_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'alm_loss'"):
        tokenkit.alm_los  # noqa: B018
    with pytest.raises(ImportError):
        from tokenkit import nothing_like_it  # noqa: F401


def test_importing_it_imports_nothing_and_the_operations_need_torch_alone():
    code = (
        "import sys, tokenkit; assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.modules.update(dict.fromkeys(['transformers', 'tokenizers', 'peft', 'datasets', 'regex']))\n"
        "tokenkit.linear_cross_entropy, tokenkit.alm_loss, tokenkit.linear_logprob, tokenkit.Head\n"
        "try: tokenkit.load_tokenizer\n"
        "except ModuleNotFoundError as error: assert 'extra `train`' in str(error), error\n"
        "else: raise SystemExit('it was found')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_from_hidden_states_is_torchs(dtype):
    hidden_BTD = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    ids_BT = torch.randint(0, 11, (2, 5))
    ids_BT[0, 3] = -7
    found = tokenkit.linear_cross_entropy(hidden_BTD, weight_VD, ids_BT, ignore_index=-7, shift=True)
    logits = (hidden_BTD.float() @ weight_VD.float().T)[:, :-1].flatten(0, 1)
    wanted = cross_entropy(logits, ids_BT[:, 1:].flatten(), ignore_index=-7)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    gradient = torch.autograd.grad(found, (hidden_BTD, weight_VD))
    for ours, theirs in zip(gradient, torch.autograd.grad(wanted, (hidden_BTD, weight_VD)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    rows_BT = tokenkit.linear_cross_entropy(
        hidden_BTD, weight_VD, ids_BT, ignore_index=-7, shift=True, reduction="none"
    )
    assert rows_BT.shape == (2, 4)
    assert rows_BT[0, 2] == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_divergences_are_torchs(reverse):
    sides = [(torch.randn(2, 3, D), torch.randn(11, D)) for D in (8, 6)]
    targets = torch.tensor([[1, -100, 1], [1, 1, 1]])
    student, teacher = (log_softmax(hidden @ weight.T, -1) for hidden, weight in sides)
    given, wanted = (student, teacher) if not reverse else (teacher, student)
    rows = kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    found = tokenkit.fused_linear_kl_div(*sides[0], *sides[1], targets, reverse=reverse)
    torch.testing.assert_close(found, rows[targets != -100].mean(), rtol=1e-5, atol=1e-6)
    mixed = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
    wanted = sum(kl_div(mixed, x, reduction="none", log_target=True).sum(-1) / 2 for x in (student, teacher))
    found = tokenkit.fused_linear_jsd(*sides[0], *sides[1], reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_and_words_are_named():
    hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction must be"):
        tokenkit.linear_cross_entropy(hidden, weight, ids, reduction="batchmean")
    with pytest.raises(ValueError, match=r"targets must have the shape .*\(2, 3\)"):
        tokenkit.linear_cross_entropy(hidden, weight, ids[:, 1:])
    with pytest.raises(ValueError, match="do not give them twice"):
        tokenkit.linear_cross_entropy(hidden, tokenkit.Head(weight), ids, softcap=3.0)
    with pytest.raises(ValueError, match="teacher_hidden must have"):
        tokenkit.fused_linear_jsd(hidden, weight, hidden[:1], weight)
    for wrong in (ids.int(), ids.bool(), ids.tolist(), None):
        with pytest.raises(TypeError, match="targets must be an int64 tensor"):
            tokenkit.linear_cross_entropy(hidden, weight, wrong)
    with pytest.raises(TypeError, match="targets must be an int64 tensor"):
        tokenkit.fused_linear_jsd(hidden, weight, hidden, weight, ids.tolist())


def test_what_is_never_scored_is_not_in_the_mean():
    hidden, weight, ids = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 2, -100, 4])
    found = tokenkit.linear_cross_entropy(hidden, weight, ids, ignore_index=0)
    torch.testing.assert_close(found, cross_entropy((hidden @ weight.T)[[1, 3]], ids[[1, 3]]))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    return byte_level_bpe(folder / "a"), sentencepiece_bpe(folder / "b")


def test_six_lines_to_a_first_loss(pair):
    import transformers

    model, teacher = tiny_model("gemma2", vocab_size=320), tiny_model("gpt2", vocab_size=400)
    mine, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in pair)

    collator = tokenkit.AlignedCollator(mine, theirs)
    batch = collator([{"text": text} for text in TEXT[:4]])
    with torch.no_grad():
        taught = tokenkit.hidden_states(teacher, batch.teacher)
    loss = tokenkit.alm_loss(tokenkit.hidden_states(model, batch.student), taught, batch).mean
    loss.backward()

    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    head = tokenkit.hidden_states(model, batch.student).head
    assert (head.softcap, head.vocab_size) == (
        5.0,
        len(mine),
    )  # 20 rows are padding: they take no probability
    clm = tokenkit.clm_loss(tokenkit.hidden_states(model, batch.student), batch).mean
    logits = model(batch.student.ids_BT).logits[:, :-1, : len(mine)].flatten(0, 1)
    targets = batch.student.tensors()["labels"][:, 1:].flatten()
    torch.testing.assert_close(clm, cross_entropy(logits, targets), rtol=1e-5, atol=1e-5)


def test_hidden_states_refuses_what_it_cannot_read(pair):
    model = tiny_model("llama")
    with pytest.raises(TypeError, match=r"one side of a Batch"):
        tokenkit.hidden_states(model, [[1, 2]])
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model: got Linear"):
        tokenkit.hidden_states(torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64))
    batch = tokenkit.AlignedCollator(*pair)([{"text": "The cats sat."}])
    with pytest.raises(ValueError, match="ids but the model's embedding only 300 rows"):
        tokenkit.hidden_states(model, batch.teacher)


def test_bits_per_byte_is_counted_from_the_models_own_logits(pair):
    model, tokenizer = tiny_model("llama").train(), tokenkit.load_tokenizer(pair[0])
    model.lm_head.eval()
    texts = ["The cats sat on the mat.", "Once upon a time."]
    found = tokenkit.bits_per_byte(model, pair[0], [texts[0], {"text": texts[1]}])
    assert model.training
    assert not model.lm_head.training
    nats = scored = 0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text).ids]])
        logp = log_softmax(model.eval()(ids).logits[0, :-1, : tokenizer.vocab_size], -1)
        nats -= logp.gather(1, ids[0, 1:, None]).sum().item()
        scored += len(text.encode())
    assert found == pytest.approx(nats / scored / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    with pytest.raises(TypeError, match="put it in a list"):
        tokenkit.bits_per_byte(model, pair[0], texts[0])
    assert tokenkit.bits_per_byte(model, pair[0], ["", *texts]) == pytest.approx(found)
    for wrong, options, message in (
        ([""], {}, "holds no text"),
        (texts, {"batch_size": 0}, "batch_size must be at least 1"),
        (["The cats sat on the mat. " * 99], {}, "max_length is 512, but the model has 128 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenkit.bits_per_byte(model, pair[0], wrong, **options)
    spoiled = tiny_model("llama")
    spoiled.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN or infinity: its weights are damaged"):
        tokenkit.bits_per_byte(spoiled, pair[0], texts)


def test_a_plain_model_is_moved_and_written(pair, tmp_path):
    import transformers

    model = tiny_model("llama")
    report = tokenkit.transfer_vocabulary(model, *pair)
    assert sum(report.values()) == model.config.vocab_size == tokenkit.load_tokenizer(pair[1]).vocab_size
    folder = tokenkit.export_huggingface(model, pair[1], tmp_path / "moved", base="made here")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError):
        tokenkit.export_huggingface(model, pair[1], folder)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype"):
        tokenkit.export_huggingface(model, pair[1], tmp_path / "other", dtype="bfloat16")
    for name, wrong in (("method", "fwt"), ("output_embeddings", "keep"), ("pad_to_multiple_of", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            tokenkit.transfer_vocabulary(model, *pair[::-1], **{name: wrong})


@pytest.mark.parametrize("name", ["alm_side_path", "baseline_gold_js", "baseline_xtoken", "baseline_uld"])
def test_a_loss_that_reads_both_tokenizers_is_made_of_them(pair, name):
    model, teacher = tiny_model("llama", vocab_size=320), tiny_model("gpt2", vocab_size=400)
    batch = tokenkit.AlignedCollator(*pair)([{"text": text} for text in TEXT[:2]])
    with torch.no_grad():
        taught = tokenkit.hidden_states(teacher, batch.teacher)
    loss = tokenkit.make_loss(name, *pair)
    loss(tokenkit.hidden_states(model, batch.student), taught, batch).mean.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_what_a_loss_lacks_of_the_tokenizers_is_named():
    with pytest.raises(ValueError, match="baseline_xtoken needs projection, which two tokenizers give"):
        tokenkit.make_loss("baseline_xtoken")
