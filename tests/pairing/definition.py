"""The definition of a cover: the tokenizer is asked for every continuation that some token could cover."""

from tokenkit.pairing.writing import Writer


def cover_by_definition(tokenizer, token_id):
    """Return {continuation: token}: what the tokenizer writes across the end of this token."""
    text = tokenizer.token_bytes[token_id]
    others = {
        other for i, other in enumerate(tokenizer.token_bytes) if other and not tokenizer.is_special_V[i]
    }
    tries = [(text[cut:], other) for cut in range(len(text)) for other in others]
    longer = sorted({other[len(end) :] for end, other in tries if other.startswith(end) and other != end})
    last = Writer(tokenizer).last_tokens([text + continuation for continuation in longer])
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
