"""A batch is put together at once; each of its documents must come out as if it were alone."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tokenization.chat.test_encode import TALK
from tokenkit.tokenization.chat.encode import (
    ChatTemplateMode,
    Document,
    Message,
    document_from_row,
    encode_documents,
)
from tokenkit.tokenization.tokenizer import load_tokenizer


def test_many_documents_are_encoded_like_each_alone(tokenizers):
    pair = [tokenizers["byte-level"], load_tokenizer("byte:target=Llama3")]
    documents = [
        TALK,
        Document(text="Hi  there"),
        document_from_row({"prompt": "a", "completion": "b"}),
        TALK,
    ]
    together = encode_documents(documents, pair)
    for document, sides in zip(documents, together, strict=True):
        for tokens, alone in zip(sides, encode_documents([document], pair)[0], strict=True):
            assert tokens.ids.tolist() == alone.ids.tolist()
            assert tokens.byte_ends.tolist() == alone.byte_ends.tolist()
            assert tokens.trained.tolist() == alone.trained.tolist()


@pytest.fixture(scope="module")
def changing(folders):
    """A tokenizer that collapses spaces, composes characters and knows a mark for a space."""
    return load_tokenizer(f"{folders['unigram']}:target=Qwen2")


@pytest.fixture(scope="module")
def llama2():
    return load_tokenizer("byte:target=Llama2")


texts_that_change = st.text(st.sampled_from("ab \ne\u0301日▁"), min_size=1, max_size=6).filter(
    lambda text: text.replace("▁", " ").strip()
)
mixed_documents = st.one_of(
    texts_that_change.map(lambda text: Document(text=text)),
    st.tuples(texts_that_change, texts_that_change).map(
        lambda pair: document_from_row({"prompt": pair[0], "completion": pair[1]})
    ),
    st.lists(texts_that_change, min_size=1, max_size=4).map(
        lambda contents: Document(
            messages=tuple(Message(r, c) for r, c in zip(["user", "assistant"] * 2, contents, strict=False))
        )
    ),
)


@given(
    documents=st.lists(mixed_documents, min_size=2, max_size=4),
    mode=st.sampled_from(ChatTemplateMode.__args__),
    loss_mask_mode=st.sampled_from([None, "all"]),
    use_chat_template=st.booleans(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_document_does_not_depend_on_those_beside_it(
    changing, llama2, documents, mode, loss_mask_mode, use_chat_template
):
    """Texts that one side would change, prompts and conversations, at all places in one batch."""
    pair = (changing, llama2)
    use_chat_template |= mode == "surround_instruct"
    options = {"mode": mode, "loss_mask_mode": loss_mask_mode, "use_chat_template": use_chat_template}
    together = encode_documents(documents, pair, **options)
    for document, sides in zip(documents, together, strict=True):
        for tokens, alone in zip(sides, encode_documents([document], pair, **options)[0], strict=True):
            for field in ("ids", "byte_ends", "special", "trained"):
                assert getattr(tokens, field).tolist() == getattr(alone, field).tolist()
