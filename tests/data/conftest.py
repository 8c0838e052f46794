"""Two small tokenizers of the tests' own: bytes, and a byte-level BPE that knows some English words."""

import json

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenkit.tokenization.tokenizer import load_tokenizer

settings.register_profile("tokenkit", deadline=None)  # machines that test are often busy
settings.load_profile("tokenkit")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """Byte-level BPE with ChatML turns, no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 4, trainer)
    folder = tmp_path_factory.mktemp("word_tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte, with the special tokens of Llama 3 (so with a BOS)."""
    return load_tokenizer("byte:target=Llama3")
