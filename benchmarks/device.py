"""The rows on a GPU: ``python -m benchmarks --device cuda``. Wall seconds, bfloat16; no figure is kept yet.

Models are made on the device with random weights. In bfloat16 two ways to one number differ by rounding, so the
deviation is printed and judged against a wide limit, and no ratio is required.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks import ours, references
from benchmarks.references import Cell
from benchmarks.rows import NOISE, NOISED, SAMPLES
from benchmarks.shapes import EAGER
from benchmarks.timing import median
from factscope.models.handle import build_handle

TOLERANCE = 0.05
"""Largest deviation of p between two orders of bfloat16 products."""
TOKENS, SAMPLE, ROUNDS = 16, 16, 3

Configs = dict[str, tuple[type, Any]]


def configs() -> Configs:
    """GPT-2 XL, and a Llama of seven billion parameters."""
    xl = GPT2Config(n_layer=48, n_embd=1600, n_head=25, vocab_size=50_257, **EAGER)
    llama = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=11_008, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32_000, **EAGER,
    )  # fmt: skip
    return {"GPT-2 XL": (GPT2LMHeadModel, xl), "Llama, 7B": (LlamaForCausalLM, llama)}


def made(kind: type, config: Any, device: str, dtype: torch.dtype) -> Any:
    """Random weights, made on the device at a scale where p moves."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            embedding = "wte" in name or "wpe" in name or "embed_tokens" in name
            inputs = parameter.shape[0] if isinstance(model, GPT2LMHeadModel) else parameter.shape[1]
            parameter.normal_(std=NOISE if embedding else 1.5 / inputs**0.5)
    return model


def rows(device: str, found: Configs, dtype: torch.dtype = torch.bfloat16) -> Iterator[dict[str, Any]]:
    """Knockout map and causal trace of every model."""
    for name, (kind, config) in found.items():
        model = made(kind, config, device, dtype)
        handle = build_handle(
            model, None, name=name, revision="0", dtype=str(dtype).removeprefix("torch."), device=device
        )
        ids = torch.randint(1, handle.vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(TOKENS)).tolist()
        prompt = torch.tensor([ids], device=device)
        with torch.no_grad():
            target = int(model(prompt, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
        cells = [(position, layer) for position in range(TOKENS) for layer in range(handle.info.n_layers)]
        values = ours.noise_values(SAMPLES, len(NOISED), handle.info.d_model, NOISE)
        noise: dict[str, Any] = {"values": values, "noised": NOISED}
        yield _row(
            f"attention knockout, window 9: {name}", device, cells,
            lambda some: ours.knockout(handle, ids, some, 9, target),  # noqa: B023 (called before the next model)
            lambda cell: references.knockout_cell(model, prompt, cell, 9, target),  # noqa: B023
        )  # fmt: skip
        yield _row(
            f"causal trace, block outputs, {SAMPLES} samples: {name}", device, cells,
            lambda some: ours.trace(handle, ids, some, target, **noise),  # noqa: B023
            lambda cell: references.trace_cell(model, prompt, cell, target, site="output", size=1, **noise),  # noqa: B023
        )  # fmt: skip
        del model, handle


def _row(
    name: str,
    device: str,
    cells: list[Cell],
    fast: Callable[[list[Cell]], dict[Cell, float]],
    slow: Callable[[Cell], float],
) -> dict[str, Any]:
    chosen = random.Random(0).sample(cells, min(SAMPLE, len(cells)))
    compared = fast(chosen)
    difference = max(abs(compared[cell] - slow(cell)) for cell in chosen)
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        own = _wall(device, lambda: fast(cells))
        theirs = _wall(device, lambda: [slow(cell) for cell in chosen]) * len(cells) / len(chosen)
        seconds.append(own)
        ratios.append(theirs / own)
    return {"row": name, "seconds": median(seconds), "ratio": median(ratios), "difference": difference}


def _wall(device: str, action: Callable[[], Any]) -> float:
    """Seconds on the wall until the device is done."""
    _wait(device)
    begin = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main(device: str) -> int:
    """Print the rows; 1 if numbers are too far apart, 2 where there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {device}: this build of torch sees no GPU here; without --device the CPU is measured")
        return 2
    worst = 0.0
    for row in rows(device, configs()):
        worst = max(worst, row["difference"])
        print(
            f"{row['row']}: {row['seconds']:.2f} s on the wall, {row['ratio']:.1f}x one forward per cell "
            f"(sample of {SAMPLE} cells, scaled), max|dp| {row['difference']:.1e}",
            flush=True,
        )
    return 0 if worst <= TOLERANCE else 1
