"""Move a small language model to a tokenizer with another vocabulary: offline, on a CPU, in minutes.

    bash examples/quickstart.sh            (makes the environment, then runs this file)
    python examples/quickstart.py --output my_folder

The text is the documentation inside Python's standard library; models and tokenizers are made here. Three
runs of the trainer: a teacher from nothing, then its transfer to the other tokenizer by next-token
prediction alone (CLM), and by matching the teacher's likelihoods as well (ALM + CLM), equal steps each.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from tokenkit.metrics import read_metrics
from tokenkit.models.reading import quiet_off_terminal

TEACHER_VOCABULARY = 1_000
TARGET_VOCABULARY = 3_000
MAX_CHARACTERS = 700  # of a document: about 200 tokens of the teacher
Settings = dict[str, "str | int | float | Path | list[str]"]
PROMPTS = ("Return a new", "If the argument is", "The class")

MODEL = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Run everything and end in a table, samples and a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=None, help="folder to write to; must not exist")
    parser.add_argument("--teacher-steps", type=int, default=220, help="optimizer steps of the teacher")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each transfer")
    arguments = parser.parse_args()
    folder = arguments.output or unused_folder(Path("quickstart_output"))
    folder.mkdir(parents=True, exist_ok=False)
    began = time.perf_counter()

    text = folder / "documentation.jsonl"
    documents = write_documents(text)
    say(f"text: {documents:,} documents, {text.stat().st_size / 1e6:.1f} MB of Python's own documentation")
    quiet_off_terminal()
    train_tokenizer(text, folder / "teacher_start", TEACHER_VOCABULARY, split_digits=False)
    train_tokenizer(text, folder / "target_tokenizer", TARGET_VOCABULARY, split_digits=True)
    make_model(folder / "teacher_start", TEACHER_VOCABULARY)

    common: Settings = {
        "data.dataset_name": text,
        "data.heldout.fraction": 0.02,
        "train_model_mode": "full",
        "max_length_teacher": 256,
        "max_length_new": 256,
        "optimizer.weight_decay": 0.1,
    }
    first: Settings = {
        "student.pretrained_model_name_or_path": folder / "teacher_start",
        "losses": ["clm"],
        "batch_size": 32,
        "steps": arguments.teacher_steps,
        "eval_interval": arguments.teacher_steps,
        "warmup_steps": min(20, arguments.teacher_steps),
        "optimizer.learning_rate": 3e-3,
        "output_dir": folder / "teacher",
    }
    train("teacher, from nothing", {**common, **first})
    # ALM's temperature of 100 divides its gradient: the weight of 100 gives that back
    for name, losses, weights in (
        ("clm", ["clm"], ["1"]),
        ("alm_clm", ["clm", "alm_unconstrained"], ["1", "100"]),
    ):
        transfer: Settings = {
            "student.pretrained_model_name_or_path": folder / "teacher" / "export",
            "target_tokenizer_name": folder / "target_tokenizer",
            "losses": losses,
            "loss_weights": weights,
            "batch_size": 16,
            "steps": arguments.steps,
            "eval_interval": max(arguments.steps // 6, 1),
            "eval_at_step_zero": True,
            "warmup_steps": min(10, arguments.steps),
            "optimizer.learning_rate": 1e-3,
            "output_dir": folder / name,
        }
        train(f"transfer with {' + '.join(losses)}", {**common, **transfer})
    report(folder, time.perf_counter() - began)


def unused_folder(path: Path) -> Path:
    """Return `path`, or the first of `path_2`, `path_3`, ... that does not exist."""
    candidates = (
        path if number == 1 else path.with_name(f"{path.name}_{number}") for number in range(1, 1000)
    )
    return next(candidate for candidate in candidates if not candidate.exists())


def write_documents(path: Path) -> int:
    """Collect docstrings of the standard library and the language reference; return how many pieces."""
    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for text in standard_library_texts():
            for piece in cut(text):
                if len(piece) > 100 and piece not in seen:
                    seen.add(piece)
                    file.write(json.dumps({"text": piece}) + "\n")
    return len(seen)


def standard_library_texts() -> Iterator[str]:
    """Yield every docstring of the standard library, then the topics of `help()`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(source.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue  # a few files of the library are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
    from pydoc_data.topics import topics

    yield from topics.values()


def cut(text: str) -> Iterator[str]:
    """Cut a text at blank lines into pieces of at most about MAX_CHARACTERS."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > MAX_CHARACTERS:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    yield piece[: 2 * MAX_CHARACTERS]


def train_tokenizer(text: Path, folder: Path, vocab_size: int, *, split_digits: bool) -> None:
    """Train a byte-level BPE tokenizer and save it in Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = text.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


def make_model(folder: Path, vocab_size: int) -> None:
    """Save a randomly initialised Llama beside its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, **MODEL)
    LlamaForCausalLM(config).save_pretrained(folder)


def train(title: str, settings: Settings) -> None:
    """Run the trainer as a user would: one flag per setting."""
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    say(f"\n== {title}\npython -m tokenkit.train {' '.join(flags)}")
    began = time.perf_counter()
    if subprocess.run([sys.executable, "-m", "tokenkit.train", *flags], check=False).returncode:
        raise SystemExit(f"the run '{title}' failed: see above")
    say(f"{time.perf_counter() - began:.0f} s")


def report(folder: Path, seconds: float) -> None:
    """Print the table and the samples, and draw the picture."""
    curves = {name: bits_per_byte(folder / name) for name in ("clm", "alm_clm")}
    teacher = next(line["bits_per_byte/teacher"] for line in curves["clm"])
    rows = {
        "teacher (its own tokenizer)": (teacher, folder / "teacher" / "export"),
        "FVT alone (no training)": (curves["clm"][0]["bits_per_byte/student"], None),
        "CLM alone": (curves["clm"][-1]["bits_per_byte/student"], folder / "clm" / "export"),
        "ALM + CLM": (curves["alm_clm"][-1]["bits_per_byte/student"], folder / "alm_clm" / "export"),
    }
    steps = curves["clm"][-1]["step"]
    say(
        f"\nbits per byte on held-out documentation, after {steps} steps of transfer ({seconds:.0f} s in all)"
    )
    for name, (value, _) in rows.items():
        say(f"  {name:30s} {value:6.3f}")
    say(
        "  FVT is where the new tokenizer begins; a transfer that works ends near the teacher or below it.\n"
        "  This teacher is minutes old: the text still has more to teach than it has, so CLM may be ahead."
    )
    say("\nsamples, greedy:")
    for name, (_, model) in rows.items():
        if model is not None:
            for text in samples(model):
                say(f"  {name:30s} {text!r}")
    draw(folder / "curves.png", curves, teacher)
    say(f"\nthe curves: {folder / 'curves.png'}; the model: {folder / 'alm_clm' / 'export'}")


def bits_per_byte(run: Path) -> list[dict]:
    """Return the measurements of a run on held-out text, oldest first."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "bits_per_byte/student" in line]


def samples(folder: Path) -> list[str]:
    """Continue the prompts with an exported model, loaded as any other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def draw(path: Path, curves: dict[str, list[dict]], teacher: float) -> None:
    """Draw bits per byte over the steps of the transfer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = {"clm": ("CLM alone", "#E69F00"), "alm_clm": ("ALM + CLM", "#0072B2")}
    for name, lines in curves.items():
        label, colour = labels[name]
        points = [(line["step"], line["bits_per_byte/student"]) for line in lines]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label, color=colour)
    axes.axhline(teacher, color="#555555", lw=1, ls="--", label="teacher, old tokenizer")
    axes.set_xlabel("steps of transfer (0: FVT alone)")
    axes.set_ylabel("bits per byte, held out")
    axes.set_title("Moving a model to another tokenizer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
