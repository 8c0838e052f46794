"""Share of positions that are padding, document by document in a row and with `pack_documents`.

    python bench/padding.py

Three steps of each text in `shared/data`; per cent of student and teacher. A step is one micro-batch.
"""

import os
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import open_data
from tokenkit.data.options import DataOptions, HeldoutOptions
from tokenkit.tokenization.tokenizer import load_tokenizer

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = [("llama3", "qwen2.5"), ("gpt2", "llama2")]
TEXTS = [
    "text/tinystories.heldout.txt",
    "text/wikitext2.valid.txt",
    "text/c4_demo.jsonl",
    "chat/conversations.jsonl",
    "chat/alpaca_en_demo.json",
]
LENGTH, STEPS = 512, 3


@cache
def tokenizer(name):
    return load_tokenizer(DATA / "tokenizers" / name)


def padding(pair, text, documents):
    """Per cent of padding: (student, teacher) of a row for each document, and the same packed."""
    collator = AlignedCollator(
        *map(tokenizer, pair),
        max_length_student=LENGTH,
        max_length_teacher=LENGTH,
        pack_documents=True,
        loss_mask_mode="all",
        use_chat_template=False,
    )
    mix, _ = open_data(DataOptions(dataset_name=str(DATA / text), heldout=HeldoutOptions(fraction=0)))
    batches = [collator.collate(mix.take(documents)) for _ in range(STEPS)]
    shares = []
    for count in (lambda side: side.ids_BT.numel(), lambda side: side.num_positions):
        for sides in ([batch.student for batch in batches], [batch.teacher for batch in batches]):
            tokens = sum(int(side.length_B.sum()) for side in sides)
            shares.append(100 * (1 - tokens / sum(map(count, sides))))
    return shares


def main():
    """Print a line for each pair, text and size of a micro-batch."""
    print("pair, text, documents: padding of student and teacher, % -> packed")
    for pair in PAIRS:
        for text in TEXTS:
            for documents in (8, 32):
                a, b, c, d = padding(pair, text, documents)
                print(
                    f"{'/'.join(pair)}, {text}, {documents}: {a:.1f} {b:.1f} -> {c:.1f} {d:.1f}", flush=True
                )


if __name__ == "__main__":
    main()
