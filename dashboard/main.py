"""The script behind ``app.py``: navigation, and the frame that all pages share."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboard import compare, editing, fact_line, messages, runs, state, weights

_HERE = Path(__file__).parent

st.set_page_config(
    page_title="FactScope",
    page_icon=str(_HERE / "icon.svg"),
    layout="wide",
    initial_sidebar_state="collapsed",
)
st.logo(str(_HERE / "logo.svg"), size="medium")
st.html(_HERE / "style.css")

page = st.navigation(
    [
        st.Page("../pages/fact.py", title="Fact", icon=":material/quiz:", default=True),
        st.Page("../pages/flow.py", title="Flow", icon=":material/conversion_path:", url_path="flow"),
        st.Page("../pages/lens.py", title="Lens", icon=":material/frame_inspect:", url_path="lens"),
        st.Page("../pages/heads.py", title="Heads", icon=":material/hub:", url_path="heads"),
        st.Page("../pages/trace.py", title="Trace", icon=":material/healing:", url_path="trace"),
        st.Page("../pages/edit.py", title="Edit", icon=":material/edit_note:", url_path="edit"),
        st.Page("../pages/layers.py", title="Layers", icon=":material/stacked_bar_chart:", url_path="layers"),
    ],
    position="top",
)
weights.begin()
runs.begin()
with messages.caught():
    editing.begin()
with messages.caught():
    fact_line.show()
with messages.caught():
    compare.banner()
page.run()
state.write_link()
