import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.registry import fault
from tokenkit.data.mix import open_data, read_documents
from tokenkit.data.options import BadRowOptions, DataOptions, HeldoutOptions, SourceOptions
from tokenkit.data.sources import hash64, is_heldout

NONE_OUT = HeldoutOptions(fraction=0)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "fifty.jsonl"
    return write_jsonl(path, [{"text": f"document {i}"} for i in range(50)])


def texts(documents):
    return [document.text for document in documents]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_holds_every_document_once_in_another_order_each_time(fifty, streaming):
    options = DataOptions(dataset_name=fifty, streaming=streaming, shuffle_buffer_size=7, heldout=NONE_OUT)
    mix, heldout = open_data(options)
    first, second = texts(mix.take(50)), texts(mix.take(50))
    everything = [f"document {i}" for i in range(50)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != everything
    assert first != second
    assert heldout == []


def test_a_stream_is_shuffled_inside_consecutive_blocks(fifty):
    mix, _ = open_data(
        DataOptions(dataset_name=fifty, streaming=True, shuffle_buffer_size=7, heldout=NONE_OUT)
    )
    order = [int(text.split()[1]) for text in texts(mix.take(50))]
    for start in range(0, 50, 7):
        assert sorted(order[start : start + 7]) == list(range(start, min(start + 7, 50)))
    assert [i - start for start in (0, 7) for i in order[start : start + 7]][:7] != [
        i - 7 for i in order[7:14]
    ]


def test_the_order_is_a_function_of_the_seed(fifty):
    options = DataOptions(dataset_name=fifty)
    orders = [texts(open_data(options, seed)[0].take(30)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("consumed", [0, 1, 6, 7, 49, 50, 51, 120])
def test_a_resumed_mix_goes_on_with_the_next_document(fifty, streaming, consumed):
    options = DataOptions(dataset_name=fifty, streaming=streaming, shuffle_buffer_size=7)
    whole, _ = open_data(options, 3)
    part, _ = open_data(options, 3)
    whole.take(consumed), part.take(consumed)
    resumed, _ = open_data(options, 3)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert resumed.documents == consumed
    assert texts(resumed.take(70)) == texts(whole.take(70))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 60), st.booleans())
def test_any_mix_resumes_exactly_whatever_is_skipped(tmp_path_factory, seed, consumed, streaming):
    folder = tmp_path_factory.mktemp("mix")
    paths = [
        write_jsonl(
            folder / f"{name}.jsonl", [{"text": f"{name}{i}" if i % 5 else None} for i in range(1, n)]
        )
        for name, n in (("a", 12), ("b", 5), ("c", 30))
    ]
    options = DataOptions(
        datasets=tuple(SourceOptions(path=p, weight=i + 1, streaming=streaming) for i, p in enumerate(paths)),
        shuffle_buffer_size=4,
        bad_rows=BadRowOptions(quota=0.5),
    )
    whole, _ = open_data(options, seed)
    part, _ = open_data(options, seed)
    whole.take(consumed), part.take(consumed)
    resumed, _ = open_data(options, seed)
    resumed.load_state_dict(part.state_dict())
    assert texts(resumed.take(40)) == texts(whole.take(40))
    assert resumed.skipped == whole.skipped


@pytest.mark.parametrize("streaming", [False, True])
def test_heldout_documents_are_never_trained_on(fifty, streaming):
    options = DataOptions(
        dataset_name=fifty, streaming=streaming, shuffle_buffer_size=9, heldout=HeldoutOptions(fraction=0.2)
    )
    mix, heldout = open_data(options)
    trained = set(texts(mix.take(200)))
    assert len(heldout) + len(trained) == 50
    assert not trained & set(texts(heldout))
    assert 5 <= len(heldout) <= 15


def test_heldout_documents_depend_on_nothing_but_their_position(fifty):
    options = DataOptions(dataset_name=fifty, heldout=HeldoutOptions(fraction=0.2))
    expected = [f"document {i}" for i in np.flatnonzero(is_heldout(np.arange(50), 0.2))]
    assert texts(open_data(options, 0)[1]) == texts(open_data(options, 9)[1]) == expected
    assert texts(open_data(replace(options, streaming=True))[1]) == expected
    fewer = replace(options, heldout=HeldoutOptions(fraction=0.2, documents=3))
    assert texts(open_data(fewer)[1]) == expected[:3]


def test_the_share_held_out_is_the_fraction():
    assert abs(is_heldout(np.arange(100_000), 0.01).mean() - 0.01) < 0.001
    assert is_heldout(np.arange(10), 0.0).sum() == 0
    assert is_heldout(np.arange(10), 1e-9).tolist() == [True] + [False] * 9


def test_the_hash_is_the_published_one():
    # the first outputs of SplitMix64 seeded with 0 and with 1234567, from its reference implementation
    assert hash64(np.array([0, 1234567], np.uint64)).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_documents_come_from_data_sets_in_proportion_to_the_weights(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": n}] * 10) for n in ("a", "b", "c")]
    weights = (1.0, 3.0, 6.0)
    sources = tuple(SourceOptions(path=p, weight=w) for p, w in zip(paths, weights, strict=True))
    mix, heldout = open_data(DataOptions(datasets=sources))
    counts = Counter(texts(mix.take(5000)))
    for name, weight in zip("abc", weights, strict=True):
        assert abs(counts[name] / 5000 - weight / 10) < 0.02
    assert sorted(texts(heldout)) == ["a", "b", "c"]
    other, heldout = open_data(DataOptions(datasets=sources, heldout=HeldoutOptions(documents=2)), seed=1)
    assert len(heldout) == 2
    assert texts(other.take(50)) != texts(open_data(DataOptions(datasets=sources))[0].take(50))


def test_a_source_keeps_its_order_in_any_mix(fifty, tmp_path):
    other = write_jsonl(tmp_path / "o.jsonl", [{"text": "other"}] * 3)
    alone, _ = open_data(DataOptions(datasets=(SourceOptions(path=fifty),)), 5)
    mixed, _ = open_data(DataOptions(datasets=(SourceOptions(path=fifty), SourceOptions(path=other))), 5)
    from_fifty = [text for text in texts(mixed.take(60)) if text != "other"]
    assert from_fifty == texts(alone.take(len(from_fifty)))


def test_skipped_rows_are_counted_by_reason(tmp_path):
    rows = [{"text": "good"}] * 100 + [
        {"text": None},
        {"text": ""},
        {"text": "  "},
        {"text": 3},
        {"text": "\ud800"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    mix, _ = open_data(DataOptions(dataset_name=path, heldout=NONE_OUT))
    assert texts(mix.take(101)) == ["good"] * 101
    # one more pass has begun, and may have met some of them again
    assert {reason: min(count, 2) for reason, count in mix.skipped.items()}.keys() == {
        "field 'text' is not text",
        "empty document",
        "not UTF-8",
    }
    assert 5 <= mix.skipped.total() <= 10


def test_documents_above_the_limit_are_skipped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "é" * 500}, {"text": "é" * 501}])
    options = DataOptions(dataset_name=path, heldout=NONE_OUT, bad_rows=BadRowOptions(max_row_bytes=1000))
    mix, _ = open_data(options)
    assert texts(mix.take(2)) == ["é" * 500] * 2
    assert list(mix.skipped) == ["too long"]


@fault(
    "Rows that are no documents",
    "left out and counted by reason; over data.bad_rows.quota the run ends",
    code="-, 65",
    kept="the last checkpoint",
)
def test_more_bad_rows_than_the_quota_are_an_error(tmp_path):
    rows = [{"text": "good"}] + [{"text": "good"}, {"text": None}] * 50
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    mix, _ = open_data(DataOptions(dataset_name=path))
    with pytest.raises(ValueError, match=r"11 of \d+ rows are no documents \(11 field 'text' is not text\)"):
        mix.take(60)


def test_a_bad_row_can_be_an_error_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": None}])
    mix, _ = open_data(
        DataOptions(dataset_name=path, bad_rows=BadRowOptions(action="raise"), heldout=NONE_OUT)
    )
    with pytest.raises(ValueError, match="row is field 'text' is not text"):
        mix.take(2)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "is empty"),
        ([{"text": "a"}], {}, "one document, and that is held out"),
        ([{"story": "a"}] * 3, {}, "with one of text, messages, .* the first row has story"),
        ([{"text": "a"}] * 3, {"text_field": "story"}, "with the field 'story', but the first row has text"),
        (
            [{"q": "a"}] * 3,
            {"text_template": "{q} {a}"},
            "with the field 'q' and 'a', but the first row has q",
        ),
        ([{"text": ""}] * 3, {}, r"no document to train on: 3 empty document"),
        ([{"text": "a"}] * 3, {"text_template": "{text.__class__}"}, r"got 'text.__class__'"),
        ([{"text": "a"}] * 3, {"text_template": "{}"}, r"got ''"),
        ([{"text": "a"}] * 3, {"text_template": "{text!r}"}, r"got 'text'"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_clear_error(tmp_path, rows, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        next(open_data(DataOptions(dataset_name=path, **options))[0])


def test_missing_paths_are_an_error_before_any_hub_is_asked(tmp_path):
    for name in (str(tmp_path / "no.jsonl"), "./no", "no.txt", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_data(DataOptions(dataset_name=name))


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match=r"set data\.dataset_name"):
        open_data(DataOptions())


def test_the_state_of_other_data_is_refused(fifty, tmp_path):
    mix, _ = open_data(DataOptions(dataset_name=fifty))
    state = mix.state_dict()
    shorter, _ = open_data(DataOptions(dataset_name=write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 9)))
    with pytest.raises(ValueError, match="has 9 rows, but 50 when"):
        shorter.load_state_dict(state)
    other_seed, _ = open_data(DataOptions(dataset_name=fifty), seed=1)
    with pytest.raises(ValueError, match="with seed 0"):
        other_seed.load_state_dict(state)


def test_templates_and_fields_make_the_text(tmp_path):
    rows = [
        {
            "q": "what",
            "n": 3,
            "chat": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        }
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (one,) = read_documents(SourceOptions(path=path, text_template="{{{q}}} is {n}"))
    assert one.text == "{what} is 3"
    (chat,) = read_documents(SourceOptions(path=path, text_field="chat"))
    assert [message.role for message in chat.messages] == ["user", "assistant"]


def test_read_documents_keeps_the_order_and_refuses_bad_rows(fifty, tmp_path):
    assert texts(read_documents(SourceOptions(path=fifty), limit=3)) == [
        "document 0",
        "document 1",
        "document 2",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match="is not text"):
        read_documents(SourceOptions(path=path))


def test_folders_mix_formats(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "from jsonl"}])
    (tmp_path / "b.txt").write_text("from text")
    (tmp_path / "c.csv").write_text("text\nfrom csv\n")
    assert texts(read_documents(SourceOptions(path=str(tmp_path)))) == ["from jsonl", "from text", "from csv"]


class _Hub:
    """Stands in for `datasets.load_dataset`, which would need a network."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def __call__(self, name, subset, *, split, streaming):
        import datasets

        self.calls.append((name, subset, split, streaming))
        data = datasets.Dataset.from_list(self.rows)
        return data.to_iterable_dataset() if streaming else data


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_resume_like_local_ones(monkeypatch, streaming):
    hub = _Hub([{"text": f"{i}"} for i in range(20)])
    monkeypatch.setattr("datasets.load_dataset", hub)
    options = DataOptions(
        dataset_name="someone/stories", dataset_config_name="small", split="test", streaming=streaming,
        shuffle_buffer_size=6, heldout=NONE_OUT,
    )  # fmt: skip
    mix, _ = open_data(options)
    first = texts(mix.take(13))
    resumed, _ = open_data(options)
    resumed.load_state_dict(mix.state_dict())
    assert sorted(first + texts(resumed.take(7)), key=int) == [str(i) for i in range(20)]
    assert hub.calls[0] == ("someone/stories", "small", "test", streaming)


def test_a_hub_data_set_stays_on_disk(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", _Hub([{"text": "a"}] * 3))
    mix, _ = open_data(DataOptions(dataset_name="someone/stories"))
    assert type(mix._sources[0]._table).__name__ == "Dataset"


def test_a_stream_without_enough_heldout_documents_is_given_up(fifty):
    tiny = HeldoutOptions(fraction=1e-12, documents=3)
    _, heldout = open_data(DataOptions(dataset_name=fifty, streaming=True, heldout=tiny))
    assert texts(heldout) == ["document 0"]


def test_a_data_set_of_a_mix_may_have_a_name_of_its_own(fifty):
    with pytest.raises(ValueError, match="data set stories: expected rows with the field 'no'"):
        open_data(DataOptions(datasets=(SourceOptions(name="stories", path=fifty, text_field="no"),)))
    with pytest.raises(ValueError, match=r"needs a path"):
        SourceOptions(weight=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: SourceOptions(path="a", weight=0), "weight must be positive"),
        (lambda: SourceOptions(path="a", weight=float("nan")), "weight must be positive"),
        (lambda: SourceOptions(path="a", format="docx"), "format must be one of"),
        (lambda: SourceOptions(path="a", text_field="a", text_template="{a}"), "not both"),
        (lambda: DataOptions(dataset_name="a", datasets=(SourceOptions(path="a"),)), "not both"),
        (lambda: DataOptions(text_field="a", text_template="{a}"), "not both"),
        (lambda: DataOptions(shuffle_buffer_size=0), "shuffle_buffer_size must be at least 1"),
        (lambda: DataOptions(num_workers=-1), "num_workers must not be negative"),
        (lambda: DataOptions(batch_size=0), "batch_size must be positive"),
        (lambda: HeldoutOptions(fraction=1.0), r"fraction must lie in \[0, 1\)"),
        (lambda: HeldoutOptions(documents=-1), "documents must not be negative"),
        (lambda: BadRowOptions(action="drop"), "action must be skip or raise"),
        (lambda: BadRowOptions(quota=1.5), r"quota must lie in \[0, 1\]"),
        (lambda: BadRowOptions(max_row_bytes=0), "must be positive"),
    ],
)
def test_options_out_of_range_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        options()


@fault(
    "The hub cannot be reached",
    "one line, before anything is loaded",
    code=65,
    kept="nothing is begun",
)
def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=r"'someone/stories' is neither a local path nor .*no route"):
        open_data(DataOptions(dataset_name="someone/stories"))


def test_real_stories_are_separated_by_their_marker(shared_data):
    documents = read_documents(SourceOptions(path=str(shared_data / "text/tinystories.heldout.txt")))
    raw = (shared_data / "text/tinystories.heldout.txt").read_text(encoding="utf-8")
    assert len(documents) == sum(1 for part in raw.split("<|endoftext|>") if part.strip())
    assert all("<|endoftext|>" not in document.text for document in documents)


@pytest.mark.parametrize(
    "name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "conversations.jsonl", "v1_sft_demo.jsonl"]
)
def test_real_chat_files_are_read(shared_data, name):
    documents = read_documents(SourceOptions(path=str(shared_data / "chat" / name)))
    assert all(document.messages for document in documents)
    assert len(documents) > 40


def test_text_to_measure_on_may_come_from_elsewhere_and_nothing_else_is_held_out(fifty, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"other {i}"} for i in range(9)])
    mix, heldout = open_data(
        DataOptions(dataset_name=fifty, heldout=HeldoutOptions(fraction=0.5, documents=4, dataset_name=other))
    )
    assert texts(heldout) == [f"other {i}" for i in range(4)]
    assert sorted(texts(mix.take(50))) == sorted(f"document {i}" for i in range(50))
    with pytest.raises(ValueError, match="never read"):
        HeldoutOptions(documents=0, dataset_name=other)
    with pytest.raises(FileNotFoundError, match="absent"):
        open_data(
            DataOptions(dataset_name=fifty, heldout=HeldoutOptions(dataset_name=str(tmp_path / "absent")))
        )
