"""The edited model for other programs: merged, or as a LoRA adapter; as a ZIP made on click, its size told before.

What is exported are the edits that are on. The ZIP is made by a run of its own, like everything that takes time. A
model that is too large for a download is for the command line, on the machine where the saved edits are.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import streamlit as st

from dashboard import messages, panels, parts, runs, stack, state
from dashboard.link import ModelChoice

Form = Literal["merged", "peft"]
FORMS: dict[Form, str] = {"merged": "Merged model", "peft": "PEFT LoRA adapter"}
EXPORT = "edit-export"
MAX_MIB = 256
_MIB = 2**20
_BESIDES = 3 * _MIB
"""What configuration, tokenizer and edits take beside the weights, about."""
_ASKED = "edit-export-asked"


def show() -> None:
    """The exports of the weight state that the pages show; nothing where no edit is on."""
    model = state.view().model
    if not model.edits:
        return
    with st.popover("Export", icon=":material/archive:", type="tertiary", key="edit-export-box"):
        edits = stack.edits(model)
        count = "the edit that is on" if len(edits) == 1 else f"the {len(edits)} edits that are on"
        st.caption(f"For other programs, with {count}. The saved edit itself is for FactScope.")
        for form in FORMS:
            with messages.caught():
                _offer(form, model, edits)


def refusal(form: Form, edits: Sequence[Any], n_bytes: int | None) -> str | None:
    """Why a form cannot be downloaded; None where it can be."""
    if form == "peft" and any(delta.left is None or delta.bias is not None for edit in edits for delta in edit.deltas):
        return (
            "A LoRA adapter holds changes of low rank. Finetuning changes whole matrices (or a bias), so this edit can "
            "only be exported merged."
        )
    if n_bytes is None:
        return "The model is not in memory yet, so that its size is not known: ask something first."
    if n_bytes > MAX_MIB * _MIB:
        return (
            f"About {n_bytes / _MIB:,.0f} MiB are too much for a download (at most {MAX_MIB}). Save the edit, and "
            "write the folder with the command line:"
        )
    return None


def size(form: Form, model: ModelChoice, edits: Sequence[Any]) -> int | None:
    """Bytes of the ZIP, about; None where that is not known."""
    if form == "peft":
        return sum(edit.n_bytes for edit in edits) + _MIB // 8
    handle = runs.loaded(model.original)
    if handle is None:
        return None
    width = {"float32": 4, "float64": 8}.get(handle.info.dtype, 2)
    return handle.n_parameters * width + _BESIDES


def line(form: Form, model: ModelChoice) -> str:
    """The command that writes the same folder from saved edits."""
    options = [] if model.name == "bundled" else [f"--model {model.name!r}"]
    options += [f"--revision {model.revision}"] if model.revision else []
    options += [f"--dtype {model.dtype}"] if model.dtype != "float32" else []
    options += [f"--edit {panels.edit_file(key)}" for key in model.edits]
    return " ".join(["factscope export", *options, "--to FOLDER", f"--as {form}"])


def _offer(form: Form, model: ModelChoice, edits: Sequence[Any]) -> None:
    n_bytes = size(form, model, edits)
    why = refusal(form, edits, n_bytes)
    if why is not None:
        parts.note("quiet", [f"{FORMS[form]}: {why}"], key=f"export-not-{form}")
        if n_bytes is not None and n_bytes > MAX_MIB * _MIB:
            st.code(line(form, model), language="bash")
        return
    assert n_bytes is not None
    key = _key(form, model)
    found = runs.look(EXPORT)
    if found is None or found.key != key or st.session_state.get(_ASKED) != key:
        st.button(
            f"{FORMS[form]}: make a ZIP, at most {_words(n_bytes)}",
            key=f"export-{form}",
            icon=":material/folder_zip:",
            on_click=_start,
            args=[form, model, edits],
        )
    elif not found.finished:
        runs.watch(EXPORT, found)
        st.progress(0.0, text=f"{FORMS[form]}: {panels.progress_words(found)}")
    elif found.error is not None:
        messages.show_error(found.error)
    elif found.result is not None:
        content, said = found.result
        messages.show_warnings(said)
        st.download_button(
            f"Download the ZIP ({_words(len(content))})",
            data=content,
            file_name=_file(form, model),
            mime="application/zip",
            on_click="ignore",
            key=f"export-get-{form}",
            icon=":material/download:",
            type="primary",
        )


def _key(form: Form, model: ModelChoice) -> str:
    return runs.digest(["export", form, repr(model)])


def _start(form: Form, model: ModelChoice, edits: Sequence[Any]) -> None:
    """Make the ZIP, in a run."""
    from dashboard.executor import Work

    def compute(handle: Any, progress: Any) -> Any:
        progress(0, 1, None)
        found = zipped(handle, form, _file(form, model).removesuffix(".zip"))
        progress(1, 1, None)
        return found

    key = _key(form, model)
    st.session_state[_ASKED] = key
    runs.again(EXPORT)
    work = Work(prepare=lambda tell: runs.use(model, tell, edits), compute=compute, label="export", keep=False)
    runs.do(EXPORT, key, work)


def zipped(handle: Any, form: Form, folder: str) -> tuple[bytes, tuple[str, ...]]:
    """The folder that the export writes, zipped under a name, and what is to be said of it."""
    from factscope.editors import export

    with tempfile.TemporaryDirectory(prefix="factscope-export-") as there:
        place = Path(there) / folder
        if form == "merged":
            said = export.export_merged(handle, place)
        else:
            export.export_peft(handle, place, portable=True)
            said = ()
        written = BytesIO()
        with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in sorted(path for path in place.rglob("*") if path.is_file()):
                archive.write(file, str(Path(folder) / file.relative_to(place)))
        return written.getvalue(), said


def _file(form: Form, model: ModelChoice) -> str:
    return f"factscope-{form}-{model.edits[-1][:8]}.zip"


def _words(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.1f} MiB" if n_bytes >= _MIB / 2 else f"{max(1, n_bytes // 2**10):,} KiB"
