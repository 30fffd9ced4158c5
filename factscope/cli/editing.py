"""Commands that edit facts, and what edits need and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from factscope import output
from factscope.cli import running, telling
from factscope.cli.options import (
    Averaged,
    AveragingChoice,
    Device,
    Dtype,
    DtypeName,
    EditLayers,
    EditMethod,
    EditPreset,
    EditProblem,
    Format,
    FormChoice,
    MethodChoice,
    ModelName,
    NewAnswer,
    NoiseText,
    Out,
    OutputFormat,
    ProbesFile,
    ProblemChoice,
    Revision,
    Samples,
    Seed,
    Statistics,
    StoredChoice,
    TraceSiteChoice,
    TraceWindow,
)
from factscope.cli.query import Asked, on_a_query, wanted_model
from factscope.cli.reading import layers as layers_of
from factscope.cli.telling import cut
from factscope.errors import Cancelled, SpecError


@on_a_query
def edit_fact(
    asked: Asked,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text that ends right before the answer; not needed with --facts.")
    ] = None,
    method: EditMethod = MethodChoice.rome,
    layers: EditLayers = None,
    new_answer: NewAnswer = None,
    problem: EditProblem = ProblemChoice.error_injection,
    preset: EditPreset = None,
    statistics: Statistics = None,
    probes: ProbesFile = None,
    facts: Annotated[
        Path | None, typer.Option("--facts", help="A file of facts that are edited together, new_answer beside each.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Keep the edit in this .safetensors file, for --edit and export.")
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", help="Tokens of the continuation of every probe; 0 writes none.", min=0, max=1000)
    ] = 24,
    sampled: Annotated[
        bool, typer.Option("--sampled/--no-sampled", help="Sample texts: fluency, consistency, essence.")
    ] = True,
    references: Annotated[
        Path | None, typer.Option("--references", help="Reference texts for the consistency, parted by empty lines.")
    ] = None,
    averaging: Averaged = AveragingChoice.mean,
) -> None:
    """Edit a fact, or several, and ask before and after."""
    if asked.query is None and facts is None:
        raise SpecError("neither --prompt nor --facts is given", "name the fact that is to be edited")
    if asked.query is None and new_answer is not None:
        raise SpecError(f"--new-answer {cut(new_answer)!r} stands without --prompt", "give the prompt, or leave it")
    if save is not None:
        _check_save(save)
    evaluation: dict[str, Any] = {
        "texts": texts, "sampled": sampled, "averaging": averaging.value, "seed": asked.seed,
        "probes": None if probes is None else str(probes),
        "references": None if references is None else str(references),
    }  # fmt: skip
    chosen: dict[str, Any] = {
        "method": method.value, "problem": problem.value, "preset": None if preset is None else preset.value,
        "layers": layers_of("--layers", layers), "new_answer": new_answer,
        "facts": None if facts is None else str(facts),
        "settings": _settings(asked.seed, statistics),
    }  # fmt: skip

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.editors.files import save_edit
        from factscope.experiments import editing

        spec = editing.EditingSpec(**chosen, evaluation=editing.EvaluationSpec(**evaluation))
        found = editing.run(handle, asked.query, spec, progress=progress)
        if save is not None:
            save_edit(found.edits[0], save)
        return found

    running.run("edit", compute, asked)


@on_a_query
def edit_layers(
    asked: Asked,
    method: EditMethod = MethodChoice.rome,
    problem: EditProblem = ProblemChoice.error_injection,
    new_answer: NewAnswer = None,
    preset: EditPreset = None,
    statistics: Statistics = None,
    only: Annotated[str | None, typer.Option("--layers", help="Which are tried: 0-5 or 3,5. [default: all]")] = None,
    edit_window: Annotated[
        int | None, typer.Option("--edit-window", help="Layers edited together. [default: 1; for memit the preset's]")
    ] = None,
    site: Annotated[TraceSiteChoice, typer.Option("--site", help="What the trace restores.")] = TraceSiteChoice.mlp,
    window: TraceWindow = None,
    samples: Samples = 10,
    noise: NoiseText = "s3",
    probes: ProbesFile = None,
    averaging: Averaged = AveragingChoice.mean,
) -> None:
    """The same edit at every layer, beside that layer's tracing effect."""
    chosen: dict[str, Any] = {
        "method": method.value, "problem": problem.value, "preset": None if preset is None else preset.value,
        "new_answer": new_answer, "layers": layers_of("--layers", only), "edit_window": edit_window,
        "site": site.value, "window": window, "samples": samples, "noise": noise, "averaging": averaging.value,
        "probes": None if probes is None else str(probes), "seed": asked.seed,
        "settings": () if statistics is None else (("statistics", statistics),),
    }  # fmt: skip

    def compute(handle: Any, progress: Any) -> Any:
        from factscope.experiments import edit_layers as by_layer

        return by_layer.run(handle, asked.query, by_layer.LayersSpec(**chosen), progress=progress)

    running.run("layers", compute, asked)


def export(
    edit: Annotated[list[Path], typer.Option("--edit", help="A saved edit; repeatable, in order.")],
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    form: Annotated[
        FormChoice, typer.Option("--as", help="The whole model with the edits in its weights, or a LoRA adapter.")
    ] = FormChoice.merged,
    stored: Annotated[
        StoredChoice, typer.Option("--stored", help="Type of a merged model's weights: as loaded, or float32.")
    ] = StoredChoice.loaded,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the model lies. [default: where it lay for the first edit]")
    ] = None,
    revision: Revision = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type in which it is loaded. [default: that of the first edit]")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write an edited model for other programs: merged into a new folder, or as a LoRA adapter for PEFT."""
    if form is FormChoice.peft and stored is not StoredChoice.loaded:
        raise SpecError(f"--stored {stored.value} stands beside --as peft, which is float32", "leave it out")
    with running.Stop() as stop:
        from factscope.editors import export as files

        edits = running.edits(edit)
        files.refuse_taken(to)
        chosen = dtype or Dtype(files.type_of(edits[0]))
        name, own = (model, None) if model is not None else files.where(edits[0])
        wanted = wanted_model(name, revision or own, chosen, device)
        handle = running.edited(running.load(wanted, stop), edits)
        if form is FormChoice.peft:
            files.export_peft(handle, to)
            said: tuple[str, ...] = ()
        else:
            said = files.export_merged(handle, to, stored=stored.value)
    for warning in (*handle.warnings, *said):
        telling.say(f"warning: {warning}")
    count = f"{len(edits)} edit{'s' if len(edits) > 1 else ''}"
    done = f"{handle.info.name} with {count}, weights {handle.info.weights}, is in {to} ({form.value})"
    telling.write(f"{output.printable(done)}\n")


def statistics(
    layers: Annotated[str | None, typer.Option("--layers", help="Whose statistics: 5, 3-7 or 2,5.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Collect from this text file, folder of .txt and .md files, or dataset (NAME:CONFIG:SPLIT:COLUMN).",
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option("--texts", help="Draw so many texts (paragraphs) from it. [default: all; a dataset needs it]"),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what collecting would cost.")] = False,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Take over a file of ROME's or MEMIT's (.npz) for one layer.")
    ] = None,
    remove: Annotated[str | None, typer.Option("--remove", help="Remove what has this key.")] = None,
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """Second moments of MLP keys, which ROME and MEMIT need: lists, collects, takes over, removes.

    Without options it lists what was collected. A collection that is stopped goes on when it is asked for again.
    """
    _refuse_statistics(layers, text, texts, estimate, import_, remove)
    if out is not None:
        output.check_out(out)
    import pandas as pd

    from factscope.editors import collecting
    from factscope.editors.second_moments import stored

    rows: list[dict[str, Any]]
    if remove is not None:
        rows = [collecting.remove(remove).row()]
        telling.say(f"removed {rows[0]['key']}")
    elif text is None and import_ is None:
        rows = [entry.row() for entry in stored()]
    else:
        chosen = layers_of("--layers", layers)
        with running.Stop() as stop:
            if import_ is not None:
                handle = running.load(wanted_model(model, revision, dtype, device), stop)
                rows = [collecting.take_over(handle, import_, layer).row() for layer in chosen]
            else:
                assert text is not None
                source = _source(text, texts, seed, stop)
                handle = running.load(wanted_model(model, revision, dtype, device), stop)
                rows = _collect(handle, source, chosen, seed, estimate, stop)
    telling.emit({"schema": 1, "command": "statistics", "rows": rows}, pd.DataFrame(rows), format, out)


def _source(text: str, texts: int | None, seed: int, stop: running.Stop) -> Any:
    from factscope.editors.named_corpora import Source

    def step(taken: int) -> None:
        telling.tell(f"statistics: {taken:,} texts" if taken % 100 == 0 else "")
        stop.check()

    return Source(text, texts, seed=seed, step=step)


def _collect(
    handle: Any, source: Any, layers: tuple[int, ...], seed: int, estimate: bool, stop: running.Stop
) -> list[dict[str, Any]]:
    """Say what it costs, and unless that is all that was asked, collect."""
    from factscope.editors import collecting

    texts = source.n_texts
    cost = collecting.estimate(handle, source.begin, layers, n_texts=texts, seed=seed, in_all=source.in_all)
    for warning in cost.warnings:
        telling.say(f"warning: {warning}")
    telling.say(cost.sentence)
    if estimate:
        return [cost.row()]
    corpus = source.whole()

    def progress(done: int, total: int, partial: Any) -> None:
        telling.tell(f"statistics: {done}/{total}" if done < total else "")
        if done < total:
            stop.check()

    try:
        return [
            e.row() for e in collecting.collect(handle, corpus, layers, n_texts=texts, seed=seed, progress=progress)
        ]
    except Cancelled:
        raise Cancelled("the collection was cancelled; what was summed is kept", "ask again to go on with it") from None


def _settings(seed: int, statistics: str | None) -> tuple[tuple[str, Any], ...]:
    """What the options set otherwise than the preset."""
    given = (("seed", seed),)
    return given if statistics is None else (*given, ("statistics", statistics))


def _check_save(path: Path) -> None:
    """Refuse a file for the edit that could not be written, before anything is computed."""
    from factscope.editors.files import SUFFIX

    output.check_out(path, "--save", (SUFFIX,))


def _refuse_statistics(
    layers: str | None, text: str | None, texts: int | None, estimate: bool, import_: Path | None, remove: str | None
) -> None:
    """One thing at a time, and no option that would change nothing."""
    asked = {"--text": text, "--import": import_, "--remove": remove}
    given = [f"{name} {cut(str(value))!r}" for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise SpecError(f"{given[0]} stands beside {given[1]}", "ask for one of them")
    if layers is None and (text is not None or import_ is not None):
        raise SpecError("--layers is missing", "name layers from 0, such as 5 or 3-7")
    if layers is not None and text is None and import_ is None:
        raise SpecError(f"--layers {cut(layers)!r} stands without --text or --import", "name the text to collect from")
    if text is None and (texts is not None or estimate):
        named = "--estimate" if texts is None else f"--texts {texts}"
        raise SpecError(f"{named} stands without --text", "name the text to collect from")
