"""Move a small language model to a tokenizer with another vocabulary: offline, on a CPU, in minutes.

    bash examples/quickstart.sh            (makes the environment, then runs this file)
    python examples/quickstart.py --output my_folder

A transfer's text is seldom the text that the model was made of, so here it is not either. Three runs of the
trainer: a teacher from nothing on the documentation inside Python's standard library, then its transfer to
the other tokenizer on *source code* of that library, by next-token prediction (CLM) and by matching the
teacher's likelihoods (ALM). All are measured on documentation that none of them saw. Models and tokenizers
are made here.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenkit.models.reading import quiet_off_terminal
from tokenkit.run.metrics import read_metrics

TEACHER_VOCABULARY = 1_000
TARGET_VOCABULARY = 3_000
MAX_CHARACTERS = 700  # of a piece: about 200 tokens of the teacher
MEASURED = 150  # pieces of documentation that are only measured on
CODE_PIECES = 2_000
Settings = dict[str, "str | int | float | Path | list[str]"]
PROMPTS = ("Return a new", "If the argument is", "The class")
RATES = {"clm": 3e-5, "alm_unconstrained": 3e-4}
"""The best of each (`python bench/quickstart_rates.py`): compared untuned, the worse rate would decide."""
TITLES = {"clm": "CLM", "alm_unconstrained": "ALM"}

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
    began = time.perf_counter()
    make_teacher(folder, arguments.teacher_steps)
    for loss, rate in RATES.items():
        transfer(folder, loss, rate, arguments.steps)
    report(folder, time.perf_counter() - began)


def make_teacher(folder: Path, steps: int) -> None:
    """Write the text, both tokenizers and a random model to a new folder, and train the model."""
    folder.mkdir(parents=True, exist_ok=False)
    documentation = list(dict.fromkeys(pieces(docstrings())))
    # every so many: of each part of the library
    apart = set(documentation[:: len(documentation) // MEASURED][:MEASURED])
    write(folder / "measured.jsonl", apart)
    text = write(folder / "documentation.jsonl", [piece for piece in documentation if piece not in apart])
    code = write(folder / "code.jsonl", dict.fromkeys(islice(pieces(source_code()), CODE_PIECES)))
    for path in (text, code):
        say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB of Python's standard library")
    quiet_off_terminal()
    train_tokenizer(text, folder / "teacher_start", TEACHER_VOCABULARY, split_digits=False)
    train_tokenizer(text, folder / "target_tokenizer", TARGET_VOCABULARY, split_digits=True)
    make_model(folder / "teacher_start", TEACHER_VOCABULARY)
    settings: Settings = {
        "student.pretrained_model_name_or_path": folder / "teacher_start",
        "data.dataset_name": text,
        "losses": ["clm"],
        "batch_size": 32,
        "steps": steps,
        "eval_interval": steps,
        "warmup_steps": min(20, steps),
        "optimizer.learning_rate": 3e-3,
        "output_dir": folder / "teacher",
    }
    train("teacher, from nothing", {**common(folder), **settings})


def transfer(folder: Path, loss: str, rate: float, steps: int, *, output: str = "", seed: int = 0) -> Path:
    """Move the teacher in `folder` to the other tokenizer; return the folder of the run."""
    settings: Settings = {
        "student.pretrained_model_name_or_path": folder / "teacher" / "export",
        "target_tokenizer_name": folder / "target_tokenizer",
        "data.dataset_name": folder / "code.jsonl",
        "losses": [loss],
        "batch_size": 16,
        "steps": steps,
        "eval_interval": max(steps // 5, 1),
        "eval_at_step_zero": True,
        "warmup_steps": min(10, steps),
        "optimizer.learning_rate": rate,
        "seed": seed,
        "output_dir": folder / (output or loss),
    }
    train(f"transfer by {TITLES[loss]}", {**common(folder), **settings})
    return folder / (output or loss)


def common(folder: Path) -> Settings:
    """Return what all runs share."""
    return {
        "data.heldout.dataset_name": folder / "measured.jsonl",
        "data.heldout.documents": MEASURED,
        "train_model_mode": "full",
        "max_length_teacher": 256,
        "max_length_new": 256,
        "optimizer.weight_decay": 0.1,
    }


def unused_folder(path: Path) -> Path:
    """Return `path`, or the first of `path_2`, `path_3`, ... that does not exist."""
    candidates = (
        path if number == 1 else path.with_name(f"{path.name}_{number}") for number in range(1, 1000)
    )
    return next(candidate for candidate in candidates if not candidate.exists())


def write(path: Path, texts: Iterable[str]) -> Path:
    """Write one document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def modules() -> Iterator[ast.Module]:
    """Yield the syntax tree of every file of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(source.relative_to(root).parts):
            continue
        try:
            yield ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue  # a few files of the library are broken on purpose


def documented(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield what may have a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstrings() -> Iterator[str]:
    """Yield every docstring of the standard library, then the topics of `help()`."""
    for tree in modules():
        for node in documented(tree):
            yield ast.get_docstring(node) or ""
    from pydoc_data.topics import topics

    yield from topics.values()


def source_code() -> Iterator[str]:
    """Yield the functions and classes of the standard library, without their docstrings and comments."""
    for tree in modules():
        for node in documented(tree):
            if ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield ast.unparse(node)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at blank lines into pieces of at most about MAX_CHARACTERS; short ones are left out."""
    for text in texts:
        piece = ""
        for paragraph in [*text.split("\n\n"), " " * MAX_CHARACTERS]:
            if piece and len(piece) + len(paragraph) > MAX_CHARACTERS:
                if len(piece) > 100:
                    yield piece[: 2 * MAX_CHARACTERS]
                piece = ""
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph


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
    curves = {loss: bits_per_byte(folder / loss) for loss in RATES}
    first = curves["alm_unconstrained"][0]  # a run by CLM alone has no teacher
    teacher, start = first["bits_per_byte/teacher"], first["bits_per_byte/student"]
    rows = {
        "teacher (its own tokenizer)": (teacher, folder / "teacher" / "export"),
        "FVT alone (no training)": (start, None),
        **{
            f"{TITLES[loss]}, {RATES[loss]:g}": (lines[-1]["bits_per_byte/student"], folder / loss / "export")
            for loss, lines in curves.items()
        },
    }
    steps = curves["clm"][-1]["step"]
    say(f"\nbits per byte of unseen documentation, {steps} steps on code later ({seconds:.0f} s in all)")
    for name, (value, model) in rows.items():
        trained = model is not None and value != teacher
        closed = (
            f"  {(start - value) / (start - teacher):4.0%} of the way back to the teacher" if trained else ""
        )
        say(f"  {name:30s} {value:6.3f}{closed}")
    say(
        "  FVT is where the new tokenizer begins. The transfer's text is not the teacher's: CLM learns that\n"
        "  text, ALM what the teacher makes of it. Each has the best of its learning rates."
    )
    say("\nsamples, greedy:")
    for name, (_, model) in rows.items():
        if model is not None:
            for text in samples(model):
                say(f"  {name:30s} {text!r}")
    draw(folder / "curves.png", curves, teacher)
    say(f"\nthe curves: {folder / 'curves.png'}; the model: {folder / 'alm_unconstrained' / 'export'}")


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
    colours = {"clm": "#E69F00", "alm_unconstrained": "#0072B2"}
    for loss, lines in curves.items():
        points = [(line["step"], line["bits_per_byte/student"]) for line in lines]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=TITLES[loss], color=colours[loss])
    axes.axhline(teacher, color="#555555", lw=1, ls="--", label="teacher, old tokenizer")
    axes.set_xlabel("steps of transfer on source code (0: FVT alone)")
    axes.set_ylabel("bits per byte of unseen documentation")
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
