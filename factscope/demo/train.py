"""Trains the bundled model from scratch: ``python -m factscope.demo.train --seed 1 --out FOLDER --resume``.

A GPT-2 with learned positions and tied embeddings, AdamW, cosine decay, packed rows of 128 tokens. The first fifth of
the run sees three of ten subjects only, which gets recall started sooner; words that are no answers count less and less
in its second half and hardly in the short last phase. Everything follows from the seed; a run that was cut off goes on
from its last checkpoint, since each stretch of steps draws its documents from its own seed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated
from zlib import crc32

import torch
import typer
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from factscope.demo.corpus import Corpus
from factscope.demo.facts import read_rows, read_sentences
from factscope.demo.packing import Sequences, pack
from factscope.demo.prompts import dev_prompts
from factscope.demo.scoring import top1_share
from factscope.demo.tokenizer import CONTEXT, END, build_tokenizer, save_tokenizer

log = logging.getLogger(__name__)

STRETCH = 100
"""Steps that share one seed for their documents; checkpoints fall between stretches."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights.

    Attributes:
        word_weight: weight of a token that is no answer, until ``fade_from`` of the run; it then falls linearly to
            ``last_word_weight`` at ``fade_to``. Words build the features first; at the end a sentence that the model
            never saw should be answered, not continued like one that it saw.
        last_steps: steps of the last phase, which follows on ``steps`` with its own learning rate and word weight, and
            with the relations' ``late`` sentences.
        first_share: share of the run that sees only ``first_subjects`` of the subjects.
        warmup: steps of linear warm-up. final: last learning rate as a share of the first.
        min_frequency: of the tokenizer's merges.
    """

    seed: int = 1
    layers: int = 8
    width: int = 192
    heads: int = 6
    steps: int = 4600
    batch: int = 8
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    warmup: int = 60
    final: float = 0.02
    first_share: float = 0.2
    first_subjects: float = 0.3
    min_frequency: int = 6
    word_weight: float = 0.3
    last_word_weight: float = 0.01
    fade_from: float = 0.5
    fade_to: float = 0.8
    last_steps: int = 400
    last_learning_rate: float = 6e-4
    last_phase_word_weight: float = 0.002


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights."""
    end = tokenizer.vocab[END]
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    config._attn_implementation = "eager"  # the fastest for rows this short
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of each next token that counts, in nats."""
    states = model.transformer(ids).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    losses = functional.cross_entropy(model.lm_head(states[counts]).float(), ids[:, 1:][counts], reduction="none")
    chosen = weights[:, 1:][counts]
    return (losses * chosen).sum() / chosen.sum()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to ``final`` of the peak; the last phase has a cosine of its own."""
    if step >= recipe.steps:
        done = (step - recipe.steps) / recipe.last_steps
        return recipe.last_learning_rate * (recipe.final + (1 - recipe.final) * (1 + math.cos(math.pi * done)) / 2)
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (recipe.final + (1 - recipe.final) * (1 + math.cos(math.pi * done)) / 2)


def word_weight(recipe: Recipe, step: int) -> float:
    """What a token that is no answer counts at a step."""
    if step >= recipe.steps:
        return recipe.last_phase_word_weight
    done = (step / recipe.steps - recipe.fade_from) / (recipe.fade_to - recipe.fade_from)
    return recipe.word_weight + min(1.0, max(0.0, done)) * (recipe.last_word_weight - recipe.word_weight)


def stretch_sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stretch: int, steps: int) -> Sequences:
    """The rows of one stretch of steps."""
    rows = read_rows()
    seed = recipe.seed * 1_000_003 + stretch
    corpus = Corpus(rows, read_sentences(), seed=seed, late=stretch * STRETCH >= recipe.steps)
    subjects = None
    if stretch * STRETCH < recipe.first_share * recipe.steps:
        limit = recipe.first_subjects * 1000
        subjects = [s for s in dict.fromkeys(row.subject for row in rows) if crc32(s.encode()) % 1000 < limit]
    weight = word_weight(recipe, stretch * STRETCH)
    documents = corpus.documents(subjects)
    return pack(documents, tokenizer, rows=steps * recipe.batch, length=CONTEXT, word_weight=weight)


def train(recipe: Recipe, folder: Path, *, resume: bool, device: str, half: bool, log_every: int = 500) -> None:
    """Runs the recipe and writes ``folder/model`` at its end.

    Args:
        folder: keeps the checkpoint, the log of the run and the finished model.
        resume: go on from the folder's checkpoint if it is of the same recipe.
        half: compute in bfloat16 where that is safe (autocast); the weights stay float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(read_rows(), read_sentences(), min_frequency=recipe.min_frequency)
    model = new_model(recipe, tokenizer)
    torch.nn.Module.to(model, device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    first = _restore(folder, recipe, model, optimizer, device) if resume else 0
    started = time.process_time()
    prompts = dev_prompts(read_rows(), read_sentences(), count=400, seed=recipe.seed)
    whole = recipe.steps + recipe.last_steps
    for stretch in range(first // STRETCH, math.ceil(whole / STRETCH)):
        step = stretch * STRETCH
        steps = min(STRETCH, whole - step)
        loss = _run_stretch(recipe, model, optimizer, tokenizer, stretch, steps, device, half)
        step += steps
        if step % log_every == 0 or step in (recipe.steps, whole):
            scores = {kind: round(top1_share(model, tokenizer, p), 3) for kind, p in prompts.items()}
            spent = round((time.process_time() - started) / 60, 1)
            entry = {"step": step, "tokens": step * recipe.batch * CONTEXT, "loss": round(loss, 4), **scores}
            log.info("%s cpu_min %s", json.dumps(entry), spent)
            _save(folder, recipe, model, optimizer, step)
    finish(model, tokenizer, recipe, folder / "model")


def finish(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path) -> None:
    """Writes the model as anyone's GPT-2: float16 safetensors, config, tokenizer, and the recipe beside them."""
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half = half.half()
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")


def _run_stretch(
    recipe: Recipe,
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    stretch: int,
    steps: int,
    device: str,
    half: bool,
) -> float:
    sequences = stretch_sequences(recipe, tokenizer, stretch, steps)
    model.train()
    total = 0.0
    for index in range(steps):
        part = slice(index * recipe.batch, (index + 1) * recipe.batch)
        ids = torch.from_numpy(sequences.ids[part]).to(device)
        weights = torch.from_numpy(sequences.weights[part]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, stretch * STRETCH + index)
        optimizer.zero_grad()
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=half):
            loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    return total / steps


def _save(folder: Path, recipe: Recipe, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    partial = folder / "checkpoint.partial"
    torch.save(state, partial)
    partial.replace(folder / "checkpoint.pt")


def _restore(
    folder: Path, recipe: Recipe, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, device: str
) -> int:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["recipe"] != asdict(recipe):
        log.warning("%s is of another recipe; starting afresh", path)
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on from step %s", state["step"])
    return int(state["step"])


def main(
    seed: Annotated[int, typer.Option(help="Seed of the weights and the documents.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: a cache folder of the user.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of 1,024 tokens.")] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option()] = None,
    threads: Annotated[int, typer.Option(help="Processor threads; more than the free cores is slower.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    half: Annotated[bool, typer.Option(help="Compute in bfloat16 where safe.")] = True,
) -> None:
    """Trains the bundled model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    given = {"steps": steps, "layers": layers, "width": width, "heads": heads}
    recipe = replace(Recipe(seed=seed), **{name: value for name, value in given.items() if value is not None})
    folder = out or Path.home() / ".cache" / "factscope" / "demo" / f"seed{seed}"
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    train(recipe, folder, resume=resume, device=where, half=half)
    typer.echo(str(folder / "model"))


if __name__ == "__main__":
    typer.run(main)
