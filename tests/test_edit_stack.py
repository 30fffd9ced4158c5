"""The visitors' stacks: what is private, what is undone, what memory they may take, what links carry."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
import torch

from dashboard import visitors
from dashboard.link import MAX_EDITS, ModelChoice, View, layers, layers_text, parse, to_params
from dashboard.stack import Stacks, words
from factscope.editors.edit import Edit, EditedModel, EditFact, fingerprint
from factscope.errors import EditError
from factscope.interventions.weights import WeightDelta

MODEL = EditedModel(name="bundled", revision="1", dtype="float32", weights="0" * 16)
BUNDLED = ModelChoice()


def make_edit(seed: int, *, on: str = MODEL.weights, layers: tuple[int, ...] = (1,), size: int = 8) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    return Edit(
        method="memit" if len(layers) > 1 else "rome",
        problem="error-injection",
        model=MODEL,
        computed_on=on,
        facts=(EditFact(prompt="{} is in", subject="Japan", target="Africa", answer="Asia"),),
        spec={"seed": seed},
        deltas=tuple(
            WeightDelta(
                layer=layer,
                place="down_projection",
                left=torch.randn(size, 1, generator=generator),
                right=torch.randn(1, size, generator=generator),
            )
            for layer in layers
        ),
    )


@pytest.fixture
def stacks() -> Stacks:
    return Stacks(each=4096, in_all=8192)


def test_a_stack_is_found_by_its_visitor_alone(stacks: Stacks) -> None:
    edit = make_edit(1)
    stacks.of("a").push(edit, BUNDLED)
    assert stacks.of("a").find(edit.key) is not None
    assert stacks.of("b").find(edit.key) is None
    assert stacks.shared(edit.key) is None
    stacks.of("a").share(edit.key, True)
    assert stacks.shared(edit.key) is edit
    stacks.of("a").share(edit.key, False)
    assert stacks.shared(edit.key) is None


def test_undoing_one_leaves_the_others_with_their_numbers_and_their_own_keys(stacks: Stacks) -> None:
    stack = stacks.of("a")
    first, third = make_edit(1), make_edit(3)
    stack.push(first, BUNDLED)
    second = make_edit(2, on=fingerprint(MODEL.weights, [first]))
    later = stack.push(second, BUNDLED)
    stack.push(third, BUNDLED)
    assert stack.made_with(later) == (1,)
    stack.remember(ModelChoice(edits=(first.key, second.key)))
    stack.undo(first.key)
    assert [entry.number for entry in stack.entries()] == [2, 3]
    assert stack.find(second.key) is later
    assert stack.made_with(later) == (1,)
    assert stack.on(BUNDLED) == (second.key,)


def test_what_was_on_is_remembered_for_each_model(stacks: Stacks) -> None:
    stack = stacks.of("a")
    edit = make_edit(1)
    stack.push(edit, BUNDLED)
    stack.remember(ModelChoice(edits=(edit.key,)))
    assert stack.on(ModelChoice()) == (edit.key,)
    assert stack.on(ModelChoice(dtype="bfloat16")) == ()
    assert stack.entries(ModelChoice(name="random:bundled")) == ()


def test_the_order_is_that_of_the_stack(stacks: Stacks) -> None:
    stack = stacks.of("a")
    keys = [stack.push(make_edit(n), BUNDLED).key for n in range(3)]
    assert stack.ordered(keys[::-1]) == tuple(keys)


@pytest.mark.parametrize(
    ("size", "says"), [(600, "of the 0 MiB that one visitor may use"), (8, "edit 1 of your stack already")]
)
def test_too_much_and_twice_are_refused(stacks: Stacks, size: int, says: str) -> None:
    stack = stacks.of("a")
    stack.push(make_edit(1), BUNDLED)
    with pytest.raises(EditError, match=says):
        stack.push(make_edit(1, size=size), BUNDLED)
    assert len(stack) == 1


def test_so_many_edits_and_no_more(stacks: Stacks) -> None:
    stack = stacks.of("a")
    for number in range(MAX_EDITS):
        stack.push(make_edit(number), BUNDLED)
    with pytest.raises(EditError, match=f"{MAX_EDITS} edits"):
        stack.push(make_edit(99), BUNDLED)


def test_the_memory_of_all_is_bounded_and_who_left_long_ago_makes_room(stacks: Stacks) -> None:
    stacks.of("a").push(make_edit(1, size=450), BUNDLED)
    stacks.of("b").push(make_edit(2, size=450), BUNDLED)
    with pytest.raises(EditError, match="all visitors together"):
        stacks.of("c").push(make_edit(3, size=450), BUNDLED)
    stacks.of("a").seen -= 48 * 3600
    stacks.of("c").push(make_edit(3, size=450), BUNDLED)
    assert len(stacks.of("a")) == 0
    assert len(stacks.of("b")) == 1


def test_a_second_window_does_not_replace_the_edit_that_is_being_computed(stacks: Stacks) -> None:
    own = stacks.of("a")
    assert own.ask(lambda number: f"edit {number}") == 1
    with pytest.raises(EditError, match="being computed in another window"):
        own.ask(lambda number: f"edit {number}")
    assert (own.asked, own.latest) == ("edit 1", 1)
    own.asked = None
    assert own.ask(lambda number: f"edit {number}") == 2 and own.asked == "edit 2"


def test_words_name_method_and_layers() -> None:
    assert words(make_edit(1)) == "ROME, layer 1"
    assert words(make_edit(1, layers=(1, 2, 3))) == "MEMIT, layers 1\u20133"
    assert words(make_edit(1, layers=(1, 4))) == "MEMIT, layers 1, 4"


# ---------------------------------------------------------------------------------------------------------- the link


def test_a_link_keeps_the_weight_state_of_both_sides() -> None:
    keys = (make_edit(1).key, make_edit(2).key)
    view = View(model=ModelChoice(edits=keys), a=View())
    assert to_params(view)["edits"] == [",".join(keys)]
    assert "a.edits" not in to_params(view)
    assert parse(to_params(view)) == (view, [])


@pytest.mark.parametrize("value", ["../../etc", "g" * 16, "0" * 15, ",".join(f"{n:016x}" for n in range(13))])
def test_keys_that_are_none_are_refused(value: str) -> None:
    view, errors = parse({"edits": [value]})
    assert view == View()
    assert len(errors) == 1
    assert "keys of edits" in str(errors[0])


@pytest.mark.parametrize(
    ("text", "found"), [("5", (5,)), ("3-5,1", (1, 3, 4, 5)), ("", ()), ("5-3", None), ("x", None), ("-1", None)]
)
def test_layers_are_read(text: str, found: tuple[int, ...] | None) -> None:
    assert layers(text) == found
    if found:
        assert layers(layers_text(found)) == found


# -------------------------------------------------------------------------------------------------------- the cookie


def heads(cookie: str | None, content_type: str = "text/html; charset=utf-8", scheme: str = "http") -> list[Any]:
    """The head of an answer, from a server that says "not modified" to a browser that has the page."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        known = any(name.startswith(b"if-") for name, _ in scope["headers"])
        given = [] if known else [(b"content-type", content_type.encode())]
        head = [*given, (b"Cache-Control", b"no-cache"), (b"etag", b"1")]
        await send({"type": "http.response.start", "status": 304 if known else 200, "headers": head})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"If-None-Match", b"1"), (b"if-modified-since", b"today"), (b"accept", b"*/*")]
    headers += [] if cookie is None else [(b"cookie", cookie.encode())]
    scope = {"type": "http", "method": "GET", "headers": headers, "scheme": scheme}
    asyncio.run(visitors.VisitorCookie(app)(scope, None, send))
    return sent[0]["headers"]


def answer(cookie: str | None, content_type: str = "text/html; charset=utf-8", scheme: str = "http") -> list[str]:
    """The cookies that a browser is given."""
    head = heads(cookie, content_type, scheme)
    return [value.decode() for name, value in head if name == b"set-cookie"]


def test_a_browser_that_has_the_page_but_no_cookie_gets_both_and_no_cache_keeps_them() -> None:
    """What a shared cache kept would be one visitor's cookie in the hands of the next."""
    head = heads(None)
    assert [value for name, value in head if name.lower() == b"cache-control"] == [b"no-store"]
    assert any(name == b"set-cookie" for name, _ in head) and (b"etag", b"1") in head
    known = heads(answer(None)[0].split(";")[0])
    assert [value for name, value in known if name.lower() == b"cache-control"] == [b"no-cache"]
    assert not any(name == b"content-type" for name, _ in known), "a browser with its cookie is told: not modified"


def test_the_cookie_is_random_and_long() -> None:
    values = {answer(None)[0].split(";")[0].removeprefix(f"{visitors.COOKIE}=") for _ in range(200)}
    assert len(values) == 200
    assert all(visitors._VALUE.fullmatch(value) for value in values)
    bits = [base64.urlsafe_b64decode(f"{value}=") for value in values]
    assert {len(one) for one in bits} == {32}, "256 bits"
    for byte in range(32):
        assert len({one[byte] for one in bits}) > 60, "no byte is a counter or a constant"


def test_a_page_gives_a_new_browser_its_own_random_cookie() -> None:
    (first,), (second,) = answer(None), answer(None)
    assert first.split(";")[0] != second.split(";")[0]
    for part in ("HttpOnly", "SameSite=Lax", "Path=/"):
        assert part in first
    assert "Secure" not in first
    assert "Secure" in answer(None, scheme="https")[0]


def test_a_known_browser_keeps_its_cookie_and_a_made_up_one_is_replaced() -> None:
    (given,) = answer(None)
    assert answer(f"other=1; {given.split(';')[0]}") == []
    assert len(answer(f"{visitors.COOKIE}=guess")) == 1


def test_files_and_sockets_give_no_cookie() -> None:
    assert answer(None, "application/javascript") == []
