"""Do edits of the bundled model work, and what else do they move? Many facts, 95% intervals by subject.

1. For each method the layer is chosen on facts about subjects of the development half, asked in development sentences:
   the one with the largest mean of the harmonic mean of rewrite, paraphrase and neighbourhood score.
2. Error injection on other facts, about subjects of the other half, one a subject, paraphrased in test sentences; then
   fewer facts for each of the other four problems. Every edit starts from the original weights.
3. Means over facts, with intervals by a bootstrap over subjects.

Every finished edit is a line of ``edits.jsonl``; a run that was stopped goes on where it stopped.

python examples/edit_claims.py --out claims
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd

from factscope import EditFact, EditingSpec, EvaluationSpec, ModelHandle, Probe, Query, evaluate_edit, load, predict
from factscope.demo.facts import TaughtFact, counterfact_records, read_rows, read_sentences
from factscope.demo.probes import probes_of
from factscope.demo.sentences import fill, is_dev
from factscope.editors.compute import edit
from factscope.editors.presets import layers_around
from factscope.experiments.edit_scores import NAMES, FactScores, summarise
from factscope.experiments.editing import chosen_settings
from factscope.settings import get_settings

METHODS = ("rome", "memit", "ft")
INJECTION = "error-injection"
OTHERS = ("tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing")
TOLD = ("rewrite", "paraphrase", "neighbourhood", "ns", "other_relations_kept", "exact_rewrite", "exact_paraphrase",
        "neighbours_kept")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One fact with its new answer and what is asked about it."""

    row: TaughtFact
    new_answer: str
    template: str
    probes: tuple[Probe, ...]

    @property
    def name(self) -> str:
        """What identifies it in the file of finished edits."""
        return f"{self.row.subject}|{self.row.relation}"


def main() -> None:
    """Choose layers, edit, print the table."""
    options = _options()
    import torch

    torch.set_num_threads(get_settings().torch_threads)
    model = load("bundled")
    options.out.mkdir(parents=True, exist_ok=True)
    done = Finished(options.out / "edits.jsonl", _manifest(model, options))
    chosen_on = list(facts(model, options.choose, development=True, seed=options.seed))
    reported_on = list(facts(model, max(options.facts, options.others), development=False, seed=options.seed))
    layers = {}
    for method in options.methods:
        for layer in options.layers or range(model.info.n_layers):
            for claim in chosen_on:
                run(model, claim, method, INJECTION, layer, done, options, stage="choose")
        layers[method] = best_layer(done, method)
        _say(f"{method}: layer {layers[method]} is the best on {len(chosen_on)} facts of the development half")
    for method in options.methods:
        for problem, n in ((INJECTION, options.facts), *((name, options.others) for name in OTHERS)):
            for claim in reported_on[:n]:
                run(model, claim, method, problem, layers[method], done, options, stage="report")
    table = summary(done, options)
    table.to_csv(options.out / "summary.csv", index=False)
    (options.out / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    sys.stdout.write(table[table["score"].isin(TOLD)].to_string(index=False, float_format="{:.3f}".format) + "\n")


def facts(model: ModelHandle, n: int, *, development: bool, seed: int) -> Iterator[Claim]:
    """Facts that the model answers, one a subject, each with a neighbour, in a seeded order."""
    sentences, rows = read_sentences(), read_rows()
    records = counterfact_records()
    order = Random(f"{seed}|{development}").sample(range(len(rows)), len(rows))
    subjects: set[str] = set()
    for index in order:
        row, rewrite = rows[index], records[index]["requested_rewrite"]
        if len(subjects) == n:
            return
        if is_dev(row.subject) != development or row.subject in subjects:
            continue
        prompt = rewrite["prompt"].replace("{}", row.subject)
        asked = probes_of(row, prompt)
        if development:
            held_out = sentences[row.relation].heldout_dev[:3]
            texts = [fill(template, row.subject, row.article, row.answer) for template in held_out]
            asked = tuple(probe for probe in asked if probe.kind != "paraphrase")
            asked += tuple(Probe(kind="paraphrase", prompt=text, answer=row.answer) for text in texts)
        kinds = {probe.kind for probe in asked}
        known = predict(model, Query(prompt=prompt, subject=row.subject, answer=row.answer, occurrence=1)).known
        if known and {"paraphrase", "neighbour"} <= kinds:
            subjects.add(row.subject)
            yield Claim(row=row, new_answer=rewrite["target_new"]["str"], template=rewrite["prompt"], probes=asked)


class Finished:
    """The edits that are done, on disk as they come.

    Raises:
        SystemExit: the file is of a run with other settings.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path = path
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        beside = path.with_name("manifest.json")
        if beside.exists() and json.loads(beside.read_text(encoding="utf-8")) != manifest:
            sys.exit(f"{beside} is of a run with other settings: name another --out")
        beside.write_text(json.dumps(manifest), encoding="utf-8")
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        if written and not written.endswith("\n"):
            path.write_text(f"{written}\n", encoding="utf-8")
        for line in written.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                continue
            self.rows[tuple(row["key"])] = row

    def add(self, key: tuple[str, ...], row: dict[str, Any]) -> None:
        """Keep one more."""
        self.rows[key] = {"key": list(key), **row}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")

    def scores(
        self, stage: str, method: str, problem: str, layer: int | None = None
    ) -> tuple[list[FactScores], list[str]]:
        """Scores and subjects of one group."""
        found = [
            row
            for key, row in self.rows.items()
            if key[:3] == (stage, method, problem) and layer in (None, int(key[3]))
        ]
        scores = [FactScores(**{n: math.nan if v is None else v for n, v in row["scores"].items()}) for row in found]
        return scores, [row["subject"] for row in found]


def run(
    model: ModelHandle, claim: Claim, method: str, problem: str, layer: int, done: Finished, options: Any, *, stage: str
) -> None:
    """One edit and its scores, unless it is done."""
    key = (stage, method, problem, str(layer), claim.name)
    if key in done.rows:
        return
    size = options.memit_window if method == "memit" else 1
    spec = EditingSpec(
        method=method,
        problem=problem,  # type: ignore[arg-type]
        preset=options.preset,
        layers=layers_around(layer, size, model.info.n_layers),
        settings=() if method == "ft" or options.statistics is None else (("statistics", options.statistics),),
    )
    target = claim.new_answer if problem == INJECTION else ""
    fact = EditFact(prompt=claim.template, subject=claim.row.subject, target=target, answer=claim.row.answer)
    made = edit(model, (fact,), chosen_settings(model, spec))
    found = evaluate_edit(model, made, [claim.probes], EvaluationSpec(texts=0, sampled=False))
    scores = {name: None if math.isnan(v) else v for name, v in asdict(found.fact_scores()[0]).items()}
    done.add(key, {"subject": claim.row.subject, "relation": claim.row.relation, "scores": scores})
    _say(f"{len(done.rows)}: {stage} {method} {problem} layer {layer} {claim.row.subject}")


def best_layer(done: Finished, method: str) -> int:
    """The layer with the largest mean of the harmonic mean of the three scores; the lowest of equals."""
    layers = sorted({int(key[3]) for key in done.rows if key[:3] == ("choose", method, INJECTION)})
    means = {n: summarise(*done.scores("choose", method, INJECTION, n))["overall_harmonic"].value for n in layers}
    return max(layers, key=lambda n: (-1.0 if math.isnan(means[n]) else means[n], -n))


def summary(done: Finished, options: Any) -> pd.DataFrame:
    """One row per method, problem and score: ``method, problem, score, value, low, high, n``."""
    rows = []
    for method in options.methods:
        for problem in (INJECTION, *OTHERS):
            scores, subjects = done.scores("report", method, problem)
            found = summarise(scores, subjects, seed=options.seed)
            rows += [(method, problem, n, s.value, s.low, s.high, s.n) for n in NAMES for s in [found[n]] if s.n]
    return pd.DataFrame(rows, columns=["method", "problem", "score", "value", "low", "high", "n"])


def _manifest(model: ModelHandle, options: Any) -> dict[str, Any]:
    decides = ("seed", "preset", "statistics", "memit_window")
    return {"weights": model.info.weights, **{name: getattr(options, name) for name in decides}}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _options(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("edit-claims"))
    parser.add_argument("--facts", type=int, default=200, help="for error injection")
    parser.add_argument("--others", type=int, default=50, help="for each of the other problems")
    parser.add_argument("--choose", type=int, default=50, help="on which layers are chosen")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", nargs="*", type=int, default=[], help="that are tried; all by default")
    parser.add_argument("--memit-window", type=int, default=2, help="layers that MEMIT edits together")
    parser.add_argument("--preset", default=None, help="the model's own by default")
    parser.add_argument("--statistics", default=None, help="auto, identity or a file; the preset's by default")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
