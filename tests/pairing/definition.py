"""The definition of a cover: the tokenizer is asked for every continuation that some token could cover."""

from bisect import bisect_left
from functools import lru_cache
from itertools import islice, takewhile

from tokenkit.pairing.bias.writing import Writer


@lru_cache(maxsize=4)
def _asked(tokenizer):
    """Return who is asked, and every text token in order: tokens that begin alike stand together."""
    texts = {text for i, text in enumerate(tokenizer.token_bytes) if text and not tokenizer.is_special_V[i]}
    return Writer(tokenizer), sorted(texts)


def cover_by_definition(tokenizer, token_id):
    """Return {continuation: token}: what the tokenizer writes across the end of this token."""
    text = tokenizer.token_bytes[token_id]
    writer, others = _asked(tokenizer)
    continuations = set()
    for end in (text[cut:] for cut in range(len(text))):
        start = bisect_left(others, end)
        alike = takewhile(lambda other, end=end: other.startswith(end), islice(others, start, None))
        continuations |= {other[len(end) :] for other in alike if other != end}
    longer = sorted(continuations)
    last = writer.last_tokens([text + continuation for continuation in longer])
    return {
        continuation: token
        for continuation, token in zip(longer, last, strict=True)
        if token >= 0 and len(tokenizer.token_bytes[token]) > len(continuation)
        and (text + continuation).endswith(tokenizer.token_bytes[token])
    }  # fmt: skip


def cover(tokenizer, covers, token_id):
    here = slice(covers.offset_V[token_id], covers.offset_V[token_id + 1])
    pairs = zip(covers.token_E[here].tolist(), covers.inside_E[here].tolist(), strict=True)
    entries = [(tokenizer.token_bytes[token][inside:], token) for token, inside in pairs]
    assert len(dict(entries)) == len(entries), "one continuation twice"
    return dict(entries)
