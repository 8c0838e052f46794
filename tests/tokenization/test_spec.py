import pytest

from tokenkit.tokenization.spec import TokenizerSpec, parse_spec


def test_a_spec_names_families_and_conversion():
    text = "Qwen/Qwen2.5-0.5B:source=Qwen2:target=Llama3:conversion=byte"
    spec = parse_spec(text)
    assert spec == TokenizerSpec("Qwen/Qwen2.5-0.5B", "Qwen2", "Llama3", "byte")
    assert str(spec) == text


@pytest.mark.parametrize("name", ["byte", "gpt2", "./folder", "/a/b", "C:\\models\\gpt2", "s3:thing"])
def test_anything_without_a_key_is_a_name(name):
    assert parse_spec(name) == TokenizerSpec(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt2:sorce=GPT2", "unknown key 'sorce' .did you mean 'source'"),
        ("gpt2:source=Lama3", "unknown source 'Lama3' .did you mean 'Llama3'"),
        ("gpt2:target=", "unknown target ''"),
        ("gpt2:conversion=bytes", "did you mean 'byte'"),
        ("gpt2:source=GPT2:source=GPT2", "given twice"),
        (":source=GPT2", "starts with a name"),
        ("", "starts with a name"),
        ("byte:conversion=prebyteified", "bytes already"),
    ],
)
def test_a_bad_spec_is_refused_with_the_nearest_name(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)
