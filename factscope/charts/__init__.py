"""Figures: a table of numbers in, a :class:`Figure` out. Nothing here imports torch.

A figure is a Vega-Lite spec and, apart from it, the data it draws, so that a page that fills in live sends new data to
an unchanged spec::

    figure = knockout_map(tokens, layers, values, answer="Paris")
    st.vega_lite_chart(figure.data, figure.spec, theme=None, key=f"map-{job}", on_select="rerun")  # in a page
    figure.chart()  # in a notebook
    export.svg(figure)  # in a file
"""

from factscope.charts import export
from factscope.charts.bars import RUNS, before_after, top_tokens
from factscope.charts.curves import control_band, knockout_curve, layer_curves, token_trajectories, trace_roles
from factscope.charts.differences import difference_bars, difference_curves, difference_map, lock
from factscope.charts.edits import loss_curve, probe_bars
from factscope.charts.enrichment import attributes_rates, sublayer_knockout
from factscope.charts.figure import Figure
from factscope.charts.heads import attention_pattern, extraction_events, head_difference, head_map, head_sources
from factscope.charts.heatmaps import knockout_map, lens_grid, trace_map
from factscope.charts.layers import layer_scores
from factscope.charts.severed import severed_curves
from factscope.charts.text import TokenRow, token_rows

__all__ = [
    "RUNS",
    "Figure",
    "TokenRow",
    "attributes_rates",
    "attention_pattern",
    "before_after",
    "control_band",
    "difference_bars",
    "difference_curves",
    "difference_map",
    "export",
    "extraction_events",
    "head_difference",
    "head_map",
    "head_sources",
    "knockout_curve",
    "knockout_map",
    "layer_curves",
    "layer_scores",
    "lens_grid",
    "lock",
    "loss_curve",
    "probe_bars",
    "severed_curves",
    "sublayer_knockout",
    "token_rows",
    "token_trajectories",
    "top_tokens",
    "trace_map",
    "trace_roles",
]
