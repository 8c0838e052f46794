"""Train the two small tokenizers of tests/data/tokenizers: `python -m tests.data.make_tokenizers`.

Their text is the documentation of this repository and tests/data/text/scripts.txt. What lies in the folder
was made once and is kept, so a change of a page changes no test.
"""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.tokenization.tiny import CHATML
from tokenkit.tokenization.files.sentencepiece_model import sentencepiece_document

DATA = Path(__file__).parent
ROOT = DATA.parents[1]
WORDS = (  # words with their space, up to three digits, punctuation, line breaks
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def corpus() -> list[str]:
    """Return the lines to train on: pages in English and code, and a page in many scripts."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    scripts = (DATA / "text" / "scripts.txt").read_text(encoding="utf-8").splitlines()
    return [line + "\n" for line in lines + scripts * 3]


def byte_level(folder: Path) -> None:
    """Byte-level BPE of 2,048 ids: NFC, words cut by a regular expression, ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048 - len(NAMED) - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in NAMED])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "</tool_call>")])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def sentencepiece_bpe(folder: Path) -> None:
    """SentencePiece BPE of 1,200 pieces with byte fallback: its model file, and that as tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.rstrip("\n") for line in corpus()),
        model_writer=model,
        vocab_size=1200,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    document = sentencepiece_document(folder / "tokenizer.model")  # a test holds it to sentencepiece
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    Tokenizer.from_str(json.dumps(document)).save(str(folder / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    byte_level(DATA / "tokenizers" / "bytelevel2k")
    sentencepiece_bpe(DATA / "tokenizers" / "spm1k")
