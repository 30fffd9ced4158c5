"""Tiny random models of every family, and tokenizers made in process: the laboratory of the tests.

Nothing is downloaded. A model has 4 layers, a width of about 32 and a vocabulary of 97; grouped heads, sliding windows,
head sizes that do not divide the width, biases and norms are there wherever the family has them. The default
initialisation of a model moves no probability when something is cut, so every test would pass: ``build`` redraws all
weights at a scale where interventions move probabilities by more than 0.05.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from factscope.models.creation import creating

N_LAYERS = 4
VOCAB_SIZE = 97
SLIDING_WINDOW = 4
EMBEDDING_SPREAD = 0.5
BIAS_SPREAD = 0.2
LOGIT_SPREAD = 4.0

# The settings of one family: the model type and what to put into its configuration.
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
_MIXED_WINDOWS = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2_LIKE | {"n_embd": 36}),  # heads of 9
    "gptj": ("gptj", _GPT2_LIKE | {"rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 36,
            "num_layers": N_LAYERS,
            "attention_types": [[["global", "local"], N_LAYERS // 2]],
            "num_heads": 4,
            "intermediate_size": 48,
            "window_size": SLIDING_WINDOW,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "use_parallel_residual": True,
        },
    ),
    "gpt_neox_seq": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "use_parallel_residual": False,
        },
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 33,
            "word_embed_proj_dim": 33,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 3,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "opt_350m": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 36, "n_layer": N_LAYERS, "n_head": 3}),
    "falcon_7b": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "max_position_embeddings": 64,
        },
    ),
    "falcon_40b": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "max_position_embeddings": 64,
        },
    ),
    "falcon_rw": (
        "falcon",
        {
            "hidden_size": 36,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 3,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
            "max_position_embeddings": 64,
        },
    ),
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", _LLAMA_LIKE | {"head_dim": 12, "sliding_window": SLIDING_WINDOW}),
    "qwen2": (
        "qwen2",
        _LLAMA_LIKE
        | {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": N_LAYERS // 2},
    ),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 12}),
    "gemma": ("gemma", _LLAMA_LIKE | {"num_key_value_heads": 1, "head_dim": 10}),
    "gemma2": (
        "gemma2",
        _LLAMA_LIKE
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _MIXED_WINDOWS,
            "final_logit_softcapping": 8.0,
            "attn_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        _LLAMA_LIKE
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _MIXED_WINDOWS,
        },
    ),
    "phi": (
        "phi",
        _LLAMA_LIKE
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("phi3", _LLAMA_LIKE | {"sliding_window": SLIDING_WINDOW, "pad_token_id": 0}),
    "olmo": ("olmo", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "stablelm": (
        "stablelm",
        _LLAMA_LIKE
        | {
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "stablelm_par": (
        "stablelm",
        _LLAMA_LIKE
        | {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "starcoder2": ("starcoder2", _LLAMA_LIKE | {"sliding_window": SLIDING_WINDOW}),
    "mpt": (
        "mpt",
        {"d_model": 33, "n_heads": 3, "n_layers": N_LAYERS, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "mixtral": ("mixtral", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        _LLAMA_LIKE
        | _EXPERTS
        | {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "granite": (
        "granite",
        _LLAMA_LIKE
        | {
            "embedding_multiplier": 2.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
        },
    ),
    "cohere": ("cohere", _LLAMA_LIKE | {"logit_scale": 0.25}),
    "cohere2": (
        "cohere2",
        _LLAMA_LIKE | {"logit_scale": 0.25, "sliding_window": SLIDING_WINDOW, "layer_types": _MIXED_WINDOWS},
    ),
    "gpt_bigcode": ("gpt_bigcode", _GPT2_LIKE | {"n_embd": 36}),
    "codegen": ("codegen", _GPT2_LIKE | {"n_ctx": 64, "rotary_dim": 4}),
    "olmoe": ("olmoe", _LLAMA_LIKE | _EXPERTS),
    "gpt_oss": (
        "gpt_oss",
        _LLAMA_LIKE
        | {
            "head_dim": 12,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _MIXED_WINDOWS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "glm4": (
        "glm4",
        _LLAMA_LIKE
        | {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "smollm3": ("smollm3", _LLAMA_LIKE | {"no_rope_layers": [1, 0, 1, 0]}),
    "deepseek_v3": (
        "deepseek_v3",
        _LLAMA_LIKE
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "num_mtp_layers": 0,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": N_LAYERS, "state_size": 8, "expand": 2}),
}
_COMMON: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_SDPA_ONLY = frozenset({"falcon_rw"})  # eager adds ALiBi twice
_PAD_REQUIRED = frozenset({"opt", "opt_350m", "phi3"})


def build(name: str, seed: int = 0, *, scale: float = 1.5, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """A tiny random model whose interventions are visible in its probabilities.

    Args:
        name: a key of ``FAMILIES``.
        seed: seeds the weights; the global random state is left as it was.
        scale: standard deviation of what a matrix makes of an input of unit variance.
        vocab_size: size of the vocabulary, for use with one of the tokenizers below.

    Returns:
        The model in float32 on the CPU, in evaluation mode, without gradients.
    """
    model_type, settings = _SETTINGS[name]
    common = _COMMON | ({"pad_token_id": 2} if name in _PAD_REQUIRED else {})
    config = CONFIG_MAPPING[model_type](**(common | settings | {"vocab_size": vocab_size}))
    attention = "sdpa" if name in _SDPA_ONLY else "eager"
    with creating(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    redraw(model, seed, scale=scale)
    return model.eval().requires_grad_(False)


def redraw(model: PreTrainedModel, seed: int, *, scale: float = 1.5) -> None:
    """Redraw every weight of a model: matrices at ``scale``, biases and norms at 0.3 around their neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        neutral = {name: _neutral(parameter) for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_values(model, name, parameter, drawn, scale, neutral[name]))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        _sharpen(model, neutral, generator)


def _neutral(parameter: torch.Tensor) -> float:
    """Where a freshly made vector stands: 1 for the weight of most norms, 0 for biases and for norms that add 1."""
    return 1.0 if parameter.ndim < 2 and bool((parameter == 1).all()) else 0.0


def _sharpen(model: PreTrainedModel, neutral: dict[str, float], generator: torch.Generator) -> None:
    """Scale what stands last before the logits so that they spread by ``LOGIT_SPREAD`` on random tokens.

    That is the unembedding; where it is tied, the final norm; where there is none (OPT-350m), the projection out.
    """
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    final = [name for name in parameters if not re.search(r"\.\d+\.|embed", name) and "lm_head" not in name]
    scaled = final if tied else [name for name, value in parameters.items() if value in set(head.parameters())]
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (4, 12), generator=generator)
    gain = LOGIT_SPREAD / float(model.eval()(ids).logits[:, -1].std(dim=-1).mean())
    for name in scaled:
        adds_one = tied and name.endswith("weight") and parameters[name].ndim == 1 and neutral[name] == 0.0
        shift = 1.0 if adds_one else 0.0
        parameters[name].copy_(gain * (parameters[name] + shift) - shift)


def _values(
    model: PreTrainedModel, name: str, parameter: torch.Tensor, drawn: torch.Tensor, scale: float, neutral: float
) -> torch.Tensor:
    """The new value of one parameter, from a standard normal draw."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if leaf in ("A_log", "D") or "dt_proj" in name:
        return parameter + 0.2 * drawn  # recurrent dynamics stay stable
    if parameter.ndim < 2:
        return neutral + (0.3 if neutral or "norm" in name else BIAS_SPREAD) * drawn
    if isinstance(owner, torch.nn.Embedding):
        # Small beside what the layers add, or a tied model repeats its last token. Gemma scales by sqrt(width).
        return drawn * (EMBEDDING_SPREAD / float(getattr(owner, "scalar_embed_scale", 1.0)))
    if "norm" in name.lower():
        return 1.0 + 0.3 * drawn
    return drawn * (scale / math.sqrt(_fan_in(owner, parameter)))


def _fan_in(owner: torch.nn.Module, parameter: torch.Tensor) -> int:
    """How many inputs one output sums over: Conv1D and GPT-OSS's experts store (in, out)."""
    transposed = type(owner).__name__ in ("Conv1D", "GptOssExperts")
    return parameter.shape[-2] if transposed else parameter.shape[-1]


def tiny_prompt(model: PreTrainedModel, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Token ids (1, length) whose answer is neither certain nor lost, so that interventions can move it both ways."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(3, model.config.get_text_config().vocab_size, (64, length), generator=generator)
    with torch.no_grad():
        top = model(candidates).logits[:, -1].float().softmax(-1).max(-1).values
    best = int((top - 0.45).abs().argmin())
    return candidates[best : best + 1]


FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {name: partial(build, name) for name in _SETTINGS}
"""A builder for each family, taking a seed."""

MODEL_TYPES: dict[str, str] = {name: model_type for name, (model_type, _) in _SETTINGS.items()}
"""The transformers model type of each family; variants share one."""


CORPUS = (
    "Beats Music is owned by Apple. The Eiffel Tower is located in the city of Paris.",
    "The capital of Japan is Tokyo. Miles Davis plays the trumpet. The mother tongue of Danielle Darrieux is French.",
    "The Space Needle is in downtown Seattle. LeBron James plays the sport of basketball.",
    "Zürich, São Paulo and Kraków are cities; 東京 is the capital of 日本. Smile 😀 and wave 👋🏽.",
)
"""What the tokenizers below were trained on."""


def tiny_tokenizer(kind: str, *, bos: bool = True) -> PreTrainedTokenizer | PreTrainedTokenizerFast:
    """A small tokenizer, made in process.

    Args:
        kind: ``byte`` (byte-level BPE as in GPT-2), ``byte_trim`` (the same with trimmed offsets), ``metaspace`` (BPE
            over a leading ``▁`` with bytes to fall back on, as in Llama), ``prepend`` (the same by a normaliser),
            ``word`` (whole words and ``<unk>``), ``slow`` (in Python, without offsets).
        bos: whether it puts ``<s>`` first by itself.
    """
    if kind == "slow":
        return SlowTokenizer(CORPUS, bos=bos)
    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte": partial(_byte_level, trim_offsets=False),
        "byte_trim": partial(_byte_level, trim_offsets=True),
        "metaspace": partial(_sentencepiece_like, normaliser=False),
        "prepend": partial(_sentencepiece_like, normaliser=True),
        "word": _word_level,
    }
    tokenizer = makers[kind]()
    if bos:
        start = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A <s> $B",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
        first = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([first, start]) if first is not None else start
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    unknown = {} if kind.startswith("byte") else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **(special | unknown)
    )


def _byte_level(*, trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece_like(*, normaliser: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator((line for line in CORPUS if line.isascii()), trainer)  # the rest falls back to bytes
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(pieces), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normaliser:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """One way to make each longer piece out of two earlier ones, in the order in which they were learned."""
    known: set[str] = set()
    merges = []
    for piece in pieces:
        if len(piece) > 1:
            cuts = (cut for cut in range(len(piece) - 1, 0, -1) if piece[:cut] in known and piece[cut:] in known)
            cut = next(cuts)
            merges.append((piece[:cut], piece[cut:]))
        known.add(piece)
    return merges


def _word_level() -> Tokenizer:
    words = dict.fromkeys(word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]+", line))
    names = ["<unk>", "<s>", "</s>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python: words with their leading space, letters and bytes for the rest, no offsets."""

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, corpus: tuple[str, ...] = CORPUS, *, bos: bool = True, **options: Any) -> None:
        words = dict.fromkeys(word for line in corpus for word in self._words(line))
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
        self._ids = {name: index for index, name in enumerate(names)}
        self._names = names
        self._puts_bos = bos
        options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
        super().__init__(special_tokens_pattern="none", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids) | self.added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        start = [self._ids["<s>"]] if self._puts_bos else []
        return start + token_ids_0 + (start + token_ids_1 if token_ids_1 else [])

    @staticmethod
    def _words(text: str) -> Iterator[str]:
        return (found.group() for found in re.finditer(r" ?\w+| ?[^\w\s]+|\s", text))

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        tokens: list[str] = []
        for word in self._words(text):
            known = word in self._ids
            tokens.extend([word] if known else [f"<0x{byte:02X}>" for byte in word.encode()])
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        pieces = (
            bytes([int(token[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else token.encode()
            for token in tokens
        )
        return b"".join(pieces).decode(errors="replace")


def save_gpt2(folder: Path, *, layers: int, width: int, positions: int) -> Path:
    """A folder with a random GPT-2 of some size and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer("byte")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=positions,
            bos_token_id=0,
            eos_token_id=1,
        )
        model = GPT2LMHeadModel(config).eval()
    redraw(model, 3, scale=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
