"""Which claims of two papers hold on the bundled model? Writes docs/findings.json and docs/findings.md.

Geva et al. 2023, Dissecting Recall of Factual Associations; Meng et al. 2022 and Hase et al. 2023 for tracing.

python -m examples.recall_claims --second FOLDER --work build/recall_claims

The second seed's folder comes from ``python -m factscope.demo.train --seed 1 --out FOLDER``. What is measured is kept
under ``--work``, a file for each model and a line for each fact, so that a run that was stopped goes on.
``python -m examples.findings`` writes the page again from the JSON.

1. Layers at which a claim is tested are chosen on 40 facts of other subjects, for each model apart.
2. Every fact gives one number for each claim, or none, with the reason.
3. The mean over facts has a 95% interval by bootstrap over subjects. A claim is reproduced where the interval lies
   above what it demands and above that of random weights; contradicted where it lies below; else undecided.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples import findings
from examples.recall_measures import Drawn, Record, draw, known, measure, query_of, rates
from factscope import ModelHandle, load
from factscope.demo.prompts import Asked
from factscope.experiments.extraction_rates import Share, mean

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = findings.DOCS / "findings.json"
CHOOSING = 40
FEWEST = 30
"""Facts below which nothing is said of a claim."""
SEED = 1

GEVA = "Geva et al. 2023, section "
MENG = "Meng et al. 2022, section "
HASE = "Hase et al. 2023, "

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Where claims are tested: per curve the layer at which it is largest on the facts for choosing."""

    n: int
    subject: int
    relation: int
    last: int
    rate: int
    mlp: int
    early: int
    early_mlp: int
    late_attention: int
    zeroed: int

    @property
    def half(self) -> int:
        """The first layer of the upper half."""
        return (self.n + 1) // 2


Value = Callable[[Record, Layers], float | None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of a paper and the number that tests it.

    Attributes:
        value: of one fact; None leaves the fact out, for the reason in ``without``.
        at_least: what the mean must exceed for the claim to hold.
        published: what the source reports of its own models; empty where no number is at hand.
        shaped: which choice of the bundled model's training brings it about, if one does.
        beats_null: whether it must be more than on random weights; where not, the page says if they do it, too.
    """

    key: str
    text: str
    source: str
    unit: str
    value: Value
    at_least: float = 0.0
    without: str = ""
    published: str = ""
    shaped: str = ""
    beats_null: bool = True


@dataclass(frozen=True, kw_only=True)
class Untested:
    """A claim that cannot be tested here."""

    text: str
    source: str
    why: str


NAMES = "names are several tokens each, as the tokenizer was made to give"
PARAGRAPHS = "paragraphs state all facts of a subject after its name"


def _lost(record: Record, site: str, layers: Sequence[int]) -> float | None:
    """Share of the attributes rate that is gone without a sublayer's updates, mean over centres of windows, percent."""
    base = record["rate to lose"]
    if not base:
        return None
    found = [record[f"rate without {site}"][k] for k in layers if k < len(record[f"rate without {site}"])]
    return 100.0 * (base - float(np.mean(found))) / base if found else None


def _share(record: Record, name: str, layer: int) -> float | None:
    """Indirect effect as a percentage of the total effect."""
    total = record["total effect"]
    return 100.0 * record[name][layer] / total if total > 0.05 else None


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _beyond_control(record: Record, source: str, layer: int) -> float | None:
    """Percent of p that a cut takes, minus what cutting as many matched positions takes."""
    if "removed control" not in record:
        return None
    return record[f"removed {source}"][layer] - record["removed control"][layer]


def _depth(curve: Sequence[float]) -> float:
    """Middle of the layer with the largest loss, as a percentage of the depth."""
    return 100.0 * (int(np.argmin(curve)) + 0.5) / len(curve)


def _events(record: Record, without: str = "") -> float:
    """1 where some layer's attention update has the target on top."""
    return float(1 in record["update rank" + (f" without {without}" if without else " attention")])


def _first(record: Record, site: str = "attention") -> int | None:
    ranks = record[f"update rank {site}"]
    return ranks.index(1) if 1 in ranks else None


def _early_loss(record: Record, layers: Layers) -> float | None:
    """Share of the extracting layers that extract no more with the subject's embeddings in place of its states."""
    events = [k for k, rank in enumerate(record["update rank attention"]) if rank == 1 and k > 0]
    if not events or 0 not in record["early layers"]:
        return None
    kept = record["early rank"][record["early layers"].index(0)]
    return 100.0 * float(np.mean([kept[k] != 1 for k in events]))


def _first_of_two(record: Record, layers: Layers) -> float | None:
    attention, mlp = _first(record), _first(record, "mlp")
    if attention is None and mlp is None:
        return None
    if attention is None or mlp is None:
        return 100.0 if mlp is None else -100.0
    return 100.0 * float(np.sign(mlp - attention))


def _raised(record: Record, layers: Layers) -> float | None:
    """Orders of magnitude between the answer's rank in the state that enters the first extracting layer, and rank 1."""
    at = _first(record)
    return None if at is None or not record["state rank"][at] else float(np.log10(record["state rank"][at]))


def _mapped(record: Record, layers: Layers) -> float | None:
    events = [k for k, rank in enumerate(record["update rank attention"]) if rank == 1]
    return 100.0 * any(record["mapping"][k] for k in events) if events else None


def _blocked(name: str) -> Value:
    return lambda r, w: 100.0 * (_events(r) - _events(r, name)) if _events(r) else None


def _several(value: Value) -> Value:
    return lambda r, w: value(r, w) if r["subject_tokens"] > 1 else None


def _agreement(record: Record, layers: Layers) -> float | None:
    """Rank correlation over layers of what zeroing takes and what restoring gives back."""
    left, right = (np.argsort(np.argsort(record[name])) for name in ("zeroed", "tracing effect"))
    flat = np.ptp(record["zeroed"]) == 0 or np.ptp(record["tracing effect"]) == 0
    return None if flat else float(np.corrcoef(left, right)[0, 1])


def _own_peak(record: Record, layers: Layers) -> float:
    return 100.0 * float(abs(int(np.argmax(record["tracing effect"])) - layers.mlp) > 1)


NO_CONTROL = "there are no matched positions"
NO_RELATION = "the relation has no token of its own"
NO_EVENT = "no layer's attention has the answer on top"
NO_RATE = "the attributes rate is 0 with nothing cancelled"
NO_EFFECT = "the corruption takes less than .05 of the probability"
ONE_TOKEN = "the subject is one token"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        key="subject read",
        text="Cutting the last position off from the subject, in one window of layers, takes much of the answer's p",
        source=GEVA + "4",
        unit="% of p",
        value=lambda r, w: r["removed subject"][w.subject],
        at_least=20,
        published="up to about 60% (GPT-2 XL, GPT-J)",
    ),
    Claim(
        key="subject depth",
        text="The subject is read in the upper half of the layers",
        source=GEVA + "4",
        unit="% of depth, of the largest loss of log-odds, above 50",
        value=lambda r, w: _depth(r["odds subject"]) - 50,
        shaped=NAMES,
    ),
    Claim(
        key="relation read",
        text="Cutting the last position off from the relation takes much of the answer's p, too",
        source=GEVA + "4",
        unit="% of p",
        value=lambda r, w: r["removed relation"][w.relation] if "removed relation" in r else None,
        at_least=20,
        without=NO_RELATION,
    ),
    Claim(
        key="subject not others",
        text="Cutting off the subject takes more than cutting off as many other positions (our control)",
        source=GEVA + "4",
        unit="% of p, subject minus matched positions",
        value=lambda r, w: _beyond_control(r, "subject", w.subject),
        without=NO_CONTROL,
    ),
    Claim(
        key="order",
        text="The relation is read before the subject: two points of information flow",
        source=GEVA + "4",
        unit="% of depth between the largest losses of log-odds",
        value=lambda r, w: _depth(r["odds subject"]) - _depth(r["odds relation"]) if "odds relation" in r else None,
        without=NO_RELATION,
    ),
    Claim(
        key="last",
        text="Cutting the last position off from itself matters less than cutting it off from the subject",
        source=GEVA + "4",
        unit="% of p, subject minus last",
        value=lambda r, w: r["removed subject"][w.subject] - r["removed last"][w.last],
    ),
    Claim(
        key="enriched",
        text="The state of the subject's last token is enriched with the subject's attributes",
        source=GEVA + "5",
        unit="points of attributes rate, own minus other subjects'",
        value=lambda r, w: r["rate subject-last"][w.rate] - r["other rate subject-last"][w.rate],
        published="the rate rises to about 50% (GPT-2 XL; attributes from Wikipedia)",
        shaped=PARAGRAPHS,
    ),
    Claim(
        key="grows",
        text="The enrichment is made in the layers: the input embeddings have less of it",
        source=GEVA + "5",
        unit="points of attributes rate, over the mean input embedding",
        value=lambda r, w: r["rate subject-last"][w.rate] - r["rate mean-embedding"][0],
        shaped=PARAGRAPHS,
    ),
    Claim(
        key="where enriched",
        text="The subject's last token is more enriched than its first",
        source=GEVA + "5",
        unit="points of attributes rate",
        value=_several(lambda r, w: r["rate subject-last"][w.rate] - r["rate subject-first"][w.rate]),
        without=ONE_TOKEN,
        shaped=PARAGRAPHS,
    ),
    Claim(
        key="mlp enriches",
        text="Cancelling early MLP updates at the subject takes much of the attributes rate",
        source=GEVA + "5",
        unit="% of the rate, windows of the lower half",
        value=lambda r, w: _lost(r, "mlp", range(w.half)),
        at_least=20,
        without=NO_RATE,
    ),
    Claim(
        key="early mlp",
        text="Early MLP updates matter more for enrichment than later ones",
        source=GEVA + "5",
        unit="% of the rate, lower half minus later windows",
        value=lambda r, w: _difference(_lost(r, "mlp", range(w.half)), _lost(r, "mlp", range(w.half, w.rate + 1))),
        without=NO_RATE,
    ),
    Claim(
        key="mlp not attention",
        text="MLP updates enrich more than attention updates do",
        source=GEVA + "5",
        unit="% of the rate, MLP minus attention, windows of the lower half",
        value=lambda r, w: _difference(_lost(r, "mlp", range(w.half)), _lost(r, "attention", range(w.half))),
        without=NO_RATE,
    ),
    Claim(
        key="extraction",
        text="For most queries some layer's attention update has the answer on top",
        source=GEVA + "6",
        unit="% of facts",
        value=lambda r, w: 100.0 * _events(r),
        at_least=50,
        published="about 68% (GPT-2 XL)",
    ),
    Claim(
        key="attention first",
        text="Attention extracts before the MLP, or alone",
        source=GEVA + "6",
        unit="% of facts, attention first minus MLP first",
        value=_first_of_two,
        without="neither has the answer on top",
    ),
    Claim(
        key="extraction depth",
        text="Extraction happens in the upper half of the layers",
        source=GEVA + "6",
        unit="% of depth of the first extracting layer, above 50",
        value=lambda r, w: None if (at := _first(r)) is None else 100.0 * (at + 0.5) / w.n - 50,
        without=NO_EVENT,
        shaped=NAMES,
    ),
    Claim(
        key="extracted from subject",
        text="What is extracted is read from the subject: without its positions the event is gone",
        source=GEVA + "6",
        unit="% of facts with an event",
        value=_blocked("subject"),
        at_least=20,
        without=NO_EVENT,
    ),
    Claim(
        key="subject not relation",
        text="Extraction needs the subject's positions more than the relation's",
        source=GEVA + "6",
        unit="% of facts with an event, subject minus relation",
        value=lambda r, w: _difference(_blocked("subject")(r, w), _blocked("relation")(r, w)),
        without=NO_EVENT,
    ),
    Claim(
        key="needs enrichment",
        text="With the subject's early states in place of its enriched ones, extraction fails more often",
        source=GEVA + "6",
        unit="% of extracting layers, states entering layer 0 put in",
        value=_early_loss,
        at_least=20,
        published="up to about 50% (GPT-2 XL)",
        without=NO_EVENT + " above layer 0",
    ),
    Claim(
        key="raised",
        text="Attention raises the answer: it is far from the top in the subject's state that the layer reads",
        source=GEVA + "6",
        unit="log10 of its rank there",
        value=_raised,
        at_least=0.5,
        without=NO_EVENT,
        beats_null=False,
    ),
    Claim(
        key="mappings",
        text="Heads of extracting layers often map the subject to the answer in their parameters alone",
        source=GEVA + "6",
        unit="% of facts with an event",
        value=_mapped,
        at_least=20,
        without=NO_EVENT,
    ),
    Claim(
        key="corruption",
        text="Noise on the subject's embeddings takes most of the answer's p",
        source=MENG + "2.2",
        unit="% of p",
        value=lambda r, w: 100.0 * r["total effect"] / r["p"],
        at_least=50,
        published="27.0% to 8.5%: 69% of p (GPT-2 XL)",
        beats_null=False,
    ),
    Claim(
        key="early site",
        text="The state of the subject's last token, in a layer of the lower half, carries the fact",
        source=MENG + "2.2",
        unit="% of the total effect",
        value=_several(lambda r, w: _share(r, "effect subject-last", w.early)),
        at_least=15,
        without=f"{NO_EFFECT}, or {ONE_TOKEN}",
        published="8.7 of 18.6 points: 47% (GPT-2 XL, layer 15)",
    ),
    Claim(
        key="last token of the subject",
        text="There, the subject's last token carries more than its first",
        source=MENG + "2.2",
        unit="% of the total effect, last minus first",
        value=_several(
            lambda r, w: _difference(
                _share(r, "effect subject-last", w.early), _share(r, "effect subject-first", w.early)
            )
        ),
        without=f"{NO_EFFECT}, or {ONE_TOKEN}",
        shaped=NAMES,
    ),
    Claim(
        key="late site",
        text="The last position's state carries the answer before the last layers (below 0.7 of the depth)",
        source=MENG + "2.2",
        unit="% of the total effect",
        value=lambda r, w: _share(r, "effect last", int(np.ceil(0.7 * w.n)) - 1),
        at_least=60,
        without=NO_EFFECT,
    ),
    Claim(
        key="mlp early",
        text="At the subject's last token, MLP updates carry more than attention updates",
        source=MENG + "2.2",
        unit="% of the total effect, MLP minus attention",
        value=lambda r, w: _difference(
            _share(r, "mlp subject-last", w.early_mlp), _share(r, "attention subject-last", w.early_mlp)
        ),
        without=NO_EFFECT,
        published="6.6 against 1.6 points on average (GPT-2 XL)",
    ),
    Claim(
        key="attention late",
        text="At the last position, attention updates carry more than MLP updates",
        source=MENG + "2.2",
        unit="% of the total effect, attention minus MLP",
        value=lambda r, w: _difference(
            _share(r, "attention last", w.late_attention), _share(r, "mlp last", w.late_attention)
        ),
        without=NO_EFFECT,
    ),
    Claim(
        key="severed",
        text="The early site acts through MLPs: severing them takes more of its effect than severing attention",
        source=MENG + "2.2",
        unit="% of the total effect, lower half",
        value=lambda r, w: _difference(
            *(
                None if r["total effect"] <= 0.05 else 100 * float(np.mean(r[name][: w.half])) / r["total effect"]
                for name in ("severed attention", "severed mlp")
            )
        ),
        without=NO_EFFECT,
    ),
    Claim(
        key="own peak",
        text="Facts differ: the tracing peak of many lies farther than one layer from that of the average",
        source=HASE + "histogram of peak layers",
        unit="% of facts",
        value=_own_peak,
        at_least=20,
        beats_null=False,
    ),
    Claim(
        key="zeroing",
        text="Zeroing MLP updates at the subject and restoring them point to the same layers",
        source=HASE + "representation zeroing",
        unit="rank correlation over layers",
        value=_agreement,
        without="one of the two is the same in every layer",
    ),
)

UNTESTED: tuple[Untested, ...] = (
    Untested(
        text="Tracing effects do not predict in which layer an edit works",
        source=HASE + "section 5",
        why="it takes the regression of edit scores on layers and tracing effects over many facts",
    ),
    Untested(
        text="The enriched state holds attributes that text about the subject names, at a rate of about 50%",
        source=GEVA + "5",
        why="the bundled model knows no text about its subjects but their facts: the ceiling is those few attributes",
    ),
    Untested(
        text="The same on GPT-2 XL, GPT-J and other models",
        source=GEVA + "4 to 6",
        why="measured on the models named here only; `--model NAME` measures another one on these facts",
    ),
)


# ---------------------------------------------------------------------------- measuring


def choose(records: Sequence[Record], n_layers: int) -> Layers:
    """The layer of the largest mean of each curve."""
    half = (n_layers + 1) // 2

    def largest(name: str, stop: int | None = None, begin: int = 0) -> int:
        curves = [record[name] for record in records if record.get(name)]
        return begin + int(np.argmax(np.mean(curves, axis=0)[begin:stop])) if curves else begin

    return Layers(
        n=n_layers,
        subject=largest("removed subject"),
        relation=largest("removed relation"),
        last=largest("removed last"),
        rate=largest("rate subject-last"),
        mlp=largest("tracing effect"),
        early=largest("effect subject-last", half),
        early_mlp=largest("mlp subject-last", half),
        late_attention=largest("attention last", begin=half),
        zeroed=largest("zeroed"),
    )


def read_layer(model: ModelHandle, asked: Sequence[Asked], *, own_answer: bool) -> int:
    """The layer with the highest mean attributes rate at the subject's last token."""
    curves = [rates(model, query_of(one, own_answer=own_answer))["rate subject-last"] for one in asked]
    return int(np.argmax(np.mean(curves, axis=0)))


def lines_of(path: Path, make: Iterator[tuple[str, Callable[[], Record]]]) -> list[Record]:
    """Records by their key, one JSON line each; what the file has already is not measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    stored = {record["key"]: record for record in map(json.loads, whole.splitlines())}
    found = []
    with path.open("a", encoding="utf-8") as file:
        for key, measured in make:
            if key not in stored:
                stored[key] = {"key": key, **measured()}
                file.write(json.dumps(stored[key]) + "\n")
                file.flush()
            found.append(stored[key])
            if len(found) % 20 == 0:
                log.info("%s: %d", path.stem, len(found))
    return found


def measured(
    model: ModelHandle, facts: Sequence[tuple[Asked, str | None]], choosing: Sequence[Asked], *, work: Path, null: bool
) -> tuple[Layers, list[Record]]:
    """Layers chosen on some facts, and the records of the others that are not left out."""
    layer = read_layer(model, choosing, own_answer=null)
    name = hashlib.sha256(f"{model.key}|{layer}|{null}|{SEED}".encode()).hexdigest()[:12]

    def records(asked: Sequence[Asked], what: str) -> list[Record]:
        def make() -> Iterator[tuple[str, Callable[[], Record]]]:
            for one in asked:
                yield one.text, lambda one=one: measure(model, one, read_layer=layer, own_answer=null)

        return lines_of(work / f"{what}-{name}.jsonl", make())

    chosen = choose(records(choosing, "choosing"), model.info.n_layers)
    kept = records([one for one, reason in facts if reason is None], "facts")
    return Layers(**{**chosen.__dict__, "rate": layer}), kept


def summed(claim: Claim, layers: Layers, records: Sequence[Record]) -> dict[str, Any]:
    """Mean with its interval, how many facts, and how many are left out."""
    pairs = [(claim.value(record, layers), record["subject"]) for record in records]
    kept = [(value, subject) for value, subject in pairs if value is not None and np.isfinite(value)]
    share: Share = mean([value for value, _ in kept], [subject for _, subject in kept], seed=SEED)
    return {
        "effect": share.value,
        "interval": [share.low, share.high],
        "n": share.n,
        "subjects": len({subject for _, subject in kept}),
        "left_out": len(pairs) - len(kept),
    }


def verdict(claim: Claim, found: dict[str, Any], null: dict[str, Any]) -> str:
    """Reproduced, contradicted, shaped by training or undecided."""
    low, high = found["interval"]
    if found["n"] < FEWEST:
        return "undecided"
    if high < claim.at_least:
        return "contradicted"
    above = not claim.beats_null or null["n"] < FEWEST or low > null["interval"][1]
    if low <= claim.at_least or not above:
        return "undecided"
    return "shaped by training" if claim.shaped else "reproduced"


def run(model: str, second: str | None, *, facts: int, choosing: int, work: Path) -> dict[str, Any]:
    """All models, as one object for the JSON file."""
    drawn: Drawn = draw(SEED)
    names = {"bundled": model, **({"second seed": second} if second else {}), "random weights": f"random:{model}"}
    tables: dict[str, Any] = {}
    results: dict[str, tuple[Layers, list[Record]]] = {}
    taken: list[tuple[Asked, str | None]] = []
    for title, name in names.items():
        log.info("%s: %s", title, name)
        handle, null = load(name), name.startswith("random:")
        if not null:
            taken = list(known(handle, drawn.measured, facts))
        elif title == "random weights":
            taken = list(known(load(model), drawn.measured, facts))
        on = [one for one, reason in known(load(model) if null else handle, drawn.choosing, choosing) if reason is None]
        results[title] = measured(handle, taken, on, work=work, null=null)
        tables[title] = {
            "weights": handle.info.weights,
            "facts": sum(reason is None for _, reason in taken),
            "subjects": len({one.row.subject for one, reason in taken if reason is None}),
            "left_out": dict(Counter(reason for _, reason in taken if reason is not None)),
            "layers": results[title][0].__dict__,
        }
    claims = []
    for claim in CLAIMS:
        sums = {title: summed(claim, *found) for title, found in results.items()}
        for title in sums.keys() - {"random weights"}:
            sums[title]["verdict"] = verdict(claim, sums[title], sums["random weights"])
        claims.append({"key": claim.key, "models": sums})
    return {
        "schema": 1,
        "seed": SEED,
        "models": tables,
        "relations_left_out": list(drawn.left_out),
        "claims": claims,
    }


# ---------------------------------------------------------------------------- the page


def page(found: dict[str, Any]) -> str:
    """The first part of docs/findings.md."""
    titles = list(found["models"])
    by_key = {claim.key: claim for claim in CLAIMS}
    rows, notes = [], []
    for number, one in enumerate(found["claims"], start=1):
        claim = by_key[one["key"]]
        cells = " | ".join(_cell(one["models"][title]) for title in titles)
        demanded = f"> {claim.at_least:g}"
        rows.append(f"| {number} | {claim.text} ({claim.source}) | {claim.unit}; {demanded} | {cells} |")
        said = [f"published: {claim.published}"] if claim.published else []
        said += [f"shaped: {claim.shaped}"] if claim.shaped else []
        chance = one["models"].get("random weights", {"n": 0})
        if not claim.beats_null and chance["n"] and chance["interval"][0] > claim.at_least:
            said += ["random weights do it, too: no sign of recall by itself"]
        left = [f"{title} {one['models'][title]['left_out']}" for title in titles if one["models"][title]["left_out"]]
        said += [f"left out, since {claim.without}: {', '.join(left)}"] if left else []
        notes += [f"{number}. {'; '.join(said)}."] if said else []
    models = "\n".join(_model(title, of) for title, of in found["models"].items())
    counts = Counter(one["models"][titles[0]]["verdict"] for one in found["claims"])
    untested = "\n".join(f"- {one.text} ({one.source}): {one.why}." for one in UNTESTED)
    return _PAGE.format(
        summary=", ".join(f"{count} {name}" for name, count in counts.most_common()),
        titles=" | ".join(titles),
        dashes=" | ".join("---" for _ in titles),
        rows="\n".join(rows),
        notes="\n".join(notes),
        models=models,
        untested=untested,
        relations=", ".join(found["relations_left_out"]),
        choosing=CHOOSING,
        fewest=FEWEST,
    )


def _cell(found: dict[str, Any]) -> str:
    if not found["n"]:
        return "no fact"
    low, high = found["interval"]
    said = f" **{found['verdict']}**" if "verdict" in found else ""
    return f"{_number(found['effect'])} [{_number(low)}, {_number(high)}], n {found['n']}{said}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 3 else f"{value:.0f}"


def _model(title: str, of: dict[str, Any]) -> str:
    left = ", ".join(f"{count} {reason}" for reason, count in of["left_out"].items()) or "none"
    layers = ", ".join(f"{name} {layer}" for name, layer in of["layers"].items() if name != "n")
    return (
        f"- **{title}** (weights `{of['weights'][:12]}`): {of['facts']} facts of {of['subjects']} subjects; left out"
        f" before: {left}. Layers chosen: {layers}."
    )


_PAGE = """# Findings: which claims hold on the bundled model

Written by `python -m examples.recall_claims`, which measures the claims; the numbers are in
[findings.json](findings.json). Edits stand [below](#edits). Of the claims on the bundled model: {summary}.

A number is the mean over facts with its 95% interval by bootstrap over subjects. A claim is **reproduced** where the
interval lies above what is demanded and above that of random weights, **contradicted** where it lies below what is
demanded, **undecided** otherwise, and where fewer than {fewest} facts can say anything. **Shaped by training**: it
holds, and a choice made in training the bundled model brings it about, so that it says little about other models. What
is demanded is our choice where the papers give no number. Random weights are the null: the same experiments, about that
model's own first choice.

| | claim | measured as; demanded | {titles} |
|---|---|---|{dashes}|
{rows}

## Published numbers, what training shaped, what is left out

{notes}

## Not tested here

{untested}

## Facts and models

Facts in a seeded order, each in the sentence that is asked first, of subjects on which neither the model's recipe nor a
layer was chosen. Layers are chosen on {choosing} facts of other subjects. Relations with few answers are left out:
{relations}.

{models}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--second", help="folder of the other seed; without it one model and its null are measured")
    parser.add_argument("--facts", type=int, default=300, help="that the model knows (300)")
    parser.add_argument("--choosing", type=int, default=CHOOSING, help=f"facts that layers are chosen on ({CHOOSING})")
    parser.add_argument("--work", type=Path, default=Path("build/recall_claims"), help="where records are kept")
    parser.add_argument("--to", type=Path, default=findings.DOCS, help="folder of findings.json and findings.md (docs)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    numbers = chosen.to / NUMBERS.name
    found = run(chosen.model, chosen.second, facts=chosen.facts, choosing=chosen.choosing, work=chosen.work)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    findings.write(chosen.to)


if __name__ == "__main__":
    main()
