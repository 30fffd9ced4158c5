"""Write docs/methods.md from the cards of the methods.

python tools/write_methods.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from factscope.methods import page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
