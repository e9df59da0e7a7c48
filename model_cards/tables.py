"""A run's tables in Markdown, for the card; laid out to read well as plain text on a terminal too."""

from __future__ import annotations

import json
import re
import unicodedata


ZWJ = "\u200d"  # joins emoji
SHOWN = 300  # characters of a caption on a card
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
RECALL = """A query counts as answered at k when a right item is among its first k
results; ties count against the model. rsum is the sum of the six recalls, at most 600."""
AGREEMENT = """Agreement with the teacher is the share, in percent, of what the teacher finds first for an image or a
text that the student finds first too: of the first ten, or the first tenth where that is less. It needs no pairs."""
NO_PAIRS = (
    "The {split} split has no pairs: nobody has measured how often the student finds what a person would, only how "
    "often it finds what its teacher finds."
)


def figures(metrics: dict[str, float], key: str) -> list[str]:
    """Names, without the split's prefix, of all recalls and rsums of a split, those of folds (`1k_...`) included; none
    of a split without pairs.

    Args:
        metrics: as in `all_results.json`.
        key: the prefix, "eval" or "test".
    """
    folds = [match[1] or "" for name in metrics if (match := re.fullmatch(rf"{key}_(\w+_)?rsum", name))]
    return [fold + name for fold in folds for name in (*RECALLS, "rsum")]


def results_table(metrics, key="test", baseline=None, teacher_parameters=None, split=None) -> str:
    """Recalls, size and speed as Markdown that reads well as plain text.

    Args:
        metrics: as in `all_results.json`.
        key: prefix of the split's figures, "eval" or "test".
        baseline: the metrics of the same student trained without a teacher; None leaves the column out.
        teacher_parameters: how many parameters the teacher has; None leaves the cell empty.
        split: the split's name; None: the key.
    """
    has_teacher = f"teacher_{key}_rsum" in metrics
    columns = [("student", metrics, f"{key}_"), ("teacher", metrics, f"teacher_{key}_")][: 1 + has_teacher]
    columns += [("plain contrastive", baseline, f"{key}_")] if baseline else []
    last = ["share kept"] if has_teacher else []
    rows = [
        [f"{as_text(split or key)} split, {metrics[f'{key}_images']:,} images", *(name for name, *_ in columns), *last]
    ]
    if f"{key}_pairs" in metrics:
        rows.append(["recall is of pairs", f"{metrics[f'{key}_pairs']:,}"])
    for name in figures(metrics, key):
        row = [name.replace("_", " "), *(_cell(of.get(prefix + name), "{:.1f}") for _, of, prefix in columns)]
        teacher = metrics.get(f"teacher_{key}_{name}")
        row += [f"{100 * metrics[f'{key}_{name}'] / teacher:.1f} %" if teacher else "-"] if has_teacher else []
        rows.append(row)
    if f"{key}_agreement" in metrics:
        rows.append(["agreement with the teacher", f"{metrics[f'{key}_agreement']:.1f}"])
        rows.append(["agreement by chance", f"{metrics[f'{key}_agreement_by_chance']:.1f}"])
    if f"teacher_reduced_{key}_rsum" in metrics:
        rows.append(["rsum at the student's width", "", f"{metrics[f'teacher_reduced_{key}_rsum']:.1f}"])
    for name in sorted(metrics, key=_width_of, reverse=True):
        if name.startswith(f"{key}_rsum_at_"):
            of_teacher = metrics.get(f"teacher_{name}")
            row = [f"rsum at {_width_of(name)} numbers", *(_cell(of.get(name), "{:.1f}") for _, of, _ in columns)]
            if has_teacher:
                row[2] = _cell(of_teacher, "{:.1f}")
                row.append(f"{100 * metrics[name] / of_teacher:.1f} %" if of_teacher else "-")
            rows.append(row)
    own = {"student": metrics, "teacher": {"parameters": teacher_parameters}, "plain contrastive": baseline}
    speeds = {f"ms_per_{of}_batch_{n}": f"ms per {of}, batch {n}" for of in ("image", "caption") for n in (1, 64)}
    for name, label in {"parameters": "parameters", **speeds}.items():
        form, unit = ("{:.2f} M", 1e6) if name == "parameters" else ("{:.2f}", 1)
        if name in metrics:
            rows.append([label, *(_cell(own[column].get(name), form, unit) for column, *_ in columns)])
    return markdown_table(rows)


def how_to_read(metrics: dict[str, float], key: str | None, by_index: bool) -> str:
    """What the figures of a split mean."""
    of_pairs = [RECALL, equal_captions(metrics, key, by_index)] if f"{key}_rsum" in metrics else []
    texts = [" ".join(filter(None, of_pairs)), AGREEMENT if f"{key}_agreement" in metrics else ""]
    return "\n\n".join(filter(None, texts))


def equal_captions(metrics: dict[str, float], key: str | None, by_index: bool) -> str:
    """What counts as right where captions stand for several images; "" where none does."""
    if f"{key}_shared_captions" not in metrics:
        return ""
    text = f"{metrics[f'{key}_shared_captions']:.3g} % of the captions stand for several images, "
    rule, other = ("of which only its own is", "all were") if by_index else ("each of which is", "only its own was")
    text += f"{rule} a right answer"
    rsum = metrics.get(f"{key}_rsum_by_{'text' if by_index else 'index'}")
    return f"{text}." if rsum is None else f"{text}; if {other}, rsum would be {rsum:.1f}."


def width_note(metrics: dict[str, float], key: str | None) -> str:
    """How a student is cut to fewer numbers and what it keeps then; "" where its numbers are not sorted."""
    widths = [name for name in metrics if name.startswith(f"{key}_rsum_at_")]
    if not widths:
        return ""
    name = min(widths, key=lambda name: (abs(_width_of(name) - 64), name))
    return (
        "The numbers of an embedding are sorted: the first say most. For a smaller index keep the first "
        f"{_width_of(name)} and normalise again (`SentenceTransformer(..., truncate_dim={_width_of(name)})`): rsum "
        f"{metrics[name]:.1f} instead of {metrics[f'{key}_rsum']:.1f}."
    )


def across_table(metrics: dict[str, float], key: str = "test") -> str:
    """Recalls of the student's queries on the teacher's index and the reverse; "" if they were not measured."""
    rows = [["", "student on teacher's index", "teacher on student's index"]]
    for name in (*RECALLS, "rsum") if f"teacher_index_{key}_rsum" in metrics else ():
        values = (metrics[f"{index}_index_{key}_{name}"] for index in ("teacher", "student"))
        rows.append([name.replace("_", " "), *(f"{value:.1f}" for value in values)])
    return markdown_table(rows) if rows[1:] else ""


def data_table(data: dict[str, dict]) -> str:
    rows = [["split", "images", "captions", "captions per image", "words per caption"]]
    for name, of in data.items():
        spreads = (of["captions_per_image"], of["words_per_caption"])
        spreads = [f"{mean:.1f} ({least} to {most})" for mean, least, most in spreads]
        rows.append([as_text(name), f"{of['images']:,}", f"{of['captions']:,}", *spreads])
    return markdown_table(rows) if data else ""


def samples_table(samples: list[list[str]]) -> str:
    rows = [["image", "captions"]]
    for i, captions in enumerate(samples, start=1):
        rows.append([f"![sample {i}](assets/sample_{i}.png)", "; ".join(map(as_text, captions))])
    return markdown_table(rows) if samples else ""


def bullets(values: dict[str, object]) -> str:
    values = {name: json.dumps(of) if isinstance(of, dict | list) else of for name, of in values.items()}
    return "\n".join(f"- {as_code(name)}: {as_text(of)}" for name, of in values.items())


def as_text(value: object) -> str:
    """Any value as one line of Markdown text, escaped: no markup, no link, no end of a table's cell, no controls."""
    text = re.sub(r"([\\`*\[\]|<>&$~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(value))
    return text.replace("://", ":\\//")  # no link


def as_code(value: object) -> str:
    """Any value as one code span, which may stand in a table."""
    return f"`{one_line(value).replace('`', chr(39)).replace('|', '/') or ' '}`"


def one_line(value: object) -> str:
    return without_controls(" ".join(str(value).split()))


def without_controls(text: str) -> str:
    """The text with U+FFFD for control characters, invisible ones (some turn the direction of writing) and surrogates.

    The joiner of emoji is kept.
    """
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") and char != ZWJ else char for char in text
    )


def fenced(text: str, language: str = "") -> str:
    """A block of code, fenced by more backticks than any line of the text starts with, so that none can end it."""
    runs = re.findall(r"^\s*(`+)", text, re.MULTILINE)
    fence = "`" * max(3, *(len(run) + 1 for run in runs), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(rows: list[list[str]]) -> str:
    """A table that reads well as plain text too; the first row is its header, shorter rows end in empty cells."""
    rows = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _width_of(name: str) -> int:
    return int(width) if (width := name.rpartition("_at_")[2]).isdecimal() else 0


def _cell(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)
