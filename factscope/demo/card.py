"""Puts measured figures into the model card: ``python -m factscope.demo.card SHIPPED.json OTHER.json``.

Joins the files of ``factscope.demo.measure`` into ``measured.json`` (the shipped weights' figures first) and rewrites
the part of ``CARD.md`` between the two marks. A test compares that part with the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from factscope.demo.facts import FOLDER

CARD_FILE = FOLDER / "CARD.md"
MEASURED_FILE = FOLDER / "measured.json"
FIRST_MARK, LAST_MARK = "<!-- figures: written by factscope.demo.card -->", "<!-- end of figures -->"

Figures = Mapping[str, Any]


def rows_of(figures: Figures) -> list[tuple[str, str, str, bool]]:
    """The rows of the card's table for one seed: what, what was demanded, what was measured, whether it holds."""
    accuracy, counts = figures["accuracy"], figures["counts"]
    knockout, lens = figures["knockout"]["all"], figures["lens"]["all"]
    subject, relation = knockout["subject"], knockout["relation"]
    megabytes = figures["folder_bytes"] / 1e6
    test = accuracy["heldout_test"]
    ranks = lens["median_rank"]
    rows = [
        (
            "facts / subjects / relations",
            "2,500 / 1,000 / 18",
            f"{counts['facts']:,} / {counts['subjects']:,} / {counts['relations']}",
            counts["facts"] >= 2500 and counts["subjects"] >= 1000 and counts["relations"] >= 18,
        ),
        ("weights and tokenizer, MB", "<= 25", f"{megabytes:.1f}", megabytes <= 25),
    ]
    for kind, label, must in (
        ("seen", "top-1, seen pairs", 0.98),
        ("unseen", "top-1, unseen (subject, template) pairs", 0.97),
        ("recombined", "top-1, recombined templates", 0.95),
        ("heldout_test", "top-1, held-out sentences, mean", 0.90),
    ):
        one = accuracy[kind]
        text = f"{one['top1']:.3f} {_bounds(one['top1_interval'], 3)}, n {one['n']:,}"
        rows.append((label, f">= {must:.2f}", text, one["top1"] >= must))
    blind = accuracy["heldout_blind"]
    lowest = min(test["by_relation"], key=test["by_relation"].__getitem__)
    rows += [
        (
            "top-1, held-out sentences, lowest relation",
            ">= 0.70",
            f"{test['lowest_relation']:.2f} ({lowest})",
            test["lowest_relation"] >= 0.70,
        ),
        (
            "top-1, held-out sentences of a writer who had seen no other sentence",
            "report",
            f"{blind['top1']:.3f} {_bounds(blind['top1_interval'], 3)}, n {blind['n']:,}",
            True,
        ),
        (
            "mean p(answer), seen pairs",
            ">= 0.90",
            f"{accuracy['seen']['mean_p']:.3f}",
            accuracy["seen"]["mean_p"] >= 0.90,
        ),
        (
            f"knockout last -> subject, best window of {figures['knockout']['window']}",
            "<= -50%",
            f"{subject['best_percent']:.0f}% {_bounds(subject['best_interval'], 0)}, n {knockout['n']:,}",
            subject["best_percent"] <= -50,
        ),
        (
            "its peak, depth",
            "35 to 75%",
            f"layer {subject['peak_layer']}, {subject['peak_depth']:.0%}",
            0.35 <= subject["peak_depth"] <= 0.75,
        ),
        (
            f"knockout last -> relation, best window of {figures['knockout']['window']}",
            "<= -60%",
            f"{relation['best_percent']:.0f}% {_bounds(relation['best_interval'], 0)}",
            relation["best_percent"] <= -60,
        ),
        (
            "its peak, before the subject's",
            f"< layer {subject['peak_layer']}",
            f"layer {relation['peak_layer']}",
            relation["peak_layer"] < subject["peak_layer"],
        ),
        (
            f"lens at subject-last, layers {lens['layers'][0]} to {lens['layers'][-1]}: median rank of own attributes, "
            f"of another subject's, of one of its type, among {lens['answers']:,} answers",
            "own <= 1/3 of another's",
            f"{ranks['own']:g}, {ranks['other_subject']:g}, {ranks['other_of_same_type']:g}",
            3 * ranks["own"] <= ranks["other_subject"],
        ),
    ]
    ends = figures["ends_with_end_token"]
    rows.append(("answer, full stop, end token", "yes", f"{ends['share']:.0%} of {ends['n']}", ends["share"] >= 0.9))
    return rows


def figures_part(seeds: Sequence[Figures]) -> str:
    """The generated part of the card, without its marks."""
    tables = [rows_of(one) for one in seeds]
    names = [f"seed {one['recipe']['seed']}" for one in seeds]
    names[0] += ", shipped"
    lines = ["| what | demanded | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(seeds)]
    for row in zip(*tables, strict=True):
        cells = [f"{text}{'' if holds else ' (**not reached**)'}" for _, _, text, holds in row]
        what = row[0][0]
        demanded = row[0][1] if len({one[1] for one in row}) == 1 else ", ".join(one[1] for one in row)
        lines.append(f"| {what} | {demanded} | " + " | ".join(cells) + " |")
    new = [one["accuracy"]["heldout_blind_new_endings"] for one in seeds]
    cells = [f"{one['top1']:.3f}, n {one['n']:,}" for one in new]
    lines.append(
        "| that writer's sentences whose last word never ended a trained one | report | " + " | ".join(cells) + " |"
    )
    for label, pick in (
        ("only subject-last cut off from the last position, in every layer", "subject-last_everywhere"),
        ("only the subject's other tokens cut off, in every layer", "subject-others_everywhere"),
    ):
        values = [one["knockout"]["several_token_subjects"][pick] for one in seeds]
        cells = [f"{value['percent']:.0f}% {_bounds(value['interval'], 0)}" for value in values]
        lines.append(f"| {label} (subjects of several tokens) | report | " + " | ".join(cells) + " |")
    lines += ["", "Subjects of several tokens alone:", ""]
    lines += ["| what | " + " | ".join(names) + " |", "|---|" + "---|" * len(seeds)]
    several = [one["knockout"]["several_token_subjects"] for one in seeds]
    for source in ("subject", "relation"):
        cells = [f"{s[source]['best_percent']:.0f}% at layer {s[source]['peak_layer']}, n {s['n']:,}" for s in several]
        lines.append(f"| knockout last -> {source} | " + " | ".join(cells) + " |")
    ranks = [one["lens"]["several_token_subjects"]["median_rank"] for one in seeds]
    cells = [f"{r['own']:g}, {r['other_subject']:g}, {r['other_of_same_type']:g}" for r in ranks]
    lines.append("| lens ranks: own, another subject's, one of its type | " + " | ".join(cells) + " |")
    lines += ["", "Curves, mean relative change in percent by the window's middle layer:", ""]
    for one, name in zip(seeds, names, strict=True):
        for source in ("subject", "relation"):
            curve = ", ".join(f"{value:.0f}" for value in one["knockout"]["all"][source]["curve_percent"])
            lines.append(f"- {name}, last -> {source}: {curve}")
    lines += ["", "| question | answer | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(seeds)]
    for asked in zip(*(one["questions"] for one in seeds), strict=True):
        cells = [f"rank {one['rank']}, p {one['p']:.3f}" for one in asked]
        lines.append(f"| {asked[0]['prompt']} | {asked[0]['answer']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "SHA-256 of each file `model.safetensors` (the fingerprint on pages and in outputs is something else: a hash",
        "of the loaded tensors):",
        "",
    ]
    lines += [f"- {name}: `{one['weights_sha256']}`" for one, name in zip(seeds, names, strict=True)]
    return "\n".join(lines)


def with_figures(card: str, part: str) -> str:
    """The card's text with its generated part replaced."""
    before, rest = card.split(FIRST_MARK)
    after = rest.split(LAST_MARK)[1]
    return f"{before}{FIRST_MARK}\n\n{part}\n\n{LAST_MARK}{after}"


def main(
    measured: Annotated[list[Path], typer.Argument(help="One JSON of factscope.demo.measure per seed, shipped first.")],
) -> None:
    """Writes measured.json and the card's figures."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in measured]
    MEASURED_FILE.write_text(
        json.dumps({"shipped": seeds[0]["recipe"]["seed"], "seeds": seeds}, indent=1) + "\n", encoding="utf-8"
    )
    CARD_FILE.write_text(with_figures(CARD_FILE.read_text(encoding="utf-8"), figures_part(seeds)), encoding="utf-8")


def _bounds(values: Sequence[float], digits: int) -> str:
    low, high = values
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    typer.run(main)
