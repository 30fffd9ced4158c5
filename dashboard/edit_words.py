"""What is said of an edit: its target, its loss step by step, how it was computed, and how to do it in Python."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pandas as pd

from dashboard import panels, stack, state, weights

MAX_LINES = 6


def targets(source: Any) -> list[str]:
    """What is made the answer, of every fact; also of an edit that is being computed."""
    return list(dict.fromkeys(fact.target.strip() or (fact.answer or "").strip() for fact in source.facts)) or [""]


def losses(source: Any) -> pd.DataFrame:
    """The loss at every step, of an edit or of one that is being computed; of many facts the first few."""
    from factscope.experiments.editing import losses as of_edits

    partial = getattr(source, "partial", None)
    if partial is None:
        found: Any = of_edits(source.edits)
        return found[found["fact"] < MAX_LINES] if len(found) else found
    return pd.DataFrame([asdict(step) for step in partial.steps], columns=["step", "loss"])


def steps(source: Any) -> int:
    """How many steps there will be at most, for the axis of a loss that is not done; 0 where that is not known."""
    asked = stack.mine().asked
    if getattr(source, "partial", None) is None or asked is None:
        return 0
    return int(dict(asked.spec.settings).get("steps", 0))


def caption(source: Any) -> str:
    """Where the loss comes from."""
    if hasattr(source, "edits"):
        edit = source.edits[0]
        return f"{edit.model}\n{edit}, {edit.problem}, preset {edit.spec.get('preset')}, computed on {edit.computed_on}"
    return "\n".join(fact.text for fact in source.facts[:3])


def report_words(edit: Any) -> list[str]:
    """What is worth knowing of how an edit was computed."""
    report = edit.report
    lines = [f"{weights.said(edit)}: preset {edit.spec.get('preset')}, seed {edit.spec.get('seed')}."]
    norms = ", ".join(f"layer {layer} {norm:.3g}" for layer, norm in dict(report.get("update_norm", {})).items())
    lines += [f"Norm of the change: {norms}."] if norms else []
    for value in list(report.get("values", ()))[:3]:
        done, most = len(value.get("steps", ())), int(edit.spec.get("steps", 0))
        if value.get("stopped") == "stop":
            lines.append(f"The optimisation ended after {done} of {most} steps: it was good enough.")
        elif done:
            lines.append(f"The optimisation took all of its {done} steps.")
        if "k_dot_u" in value:
            lines.append(f"k \u00b7 u {value['k_dot_u']:.3g}, {value['share_of_k_dot_u']:.2f} of the averaged key's.")
    for layer in report.get("layers", ()):
        shares = layer["share_written"]
        lines.append(f"Layer {layer['layer']} writes {min(shares):.0%} to {max(shares):.0%} of what is left to write.")
    lines += [f"{len(edit.templates)} contexts were sampled and are stored with it."] if edit.templates else []
    return lines


def python_lines(source: Any) -> str:
    """The same edit with the public interface, on the weight state that it was computed on."""
    own, asked = stack.mine(), stack.mine().asked
    gone = False
    if getattr(source, "partial", None) is None:
        spec, query = source.spec, source.query.query
        entry = own.find(source.edits[0].key)
        before = None if entry is None else own.made_with(entry)
        there = [] if entry is None else own.entries(entry.model)
        model = replace(
            state.view().model.original, edits=tuple(one.key for one in there if one.number in (before or ()))
        )
        gone = before is None and source.edits[0].computed_on != source.edits[0].model.weights
    elif asked is not None:
        spec, query, model = asked.spec, asked.query, asked.model
    else:
        return ""
    names, loading = panels.load_lines(model)
    loading += ["# it was computed with edits on that are not here any more: this is not the same edit"] if gone else []
    names = [name for name in names if name != "with_edits"]
    files = [
        f"# {name}: {what}, as on the page"
        for name, what in (
            (spec.facts, "the table of further facts (prompt, subject, answer, new_answer)"),
            (spec.evaluation.probes, "your own probes (prompt, kind, answer)"),
        )
        if name is not None
    ]
    return "\n".join(
        [
            f"from factscope import {', '.join([*names, 'Query', 'with_edits'])}",
            "from factscope.experiments import editing",
            "",
            *loading,
            f"query = {panels.short(query)}",
            *files,
            f"spec = editing.{_spec(spec)}",
            "result = editing.run(model, query, spec)",
            "result.table(), result.scores()",
            "edited = with_edits(model, result.edits)",
        ]
    )


def lines_again(source: Any) -> str:
    """The probes of an edit asked again, where other edits are on than when it was made."""
    edit = source.edits[0]
    view = state.view().model
    names, loading = panels.load_lines(replace(view, edits=tuple(key for key in view.edits if key != edit.key)))
    return "\n".join(
        [
            f"from factscope import {', '.join(dict.fromkeys([*names, 'load_edit', 'Query']))}",
            "from factscope.experiments import editing",
            "",
            *loading,
            f'edit = load_edit("{panels.edit_file(edit.key)}")',
            f"query = {panels.short(source.query.query)}",
            "result = editing.evaluate(model, edit, query=query)",
            "result.table(), result.scores()",
        ]
    )


def _spec(spec: Any) -> str:
    return panels.short(spec).replace("EvaluationSpec(", "editing.EvaluationSpec(")
