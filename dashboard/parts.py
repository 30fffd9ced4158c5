"""Two small parts that put text of users and models on the page: the token line and the note.

Both set text with ``textContent`` and nothing else, so whatever the text is, it stays text. Their colours come from the
page's theme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import streamlit as st

_COUNT = "parts-count"
Tone = Literal["good", "warn", "bad", "plain"]

_PALETTE = """
:host, .root { --subject: #0b62a4; --accent: #c2185b; --good: #1a7f4b; --warn: #9a5b00; --bad: #b3261e;
  --faint: #667080; --chip: rgba(120,130,150,.13); font-family: var(--st-font, sans-serif);
  color: var(--st-text-color, inherit); }
.root.dark { --subject: #63b3f2; --accent: #ff6fa8; --good: #5fd39a; --warn: #f2b45a; --bad: #ff8a80; --faint: #9aa3b2;
  --chip: rgba(160,170,190,.16); }
"""

_TOKEN_CSS = (
    _PALETTE
    + """
.line { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 2px 1px; max-height: 150px; overflow-y: auto;
  padding: 1px; }
.token { font: 15px/1.35 'DejaVu Sans Mono', Menlo, Consolas, monospace; color: inherit; background: none;
  cursor: pointer; border: 0; border-bottom: 3px solid transparent; border-radius: 4px 4px 0 0;
  padding: 1px 3px 0; white-space: pre;
  text-align: center; }
.token small { display: block; font-size: 9px; line-height: 1.1; color: var(--faint); }
.token .dot { color: var(--faint); opacity: .65; }
.token:hover { background: var(--chip); }
.token:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.token.subject { border-bottom-color: var(--subject); }
.token.last { border-bottom: 3px double var(--accent); }
.token.special { color: var(--faint); font-style: italic; }
.token.anchor { background: var(--subject); color: #fff; }
.token.anchor small { color: #fff; }
.arrow { color: var(--accent); font-size: 17px; padding: 0 5px 6px; }
.chip { display: inline-flex; gap: 7px; align-items: baseline; border-radius: 14px; padding: 3px 11px;
  margin: 0 3px 3px 0; background: var(--chip); font-size: 15px; white-space: pre; }
.chip b { font-weight: 600; }
.chip span { color: var(--faint); font-variant-numeric: tabular-nums; font-size: 13px; }
.chip.good { box-shadow: inset 0 0 0 1.5px var(--good); }
.chip.warn { box-shadow: inset 0 0 0 1.5px var(--warn); }
.hint { color: var(--faint); font-size: 12px; padding: 0 0 6px 8px; }
"""
)

_DARK_JS = """
function dark(element) {
  const found = getComputedStyle(element).getPropertyValue('--st-background-color').trim();
  const hex = /^#([0-9a-f]{6})/i.exec(found);
  if (hex) { const n = parseInt(hex[1], 16); return ((n >> 16) + ((n >> 8) & 255) + (n & 255)) < 384; }
  const rgb = /(\\d+)\\D+(\\d+)\\D+(\\d+)/.exec(found);
  return rgb ? (+rgb[1] + +rgb[2] + +rgb[3]) < 384 : false;
}
"""

_TOKEN_JS = (
    _DARK_JS
    + """
const anchors = new WeakMap();
function text(tag, kind, value) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = value;
  return made;
}
export default function({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector('.root');
  root.classList.toggle('dark', dark(root));
  const line = root.querySelector('.line');
  const focused = line.contains(root.getRootNode().activeElement) ? root.getRootNode().activeElement.dataset.n : null;
  const hint = text('span', 'hint', data.hint);
  hint.setAttribute('role', 'status');
  const buttons = [];
  function pick(position) {
    const start = anchors.get(root);
    if (start === undefined) {
      anchors.set(root, position);
      buttons[position].classList.add('anchor');
      hint.textContent = 'Now click the last token of the subject (Esc to leave it as it was).';
    } else {
      anchors.delete(root);
      for (const b of buttons) b.classList.remove('anchor');
      hint.textContent = data.hint;
      setTriggerValue('span', [Math.min(start, position), Math.max(start, position) + 1]);
    }
  }
  anchors.delete(root);
  line.replaceChildren();
  for (const token of data.tokens) {
    const button = text('button', 'token ' + token.kind, '');
    button.type = 'button';
    button.dataset.n = token.n;
    button.title = token.title;
    button.setAttribute('aria-label', token.label);
    const lead = /^·+/.exec(token.text);
    if (lead) button.append(text('span', 'dot', lead[0]));
    button.append(document.createTextNode(lead ? token.text.slice(lead[0].length) : token.text));
    button.append(text('small', '', token.n));
    button.onclick = () => pick(token.n);
    button.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && buttons[token.n + step]) { buttons[token.n + step].focus(); event.preventDefault(); }
      if (event.key === 'Escape' && anchors.has(root)) {
        buttons[anchors.get(root)].classList.remove('anchor');
        anchors.delete(root);
        hint.textContent = data.hint;
      }
    };
    buttons.push(button);
    line.append(button);
  }
  line.append(text('span', 'arrow', '\\u25b8'));
  for (const chip of data.chips) {
    const made = text('span', 'chip ' + chip.tone, '');
    made.title = chip.title;
    made.append(text('span', '', chip.name), text('b', '', chip.text), text('span', '', chip.detail));
    line.append(made);
  }
  line.append(hint);
  if (focused !== null && buttons[focused]) buttons[focused].focus();
}
"""
)

_NOTE_CSS = (
    _PALETTE
    + """
.note { border-left: 4px solid var(--faint); background: var(--chip); border-radius: 4px; padding: 6px 12px;
  font-size: 15px; }
.note p { margin: 1px 0; line-height: 1.4; overflow-wrap: anywhere; white-space: pre-wrap; }
.note p:first-child.strong { font-weight: 600; }
.note.good { border-color: var(--good); } .note.warn { border-color: var(--warn); }
.note.bad { border-color: var(--bad); }
.note.small { padding: 3px 8px; font-size: 13px; }
.note.small p { margin: 0; line-height: 1.25; }
.note.quiet { background: none; border: 0; padding: 0; color: var(--faint); font-size: 13px; }
"""
)

_NOTE_JS = (
    _DARK_JS
    + """
export default function({ data, parentElement }) {
  const root = parentElement.querySelector('.root');
  root.classList.toggle('dark', dark(root));
  const note = root.querySelector('.note');
  note.className = 'note ' + data.tone + (data.small ? ' small' : '');
  note.setAttribute('role', data.tone === 'bad' ? 'alert' : 'note');
  note.replaceChildren(...data.lines.map((line, index) => {
    const made = document.createElement('p');
    made.textContent = line;
    if (data.strong && index === 0) made.className = 'strong';
    return made;
  }));
}
"""
)

_token_line = st.components.v2.component(
    "factscope_token_line", html='<div class="root"><div class="line"></div></div>', css=_TOKEN_CSS, js=_TOKEN_JS
)
_note = st.components.v2.component(
    "factscope_note", html='<div class="root"><div class="note"></div></div>', css=_NOTE_CSS, js=_NOTE_JS
)


def note(
    tone: Tone | Literal["quiet"],
    lines: Sequence[str],
    *,
    strong: bool = False,
    small: bool = False,
    key: str | None = None,
) -> None:
    """Lines of plain text with a coloured bar, in one element: the browser never takes them for markup.

    Args:
        tone: what the bar's colour says; "quiet" is small text without a bar.
        strong: whether the first line is a heading.
        small: smaller letters and less room, where several stand side by side.
    """
    if key is None:
        count = st.session_state[_COUNT] = st.session_state.get(_COUNT, 0) + 1
        key = f"note-{count}"
    _note(data={"tone": tone, "lines": [str(line) for line in lines], "strong": strong, "small": small}, key=key)


def begin(first: int) -> None:
    """Number the notes without a key from here on; the frame and the page's body, which may run alone, start apart."""
    st.session_state[_COUNT] = first


def token_line(
    tokens: Sequence[dict[str, Any]], chips: Sequence[dict[str, str]], *, hint: str, on_span: Callable[[], None]
) -> Any:
    """The prompt's tokens as buttons, and chips behind them.

    Args:
        tokens: ``n, text, kind, title, label`` of each.
        chips: ``name, text, detail, tone, title`` of each.
        on_span: called when a subject was chosen; the component's result then has ``span = [start, stop]``.
    """
    return _token_line(
        data={"tokens": list(tokens), "chips": list(chips), "hint": hint}, key="token-line", on_span_change=on_span
    )
