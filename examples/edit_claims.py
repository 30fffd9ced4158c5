"""Do edits of the bundled model work, and what else do they move? Many facts, 95% intervals by subject.

1. For each method the layer is chosen on facts about subjects of the development half, asked in development sentences:
   the one with the largest mean of the harmonic mean of rewrite, paraphrase and neighbourhood score.
2. Error injection on other facts, about subjects of the other half, one a subject, paraphrased in test sentences; then
   fewer facts for each of the other four problems. Every edit starts from the original weights.
3. Means over facts, with intervals by a bootstrap over subjects.

Every finished edit is a line of ``edits.jsonl``; a run that was stopped goes on where it stopped. The means go to
docs/edit_findings.json, their tables to docs/findings.md.

python -m examples.edit_claims --out build/edit_claims
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

from examples import findings
from factscope import EditFact, EditingSpec, EvaluationSpec, ModelHandle, Probe, Query, evaluate_edit, load, predict
from factscope.demo.facts import TaughtFact, counterfact_records, read_rows, read_sentences
from factscope.demo.probes import probes_of
from factscope.demo.sentences import fill, is_dev
from factscope.editors.compute import edit
from factscope.editors.presets import layers_around
from factscope.experiments.edit_scores import NAMES, SMALLEST_REWRITE, FactScores, summarise
from factscope.experiments.editing import chosen_settings
from factscope.experiments.extraction_rates import mean
from factscope.settings import get_settings

METHODS = ("rome", "memit", "ft")
INJECTION = "error-injection"
OTHERS = ("tracing-reversal", "fact-erasure", "fact-amplification", "fact-forcing")
NUMBERS = "edit_findings.json"
NAMED = {"rome": "ROME", "memit": "MEMIT", "ft": "FT"}
TOLD = {
    "rewrite": "rewrite", "paraphrase": "paraphrase", "neighbourhood": "neighbourhood", "ns": "NS",
    "neighbours_kept": "neighbours kept", "other_relations_kept": "other relations kept",
}  # fmt: skip
UNCHANGED = "unchanged"
"""Share of facts whose rewrite score is nothing: p(target) did not grow, or for an erasure did not fall."""
DEMANDED = {"rewrite": 0.80, "paraphrase": 0.50, "neighbourhood": 0.90}
"""Of ROME, for error injection."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose layers, edit, print the table."""
    options = _options(arguments)
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
    numbers = {
        "schema": 1,
        "model": {"name": model.info.name, "weights": model.info.weights},
        "settings": _manifest(model, options),
        "layers": layers,
        "choosing": by_layer(done, options),
        "reported": reported(done, options),
    }
    options.to.mkdir(parents=True, exist_ok=True)
    (options.to / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    findings.write(options.to)


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


def reported(done: Finished, options: Any) -> list[dict[str, Any]]:
    """One record per method, problem and score: ``method, problem, score, value, low, high, n``."""
    groups = [(method, problem) for method in options.methods for problem in (INJECTION, *OTHERS)]
    return [
        {"method": method, "problem": problem, **one}
        for method, problem in groups
        for one in _means(*done.scores("report", method, problem), options.seed, more=[UNCHANGED])
    ]


def by_layer(done: Finished, options: Any) -> list[dict[str, Any]]:
    """The same on the facts on which layers are chosen, per method and layer."""
    groups = sorted({(options.methods.index(key[1]), int(key[3])) for key in done.rows if key[0] == "choose"})
    return [
        {"method": options.methods[place], "layer": layer, **one}
        for place, layer in groups
        for one in _means(*done.scores("choose", options.methods[place], INJECTION, layer), options.seed)
    ]


def _means(
    scores: Sequence[FactScores], subjects: Sequence[str], seed: int, more: Sequence[str] = ()
) -> list[dict[str, Any]]:
    found = summarise(scores, subjects, seed=seed)
    if UNCHANGED in more:
        nothing = [float(one.rewrite <= SMALLEST_REWRITE) for one in scores]
        found[UNCHANGED] = mean(nothing, subjects, seed=seed)
    return [
        {"score": n, "value": s.value, "low": s.low, "high": s.high, "n": s.n}
        for n in (*NAMES, *more)
        if (s := found[n]).n
    ]


def section(numbers: dict[str, Any]) -> str:
    """What docs/findings.md says of edits."""
    names = list(TOLD)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in numbers["reported"]:
        found.setdefault((one["method"], one["problem"]), {})[one["score"]] = one
    rows = [
        f"| {NAMED[method]}, layer {numbers['layers'][method]} | {problem} | {scores['rewrite']['n']} | "
        + " | ".join(_cell(scores.get(name)) for name in names)
        + " |"
        for (method, problem), scores in found.items()
    ]
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for one in numbers["choosing"]:
        layers.setdefault((one["method"], one["layer"]), {})[one["score"]] = one
    chosen = [
        f"| {NAMED[method]} | {layer}{' **chosen**' if numbers['layers'][method] == layer else ''} | "
        + " | ".join(_cell(scores.get(name), bare=True) for name in (*names, "overall_harmonic"))
        + " |"
        for (method, layer), scores in layers.items()
    ]
    verdicts = [
        f"{name} {one['value']:.2f}, demanded {least:.2f}: {_reached(one, least)}"
        for name, least in DEMANDED.items()
        if (one := found.get(("rome", INJECTION), {}).get(name)) is not None
    ]
    return _SECTION.format(
        heads=" | ".join(TOLD.values()),
        dashes="|".join("---" for _ in names),
        rows="\n".join(rows),
        layers="\n".join(chosen),
        verdicts="; ".join(verdicts),
        unchanged=_unchanged(found),
        against=_against(layers),
        preset=f"`{numbers['settings']['preset'] or 'bundled'}`",
        facts=max((one["n"] for one in numbers["choosing"]), default=0),
        window=numbers["settings"]["memit_window"],
        weights=numbers["model"]["weights"][:12],
    )


def _unchanged(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    problem = "fact-amplification"
    shares = {method: scores[UNCHANGED] for (method, of), scores in found.items() if of == problem}
    return ", ".join(f"{NAMED[m]} {one['value']:.0%} of {one['n']}" for m, one in shares.items()) or "none measured"


def _against(layers: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Rank correlation, over the layers of each method, of what is rewritten and what else is kept."""
    said = []
    for method in dict.fromkeys(method for method, _ in layers):
        of = [scores for (name, _), scores in layers.items() if name == method and "other_relations_kept" in scores]
        if len(of) > 2:
            names = ("rewrite", "other_relations_kept")
            values = pd.DataFrame([[scores[name]["value"] for name in names] for scores in of]).rank()
            said.append(f"{NAMED[method]} {values.corr().iloc[0, 1]:.2f}")
    return ", ".join(said) or "none measured"


def _cell(one: dict[str, Any] | None, *, bare: bool = False) -> str:
    if one is None:
        return "none"
    return f"{one['value']:.2f}" if bare else f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _reached(one: dict[str, Any], least: float) -> str:
    if one["low"] >= least:
        return "reached"
    return "not told by so many facts" if one["high"] >= least else "not reached"


_SECTION = """## Edits

Written by `python -m examples.edit_claims`; the numbers are in [edit_findings.json](edit_findings.json). Weights
`{weights}`, preset {preset}, each edit from the original weights. The layer of each method is the one with the
largest mean of the harmonic mean of rewrite, paraphrase and neighbourhood on {facts} facts of other subjects,
paraphrased in other sentences. MEMIT edits {window} layers together, named by their centre (at the ends those that
are there). Mean over facts, one a subject, with 95% intervals by bootstrap over subjects.

ROME, error injection: {verdicts}.

| method | problem | facts | {heads} |
|---|---|---|{dashes}|
{rows}

Rewrite and paraphrase: the share of what p(target) could gain that it gained (for fact erasure the share of it that
is gone); neighbourhood: one minus how far p(target) moved on prompts of other subjects with the same answer, of how
far it could; NS: the share of those where the true answer still beats the new one; kept: of what was answered right
before, the share that still is, on neighbours and on the same subject's other relations. NS compares the target with
the true answer and is empty where they are the same.

What the numbers say of this model:

- ROME and MEMIT move other relations of the subject most in the layers where they rewrite the fact best (rank
  correlation of the two columns below: {against}). They change what is written at the subject's last token, from which
  every relation of the subject is read; that neighbours stay as they were says nothing about that.
- Fact amplification starts from facts that the model answers, most of them with a p near 1, and the preset ends its
  search once p is above .98. Facts on which nothing was gained at all: {unchanged}.

Error injection by layer, on the facts on which the layer was chosen:

| method | layer | {heads} | harmonic mean |
|---|---|{dashes}|---|
{layers}
"""


def _manifest(model: ModelHandle, options: Any) -> dict[str, Any]:
    decides = ("seed", "preset", "statistics", "memit_window")
    return {"weights": model.info.weights, **{name: getattr(options, name) for name in decides}}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _options(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/edit_claims"), help="where finished edits are kept")
    parser.add_argument("--to", type=Path, default=findings.DOCS, help="folder of the page and its numbers (docs)")
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
