"""The null beside the finding: the same knockout on the same architecture with random weights.

python examples/beside_random_weights.py
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from factscope import KnockoutSpec, Query, attention_knockout, load


def main() -> None:
    """Print the change in log-odds per layer for the trained and the random model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--prompt", default="Miles Davis plays the")
    parser.add_argument("--subject", default="Miles Davis")
    parser.add_argument("--answer", default="trumpet")
    options = parser.parse_args()

    query = Query(prompt=options.prompt, subject=options.subject, answer=options.answer)
    tables = {
        name: attention_knockout(load(name), query, KnockoutSpec(sources=("subject",))).table().set_index("layer")
        for name in (options.model, f"random:{options.model}")
    }
    beside = pd.DataFrame({name: table["log_odds_change"] for name, table in tables.items()})
    sys.stdout.write(beside.round(2).to_string() + "\n")


if __name__ == "__main__":
    main()
