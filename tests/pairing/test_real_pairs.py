"""Every ordered pair of the real tokenizers, on real text in many scripts and on conversations."""

import json
from functools import cache
from itertools import pairwise, permutations

import numpy as np
import pytest

from tests.conftest import OWN_DATA, SHARED_DATA
from tokenkit.pairing.align import SideRules, align_kinds, chunk_spans
from tokenkit.tokenization.ragged import flatten
from tokenkit.tokenization.tokenizer import canonical_text, load_tokenizer

SPACES = "space+tab+newline"
COMPLETE = {"bytelevel2k", "spm1k"}  # every text has bytes under these
if SHARED_DATA.is_dir():
    COMPLETE |= {"gpt2", "llama2", "llama3", "qwen2.5", "mistral-v0.1", "phi-3-mini"}


@pytest.fixture(scope="module")
def tokenizers():
    """Those of the repository, and of the data beside it where that is present."""
    files = [
        file
        for root in (OWN_DATA, SHARED_DATA)
        for room in ("tokenizers", "models")
        for file in sorted(root.glob(f"{room}/*/tokenizer.json"))
    ]
    assert len(files) >= (18 if SHARED_DATA.is_dir() else 2)
    return {file.parent.name: load_tokenizer(str(file.parent)) for file in files}


@pytest.fixture(scope="module")
def texts():
    """Many scripts, special-token strings, emoji, and every kind of whitespace."""
    odd = "a </s> b <|endoftext|> c <|im_end|><s>[INST] 👩‍👩‍👧‍👦 é\r\n\ttab  two   three"
    if not (shared_data := SHARED_DATA).is_dir():
        return [*(OWN_DATA / "text" / "scripts.txt").read_text(encoding="utf-8").splitlines(), odd]
    udhr = [path.read_text(encoding="utf-8")[200:400] for path in sorted(shared_data.glob("text/udhr/*.txt"))]
    wikitext = (shared_data / "text/wikitext2.valid.txt").read_text(encoding="utf-8")
    unknown = wikitext.index("<unk>")
    c4 = (shared_data / "text/c4_demo.jsonl").read_text(encoding="utf-8").split("\n")[:4]
    return [
        *udhr,
        wikitext[: unknown + 300],
        *(json.loads(line)["text"][:300] for line in c4),
        odd,
    ]


@pytest.fixture(scope="module", params=["all", "faithful"])
def encoded(request, tokenizers, texts):
    """Each tokenizer's tokens of texts that all of the group leave as they are.

    The first group loses its runs of whitespace to the tokenizers that collapse them; the second keeps them.
    """
    names = [
        name
        for name, tokenizer in tokenizers.items()
        if request.param == "all" or tokenizer.normalize("a  b\n\n\tc") == "a  b\n\n\tc"
    ]
    assert len(names) >= ({"all": 18, "faithful": 12}[request.param] if SHARED_DATA.is_dir() else 2)
    group = {name: tokenizers[name] for name in names}
    canonical = [canonical_text(text, *group.values()) for text in texts]
    flat = {name: flatten(tokenizer.encode_batch(canonical)) for name, tokenizer in group.items()}
    return canonical, flat


def align_pair(tokenizers, flat, names, kind="unconstrained"):
    student, teacher = names
    pair_rules = (rules(tokenizers[name]) for name in names)
    return align_kinds(flat[student], flat[teacher], [kind], *pair_rules)[kind]


@cache
def rules(tokenizer):
    return SideRules(tokenizer.space_mask(SPACES), tokenizer.unk_id, tokenizer.pad_id)


def bytes_of_chunks(tokenizer, flat, chunk_N, count):
    """What the ids of each chunk spell, from the vocabulary alone."""
    spelled = [b""] * count
    for token_id, chunk in zip(flat.ids_N.tolist(), chunk_N.tolist(), strict=True):
        if chunk >= 0:
            spelled[chunk] += tokenizer.token_bytes[token_id]
    return spelled


def without_added_space(tokenizer, flat, spelled, offset_B):
    """Take away the space that some tokenizers put in front: their first token spells more than it covers."""
    for b, (first, end) in enumerate(pairwise(offset_B)):
        token = flat.offset_B[b]
        if first < end and flat.byte_ends_N[token] < len(tokenizer.token_bytes[flat.ids_N[token]]):
            spelled[first] = spelled[first].removeprefix(b" ")
    return spelled


@pytest.mark.parametrize("kind", ["unconstrained", "space"])
def test_both_sides_of_every_chunk_spell_the_same_bytes(tokenizers, encoded, kind):
    _, flat = encoded
    for names in permutations(flat, 2):
        alignment = align_pair(tokenizers, flat, names, kind)
        spelled = []
        for name, chunk_N in zip(names, alignment[:2], strict=True):
            side = tokenizers[name], flat[name]
            chunk_bytes = bytes_of_chunks(*side, chunk_N, len(alignment.student_last_C))
            spelled.append(without_added_space(*side, chunk_bytes, alignment.offset_B))
        assert spelled[0] == spelled[1], names


def test_every_shared_boundary_of_a_pair_is_found(tokenizers, encoded):
    texts, flat = encoded
    for names in permutations(flat, 2):
        alignment = align_pair(tokenizers, flat, names)
        _, end_C = chunk_spans(alignment, flat[names[0]])
        for b, text in enumerate(texts):
            ends = [
                set(side.byte_ends_N[side.offset_B[b] : side.offset_B[b + 1]].tolist())
                for side in (flat[name] for name in names)
            ]
            shared = sorted(ends[0] & ends[1] - {0})
            assert end_C[alignment.offset_B[b] : alignment.offset_B[b + 1]].tolist() == shared
            assert shared[-1] == len(text.encode())


def test_no_token_of_ordinary_text_is_left_out(tokenizers, encoded):
    """Special-token strings in the text are text too, so only unknown tokens may take chunks away."""
    _, flat = encoded
    complete = [name for name in flat if tokenizers[name].unk_id not in flat[name].ids_N]
    assert set(complete) >= COMPLETE
    for names in permutations(complete, 2):
        alignment = align_pair(tokenizers, flat, names)
        assert (alignment.student_N >= 0).all(), names
        assert (alignment.teacher_M >= 0).all(), names


@pytest.mark.parametrize(
    "names",
    [("gpt2", "llama3"), ("llama2", "qwen2.5"), ("qwen2.5", "llama2"), ("spm1k", "bytelevel2k")],
)
def test_space_chunks_of_real_pairs_begin_with_whitespace(tokenizers, encoded, names):
    texts, flat = encoded
    if not set(names) <= set(flat):
        pytest.skip("real data is absent: set TOKENKIT_DATA")
    alignment = align_pair(tokenizers, flat, names, "space")
    start_C, _ = chunk_spans(alignment, flat[names[0]])
    for b, text in enumerate(texts):
        starts = start_C[alignment.offset_B[b] : alignment.offset_B[b + 1]].tolist()
        assert starts[0] == 0
        assert {text.encode()[start] for start in starts[1:]} <= set(b" \t\n")
    assert len(np.unique(alignment.student_N)) > (500 if SHARED_DATA.is_dir() else 100)
