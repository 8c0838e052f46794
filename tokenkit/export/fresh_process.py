"""Run as a program by `verify`: what a user's own process makes of an exported folder, without tokenkit."""

import json
import sys
from pathlib import Path


def main(folder: str, questions: str, answers: str, trusts_code: str) -> None:
    """Load a folder with the Auto classes, and write logits, ids and texts as JSON.

    Args:
        folder: of a model and its tokenizer.
        questions: JSON file: `ids` of a text, `texts` to encode.
        answers: JSON file that is written.
        trusts_code: "1": the folder's code may run.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    trust = {"trust_remote_code": trusts_code == "1"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([asked["ids"]])).logits[0]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = generator(asked["prompt"], max_new_tokens=4, do_sample=False)
    found = {
        "logits": logits_TV.tolist(),
        "ids": encoded,
        "texts": [tokenizer.decode(ids) for ids in encoded],
        "tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        "generated": written[0]["generated_text"],
    }
    Path(answers).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
