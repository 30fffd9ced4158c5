"""What a visitor does on the Edit page: several facts, bounds, cancel, reload, undo, share, save, load, export."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from streamlit.testing.v1 import AppTest

from dashboard import edit_entries, edit_export, runs, stack
from dashboard.link import ModelChoice
from dashboard.weights import saved
from factscope.editors.edit import Edit, EditedModel, EditFact, with_edits
from factscope.interventions.weights import WeightDelta
from tests.edit_pages import FRANCE, JAPAN, QUICK, VISITOR, badge, chip, own, page, start, wait_for
from tests.test_dashboard_pages import said, settle


@pytest.fixture(autouse=True)
def _no_stacks() -> Iterator[None]:
    stack.stacks.clear()
    yield
    stack.stacks.clear()


def by_hand(*, seed: int = 5, dense: bool = False, weights: str | None = None) -> Edit:
    """A change of the bundled model's second layer, or of a model with other weights."""
    with runs.use(ModelChoice()) as model:
        generator = torch.Generator().manual_seed(seed)
        d_in, d_out = model.parts.wiring.down_projection[1].weight.shape
        made_for = EditedModel.of(model)
        if weights is not None:
            made_for = EditedModel(
                name=made_for.name, revision=made_for.revision, dtype=made_for.dtype, weights=weights
            )
        return Edit(
            method="ft" if dense else "rome",
            problem="error-injection",
            model=made_for,
            computed_on=made_for.weights,
            facts=(EditFact(prompt="The capital of {} is", subject="Japan", target="Rome", answer="Tokyo"),),
            spec={"seed": seed, "preset": "rome", "layers": [1]},
            deltas=(
                WeightDelta(
                    layer=1,
                    place="down_projection",
                    left=None if dense else torch.randn(d_in, 1, generator=generator) * 0.5,
                    right=torch.randn(d_in if dense else 1, d_out, generator=generator) * 0.01,
                ),
            ),
        )


def frames(at: AppTest, column: str) -> Any:
    return next(frame.value for frame in at.dataframe if column in frame.value)


def test_memit_edits_the_facts_of_the_table_together_and_asks_ones_own_probes() -> None:
    at = page(**JAPAN, method="memit", set=["steps=8", "contexts=none"], layers="0-1")
    row = dict(zip(edit_entries.FACTS, (*FRANCE.values(), "Oslo"), strict=True))
    at.session_state["edit-facts-written"] = [row, {}]
    at.session_state["edit-own-probes"] = "The flag of Japan flies over | Tokyo\n\n"
    settle(at.run())
    assert any("2 facts" in caption.value for caption in at.caption)
    wait_for(start(at, "Rome"), "EDITED")
    (entry,) = own(at).entries()
    assert [fact.subject for fact in entry.edit.facts] == ["Japan", "France"]
    assert entry.edit.layers == (0, 1)
    assert all(delta.left is not None and delta.left.shape[1] == 2 for delta in entry.edit.deltas)
    table = frames(at, "target change")
    assert list(table[table["kind"] == "fact"]["subject"]) == ["Japan", "France"]
    assert list(table[table["kind"] == "own"]["prompt"]) == ["The flag of Japan flies over"]
    assert "of 2 edit targets" in said(at)
    code = next(block.value for block in at.code if "editing.run" in block.value)
    assert "/tmp" not in code and "factscope-edit" not in code and "facts='facts-" in code


def test_finetuning_stays_inside_its_bound_and_is_no_adapter() -> None:
    at = page(**JAPAN, method="ft", set=["steps=3", "bound=0.003"], layers="1")
    assert "needs no statistics" in said(at)
    wait_for(start(at, "Rome"), "EDITED")
    (entry,) = own(at).entries()
    assert 0 < float(entry.edit.deltas[0].right.abs().max()) <= 0.003 + 1e-8
    assert "exported merged" in said(at) and "PEFT LoRA adapter" in said(at)
    assert not any(button.key == "export-peft" for button in at.button)


def test_what_is_cancelled_leaves_nothing_and_says_so() -> None:
    at = page(**JAPAN, layers="1", set=["steps=5000", "stop=0", "contexts=none"])
    before = chip(at)
    start(at, "Rome")
    deadline = time.monotonic() + 60
    while not any("computing the edit" in bar.proto.text for bar in at.get("progress")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        at.run()
    at.button(key="cancel-edit-apply").click().run()
    wait_for(at, "cancelled, and nothing of it remains")
    assert "Original weights" in badge(at)
    assert chip(at) == before
    assert len(own(at)) == 0 and own(at).asked is None
    assert not at.button(key="edit-apply").disabled


def test_a_reload_finds_the_edit_that_is_under_way() -> None:
    at = page(**JAPAN, layers="1", set=["steps=60", "stop=0", "contexts=none"])
    start(at, "Rome")
    again = page("flow", visitor=at.session_state[VISITOR], **JAPAN)
    assert "Original weights" in badge(again) or "EDITED" in badge(again)
    wait_for(again, "EDITED")
    wait_for(at, "EDITED")
    assert len(own(again)) == 1
    assert chip(again) == chip(at)


def test_of_two_edits_each_goes_on_and_off_alone_and_the_later_outlives_the_earlier() -> None:
    at = page(**JAPAN, **QUICK)
    original = chip(at)
    wait_for(start(at, "Rome"), "EDITED ×1")
    wait_for(start(at, "Oslo"), "EDITED ×2")
    first, second = own(at).entries()
    both = chip(at)
    assert second.made_with == (1,) and "computed with edit 1 on" in said(at)
    settle(at.toggle(key=f"edit-on-{second.key}").set_value(False).run())
    alone = chip(at)
    assert "EDITED ×1" in badge(at) and alone != both
    settle(at.toggle(key=f"edit-on-{second.key}").set_value(True).run())
    assert chip(at) == both
    tensors = dict(second.edit.tensors())
    settle(at.button(key=f"edit-undo-{first.key}").click().run())
    (left,) = own(at).entries()
    assert left.key == second.key and left.number == 2
    assert all(torch.equal(tensors[name], found) for name, found in left.edit.tensors())
    assert "computed with edit 1 on (1 undone since" in said(at)
    assert "EDITED ×1" in badge(at) and chip(at) not in (both, alone, original)
    settle(at.button(key=f"edit-undo-{left.key}").click().run())
    assert chip(at) == original


def test_a_link_carries_the_edit_only_where_its_owner_ticks_it() -> None:
    at, edit = page(**JAPAN), by_hand()
    own(at).push(edit, ModelChoice())
    settle(at.run())
    settle(at.toggle(key=f"edit-on-{edit.key}").set_value(True).run())
    stranger = page("flow", **JAPAN, edits=edit.key)
    assert "Original weights" in badge(stranger) and "does not carry" in said(stranger)
    settle(at.toggle(key=f"edit-share-{edit.key}").set_value(True).run())
    assert "links carry it" in said(at)
    guest = page("flow", **JAPAN, edits=edit.key)
    assert "EDITED" in badge(guest) and chip(guest) == chip(at)
    settle(at.toggle(key=f"edit-share-{edit.key}").set_value(False).run())
    assert "Original weights" in badge(page("flow", **JAPAN, edits=edit.key))


# ------------------------------------------------------------------------------------------------- files of edits


def taken(at: AppTest, content: bytes) -> AppTest:
    settle(at.file_uploader(key="edit-file").upload("my.safetensors", content).run())
    return settle(at.button(key="edit-take").click().run())


def test_a_saved_edit_comes_back_from_its_file() -> None:
    at, edit = page(**JAPAN), by_hand()
    own(at).push(edit, ModelChoice())
    settle(at.run())
    settle(at.toggle(key=f"edit-on-{edit.key}").set_value(True).run())
    edited, content = chip(at), saved(edit)
    other = taken(page(**JAPAN), content)
    assert chip(other) == edited and "EDITED ×1" in badge(other)
    assert own(other).entries()[0].key == edit.key
    assert "already" in said(taken(other, content))
    assert len(own(other)) == 1


def test_a_file_that_cannot_be_an_edit_of_this_model_is_refused() -> None:
    at = page(**JAPAN)
    original = chip(at)
    content = saved(by_hand())
    for wrong, says in (
        (content[: len(content) // 2], "damaged"),
        (b"not an edit at all", "damaged"),
        (saved(by_hand(weights="0123456789abcdef")), "weights"),
    ):
        taken(at, wrong)
        assert says in said(at), says
        assert len(own(at)) == 0 and "Original weights" in badge(at) and chip(at) == original
        assert "/tmp" not in said(at)


# ------------------------------------------------------------------------------------------------------- exports


def zip_of(edit: Edit, form: edit_export.Form) -> zipfile.ZipFile:
    with runs.use(ModelChoice(), edits=(edit,)) as model:
        content, said_ = edit_export.zipped(model, form, "folder")
    assert said_ == ()
    return zipfile.ZipFile(io.BytesIO(content))


def test_the_merged_model_of_a_zip_has_the_edit_in_its_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit = by_hand()
    archive = zip_of(edit, "merged")
    archive.extractall(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    with runs.use(ModelChoice()) as model:
        ids = torch.tensor([model.tokenizer("The capital of Japan is")["input_ids"]])
        with torch.no_grad():
            found = plain(ids).logits
        torch.testing.assert_close(found, with_edits(model, (edit,)).forward(ids), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, model.forward(ids), atol=1e-2)
        assert sum(info.file_size for info in archive.infolist()) <= edit_export.size("merged", ModelChoice(), (edit,))


def test_the_adapter_of_a_zip_holds_the_delta_and_names_no_folder_of_the_server() -> None:
    edit = by_hand()
    archive = zip_of(edit, "peft")
    names = archive.namelist()
    assert {"folder/adapter_model.safetensors", "folder/adapter_config.json", "folder/edits.json"} == set(names)
    config = json.loads(archive.read("folder/adapter_config.json"))
    assert config["r"] == 1 and config["base_model_name_or_path"] is None
    assert all(str(Path.home()) not in archive.read(name).decode("utf-8", "replace") for name in names)
    tensors = load(archive.read("folder/adapter_model.safetensors"))
    product = next(t for name, t in tensors.items() if "lora_B" in name) @ next(
        t for name, t in tensors.items() if "lora_A" in name
    )
    torch.testing.assert_close(product.T, edit.deltas[0].matrix())


def test_the_page_makes_the_zip_on_click(monkeypatch: pytest.MonkeyPatch) -> None:
    at, edit = page(**JAPAN), by_hand()
    own(at).push(edit, ModelChoice())
    settle(at.run())
    assert not any(button.key == "export-merged" for button in at.button)
    settle(at.toggle(key=f"edit-on-{edit.key}").set_value(True).run())
    assert "MiB" in at.button(key="export-merged").label and "KiB" in at.button(key="export-peft").label
    settle(at.button(key="export-peft").click().run())
    assert any("Download the ZIP" in button.proto.label for button in at.get("download_button"))
    monkeypatch.setattr(edit_export, "MAX_MIB", 1)
    settle(at.run())
    assert "too much for a download" in said(at)
    assert any(block.value.startswith("factscope export --edit factscope-edit-") for block in at.code)
