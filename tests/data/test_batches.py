import json

import pytest
import torch

from tests.faults.registry import fault
from tokenkit.data.batches import Batches
from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import open_data
from tokenkit.data.options import DataOptions, HeldoutOptions

SIZE = 8


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    return DataOptions(dataset_name=str(path), heldout=HeldoutOptions(fraction=0))


@pytest.fixture
def make(data, byte_tokenizer):
    made = []

    def _make(**options):
        mix, _ = open_data(data, 7)
        made.append(Batches(mix, AlignedCollator(byte_tokenizer), SIZE, **options))
        return made[-1]

    yield _make
    for batches in made:
        batches.close()


def texts(tokenizer, micro_batches):
    return [
        tokenizer.decode(row[:n].tolist())
        for batch in micro_batches
        for row, n in zip(batch.student.ids_BT, batch.student.length_B, strict=True)
    ]


def steps(tokenizer, batches, count):
    return [texts(tokenizer, next(batches)) for _ in range(count)]


def test_a_step_is_the_next_documents_of_the_mix(make, data, byte_tokenizer):
    expected = [d.text for d in open_data(data, 7)[0].take(SIZE * 9)]
    assert [text for step in steps(byte_tokenizer, make(), 9) for text in step] == expected


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 2), (1, 4), (8, 1)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_and_micro_batches_split_the_same_documents(
    make, byte_tokenizer, world, accumulation, prefetch
):
    ranks = [make(rank=r, world=world, accumulation=accumulation, prefetch=prefetch) for r in range(world)]
    for expected in steps(byte_tokenizer, make(), 3):
        micro_batches = [next(rank) for rank in ranks]
        assert all(len(batches) == accumulation for batches in micro_batches)
        assert [text for batches in micro_batches for text in texts(byte_tokenizer, batches)] == expected


@fault(
    "Killed with documents read ahead",
    "the state counts what was taken: no row is lost or comes twice",
    code="-9",
    kept="the last checkpoint",
)
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_what_was_read_ahead_is_not_consumed(make, byte_tokenizer, prefetch):
    whole = steps(byte_tokenizer, make(), 9)
    part = make(prefetch=prefetch)
    assert part.state_dict()["documents"] == 0
    assert steps(byte_tokenizer, part, 4) == whole[:4]
    state = json.loads(json.dumps(part.state_dict()))
    assert state["documents"] == 4 * SIZE
    resumed = make(prefetch=prefetch)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert steps(byte_tokenizer, resumed, 5) == whole[4:]


def test_another_number_of_ranks_goes_on_where_the_run_stopped(make, byte_tokenizer):
    whole = steps(byte_tokenizer, make(), 6)
    two = [make(rank=r, world=2) for r in range(2)]
    for _ in range(3):
        [next(rank) for rank in two]
    four = [make(rank=r, world=4) for r in range(4)]
    for rank in four:
        rank.load_state_dict(two[0].state_dict())
    for expected in whole[3:]:
        assert [text for rank in four for text in texts(byte_tokenizer, next(rank))] == expected


def test_a_closed_reader_goes_on_without_its_thread(make, byte_tokenizer):
    whole = steps(byte_tokenizer, make(), 5)
    batches = make(prefetch=3)
    first = steps(byte_tokenizer, batches, 2)
    batches.close()
    assert first + steps(byte_tokenizer, batches, 3) == whole


@fault(
    "The thread that reads ahead fails",
    "the loop gets its error with the next step",
    code="its own",
    kept="the last checkpoint",
)
def test_an_error_in_the_background_reaches_the_loop(make, monkeypatch):
    batches = make(prefetch=2)

    def fail(rows):
        raise ValueError("no more")

    monkeypatch.setattr(batches._collator, "collate", fail)
    with pytest.raises(ValueError, match="no more"):
        next(batches)


@pytest.mark.parametrize("options", [{"accumulation": 3}, {"world": 5}, {"world": 4, "accumulation": 4}])
def test_documents_that_do_not_divide_are_an_error(make, options):
    with pytest.raises(ValueError, match=r"batch_size \(8\) must be a positive multiple"):
        make(**options)


def test_a_rank_outside_the_world_is_an_error(make):
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\): got 2"):
        make(rank=2, world=2)


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_without_a_trained_token_is_given_out_as_any_other(data, byte_tokenizer, world):
    mix, _ = open_data(data)
    collator = AlignedCollator(byte_tokenizer, max_length_student=1)
    batches = Batches(mix, collator, SIZE, world=world, accumulation=2, prefetch=0)
    assert not any(batch.student.trained_BT[:, 1:].any() for batch in next(batches))


def test_batches_are_equal_bit_for_bit_with_and_without_prefetch(make):
    ahead, plain = make(prefetch=2), make(prefetch=0)
    for _ in range(4):
        for one, other in zip(next(ahead), next(plain), strict=True):
            assert torch.equal(one.student.ids_BT, other.student.ids_BT)
            assert torch.equal(
                one.chunks["unconstrained"].teacher_BS, other.chunks["unconstrained"].teacher_BS
            )
