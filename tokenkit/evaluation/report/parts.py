"""The parts of a report's page, each of what `report.json` holds under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenkit.evaluation.report.charts import short
from tokenkit.evaluation.report.html import Child, Safe, el, joined, table

Run = Mapping[str, Any]

ROWS = {
    "special": "special tokens, by their role",
    "same_bytes": "copied from the token with the same bytes",
    "mean_of_pieces": "mean of the pieces that the old tokenizer writes",
    "mean_of_all": "mean of all rows",
}
"""By label of `embeddings.rows`."""
MODELS = {"teacher": "Teacher", "before": "Before", "after": "After"}


def sentence(run: Run, *, with_name: bool) -> Safe:
    """Return what a run was, in one sentence."""
    name = [el("b", run["name"]), ": "] if with_name else []
    moved = [" to ", el("b", run["target_tokenizer"])] if run.get("target_tokenizer") else []
    taught = [", taught by ", el("b", run["teacher"])] if run.get("teacher") else []
    losses = f" with {', '.join(run['losses'])}" if run["losses"] else ""
    state = run["state"]
    steps = f"{state['step']:,}" + (f" of {state['steps']:,}" if state["steps"] else "") + " steps"
    ending = "done" if state["outcome"] == "done" else f"{state['outcome']}: {state['reason']}"
    student = run.get("student") or "a model that the folder does not name"
    return joined([*name, el("b", student), *moved, *taught, f"{losses}; {steps}, {ending}."])


def key_figures(run: Run) -> list[tuple[str, Child, str]]:
    """Return the few figures at the top: what they are, the figure, and a line under it."""
    found: list[tuple[str, Child, str]] = []
    bits = run.get("bits_per_byte")
    if bits and bits.get("after") is not None:
        before = [f"{bits['before']:.3f}", el("small", " → ")] if bits.get("before") else []
        teacher = f"teacher {bits['teacher']:.3f}" if bits.get("teacher") else "no teacher was measured"
        found.append(("Bits per byte", joined([*before, f"{bits['after']:.3f}"]), teacher))
    rates = run.get("bytes_per_token")
    if rates:
        one = rates[0]
        figure = joined([f"{one['old']:.2f}", el("small", " → "), f"{one['new']:.2f}"])
        found.append(("Bytes per token", figure, one["text"]))
    overlap = run.get("overlap")
    if overlap:
        under = f"of the new: {overlap['shared']:,} tokens"
        found.append(("Shared vocabulary", f"{overlap['share_of_new']:.0%}", under))
    if run["size"].get("parameters"):
        trained = run["size"].get("trained", 0) / run["size"]["parameters"]
        found.append(
            ("Parameters", short(run["size"]["parameters"]), f"{100 * trained:.3g} % of them trained")
        )
    timings = run["timings"]
    if timings.get("seconds"):
        under = f"{timings.get('tokens_per_second', 0):,.0f} tokens per second"
        found.append(("Time", duration(timings["seconds"]), under))
    return found


def duration(seconds: float) -> str:
    """Return a time in the one or two units that matter."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def track(bits: Mapping[str, Any], ends: tuple[float, float]) -> Safe:
    """Return the way from before to after on one scale, with the teacher as a line; a table says it again."""

    def at(name: str) -> str | None:
        value = bits.get(name)
        return None if value is None else f"{100 * (value - ends[0]) / (ends[1] - ends[0]):.2f}%"

    marks: list[Child] = []
    before, after, teacher = at("before"), at("after"), at("teacher")
    if before and after:
        edges = sorted((bits["before"], bits["after"]))
        width = 100 * (edges[1] - edges[0]) / (ends[1] - ends[0])
        left = 100 * (edges[0] - ends[0]) / (ends[1] - ends[0])
        marks.append(el("span", class_="way", style=f"left:{left:.2f}%;width:{width:.2f}%"))
    if teacher:
        marks.append(el("span", class_="teacher", style=f"left:{teacher}"))
    if before:
        marks.append(el("span", class_="dot", style=f"left:{before}"))
    if after:
        marks.append(el("span", class_="dot after", style=f"left:{after}"))
    return el("div", marks, class_="track", aria_hidden="true")


def bits_row(run: Run) -> list[Child]:
    """Return a run's row of the table of bits per byte."""
    bits = run["bits_per_byte"]
    size = bits.get("bytes")
    teacher, before, after = (bits.get(name) for name in ("teacher", "before", "after"))
    return [
        run["name"],
        *(_figure(value) for value in (teacher, before, after)),
        _change(before, after),
        _change(teacher, after),
        f"{size:,}" if isinstance(size, int) else "–",
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _change(old: float | None, new: float | None) -> Child:
    if old is None or new is None:
        return "–"
    return el("td", f"{new - old:+.4f}", class_="good" if new < old else "bad" if new > old else None)


def by_class(found: Mapping[str, Any]) -> Safe:
    """Return bits per byte by class of byte, of each model that was measured."""
    models, shares = found["models"], found["share_of_bytes_by_class"]
    top = max(value for one in models.values() for value in one["bits_per_byte_by_class"].values()) or 1
    rows: list[list[Child]] = []
    for kind, share in shares.items():
        values = [one["bits_per_byte_by_class"][kind] for one in models.values()]
        rows.append([kind, f"{share:.1%}", *(_bar(f"{value:.3f}", value / top) for value in values)])
    totals = [one["bits_per_byte"] for one in models.values()]
    rows.append([el("b", "all"), "100%", *(_bar(f"{value:.3f}", value / top) for value in totals)])
    about = (
        f"Measured for this report on {found['bytes']:,} bytes of {found['documents']:,} documents that all "
        f"these models score, at the beginning of each, of {found['text']['name']}; the run's own figures "
        "are over documents cut at its own lengths. Before: the new vocabulary, without any training."
    )
    head = ("Bytes of", "Share", *(MODELS.get(name, name) for name in models))
    return joined([el("p", about, class_="lead"), table("Bits per byte by kind of character", head, rows)])


def _bar(words: str, share: float) -> Safe:
    return el("td", words, class_="bar", style=f"--w:{100 * min(max(share, 0), 1):.1f}%")


def bytes_per_token(rates: Sequence[Mapping[str, Any]]) -> Safe:
    """Return how many bytes a token of the old and of the new tokenizer stands for, by text."""
    top = max(max(one["old"], one["new"]) for one in rates)
    rows: list[list[Child]] = []
    for one in rates:
        more = round(one["old"] / one["new"] - 1, 2)
        look = "good" if more < 0 else "bad" if more > 0 else None
        bars = [_bar(f"{one[side]:.2f}", one[side] / top) for side in ("old", "new")]
        rows.append(
            [one["text"], f"{one['bytes']:,}", *bars, el("td", f"{more:+.0%}" if more else "0%", class_=look)]
        )
    about = (
        "More bytes per token are shorter sequences. Last: how many tokens more or less the new one writes."
    )
    head = ("Text", "Bytes", "Old", "New", "Tokens")
    return joined([el("p", about, class_="lead"), table("Bytes per token", head, rows)])


def overlap(found: Mapping[str, Any]) -> Safe:
    """Return how far two vocabularies have the same bytes."""
    rows = [
        ["Old", f"{found['old']['ids']:,}", f"{found['old']['strings']:,}", f"{found['share_of_old']:.1%}"],
        ["New", f"{found['new']['ids']:,}", f"{found['new']['strings']:,}", f"{found['share_of_new']:.1%}"],
    ]
    about = f"{found['shared']:,} strings of bytes are a token of both. Special tokens are left out."
    head = ("Tokenizer", "Ids", "Different strings of bytes", "In both")
    return joined([el("p", about, class_="lead"), table("Vocabularies by their bytes", head, rows)])


def embeddings(found: Mapping[str, Any]) -> Safe:
    """Return how many rows were made in which way."""
    counts = {name: count for name, count in found["counts"].items() if count}
    total = sum(counts.values()) or 1
    bar = [el("span", class_=f"f{n % 6}", style=f"flex:{count}") for n, count in enumerate(counts.values())]
    rows = []
    for number, (name, count) in enumerate(counts.items()):
        label = ROWS.get(name, name.replace("_", " "))
        mark = el("i", class_=f"square f{number % 6}", aria_hidden="true")
        rows.append([el("span", mark, f" {label}", class_="key"), f"{count:,}", f"{count / total:.1%}"])
    about = f"Rows of the new embedding before any training, {found['from']}."
    shown = table("Rows by where they come from", ("Row", "Rows", "Share"), rows, class_="keyed")
    return joined([el("p", about, class_="lead"), el("div", bar, class_="stack", aria_hidden="true"), shown])


def alignments(documents: Sequence[Sequence[Mapping[str, Any]]]) -> Safe:
    """Return both tokenizations of some documents, chunk by chunk."""
    about = (
        "New tokenizer above, teacher's below. A box is a chunk: the smallest stretch of text at whose both "
        "ends both have a border. Grey: no partner."
    )
    return joined([el("p", about, class_="lead"), [_aligned(row) for row in documents]])


def _aligned(row: Sequence[Mapping[str, Any]]) -> Safe:
    boxes, number = [], 0
    for cell in row:
        colour = "kn" if cell["chunk"] < 0 else f"k{number % 6}"
        number += cell["chunk"] >= 0
        sides = (
            el("span", [el("bdi", token) for token in cell[side]], class_="side")
            for side in ("student", "teacher")
        )
        boxes.append(el("span", sides, class_=f"cell {colour}"))
    return el("div", boxes, class_="aligned")


def samples(found: Sequence[Mapping[str, str]]) -> Safe:
    """Return what the model goes on with."""
    about = (
        "The most likely continuation, token by token, of the first words of documents, which are in colour."
    )
    quotes = [el("blockquote", el("b", one["prompt"]), one["text"], dir="auto") for one in found]
    return joined([el("p", about, class_="lead"), quotes])


def tasks(runs: Sequence[Run]) -> Safe | None:
    """Return scores of tasks, one column for each run."""
    scores: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for number, run in enumerate(runs):
        for row in run["tasks"]:
            scores.setdefault((row["task"], row["metric"]), {})[number] = row
    if not scores:
        return None
    rows = []
    for (task, metric), found in scores.items():
        cells = []
        for number in range(len(runs)):
            row = found.get(number)
            error = f" ± {row['stderr']:.4f}" if row and row["stderr"] is not None else ""
            cells.append(f"{row['value']:.4f}{error}" if row else "–")
        rows.append([task, metric, *cells])
    head = ("Task", "Metric", *(run["name"] for run in runs))
    return table("Results of lm-eval, with standard errors where it gives them", head, rows)


def configuration(runs: Sequence[Run]) -> Safe | None:
    """Return what differs between runs, and every setting behind a button."""
    names = sorted({name for run in runs for name in run["config"]})
    if not names:
        return None
    rows = [[name, *(el("td", _setting(run, name), class_="words") for run in runs)] for name in names]
    differs = [
        row
        for name, row in zip(names, rows, strict=True)
        if len({_setting(run, name) for run in runs}) > 1 and name not in ("name", "output_dir")
    ]
    head = ("Setting", *(run["name"] for run in runs))
    shown = table("Settings in which the runs differ", head, differs) if differs else None
    return joined(
        [shown, el("details", el("summary", f"All {len(names)} settings"), table("config.yaml", head, rows))]
    )


def _setting(run: Run, name: str) -> str:
    if name not in run["config"]:
        return "–"
    value = run["config"][name]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def origin(runs: Sequence[Run]) -> Safe:
    """Return commands, versions and times."""
    made: list[Child] = []
    for run in runs:
        if len(runs) > 1:
            made.append(el("h3", run["name"]))
        if run["command"]:
            made.append(el("pre", " ".join(run["command"]), aria_label="command"))
        timings, rows = run["timings"], []
        if timings.get("began"):
            rows.append(["Began", timings["began"]])
        if timings.get("seconds") is not None:
            rows.append(["Time", duration(timings["seconds"])])
        if timings.get("resumed"):
            rows.append(["Resumed", f"{timings['resumed']} times"])
        if timings.get("tokens_per_second"):
            rows.append(["Tokens per second (median)", f"{timings['tokens_per_second']:,.0f}"])
        rows += [
            [name.capitalize(), f"{v:,}" if isinstance(v, int) else str(v)] for name, v in run["size"].items()
        ]
        rows += [[name, version] for name, version in run["versions"].items()]
        if rows:
            made.append(table("Versions and times", ("What", "Value"), rows))
        if not run["command"] and not run["versions"]:
            made.append(el("p", "The run kept no command and no versions.", class_="note"))
    return joined(made)


def notes(found: Sequence[str]) -> Safe:
    """Return what the report could not say, and why."""
    return el("ul", [el("li", one) for one in found])
