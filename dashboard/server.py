"""Start-up and shut-down of the process that serves the pages."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dashboard import messages, runs
from dashboard.link import ModelChoice
from factscope.errors import FactScopeError

logger = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
    """Import torch, then load the bundled model in the background; stop all runs at the end."""
    messages.start_log()
    jobs = runs.executor()
    await asyncio.to_thread(warm_up)
    threading.Thread(target=preload, name="preload", daemon=True).start()
    try:
        yield {}
    finally:
        jobs.shutdown()


def warm_up() -> None:
    """Import what every page needs before the first one is asked for, and choose torch's threads."""
    import torch

    from dashboard import requests
    from factscope.settings import get_settings
    from factscope.store import stored_result

    torch.set_num_threads(get_settings().torch_threads)
    stored_result("prediction", requests.HOME, requests.prediction())


def preload() -> None:
    """Load the bundled model; then keep it and all modules out of garbage collections.

    Streamlit collects garbage after every run of a script; with a model in memory that takes hundreds of milliseconds
    (``runner.postScriptGC`` is off too).
    """
    try:
        with runs.use(ModelChoice()):
            logger.info("the bundled model is in memory")
    except FactScopeError as error:
        logger.warning("the bundled model was not loaded: %s", error)
    except Exception:
        logger.exception("the bundled model was not loaded")
    gc.collect()
    gc.freeze()
