"""Hidden states through a wrapped forward, with the right head: CLM equals the model's own loss."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.tiny import BASE
from tokenkit.integrations import forward
from tokenkit.integrations.forward import hidden_states
from tokenkit.losses import clm_loss
from tokenkit.structs import Batch, Side

SMALL = {**BASE, "vocab_size": 96}
MODELS = {
    "llama": SMALL,
    "gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "granite": {**SMALL, "logits_scaling": 6.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "phi": {**SMALL, "pad_token_id": 0},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3": {**SMALL, "head_dim": 8},
}


def make(name, **changes):
    """A model whose every parameter is random: zeros and ones would hide what is left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**MODELS[name], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    return model.eval()


def make_batch(rows=3, positions=12):
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(96, (rows, positions), generator=generator)
    length_B = torch.arange(positions, positions - rows, -1)
    trained_BT = torch.arange(positions) < length_B[:, None]
    side = Side(ids_BT, length_B, trained_BT)
    return Batch(side, side, {})


def own_loss(model, batch):
    tensors = batch.student.tensors()
    return model(input_ids=tensors["input_ids"], labels=tensors["labels"]).loss


def clm(model, batch, **options):
    term = clm_loss(hidden_states(model, batch.student.ids_BT, **options), batch)
    return term.total / term.count


@pytest.mark.parametrize("name", MODELS)
def test_clm_is_the_models_own_loss_and_gradient(name):
    model, batch = make(name), make_batch()
    wanted, got = own_loss(model, batch), clm(model, batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(got, parameters, allow_unused=True)
    theirs = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None and other.norm() > 1e-6:
            assert (one - other).norm() <= 1e-4 * other.norm()


def test_padding_rows_of_the_head_take_no_probability():
    model, batch = make("llama"), make_batch()
    batch.student.ids_BT.clamp_(max=79)
    logits_BTV = model(batch.student.ids_BT).logits[..., :80]
    labels_BT = batch.student.tensors()["labels"]
    wanted = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    assert clm(model, batch, vocab_size=80).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert abs(clm(model, batch).item() - wanted.item()) > 1e-3


# about 4 s: Dynamo traces a whole model
def test_through_torch_compile():
    model, batch = make("llama", num_hidden_layers=1), make_batch()
    compiled = torch.compile(model, backend="eager")
    assert clm(compiled, batch).item() == pytest.approx(own_loss(model, batch).item(), rel=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_through_autocast():
    model, batch = make("llama"), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden_states(model, batch.student.ids_BT)
        value = clm(model, batch)
    assert value.item() == pytest.approx(own_loss(model, batch).item(), rel=2e-2)
    assert states.hidden_BTD.dtype in (torch.bfloat16, torch.float32)


def test_through_peft_with_an_adapter_on_the_head():
    from peft import LoraConfig, get_peft_model

    model, batch = make("llama", tie_word_embeddings=False), make_batch()
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    assert clm(tuned.eval(), batch).item() == pytest.approx(own_loss(tuned, batch).item(), rel=1e-5)
    clm(tuned, batch).backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_a_scale_that_no_configuration_names_is_measured(dropout, monkeypatch):
    model, batch = make("llama", attention_dropout=dropout), make_batch()
    inner = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: inner(x) * 1.1)
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    assert hidden_states(model, batch.student.ids_BT).head.scale == pytest.approx(1.1, rel=1e-5)
    assert modes == [module.training for module in model.modules()]
    torch.testing.assert_close(clm(model.eval(), batch), own_loss(model, batch))


def test_what_stands_between_body_and_head_is_found():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "modernbert-decoder", **{**SMALL, "pad_token_id": 0, "decoder_bias": True, "eos_token_id": 1}
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.norm.weight.uniform_(0.5, 2)
    batch = make_batch()
    torch.testing.assert_close(clm(model, batch), own_loss(model, batch))


def test_an_encoder_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SMALL)).eval()
    with pytest.raises(ValueError, match="depends on the tokens after it"):
        hidden_states(model, make_batch().student.ids_BT)


def test_a_head_that_is_not_known_is_refused(monkeypatch):
    model, batch = make("llama"), make_batch()
    inner = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: inner(x) + 0.5)
    with pytest.raises(ValueError, match="LlamaForCausalLM are not those of its hidden states and head"):
        hidden_states(model, batch.student.ids_BT)


def test_a_head_that_cannot_be_measured_alone_is_compared_in_its_forward(monkeypatch):
    model, batch = make("llama"), make_batch()
    inner = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: inner(x) * 1.1)
    model._original_forward = model.forward  # as Accelerate leaves it
    with pytest.raises(ValueError, match="LlamaForCausalLM makes logits that are not those"):
        hidden_states(model, batch.student.ids_BT)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model: got Linear"):
        hidden_states(torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize(("wrong", "words"), [(-100, "got -100"), (10**6, "got 1000000")])
def test_ids_without_a_row_are_refused(wrong, words):
    model = make("llama")
    with pytest.raises(ValueError, match=f"from 0 to .* {words}"):
        hidden_states(model, torch.tensor([[1, wrong]]))


def _sharded_gradient(world, name, reshard):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    model, batch = make(name), make_batch(4)
    row = slice(2 * world.rank, 2 * world.rank + 2)
    mine = Batch.from_tensors({key: value[row] for key, value in dict(batch).items()}, batch)
    whole = copy.deepcopy(model)
    count = clm_loss(hidden_states(whole, batch.student.ids_BT), batch).count
    clm(whole, batch).backward()
    if reshard is None:
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model, reshard_after_forward=reshard)
    for _ in range(2):  # the second forward finds what the first backward left
        wrapped.zero_grad()
        term = clm_loss(hidden_states(wrapped, mine.student.ids_BT), mine)
        (term.total / count * 2).backward()
    worst = 0.0
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        if other.grad is None or other.grad.norm() < 1e-6:
            continue
        gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
        worst = max(worst, float((gradient - other.grad).norm() / other.grad.norm()))
    return worst


@pytest.mark.parametrize(
    ("name", "reshard"), [("gemma2", None), ("llama", True), ("gemma2", True), ("phi", False)]
)
def test_gradients_of_two_ranks_are_those_of_one_batch(name, reshard):
    assert max(run_ranks(_sharded_gradient, 2, name, reshard, always_shard=False)) < 1e-5


def test_the_check_runs_once():
    model, batch = make("llama"), make_batch()
    hidden_states(model, batch.student.ids_BT)
    assert model in forward._CHECKED
