"""One experiment with one library, as its documentation shows; runs in the environment made from peers.txt.

    python peer_program.py TransformerLens|nnsight EXPERIMENT FOLDER

Prints one line of JSON: the version, p of every sampled cell, CPU seconds of every round.
"""

import gc
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import GPT2LMHeadModel

torch.set_num_threads(1)
torch.set_grad_enabled(False)


def transformer_lens(model, task):
    """The two experiments with HookedTransformer.run_with_hooks."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # pyright: ignore[reportMissingImports]
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights  # pyright: ignore[reportMissingImports]

    shape = model.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_ctx=shape.n_positions,
        d_head=shape.n_embd // shape.n_head,
        n_heads=shape.n_head,
        d_mlp=4 * shape.n_embd,
        d_vocab=shape.vocab_size,
        act_fn="gelu_new",
        eps=shape.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    hooked = HookedTransformer(config)
    state = hooked.fill_missing_keys(convert_gpt2_weights(model, config))
    hooked.load_state_dict(state, strict=False)
    hooked.eval()
    ids, target = torch.tensor([task["ids"]]), task["target"]
    noise = torch.tensor(task["noise"], dtype=torch.float64)
    noised = task["noised"]

    def knockout(position, layer):
        def block(scores, hook):
            scores[:, :, -1, position] = -torch.inf
            return scores

        hooks = [(f"blocks.{k}.attn.hook_attn_scores", block) for k in task["windows"][str(layer)]]
        return float(hooked.run_with_hooks(ids, fwd_hooks=hooks)[0, -1].softmax(-1)[target])

    def trace(position, layer):
        def add(embedded, hook):
            embedded[1:, noised] += noise
            return embedded

        def restore(states, hook):
            states[1:, position] = states[0, position]
            return states

        hooks = [("hook_embed", add), (f"blocks.{layer}.hook_resid_post", restore)]
        logits = hooked.run_with_hooks(ids.repeat(1 + len(noise), 1), fwd_hooks=hooks)
        return float(logits[1:, -1].softmax(-1)[:, target].mean())

    return {"attention knockout": knockout, "causal trace": trace}


def nnsight(model, task):
    """The two experiments with tracing contexts."""
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    traced = NNsight(model)
    ids, target = torch.tensor([task["ids"]]), task["target"]
    noise = torch.tensor(task["noise"], dtype=torch.float64)
    noised, length = task["noised"], ids.shape[1]

    def knockout(position, layer):
        blocked = torch.zeros(1, 1, length, length, dtype=torch.bool)
        blocked[..., -1, position] = True
        with traced.trace(ids, use_cache=False, logits_to_keep=1):
            for k in task["windows"][str(layer)]:
                args, kwargs = traced.transformer.h[k].attn.inputs
                mask = kwargs["attention_mask"]
                lowest = torch.finfo(mask.dtype).min
                traced.transformer.h[k].attn.inputs = (
                    args,
                    {**kwargs, "attention_mask": mask.masked_fill(blocked, lowest)},
                )
            logits = traced.lm_head.output.save()
        return float(logits[0, -1].softmax(-1)[target])

    def trace(position, layer):
        with traced.trace(ids.repeat(1 + len(noise), 1), use_cache=False):
            traced.transformer.wte.output[1:, noised] += noise
            traced.transformer.h[layer].output[1:, position] = traced.transformer.h[layer].output[0, position]
            logits = traced.lm_head.output.save()
        return float(logits[1:, -1].softmax(-1)[:, target].mean())

    return {"attention knockout": knockout, "causal trace": trace}


def main(peer, experiment, place):
    task = json.loads((Path(place) / "task.json").read_text())
    model = GPT2LMHeadModel.from_pretrained(
        Path(place) / "model", attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
    library, package = {"TransformerLens": (transformer_lens, "transformer-lens"), "nnsight": (nnsight, "nnsight")}[
        peer
    ]
    cell = library(model, task)[experiment]
    cell(*task["cells"][0])
    seconds, p = [], []
    for _ in range(task["rounds"]):
        gc.collect()
        begin = time.process_time()
        p = [cell(*where) for where in task["cells"]]
        seconds.append(time.process_time() - begin)
    print(json.dumps({"version": version(package), "p": {experiment: p}, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
