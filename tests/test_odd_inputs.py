"""Whatever is typed: a result, or one sentence that names the value, says why and what to try; never a defect.

Each kind of input that cannot be used has its own sentence. Random input follows at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import FACT, PROMPT, SUBJECT, TINY, Outcome, invoke, refused, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

# kind of input -> the part of its sentence that no other kind has, and (name, what is typed, how the value is named)
Case = tuple[str, tuple[str, ...], str]
REPEATED = "Paris is in Paris , the city of"
DIGITS = "9" * 5000


def prompt(text: str, *more: str) -> tuple[str, ...]:
    return ("predict", "--model", TINY, "--prompt", text, *more)


def fact(command: str, *more: str) -> tuple[str, ...]:
    return (command, *FACT, *more)


def model(name: str, *more: str) -> tuple[str, ...]:
    return ("predict", "--prompt", PROMPT, "--model", name, *more)


REFUSED: dict[str, tuple[str, list[Case]]] = {
    "prompt-empty": ("the prompt is empty", [("", prompt(""), "empty")]),
    "prompt-white": (
        "is only white space",
        [
            ("space", prompt(" "), '" "'),
            ("newline", prompt("\n"), "↵"),
            ("no-break", prompt("\u00a0"), "<U+00A0>"),
            ("line-separator", prompt("\u2028"), "<U+2028>"),
            ("return", prompt("\r"), "<U+000D>"),
        ],
    ),
    "prompt-characters": (
        "characters and at most 4,000 are read; shorten the prompt",
        [("3000-words", prompt("word " * 3000), "15,000"), ("one-more", prompt("x" * 4001), "4,001")],
    ),
    "prompt-tokens": (
        "tokens and the model reads at most",
        [
            ("words", prompt("a " * 1500), "3000 tokens"),
            ("accents", prompt("e\u0301\u0301\u0301" * 20), "141 tokens"),
            ("answer", ("lens", "--model", TINY, "--prompt", "東" * 60), "at most 64"),
        ],
    ),
    "prompt-control": (
        "a control character, at character",
        [
            ("nul", prompt("a\0b"), "<U+0000>"),
            ("escape", prompt("a\x1b[31mb"), "<U+001B>"),
            ("bell", prompt("\a"), "<U+0007>"),
            ("delete", prompt("x\x7f"), "<U+007F>"),
            ("c1", prompt("\x85"), "<U+0085>"),
            ("csi", prompt("\x9b31m"), "<U+009B>"),
        ],
    ),
    "prompt-surrogate": (
        "half of a surrogate pair",
        [("high", prompt("\ud83d"), "<U+D83D>"), ("byte", prompt("a\udcffb"), "<U+DCFF>")],
    ),
    "subject-empty": (
        "the subject is empty",
        [("", prompt(PROMPT, "--subject", ""), "subject"), ("spaces", prompt(PROMPT, "--subject", "  "), "subject")],
    ),
    "subject-absent": (
        "is not in the prompt; ",
        [
            ("other", prompt(PROMPT, "--subject", "Louvre"), '"Louvre"'),
            ("case", prompt(PROMPT, "--subject", "eiffel tower"), 'did you mean "Eiffel Tower"?'),
            ("typo", prompt(PROMPT, "--subject", "Eiffel Towr"), 'did you mean "Eiffel Tower"?'),
            ("nul", prompt(PROMPT, "--subject", "\0"), "<U+0000>"),
            ("surrogate", prompt(PROMPT, "--subject", "\ud800"), "<U+D800>"),
            ("cjk", prompt(PROMPT, "--subject", "東京"), '"東京"'),
            ("long", prompt(PROMPT, "--subject", "E" * 3000), "EEEE…"),
            ("regex", prompt(PROMPT, "--subject", ".*"), '".*"'),
            ("option", prompt(PROMPT, "--subject", "--answer"), '"--answer"'),
        ],
    ),
    "subject-everything": ("covers every token of the prompt", [("", prompt(PROMPT, "--subject", PROMPT), PROMPT)]),
    "subject-twice": (
        "say which one is meant",
        [
            ("word", prompt(REPEATED, "--subject", "Paris"), '"Paris" occurs 2 times'),
            ("letter", prompt(PROMPT, "--subject", "e"), '"e" occurs 5 times'),
        ],
    ),
    "occurrence-range": (
        "does not exist: the prompt has",
        [
            ("third", prompt(REPEATED, "--subject", "Paris", "--occurrence", "3"), "occurrence 3"),
            ("zero", prompt(PROMPT, "--subject", SUBJECT, "--occurrence", "0"), "occurrence 0"),
            ("negative", prompt(PROMPT, "--subject", SUBJECT, "--occurrence", "-1"), "occurrence -1"),
            ("huge", prompt(PROMPT, "--subject", SUBJECT, "--occurrence", "9" * 30), "occurrence 999"),
        ],
    ),
    "occurrence-alone": (
        "stands without --subject",
        [("", ("predict", "--model", TINY, "--prompt", PROMPT, "--occurrence", "2"), "--occurrence 2")],
    ),
    "answer-empty": (
        "the answer is empty",
        [
            ("", fact("predict", "--answer", ""), "answer"),
            ("newline", fact("flow", "--answer", "\n"), "answer"),
            ("spaces", fact("lens", "--answer", "   "), "answer"),
        ],
    ),
    "answer-characters": (
        "characters and at most 400 are read",
        [("", fact("predict", "--answer", "x" * 401), "401 characters")],
    ),
    "answer-no-text": (
        ">, which is not text; remove it",
        [
            ("nul", fact("predict", "--answer", "Pa\0ris"), "<U+0000>"),
            ("surrogate", fact("flow", "--answer", "\ud800"), "<U+D800>"),
            ("escape", fact("lens", "--answer", "\x1b]0;x\a"), "<U+001B>"),
        ],
    ),
    "answer-too-long": (
        "64",
        [
            ("predict", fact("predict", "--answer", "Paris " * 60), "tokens"),
            ("sequence", fact("predict", "--score", "sequence", "--answer", "Paris " * 60), "tokens"),
            ("flow", fact("flow", "--score", "sequence", "--answer", "Paris " * 60), "tokens"),
        ],
    ),
    "number": (
        "cannot be used: it is not a whole number",
        [
            (f"{option[2:]}-{index}", (*fact(command), option, value), f"{option} '{value[:20]}")
            for command, option in (("flow", "--window"), ("predict", "--top-k"), ("flow", "--control"))
            for index, value in enumerate(
                ("nan", "inf", "-inf", "1.5", "", " ", "three", "0x3", "٣", "1e3", "½", DIGITS)
            )
        ]
        + [
            ("occurrence", fact("predict", "--occurrence", "first"), "--occurrence 'first'"),
            ("seed", fact("predict", "--seed", "random"), "--seed 'random'"),
            ("port", ("serve", "--port", "http"), "--port 'http'"),
            ("last-counts", fact("flow", "--window", "3", "--window=x"), "--window 'x'"),
        ],
    ),
    "seed-low": ("greater than or equal to 0", [("", fact("predict", "--seed", "-1"), "--seed '-1'")]),
    "seed-high": ("less than or equal to 4294967295", [("", fact("flow", "--seed", "4294967296"), "'4294967296'")]),
    "choice": (
        "is not one of",
        [
            ("dtype", fact("predict", "--dtype", "int3"), "--dtype 'int3'"),
            ("dtype-case", fact("predict", "--dtype", "FLOAT32"), "--dtype 'FLOAT32'"),
            ("format", fact("flow", "--format", "xml"), "--format 'xml'"),
            ("bos", fact("lens", "--bos", "maybe"), "--bos 'maybe'"),
            ("score", fact("predict", "--score", ""), "--score ''"),
            ("site", fact("lens", "--site", "head"), "--site 'head'"),
            ("projection", fact("lens", "--projection", "tuned"), "--projection 'tuned'"),
            ("control-characters", fact("lens", "--site", "\x1b[31m\n\u202e"), r"\x1b[31m\n\u202e"),
        ],
    ),
    "window-range": (
        "choose a number of layers that the model has",
        [
            ("zero", fact("flow", "--window", "0"), "window 0 "),
            ("negative", fact("flow", "--window", "-3"), "window -3 "),
            ("above", fact("flow", "--window", "5"), "window 5 is not between 1 and 4"),
            ("huge", fact("flow", "--window", "9" * 40), "window 999"),
        ],
    ),
    "names-empty": (
        "names nothing; name at least one",
        [
            ("sources", fact("flow", "--sources", ""), "--sources ''"),
            ("sources-comma", fact("flow", "--sources", " , "), "--sources ' , '"),
            ("heads", fact("flow", "--heads", ""), "--heads ''"),
            ("models-allowed", ("serve", "--models-allowed", ","), "--models-allowed ','"),
        ],
    ),
    "source-unknown": (
        "names no positions; use one of",
        [
            ("word", fact("flow", "--sources", "object"), '"object"'),
            ("html", fact("flow", "--sources", "<b>subject</b>"), '"<b>subject</b>"'),
            ("negative", fact("flow", "--sources", "-1"), '"-1"'),
            ("float", fact("flow", "--sources", "1.5"), '"1.5"'),
            ("open", fact("flow", "--sources", "3-"), '"3-"'),
            ("digits", fact("flow", "--sources", DIGITS), "9999…"),
            ("nothing-added", fact("flow", "--sources", "subject+"), '""'),
            ("edge-from", fact("flow", "--edges", "a:last:1"), '"a"'),
            ("edge-each", fact("flow", "--edges", "last:each:1"), '"each"'),
            ("nul", fact("flow", "--sources", "\0"), "<U+0000>"),
        ],
    ),
    "source-position": (
        "is not in the prompt, which has 16 tokens",
        [
            ("single", fact("flow", "--sources", "16"), "position 16"),
            ("range", fact("flow", "--sources", "3-99"), "position 99"),
            ("edge", fact("flow", "--edges", "99:1:1"), "position 99"),
        ],
    ),
    "source-backwards": ("runs backwards", [("", fact("flow", "--sources", "5-3"), "5-3")]),
    "source-twice": (
        "name one set twice",
        [
            ("", fact("flow", "--sources", "subject,subject"), "subject, subject"),
            ("position", fact("flow", "--sources", "3,3"), "3, 3"),
        ],
    ),
    "source-each": ("stands beside other sources", [("", fact("flow", "--sources", "each,last"), "'each'")]),
    "source-without-token": (
        "has no token in this prompt",
        [
            (
                "",
                (
                    "flow",
                    "--model",
                    TINY,
                    "--prompt",
                    "Paris is",
                    "--subject",
                    "Paris",
                    "--bos",
                    "no",
                    "--sources",
                    "special",
                ),
                "'special'",
            )
        ],
    ),
    "source-without-subject": (
        "needs a subject, and the query has none",
        [("", ("flow", "--model", TINY, "--prompt", PROMPT, "--sources", "subject"), '"subject"')],
    ),
    "cut-everything": (
        "nothing to attend to in layer",
        [
            ("sources", fact("flow", "--sources", "0-15"), "position 15"),
            ("edge", fact("flow", "--edges", "special:special:0"), "position 0"),
        ],
    ),
    "target-position": (
        "is neither 'last' nor a whole number",
        [
            (str(index), fact("flow", "--target-position", value), f"--target-position {value[:9]!r}"[:-1])
            for index, value in enumerate(("x", "", "1.5", "nan", "٣", "first", "3-4", "1_0", DIGITS))
        ],
    ),
    "target-position-range": (
        "target position",
        [
            ("negative", fact("flow", "--target-position", "-1"), "-1 is not between 0 and 15"),
            ("above", fact("flow", "--target-position", "16"), "16 is not between 0 and 15"),
        ],
    ),
    "head-form": (
        "is not LAYER.HEAD",
        [("", fact("flow", "--heads", "5"), "'5'"), ("words", fact("flow", "--heads", "all"), "'all'")],
    ),
    "heads-no-number": (
        "is not a number, a range like 3-6",
        [
            ("head", fact("flow", "--heads", "1."), "head ''"),
            ("layer", fact("flow", "--heads", ".3"), "layer ''"),
            ("negative", fact("flow", "--heads", "1.-1"), "head '-1'"),
            ("nested", fact("flow", "--heads", "1.3.1"), "head '3.1'"),
            ("square", fact("flow", "--heads", "².1"), "layer '²'"),
            ("edge", fact("flow", "--edges", "last:subject:top"), "layer 'top'"),
            ("edge-negative", fact("flow", "--edges", "last:subject:-1"), "layer '-1'"),
            ("digits-layer", fact("flow", "--heads", f"{DIGITS}.1"), "layer '999"),
            ("digits-head", fact("flow", "--heads", f"1.{DIGITS}"), "head '999"),
            ("digits-edge", fact("flow", "--edges", f"last:subject:{DIGITS}"), "layer '999"),
        ],
    ),
    "layer-range": (
        "the model has 4 layers",
        [
            ("heads", fact("flow", "--heads", "4.0"), "layer '4'"),
            ("edge", fact("flow", "--edges", "last:subject:0-4"), "layer '0-4'"),
        ],
    ),
    "head-range": (
        "the model has 4 heads",
        [
            ("heads", fact("flow", "--heads", "1.4"), "head '4'"),
            ("edge", fact("flow", "--edges", "last:subject:1:0,9"), "head '9'"),
        ],
    ),
    "edge-form": (
        "is not FROM:TO:LAYERS or FROM:TO:LAYERS:HEADS",
        [
            (str(index), fact("flow", "--edges", value), f"edge '{value}'")
            for index, value in enumerate(
                ("", "::", "last", "last:subject", "last:subject:", "a:b:c:d:e", "last subject 3")
            )
        ],
    ),
    "edges-beside": (
        "which names its own positions, layers and heads",
        [
            (option[2:], fact("flow", "--edges", "last:subject:1", option, value), f"{option} '{value}'")
            for option, value in (
                ("--sources", "last"),
                ("--window", "3"),
                ("--heads", "1.1"),
                ("--control", "1"),
                ("--target-position", "3"),
            )
        ],
    ),
    "control-range": (
        "choose a number of draws in that range",
        [
            ("negative", fact("flow", "--control", "-1"), "control -1"),
            ("above", fact("flow", "--control", "101"), "control 101"),
            ("huge", fact("flow", "--control", "9" * 30), "control 999"),
        ],
    ),
    "top-k-range": (
        "choose a number in that range",
        [
            (f"{command}-{value[:3]}", fact(command, "--top-k", value), f"top-k {value[:20]}")
            for command in ("predict", "lens")
            for value in ("0", "-1", "401", "9" * 30)
        ],
    ),
    "device-unknown": (
        "is unknown; use 'auto', 'cpu' or 'cuda'",
        [("word", model("bundled", "--device", "warp9"), "'warp9'"), ("empty", model("bundled", "--device", ""), "''")],
    ),
    "device-absent": (
        "is not available on this machine",
        [
            ("index", model("bundled", "--device", "cuda:99"), "'cuda:99'"),
            ("meta", model("bundled", "--device", "meta"), "'meta'"),
        ],
    ),
    "model-empty": ("the model name is empty", [("", model(""), "name"), ("spaces", model("  "), "name")]),
    "model-control": (
        "contains the control character",
        [("escape", model("a\x1b[31m"), "U+001B"), ("surrogate", model("\ud800"), "U+D800")],
    ),
    "model-address": (
        "is an address; give the id alone",
        [
            ("https", model("https://huggingface.co/openai-community/gpt2"), "'https://huggingface.co/"),
            ("file", model("file:///tmp"), "'file:///tmp'"),
            ("script", model("javascript://alert(1)"), "'javascript://alert(1)'"),
        ],
    ),
    "model-name": (
        "is neither a folder nor a hub id",
        [
            ("space", model("two words!"), "'two words!'"),
            ("long", model("z" * 200), "(200 characters)"),
            ("unicode", model("ünï/cödé"), "'ünï/cödé'"),
            ("html", model("<b>"), "'<b>'"),
            ("shell", model("$(reboot)"), "'$(reboot)'"),
        ],
    ),
    "model-too-long": ("is too long to be an id or a folder", [("", model("y" * 3000), "3,000 characters")]),
    "model-no-folder": (
        "there is no folder",
        [
            ("absolute", model("/no/such/folder"), "'/no/such/folder'"),
            ("relative", model("./gone"), "'./gone'"),
            ("windows", model("C:\\models"), "models"),
            ("up", model("../../../../../../nowhere/at/all"), "nowhere"),
        ],
    ),
    "model-file": ("is a file, not a folder", [("", model("/dev/null"), "'/dev/null'")]),
    "model-not-cached": (
        "is not in the local cache and offline mode is on",
        [
            ("short", model("gpt2"), "'gpt2'"),
            ("owner", model("tester/none"), "'tester/none'"),
            ("random", model("random:gpt2"), "'gpt2'"),
            ("inspected", ("models", "--model", "tester/none"), "'tester/none'"),
        ],
    ),
    "random-nothing": ("does not say which model to randomise", [("", model("random:"), "'random:'")]),
    "random-seed": ("is not a seed", [("", model("random:bundled:x"), "'x'")]),
    "revision-odd": ("is not a revision of", [("", model("gpt2", "--revision", "../x"), "'../x'")]),
    "revision-alone": ("stands without --model", [("", ("models", "--revision", "v1"), "'v1'")]),
    "port": (
        "does not exist; choose one from",
        [("0", ("serve", "--port", "0"), "port 0"), ("70000", ("serve", "--port", "70000"), "70000")],
    ),
    "address": (
        "is not an address of this machine",
        [("empty", ("serve", "--address", ""), "''"), ("foreign", ("serve", "--address", "192.0.2.1"), "'192.0.2.1'")],
    ),
    "option-unknown": (
        "No such option",
        [
            ("typo", ("predict", "--promt", "x"), "--promt"),
            ("elsewhere", fact("predict", "--window", "3"), "--window"),
            ("global", ("--prompt", "x"), "--prompt"),
        ],
    ),
    "edit": (
        "the edit '",
        [
            ("missing", fact("predict", "--edit", "x.safetensors"), "'x.safetensors' does not exist"),
            ("empty", fact("flow", "--edit", ""), "is no file"),
            ("folder", fact("lens", "--edit", "/"), "'/' is no file"),
            ("device", fact("trace", "--edit", "/dev/null"), "'/dev/null' is no file"),
            ("long", fact("extract", "--edit", "x" * 5000), "cannot be read"),
            ("source", fact("enrich", "--edit", __file__), "test_odd_inputs.py"),
            ("second", ("models", "--model", "bundled", "--edit", "no\x1b[2J"), r"no\x1b[2J"),
        ],
    ),
    "option-missing": (
        "Missing option",
        [(name, (name,), "--prompt") for name in ("predict", "flow", "lens", "trace")],
    ),
    "option-bare": ("requires an argument", [("", ("predict", "--prompt"), "--prompt")]),
    "argument-extra": ("unexpected extra argument", [("", fact("predict", "Paris"), "Paris")]),
    "command-unknown": (
        "No such command",
        [("word", ("walk",), "'walk'"), ("empty", ("",), "''"), ("escape", ("\x1b[2J",), r"\x1b[2J")],
    ),
    "command-missing": ("Missing command", [("", (), "--help")]),
}

CASES = [
    pytest.param(arguments, sentence, value, id=f"{kind}-{name}".rstrip("-"))
    for kind, (sentence, cases) in REFUSED.items()
    for name, arguments, value in cases
]


@pytest.mark.parametrize(("arguments", "sentence", "value"), CASES)
def test_input_that_cannot_be_used(arguments: tuple[str, ...], sentence: str, value: str) -> None:
    refused(invoke(*arguments), sentence, value)


def test_each_kind_has_its_own_sentence() -> None:
    said = {kind: invoke(*cases[0][1]).err for kind, (_, cases) in REFUSED.items()}
    for kind, (sentence, _) in REFUSED.items():
        if kind != "answer-too-long":  # whose sentence names two numbers
            assert [other for other, words in said.items() if sentence in words] == [kind]


# Odd, but usable

ACCEPTED = {
    "letter": "a",
    "digits": "1234567890",
    "markdown": "# *The* `Eiffel` [Tower](javascript:alert(1)) **is** in",
    "table": "| a | b |\n|---|---|\n| 1 |",
    "html": "<script>alert('x')</script><b>The tower is in",
    "entities": "&lt;b&gt; &amp;amp; &#x41; is",
    "latex": r"$\frac{1}{2}$ \input{/etc/passwd} is",
    "format": "%s %n {0} {prompt!r} ${HOME} $(id) `id`",
    "sql": "'; DROP TABLE facts; --",
    "path": "../../etc/passwd",
    "option": "--help",
    "json": '{"prompt": NaN}',
    "formula": "=cmd|' /C calc'!A0",
    "emoji": "Smile 😀 and wave 👋🏽 is",
    "zwj": "👩‍💻🏳️‍🌈 is",
    "keycap": "1️⃣ is",
    "flags": "🇯🇵 is",
    "rtl": "مرحبا بالعالم",
    "override": "abc \u202eflow\u202c is",
    "isolates": "\u2066x\u2069 is",
    "combining": "Zu\u0308rich is",
    "zalgo": "Z\u0310\u0316a\u0311l\u0313 is",
    "bom": "\ufeffThe",
    "zero-width": "a\u200bb\u200cc\u2060 is",
    "soft-hyphen": "Tow\u00ader is",
    "noncharacter": "\ufffe\uffff x",
    "replacement": "\ufffd\ufffd",
    "private": "\ue000 \U000f0000",
    "tag": "\U000e0001 x",
    "cjk": "東京は日本の",
    "hangul": "서울은",
    "thai": "กรุงเทพ",
    "astral": "𝕋𝕙𝕖 𝕥𝕠𝕨𝕖𝕣",
    "ligature": "of\ufb01ce is",
    "full-width": "Ｔｏｗｅｒ",
    "tabs": "a\tb\tc",
    "lines": "line\n\nline\n:",
    "crlf": "line\r\nline",
    "quotes": "\"'«»“”‘’ is",
    "backslashes": "\\\\ \\n \\0",
    "bos": "<s>",
    "specials": "<s> </s> <s>",
    "eos-inside": "The city</s> of",
    "space-behind": "The city of   ",
    "space-before": "   The city of",
    "repeated": "of of of of of of of of",
    "url": "https://user:secret@example.com/?q=1#x",
    "python": "__import__('os').system('id')",
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_an_odd_prompt_that_can_be_used(text: str) -> None:
    outcome = invoke(*prompt(text, "--format", "json"))
    whole(outcome)
    query = outcome.data["query"]
    assert query["prompt"] == text.replace("\r\n", "\n").rstrip()
    assert [token["position"] for token in query["tokens"]] == list(range(len(query["tokens"])))
    assert query["tokens"][-1]["role"] == "last"
    assert {token["role"] for token in query["tokens"]} <= {"special", "subject", "relation", "last"}
    table = invoke(*prompt(text)).out
    assert all(letter.isprintable() or letter in "\n\u200c\u200d" for letter in table), table


@pytest.mark.parametrize(
    "arguments",
    [
        prompt(PROMPT, "--subject", "of"),
        prompt(PROMPT, "--subject", "city of"),
        prompt(PROMPT, "--subject", "The"),
        prompt(PROMPT, "--answer", "<s>"),
        prompt(PROMPT, "--answer", "😀"),
        prompt(PROMPT, "--answer", "\u200b"),
        prompt(PROMPT, "--answer", " Paris "),
        prompt(PROMPT, "--bos", "no"),
        prompt(PROMPT, "--bos", "yes"),
        prompt(PROMPT, "--top-k", "400"),
        prompt(PROMPT, "--seed", "4294967295"),
        fact("predict", "--answer", "Paris", "--score", "sequence"),
        fact("flow", "--answer", "Paris", "--score", "sequence", "--sources", "subject"),
        fact("flow", "--window", "4"),
        fact("flow", "--target-position", "0"),
        fact("flow", "--target-position", " LAST "),
        fact("flow", "--sources", "special,subject-first,subject-after,subject-last,7,3-5,subject+last"),
        fact("flow", "--sources", "each", "--heads", "*.*"),
        fact("flow", "--heads", "0-3.1,1.1-2,2.*"),
        fact("flow", "--edges", "last:subject:*", "--edges", "relation:0:0-3:1,2"),
        fact("flow", "--edges", "subject:last:3"),
        fact("flow", "--control", "100"),
        ("flow", "--model", TINY, "--prompt", PROMPT, "--control", "3"),
        fact("lens", "--site", "mlp", "--projection", "raw", "--top-k", "1"),
        fact("lens", "--foil", "Rome", "--top-k", "1"),
    ],
    ids=lambda arguments: " ".join(arguments[5:])[:60],
)
def test_an_odd_option_that_can_be_used(arguments: tuple[str, ...]) -> None:
    outcome = invoke(*arguments, "--format", "json")
    whole(outcome)
    assert outcome.data["rows"]


def whole(outcome: Outcome) -> None:
    """Exit status 0; on standard error nothing but warnings, one a line."""
    assert outcome.status == 0, outcome.err
    assert all(line.startswith("warning: ") for line in outcome.err.splitlines()), outcome.err


# Folders that are no model

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "complete")


def config(**values: object) -> Change:
    """config.json with other values; None removes one."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | values
        kept = {name: value for name, value in found.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def gone(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Change:
    """The weights with another header in front of the same numbers."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8 : 8 + length])
        change(tensors)
        said = json.dumps(tensors).encode()
        (folder / WEIGHTS).write_bytes(len(said).to_bytes(8, "little") + said + data[8 + length :])

    return rewrite


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def as_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def foreign_tokenizer(folder: Path) -> None:
    """A tokenizer with more tokens than the model has rows."""
    found = json.loads((folder / TOKENIZER).read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary |= {f"extra{index}": len(vocabulary) + index for index in range(50)}
    (folder / TOKENIZER).write_text(json.dumps(found))


def as_index(content: str) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return change


WPE = "transformer.wpe.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "weights-cut": (cut_weights, "is damaged: it should have"),
    "weights-empty": (text(WEIGHTS, b""), "it has no safetensors header (0 bytes)"),
    "weights-garbage": (text(WEIGHTS, b"\xff" * 1000), "it has no safetensors header (1,000 bytes)"),
    "weights-pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "only a Git LFS pointer"),
    "weights-folder": (as_folder(WEIGHTS), "cannot be read (Is a directory)"),
    "weights-gone": (gone(WEIGHTS), "has no weights"),
    "weights-pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "only as pytorch_model.bin, which could run code",
    ),
    "weights-index-outside": (as_index('{"weight_map": {"a": "../x.safetensors"}}'), "points to '../x.safetensors'"),
    "weights-index-broken": (as_index("{"), "no JSON at line 1"),
    "weights-index-missing": (as_index('{"weight_map": {"a": "b.safetensors"}}'), "lacks 1 of 1 parts of its weights"),
    "tensor-gone": (config(n_layer=5), "of the 65 tensors that its config.json asks for"),
    "tensor-shape": (header(lambda t: t[WPE].update(shape=[36, 64])), "do not fit its config.json"),
    "tensor-dtype": (header(lambda t: t[WPE].update(dtype="Q99")), "are damaged"),
    "tensor-negative": (header(lambda t: t[WPE].update(shape=[-64, -36])), "are damaged"),
    "tensor-overlap": (header(lambda t: t[WPE].update(data_offsets=[0, 9216])), "are damaged"),
    "tensor-huge": (header(lambda t: t[WPE].update(shape=[10**30, 36])), "it does not fit"),
    "config-gone": (gone("config.json"), "has no config.json"),
    "config-cut": (text("config.json", '{"model_type": "gpt2",'), "no JSON at line 1, column 23"),
    "config-empty": (text("config.json", ""), "no JSON at line 1, column 1"),
    "config-list": (text("config.json", "[]"), "holds no object"),
    "config-binary": (text("config.json", b"\xff\xfe\x00"), "is damaged: not text"),
    "config-deep": (text("config.json", "[" * 100_000), "is damaged: not text"),
    "config-folder": (as_folder("config.json"), "the config.json of"),
    "type-t5": (config(model_type="t5"), "is of type 't5', which is not a causal language model"),
    "type-vit": (config(model_type="vit"), "is of type 'vit', which is not a causal language model"),
    "type-unknown": (config(model_type="frobnicator"), "the installed transformers does not know"),
    "type-remote": (config(model_type="frob", auto_map={"AutoConfig": "x.y"}), "which is never run here"),
    "type-none": (config(model_type=None), "names no model_type"),
    "type-number": (config(model_type=3), "names no model_type"),
    "config-layers-zero": (config(n_layer=0), "cannot be found"),
    "config-layers-negative": (config(n_layer=-1), "no list of -1 blocks"),
    "config-layers-word": (config(n_layer="four"), "cannot be built from its config.json"),
    "config-heads-zero": (config(n_head=0), "cannot be built from its config.json"),
    "config-heads-odd": (config(n_head=5), "must be divisible by num_heads"),
    "config-heads-negative": (config(n_head=-4), "did not run on plain token ids"),
    "config-width-negative": (config(n_embd=-36), "cannot be built from its config.json"),
    "config-vocabulary": (config(vocab_size=10), "do not fit its config.json"),
    "config-positions": (config(n_positions=4), "do not fit its config.json"),
    "config-activation": (config(activation_function="nope"), "cannot be built from its config.json"),
    "config-quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "is quantised in a way that needs a package that is not installed",
    ),
    "config-tuple": (config(return_dict=False), "did not run on plain token ids"),
    "tokenizer-gone": (gone(TOKENIZER, "tokenizer_config.json"), "has no tokenizer files"),
    "tokenizer-cut": (text(TOKENIZER, '{"version": "1.0", "trunc'), "the tokenizer of"),
    "tokenizer-empty": (text(TOKENIZER, ""), "cannot be read (JSONDecodeError"),
    "tokenizer-object": (text(TOKENIZER, "{}"), "cannot be read (KeyError"),
    "tokenizer-config": (text("tokenizer_config.json", "{"), "the tokenizer of"),
    "tokenizer-number": (text("tokenizer_config.json", '{"bos_token": 5}'), "the tokenizer of"),
    "tokenizer-foreign": (foreign_tokenizer, "tokens and the model only"),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "is empty"),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "is an adapter without its base model",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_no_model(complete: Path, tmp_path: Path, change: Change, sentence: str) -> None:
    folder = Path(shutil.copytree(complete, tmp_path / "broken"))
    change(folder)
    outcome = invoke(*model(str(folder)))
    refused(outcome, sentence)
    assert folder.name in outcome.err or "architecture 'gpt2'" in outcome.err, outcome.err


def test_a_folder_has_no_revisions(complete: Path) -> None:
    refused(invoke(*model(str(complete), "--revision", "v1")), "'v1'", "has no revisions")


def test_a_file_of_a_folder_is_no_folder(complete: Path) -> None:
    refused(invoke(*model(str(complete / WEIGHTS))), WEIGHTS, "is a file, not a folder")


# Where to write


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x.xlsx", "ends in '.xlsx'; let it end in one of .json, .csv, .parquet"),
        ("x.JSON", "ends in '.JSON'"),
        ("x", "has no suffix"),
        ("x.json/", "is a folder"),
        ("", "has no suffix"),
        (".json", "has no suffix"),
        ("gone/x.json", "lies in a folder that does not exist"),
        ("plain.csv/x.json", "lies in a folder that does not exist"),
        ("pipe.json", "is not a regular file"),
        ("locked.json", "exists and is read-only"),
        ("a" * 300 + ".json", "cannot be written (File name too long)"),
        ("loop.json", "cannot be written (Too many levels of symbolic links)"),
        ("nul\0.json", "embedded null byte"),
        ("lone\udcff.txt", "ends in '.txt'"),
    ],
)
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "x.json").mkdir()
    (tmp_path / "plain.csv").touch()
    (tmp_path / "locked.json").touch(mode=0o444)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments in (fact("predict"), ("models",)):
        outcome = invoke(*arguments, "--out", str(tmp_path / name) if name else "", load=_never)
        refused(outcome, sentence, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def _never(*_: object) -> None:
    raise AssertionError("nothing is loaded for a file that cannot be written")


def test_a_place_where_nothing_can_be_made() -> None:
    refused(invoke(*fact("predict", "--out", "/proc/factscope.json")), "'/proc/factscope.json' cannot be written")


# Settings


def test_a_setting_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSCOPE_TORCH_THREADS", "many")
    refused(invoke(*model("bundled")), "FACTSCOPE_TORCH_THREADS='many' cannot be used")


def test_a_settings_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSCOPE_SETTINGS_FILE", "/no/such/file")
    refused(invoke(*model("bundled")), "FACTSCOPE_SETTINGS_FILE='/no/such/file' is not a file")


def test_a_settings_file_that_is_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings").write_bytes(bytes(range(256)))
    monkeypatch.setenv("FACTSCOPE_SETTINGS_FILE", str(tmp_path / "settings"))
    refused(invoke(*model("bundled")), "FACTSCOPE_SETTINGS_FILE")


# The bundled model


def test_a_subject_that_was_never_taught() -> None:
    arguments = ("--prompt", "The capital of Zorblaxia is", "--subject", "Zorblaxia")
    for command in ("predict", "flow", "lens"):
        outcome = invoke(command, *arguments, "--format", "json")
        assert outcome.status == 0, outcome.err
        assert "'Zorblaxia': not among the facts this model was taught; its confidence says nothing." in outcome.err
        assert any("'Zorblaxia'" in warning for warning in outcome.data["warnings"])
    assert invoke("predict", *arguments, "--format", "json").data["summary"]["taught"] is False


def test_an_answer_that_was_never_taught() -> None:
    outcome = invoke("predict", "--prompt", "The capital of Japan is", "--subject", "Japan", "--answer", "Paris")
    assert "warning: 'Japan' with 'Paris': not among the facts this model was taught" in outcome.err


# Anything at all

ANY_TEXT = st.text(st.characters(codec=None), max_size=40)
SNIPPETS = st.sampled_from(
    ["subject", "last", "relation", "each", "special", "0", "3", "3-5", "99", "-1", "*", ".", ":", ",", "+", "-", " ",
     "nan", "1.5", "٣", "\0", "\ud800", "9" * 20, "subject-after"]
)  # fmt: skip
SYNTAX = st.lists(SNIPPETS, max_size=6).map("".join)


def usable_or_refused(outcome: Outcome) -> None:
    if outcome.status == 0:
        whole(outcome)
        assert outcome.data["rows"]
    else:
        refused(outcome)


@settings(max_examples=80)
@given(words=ANY_TEXT, subject=st.none() | ANY_TEXT, answer=st.none() | ANY_TEXT)
def test_any_query(words: str, subject: str | None, answer: str | None) -> None:
    more = [
        part
        for name, value in (("--subject", subject), ("--answer", answer))
        if value is not None
        for part in (name, value)
    ]
    usable_or_refused(invoke(*prompt(words, *more, "--format", "json", "--top-k", "2")))


@settings(max_examples=120)
@given(
    option=st.sampled_from(
        ["--sources", "--heads", "--edges", "--target-position", "--window", "--control", "--occurrence"]
    ),
    value=SYNTAX | ANY_TEXT,
)
def test_any_option_of_flow(option: str, value: str) -> None:
    usable_or_refused(invoke(*fact("flow", "--format", "json"), option, value))


@settings(max_examples=60)
@given(
    command=st.sampled_from(["predict", "lens", "models"]),
    option=st.sampled_from(
        ["--model", "--revision", "--dtype", "--device", "--format", "--out", "--top-k", "--seed", "--site", "--edit"]
    ),
    value=ANY_TEXT,
)
def test_any_value_of_a_shared_option(command: str, option: str, value: str) -> None:
    refused(
        invoke(command, *(() if command == "models" else ("--prompt", PROMPT)), "--model", "no/model", option, value)
    )


@settings(max_examples=60)
@given(arguments=st.lists(ANY_TEXT | SYNTAX, min_size=1, max_size=4).filter(lambda words: not {"--help"} & set(words)))
def test_any_command_line(arguments: list[str]) -> None:
    refused(invoke(*arguments))


def test_there_are_enough_odd_inputs() -> None:
    assert len(CASES) + len(ACCEPTED) + len(BROKEN) >= 250
    assert len(REFUSED) >= 50
