"""One fact from prompt to figures: prediction, attention knockout, logit lens.

python examples/one_fact.py --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from factscope import KnockoutSpec, Query, attention_knockout, charts, load, logit_lens, predict


def main() -> None:
    """Ask the bundled model for a fact, block the subject, and write two figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    model = load(options.model)
    query = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")

    prediction = predict(model, query)
    sys.stdout.write(f"{prediction.target.text!r}: p {prediction.p_target:.3f}, rank {prediction.rank}\n")

    curve = attention_knockout(model, query, KnockoutSpec(control=10))
    worst = curve.table().sort_values("relative_change_percent").iloc[0]
    sys.stdout.write(
        f"Blocking {worst.source} around layer {worst.layer:.0f} changes it by {worst.relative_change_percent:.0f}%\n"
    )
    grid = logit_lens(model, query)
    sys.stdout.write(f"Rank of the answer at the last position, by layer: {grid.target_rank[:, -1].tolist()}\n")

    tokens = charts.token_rows(curve.query.tokens)
    figure = charts.knockout_curve(curve.table(), tokens=tokens, answer=curve.target.text, caption=query.prompt)
    (options.out / "flow.svg").write_bytes(charts.export.svg(figure, theme="light"))
    (options.out / "flow.csv").write_bytes(charts.export.csv(figure))


if __name__ == "__main__":
    main()
