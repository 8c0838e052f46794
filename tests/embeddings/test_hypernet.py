import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import byte_level_bpe, sentencepiece_bpe, tiny_model
from tokenkit.embeddings import hypernet as module
from tokenkit.embeddings import hypernet_files
from tokenkit.embeddings.hypernet import Hypernet, mean_rows, surfaces
from tokenkit.embeddings.hypernet_files import (
    ABOUT,
    WEIGHTS,
    hypernet_rows,
    load_hypernet,
    rows_digest,
    save_hypernet,
)
from tokenkit.embeddings.hypernet_options import HypernetOptions
from tokenkit.embeddings.rows import Matching, row_sources
from tokenkit.embeddings.transfer import InitOptions, transfer_vocabulary
from tokenkit.models.causal_lm import CausalLM
from tokenkit.tokenization.tokenizer import load_tokenizer

ARCHITECTURES = ["identity", "linear", "mlp", "transformer"]
WIDTH = 32


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level_bpe(folder / "old", 300)
    sentencepiece_bpe(folder / "new", 400)
    return load_tokenizer(str(folder / "old")), load_tokenizer(str(folder / "new"))


@pytest.fixture(scope="module")
def sources(tokenizers):
    return row_sources(*tokenizers)


def moved(network):
    """Give every weight, the last projection's too, another value."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("reads", "writes"), [(1, 1), (2, 2), (1, 2)])
def test_it_begins_as_fvt_bit_for_bit(sources, architecture, shared, reads, writes):
    old = [torch.randn(300, WIDTH) for _ in range(reads)]
    options = HypernetOptions(architecture=architecture, shared=shared)
    network = Hypernet(options, WIDTH, reads=reads, writes=writes).fit_scale(old)
    rows = network(surfaces(sources), old)
    assert len(rows) == writes
    for index, rows_VD in enumerate(rows):
        expected = sources.rows(old[min(index, reads - 1)], len(rows_VD))
        assert torch.equal(rows_VD, expected)


def test_surfaces_by_hand():
    method_V = torch.tensor([0, 1, 2, 3, 2], dtype=torch.uint8).numpy()
    found = surfaces(
        replace_sources([7, 3, 4, 5, 6, 8], [0, 1, 2, 5, 5], method_V), max_pieces=2
    )  # the third token has three pieces, of which two are read
    assert found.pieces_VL.tolist() == [[7, 0], [3, 0], [4, 5], [0, 0], [8, 0]]
    assert found.length_V.tolist() == [1, 1, 2, 0, 1]
    assert found.is_read_V.tolist() == [False, True, True, False, True]
    old_WD = torch.arange(18.0).reshape(9, 2)
    means_VD = mean_rows(found, old_WD)
    assert means_VD[2].tolist() == [10.0, 11.0]  # all three pieces: (8 + 10 + 12) / 3
    assert means_VD[3].tolist() == old_WD.mean(0).tolist()


def replace_sources(ids, offsets, method_V):
    from tokenkit.embeddings.rows import RowSources

    return RowSources(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets), method_V)


def test_linear_is_one_projection_of_mean_first_and_last_piece():
    old_WD = torch.randn(9, 4)
    found = surfaces(replace_sources([4, 5, 6], [0], torch.tensor([2], dtype=torch.uint8).numpy()))
    options = HypernetOptions(architecture="linear", residual_alpha=0.5)
    network = moved(Hypernet(options, 4).fit_scale([old_WD]))
    scale, write = old_WD.std(), network.networks[0].write
    scaled_WD = old_WD / scale
    features = torch.cat([scaled_WD[4:7].mean(0), scaled_WD[4], scaled_WD[6]])
    expected = old_WD[4:7].mean(0) + 0.5 * scale * (features @ write.weight.T + write.bias)
    torch.testing.assert_close(network(found, [old_WD])[0][0], expected)


def test_padding_is_attended_to_where_no_mask_hides_it(sources):
    old_WD = torch.randn(300, WIDTH)
    options = HypernetOptions(use_attention_mask=False)
    network = moved(Hypernet(options, WIDTH).fit_scale([old_WD]))
    found = surfaces(sources)
    (before,) = network(found, [old_WD])
    with torch.no_grad():
        network.networks[0].padding.add_(1.0)
    assert not torch.allclose(before, network(found, [old_WD])[0])
    for hides in ({"use_attention": False}, {"use_attention_mask": True}, {"architecture": "mlp"}):
        assert Hypernet(replace(options, **hides), WIDTH).networks[0].padding is None


@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_a_row_depends_on_the_pieces_of_its_token_alone(sources, architecture):
    """Each token by itself gives the row that it has among all others: nothing is mixed up by slabs."""
    old_WD = torch.randn(300, WIDTH)
    network = moved(Hypernet(HypernetOptions(architecture=architecture), WIDTH).fit_scale([old_WD]))
    (together,) = network(surfaces(sources, size=448), [old_WD])
    assert len(together) == 448
    ends = [*sources.offset_V[1:].tolist(), len(sources.old_ids_K)]
    for token in range(0, len(ends), 7):
        ids = sources.old_ids_K[sources.offset_V[token] : ends[token]].tolist()
        alone = replace_sources(ids, [0], sources.method_V[token : token + 1])
        (row,) = network(surfaces(alone), [old_WD])
        torch.testing.assert_close(together[token], row[0], rtol=1e-4, atol=1e-5)


def test_special_tokens_and_tokens_without_pieces_keep_their_rows(sources):
    old_WD = torch.randn(300, WIDTH)
    network = moved(Hypernet(HypernetOptions(), WIDTH).fit_scale([old_WD]))
    found = surfaces(sources)
    (rows_VD,) = network(found, [old_WD])
    means_VD = mean_rows(found, old_WD)
    changed_V = (rows_VD != means_VD).any(1)
    assert torch.equal(changed_V, found.is_read_V)
    assert 0 < int((~found.is_read_V).sum()) < 40  # special tokens, and bytes of letters that have a token


@pytest.mark.parametrize("architecture", ["linear", "mlp", "transformer"])
def test_slabs_give_the_same_rows_and_gradients(sources, architecture, monkeypatch):
    old_WD = torch.randn(300, WIDTH, requires_grad=True)
    network = moved(Hypernet(HypernetOptions(architecture=architecture), WIDTH).fit_scale([old_WD]))
    found, results = surfaces(sources), []
    weight = torch.randn(len(found.length_V), WIDTH)
    for slab in (10_000, 37):
        monkeypatch.setattr(module, "SLAB", slab)
        (rows_VD,) = network(found, [old_WD])
        inputs = [old_WD, *network.parameters()]
        results.append([rows_VD, *torch.autograd.grad((rows_VD * weight).sum(), inputs)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_without_residual_the_mean_has_no_part(sources):
    old_WD = torch.randn(300, WIDTH)
    network = Hypernet(HypernetOptions(residual=False), WIDTH).fit_scale([old_WD])
    found = surfaces(sources)
    (rows_VD,) = network(found, [old_WD])
    with torch.no_grad():
        network.networks[0].write.weight.zero_()
        network.networks[0].write.bias.zero_()
    assert rows_VD[found.is_read_V].any()
    assert not network(found, [old_WD])[0][found.is_read_V].any()


@pytest.fixture
def saved(tokenizers, tmp_path):
    """Return a tied model, both tokenizers and the folder of a network for it that writes two matrices."""
    old, new = tokenizers
    model = CausalLM(tiny_model(tie_word_embeddings=True), old.vocab_size)
    rows_WD = model.embedding.weight
    network = moved(Hypernet(HypernetOptions(num_heads=4), WIDTH, writes=2).fit_scale([rows_WD]))
    about = {
        "base_model": {"name": "tiny", "rows": rows_digest([rows_WD])},
        "old_tokenizer": {"name": "old", "fingerprint": old.fingerprint()},
    }
    save_hypernet(tmp_path, network, about)
    return model, old, new, tmp_path, network


def apply(model, old, new, folder, mode="untie"):
    return transfer_vocabulary(
        model,
        old,
        new,
        pad_to_multiple_of=64,
        output_embeddings=mode,
        method="hypernet",
        options=InitOptions(hypernet=str(folder)),
    )


@pytest.mark.parametrize("tokens", [37, 4096])
def test_it_is_a_method_of_transfer(saved, monkeypatch, tokens):
    monkeypatch.setattr(hypernet_files, "TOKENS", tokens)
    model, old, new, folder, network = saved
    old_WD = model.embedding.weight.detach().clone()
    report = apply(model, old, new, folder)
    assert report == row_sources(old, new).report()
    expected = network(surfaces(row_sources(old, new)), [old_WD])
    for made, rows_VD in zip((model.embedding.weight, model.output.weight), expected, strict=True):
        assert len(made) == 448
        torch.testing.assert_close(made[:400].detach(), rows_VD.detach())
        torch.testing.assert_close(made[447].detach(), old_WD.mean(0))


def test_special_tokens_are_copied_only_where_matching_says_so(saved):
    model, old, new, folder, _ = saved
    old_WD = model.embedding.weight.detach().clone()
    matching = Matching(special=False, bos_eos=False)
    options = InitOptions(hypernet=str(folder), matching=matching)
    transfer_vocabulary(model, old, new, output_embeddings="untie", method="hypernet", options=options)
    for special in (new.bos_id, new.eos_id):
        torch.testing.assert_close(model.embedding.weight[special].detach(), old_WD.mean(0))


def test_beside_the_rows_nothing_as_large_as_they_are_is_made(saved, monkeypatch):
    _, old, new, _, network = saved
    monkeypatch.setattr(hypernet_files, "TOKENS", 20)
    monkeypatch.setattr("tokenkit.embeddings.rows.CHUNK_BYTES", 4 * WIDTH * 20)
    old_WD = torch.randn(old.vocab_size, WIDTH)
    large = {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for made in result if isinstance(result, (tuple, list)) else [result]:
                is_matrix = isinstance(made, torch.Tensor) and made.is_floating_point()
                if is_matrix and (storage := made.untyped_storage()).nbytes() >= old_WD.nbytes:
                    large[storage.data_ptr()] = storage
            return result

    with Sizes():
        made = hypernet_rows(network, old, new, [old_WD], new.vocab_size)
    own = {t.untyped_storage().data_ptr() for t in (old_WD, made.input_VD, made.output_VD)}
    assert large.keys() == own


def test_in_training_no_copy_of_the_old_rows_is_kept(sources, monkeypatch):
    monkeypatch.setattr(module, "SLAB", 64)  # many slabs, which are computed again
    old_WD = torch.randn(100_000, WIDTH)
    network = moved(Hypernet(HypernetOptions(num_heads=4), WIDTH).fit_scale([old_WD]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        network(surfaces(sources), [old_WD])[0].sum()
    assert max(tensor.untyped_storage().nbytes() for tensor in kept) < old_WD.nbytes / 2


def test_what_was_saved_is_read_again_and_never_overwritten(saved):
    *_, folder, network = saved
    loaded, about = load_hypernet(folder)
    assert about["options"]["num_heads"] == 4
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_hypernet(folder, network, {})


def test_a_model_that_stays_tied_is_refused(saved):
    model, old, new, folder, _ = saved
    with pytest.raises(ValueError, match="writes input and output rows, but the model's are tied"):
        apply(model, old, new, folder, "preserve")


def test_another_model_width_or_tokenizer_is_refused(saved, tokenizers):
    _, old, new, folder, _ = saved
    wide = CausalLM(tiny_model(hidden_size=64, tie_word_embeddings=True), old.vocab_size)
    with pytest.raises(ValueError, match="made for 1 embedding matrices of width 32, but the model has 1 of"):
        apply(wide, old, new, folder)
    other = CausalLM(tiny_model(seed=1, tie_word_embeddings=True), old.vocab_size)
    with pytest.raises(ValueError, match="trained on another base model"):
        apply(other, old, new, folder)
    about = json.loads((folder / ABOUT).read_text())
    about["old_tokenizer"]["fingerprint"] = "0"
    (folder / ABOUT).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="trained on another old tokenizer"):
        apply(saved[0], old, new, folder)


def test_rows_have_one_digest_in_both_dtypes():
    rows_WD = torch.randn(300, 8)
    assert rows_digest([rows_WD]) == rows_digest([rows_WD.bfloat16()])
    changed_WD = rows_WD.clone()
    changed_WD[0] += 0.1
    assert rows_digest([rows_WD]) != rows_digest([changed_WD])


def test_damaged_folders_are_one_error(saved, tmp_path):
    *_, folder, _ = saved
    with pytest.raises(FileNotFoundError, match="holds no hypernetwork"):
        load_hypernet(folder / "absent")
    state = load_file(folder / WEIGHTS)
    state.pop("scale_I")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match="no hypernetwork can be read from"):
        load_hypernet(folder)
    (folder / ABOUT).write_text("{")
    with pytest.raises(ValueError, match="no hypernetwork can be read from"):
        load_hypernet(folder)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide the embeddings' width, 32: got 5"):
        Hypernet(replace(HypernetOptions(), num_heads=5), WIDTH)
