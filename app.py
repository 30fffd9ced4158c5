"""The dashboard: ``streamlit run app.py``, or ``factscope serve``."""

import sys
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dashboard import messages, server, visitors

app = st.App(
    "dashboard/main.py",
    lifespan=server.lifespan,
    middleware=[Middleware(visitors.VisitorCookie)],
    on_script_error=messages.on_script_error,
)
