"""The vocabulary of table columns: what each number means, in which unit, and where its definition comes from.

A name means the same in every table, on every page and in every file. Pages show ``meaning`` on hover. Units: a
probability is a fraction from 0 to 1, entropies and log-odds are in nats, relative changes in percent, ranks start at
1, layers and positions at 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GEVA = "Geva et al. 2023, arXiv 2304.14767"
HASE = "Hase et al. 2023, arXiv 2301.04213"
GEVA_MLP = "Geva et al. 2022, arXiv 2203.14680"
MENG = "Meng et al. 2022, arXiv 2202.05262"
MEMIT = "Meng et al. 2023, arXiv 2210.07229"
CHUGHTAI = "Chughtai et al. 2024, arXiv 2402.07321"
LOGIT_LENS = "nostalgebraist 2020, interpreting GPT: the logit lens"
FACTSCOPE = "FactScope"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        name: as in the table.
        unit: "probability", "nats", "percent", "rank", "layer", "position"; empty where there is none.
        meaning: one sentence for people.
        source: who defined it.
    """

    name: str
    unit: str
    meaning: str
    source: str


_ALL = (
    # tokens and predictions
    Column(
        name="rank",
        unit="rank",
        meaning="Place of the token among all tokens of the vocabulary by probability; 1 is the most probable.",
        source=FACTSCOPE,
    ),
    Column(name="id", unit="", meaning="Number of the token in the model's vocabulary.", source=FACTSCOPE),
    Column(
        name="text",
        unit="",
        meaning="The token's exact text, its leading space included; bytes that are no whole character stand as <E2>.",
        source=FACTSCOPE,
    ),
    Column(
        name="display",
        unit="",
        meaning="The token's text with marks for what cannot be seen: a dot for a space, a return sign for a newline.",
        source=FACTSCOPE,
    ),
    Column(
        name="probability",
        unit="probability",
        meaning="Share of the model's belief that goes to this token as the next one; all tokens together make 1.",
        source=FACTSCOPE,
    ),
    Column(
        name="position",
        unit="position",
        meaning="Place of the token in the prompt, counted from 0 with special tokens included.",
        source=FACTSCOPE,
    ),
    Column(
        name="role",
        unit="",
        meaning="What the token is to the query: special, subject, relation, or last for the token that is read out.",
        source=GEVA,
    ),
    Column(
        name="p_target",
        unit="probability",
        meaning="Probability of the answer at the read-out token when nothing is blocked.",
        source=FACTSCOPE,
    ),
    Column(
        name="n_tokens",
        unit="",
        meaning="Number of tokens that the whole answer has for this tokenizer.",
        source=FACTSCOPE,
    ),
    Column(
        name="continuation",
        unit="",
        meaning="What the model writes after the prompt when it always takes its most probable token.",
        source=FACTSCOPE,
    ),
    Column(
        name="known",
        unit="",
        meaning="Whether every token of the answer, one after the other, is the model's most probable token.",
        source=GEVA,
    ),
    Column(
        name="taught",
        unit="",
        meaning="Whether the bundled model was taught this fact; its confidence about anything else says nothing.",
        source=FACTSCOPE,
    ),
    # attention knockout
    Column(
        name="source",
        unit="",
        meaning="The tokens that the read-out token was kept from reading: a named set, or one position.",
        source=GEVA,
    ),
    Column(
        name="layer",
        unit="layer",
        meaning="Number of the layer, counted from 0; -1 is the embedding, and a window is named by its middle layer.",
        source=GEVA,
    ),
    Column(
        name="window",
        unit="layers",
        meaning="Number of neighbouring layers that are blocked together around the named layer.",
        source=GEVA,
    ),
    Column(
        name="p_base",
        unit="probability",
        meaning="Probability of the answer in the ordinary run, with nothing blocked.",
        source=GEVA,
    ),
    Column(
        name="p_knockout",
        unit="probability",
        meaning="Probability of the answer when attention to the source tokens is blocked in the window.",
        source=GEVA,
    ),
    Column(
        name="relative_change_percent",
        unit="percent",
        meaning="Change of the answer's probability by the block, relative to the ordinary run; -100 means it is gone.",
        source=GEVA,
    ),
    Column(
        name="log_odds_change",
        unit="nats",
        meaning="Change of the answer's log-odds, log(p / (1 - p)), by the block; it tells even near p = 0 or 1.",
        source=FACTSCOPE,
    ),
    Column(
        name="logit_difference_change",
        unit="nats",
        meaning="Change, by the block, of the logit of the answer's first token minus that of the foil's first token.",
        source=FACTSCOPE,
    ),
    # logit lens
    Column(
        name="site",
        unit="",
        meaning="Which vector is read or put back: the state after the block, or the update of its MLP or attention.",
        source=GEVA,
    ),
    Column(
        name="target_rank",
        unit="rank",
        meaning="Rank of the answer's first token when the inner state is read as if it were the last one.",
        source=LOGIT_LENS,
    ),
    Column(
        name="target_probability",
        unit="probability",
        meaning="Probability of the answer's first token when the inner state is read as if it were the last one.",
        source=LOGIT_LENS,
    ),
    Column(
        name="entropy",
        unit="nats",
        meaning="How undecided the reading is: 0 when one token has all the probability, larger the more share it.",
        source=LOGIT_LENS,
    ),
    # attribute extraction
    Column(
        name="extracted",
        unit="",
        meaning="Whether the answer alone is on top when what the layer adds at the read-out is read as tokens.",
        source=GEVA,
    ),
    Column(
        name="target_score",
        unit="",
        meaning="Raw projection: the answer's output embedding times what the layer adds at the read-out token.",
        source=GEVA,
    ),
    Column(
        name="early_layer",
        unit="layer",
        meaning="Layer from which earlier states were put in place of those that enter the layer that is read.",
        source=GEVA,
    ),
    Column(
        name="extraction_rate",
        unit="fraction",
        meaning="Share of the queries in which the layer, or any layer, extracts the answer.",
        source=GEVA,
    ),
    # heads
    Column(name="head", unit="head", meaning="Number of the attention head in its layer, counted from 0.", source=GEVA),
    Column(
        name="direct_effect",
        unit="nats",
        meaning="What a head, or a token through it, adds to the answer's logit, the norms behind keeping their scale.",
        source=CHUGHTAI,
    ),
    Column(
        name="direct_effect_foil",
        unit="nats",
        meaning="The same for the difference of two logits: the answer's minus the foil's.",
        source=CHUGHTAI,
    ),
    Column(
        name="attention_to_subject",
        unit="fraction",
        meaning="Share of the read-out token's attention in this head that goes to the subject's tokens.",
        source=GEVA,
    ),
    Column(
        name="mapping_rank",
        unit="rank",
        meaning="Rank of the answer among what the head's weights alone map the subject's input embedding to.",
        source=GEVA,
    ),
    Column(
        name="top_promoted",
        unit="",
        meaning="The token whose logit the head raises most.",
        source=CHUGHTAI,
    ),
    Column(
        name="weight",
        unit="fraction",
        meaning="Share of a token's attention in one head that goes to the source; a token's shares make 1.",
        source=FACTSCOPE,
    ),
    # causal tracing
    Column(
        name="p_restored",
        unit="probability",
        meaning="Probability of the answer when the subject is blurred and one state is put back to its clean value.",
        source=MENG,
    ),
    Column(
        name="indirect_effect",
        unit="probability",
        meaning="What putting back one state adds to the answer's probability in the blurred run.",
        source=MENG,
    ),
    Column(
        name="p_clean",
        unit="probability",
        meaning="Probability of the answer in the ordinary run, before the subject is blurred.",
        source=MENG,
    ),
    Column(
        name="p_corrupted",
        unit="probability",
        meaning="Probability of the answer when the subject is blurred and nothing is put back, mean over the samples.",
        source=MENG,
    ),
    Column(
        name="total_effect",
        unit="probability",
        meaning="What blurring the subject takes from the answer's probability.",
        source=MENG,
    ),
    Column(
        name="noise_std",
        unit="",
        meaning="Standard deviation of the noise that is added to the embeddings of the subject's tokens.",
        source=MENG,
    ),
    # representation zeroing
    Column(
        name="p_zeroed",
        unit="probability",
        meaning="Probability of the answer when zeros stand in the place of updates at the source tokens.",
        source=HASE,
    ),
    Column(
        name="fraction_removed",
        unit="",
        meaning="Share of the answer's probability that goes when these updates are zeroed; 1 means all of it.",
        source=HASE,
    ),
    # counterfactual patching
    Column(
        name="partner",
        unit="position",
        meaning="Place in the other question's prompt that the state comes from.",
        source=FACTSCOPE,
    ),
    Column(
        name="p_patched",
        unit="probability",
        meaning="Probability of the answer when one place has the state of the other question's run.",
        source=FACTSCOPE,
    ),
    Column(
        name="p_other_patched",
        unit="probability",
        meaning="Probability of the other question's answer when one place has the state of the other run.",
        source=FACTSCOPE,
    ),
    Column(
        name="logit_difference",
        unit="nats",
        meaning="Logit of the answer minus that of the foil, or of the other question's answer.",
        source=FACTSCOPE,
    ),
    # subject enrichment
    Column(
        name="attributes_rate",
        unit="percent",
        meaning="Share of attributes of the subject among the first 50 meaningful tokens that a state speaks for.",
        source=GEVA,
    ),
    Column(
        name="ceiling",
        unit="percent",
        meaning="The highest attributes rate that so many known attributes allow.",
        source=FACTSCOPE,
    ),
    Column(
        name="other_subject_rate",
        unit="percent",
        meaning="The same rate for attributes of other subjects, drawn at random: what chance and common words give.",
        source=FACTSCOPE,
    ),
    Column(
        name="neuron",
        unit="",
        meaning="Number of the neuron in the MLP: the row of its last matrix, counted from 0.",
        source=GEVA_MLP,
    ),
    Column(
        name="activation",
        unit="",
        meaning="How strongly the neuron is switched on at the subject: the factor of what it writes.",
        source=GEVA_MLP,
    ),
    Column(
        name="size",
        unit="",
        meaning="Length of the vector that the neuron adds: its activation times the length of its row.",
        source=GEVA_MLP,
    ),
    Column(
        name="top_tokens",
        unit="",
        meaning="The tokens that the neuron's part of the update speaks for most, through the output embedding.",
        source=GEVA_MLP,
    ),
    # editing
    Column(
        name="kind",
        unit="",
        meaning="What a prompt is to the edited fact: the fact itself, a paraphrase, a neighbour, another "
        "relation, one's own, or a text.",
        source=MENG,
    ),
    Column(
        name="p_target_before",
        unit="probability",
        meaning="Probability of what the edit is to make the answer, before the edit.",
        source=HASE,
    ),
    Column(
        name="p_target_after",
        unit="probability",
        meaning="Probability of what the edit is to make the answer, after the edit.",
        source=HASE,
    ),
    Column(
        name="p_true_before",
        unit="probability",
        meaning="Probability of the prompt's own true answer before the edit.",
        source=MENG,
    ),
    Column(
        name="p_true_after",
        unit="probability",
        meaning="Probability of the prompt's own true answer after the edit.",
        source=MENG,
    ),
    Column(
        name="p_true",
        unit="probability",
        meaning="Probability of the prompt's own true answer, all of its tokens.",
        source=FACTSCOPE,
    ),
    Column(name="top_before", unit="", meaning="The most probable next token before the edit.", source=FACTSCOPE),
    Column(name="top_after", unit="", meaning="The most probable next token after the edit.", source=FACTSCOPE),
    Column(
        name="text_before",
        unit="",
        meaning="What the model writes before the edit, greedily to the end of the sentence; after the beginning "
        "of a text, sampled.",
        source=FACTSCOPE,
    ),
    Column(
        name="text_after",
        unit="",
        meaning="What the model writes after the edit, with the same draws where it is sampled.",
        source=FACTSCOPE,
    ),
    Column(
        name="rewrite",
        unit="fraction",
        meaning="Share of what the whole target's probability could gain that it gained; for erasure the share of "
        "it that is gone.",
        source=HASE,
    ),
    Column(
        name="paraphrase",
        unit="fraction",
        meaning="The rewrite score on other words for the same question, mean over them.",
        source=HASE,
    ),
    Column(
        name="neighbourhood",
        unit="fraction",
        meaning="On other subjects with the same answer: 1 minus how far the target's probability moved, of how "
        "far it could.",
        source=HASE,
    ),
    Column(
        name="essence",
        unit="fraction",
        meaning="One minus a fifth of what five texts about the subject gained in perplexity, between 0 and 1.",
        source=HASE,
    ),
    Column(
        name="overall",
        unit="fraction",
        meaning="Mean of the rewrite, paraphrase and neighbourhood scores.",
        source=HASE,
    ),
    Column(
        name="overall_essence",
        unit="fraction",
        meaning="Mean of the rewrite, paraphrase, neighbourhood and essence scores.",
        source=HASE,
    ),
    Column(
        name="overall_harmonic",
        unit="fraction",
        meaning="Harmonic mean of the rewrite, paraphrase and neighbourhood scores of one fact, mean over facts.",
        source=HASE,
    ),
    Column(
        name="es",
        unit="fraction",
        meaning="Efficacy: share of edited prompts where the new answer is more probable, per token, than the true "
        "one.",
        source=MENG,
    ),
    Column(
        name="em",
        unit="probability",
        meaning="Efficacy magnitude: per-token probability of the new answer minus that of the true one on the "
        "edited prompt.",
        source=MENG,
    ),
    Column(
        name="ps",
        unit="fraction",
        meaning="Paraphrase score: share of other wordings where the new answer is more probable, per token, than "
        "the true one.",
        source=MENG,
    ),
    Column(
        name="pm",
        unit="probability",
        meaning="Paraphrase magnitude: per-token probability of the new answer minus that of the true one on other "
        "wordings.",
        source=MENG,
    ),
    Column(
        name="ns",
        unit="fraction",
        meaning="Neighbourhood score: share of neighbours where the true answer is more probable, per token, than "
        "the new one.",
        source=MENG,
    ),
    Column(
        name="nm",
        unit="probability",
        meaning="Neighbourhood magnitude: per-token probability of the true answer minus that of the new one on "
        "neighbours.",
        source=MENG,
    ),
    Column(name="s", unit="fraction", meaning="Harmonic mean of the means over facts of ES, PS and NS.", source=MENG),
    Column(
        name="exact_rewrite",
        unit="fraction",
        meaning="Share of edited prompts where every token of the target is the first choice, those before it given.",
        source=MEMIT,
    ),
    Column(
        name="exact_paraphrase",
        unit="fraction",
        meaning="Share of other wordings where every token of the target is the first choice, those before it given.",
        source=MEMIT,
    ),
    Column(
        name="exact_neighbourhood",
        unit="fraction",
        meaning="Share of neighbours where every token of the true answer is the first choice, those before it given.",
        source=MEMIT,
    ),
    Column(
        name="neighbours_kept",
        unit="fraction",
        meaning="Of the neighbours that were answered right before the edit, the share that still is.",
        source=FACTSCOPE,
    ),
    Column(
        name="other_relations_kept",
        unit="fraction",
        meaning="Of the subject's other facts that were answered right before the edit, the share that still is.",
        source=FACTSCOPE,
    ),
    Column(
        name="fluency",
        unit="",
        meaning="GE: weighted entropy, in bits, of pairs and triples of words in sampled texts, times 100; words "
        "as nltk splits lines.",
        source=MENG,
    ),
    Column(
        name="consistency",
        unit="",
        meaning="RS: cosine of the TF-IDF vectors of sampled texts and reference texts, times 100; words weighed "
        "by the references.",
        source=MENG,
    ),
    Column(
        name="tracing_effect",
        unit="fraction",
        meaning="Largest share, over tokens, of what corruption took that restoring this layer gives back.",
        source=HASE,
    ),
    # cost
    Column(name="seconds", unit="seconds", meaning="Time of the computation alone, without loading.", source=FACTSCOPE),
    Column(name="passes", unit="", meaning="Number of interventions that were run.", source=FACTSCOPE),
    # facts
    Column(name="prompt", unit="", meaning="The text that ends right before the answer.", source=GEVA),
    Column(name="subject", unit="", meaning="The words of the prompt that name what the fact is about.", source=GEVA),
    Column(name="relation", unit="", meaning="The kind of fact: what is asked about the subject.", source=GEVA),
    Column(
        name="answer",
        unit="",
        meaning="What the fact says about the subject: the right next words, also called the attribute.",
        source=GEVA,
    ),
    # models
    Column(name="name", unit="", meaning="The model's name: bundled, an id on the hub, or a folder.", source=FACTSCOPE),
    Column(
        name="family",
        unit="",
        meaning="The model type in the words of its own configuration, such as gpt2 or llama.",
        source=FACTSCOPE,
    ),
    Column(name="size_mb", unit="MB", meaning="Size of the model's files on this machine.", source=FACTSCOPE),
    Column(
        name="capability",
        unit="",
        meaning="Something that a method needs of a model, measured when the model is loaded.",
        source=FACTSCOPE,
    ),
    Column(
        name="supported",
        unit="",
        meaning="Whether the loaded model passed the measurement for this capability.",
        source=FACTSCOPE,
    ),
    Column(name="reason", unit="", meaning="Why a capability is missing, in plain words.", source=FACTSCOPE),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}
"""Every column by its name."""


_CONTROL = re.compile(r"(?:(?P<source>.+)-)?control-[0-9]+")


def control_name(source: str, draw: int) -> str:
    """What a row of ``flow`` is called that cuts a random set matched to a source: the subject's is ``control-2``,
    the relation's ``relation-control-2``.
    """
    return f"control-{draw}" if source == "subject" else f"{source}-control-{draw}"


def control_of(source: str) -> str | None:
    """Which source such a row is the control of; None for a source itself."""
    found = _CONTROL.fullmatch(source)
    return None if found is None else found["source"] or "subject"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the columns of one command's rows are to a comparison of two such tables.

    Attributes:
        axes: together they name a row; rows of two tables are joined on them.
        measures: numbers of a row that can be subtracted.
        labels: words and numbers about a row that cannot.
        optional: measures that are compared where both tables have them.
        position: the axis whose whole numbers are positions of the prompt; empty where there is none.
    """

    axes: tuple[str, ...]
    measures: tuple[str, ...]
    labels: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    position: str = ""


ROWS = {
    "predict": Rows(axes=("text",), measures=("rank", "probability"), labels=("id",)),
    "flow": Rows(
        axes=("source", "layer"),
        measures=("p_base", "p_knockout", "relative_change_percent", "log_odds_change"),
        labels=("window",),
        optional=("logit_difference_change",),
        position="source",
    ),
    "lens": Rows(
        axes=("layer", "position", "rank"),
        measures=("probability", "target_rank", "target_probability", "entropy"),
        labels=("site", "id", "text"),
        position="position",
    ),
    "trace": Rows(
        axes=("position", "layer"),
        measures=("p_restored", "indirect_effect"),
        optional=("logit_difference",),
        labels=("site",),
        position="position",
    ),
    "enrich": Rows(axes=("position", "layer"), measures=("attributes_rate", "ceiling", "other_subject_rate")),
    "extract": Rows(axes=("site", "layer"), measures=("target_rank", "target_score"), labels=("extracted",)),
    "heads": Rows(
        axes=("layer", "head"),
        measures=("direct_effect", "direct_effect_foil", "attention_to_subject", "mapping_rank"),
        labels=("top_promoted",),
    ),
    "edit": Rows(
        axes=("kind", "prompt"),
        measures=("p_target_before", "p_target_after", "p_true_before", "p_true_after"),
        labels=("top_before", "top_after", "text_before", "text_after"),
    ),
    "layers": Rows(axes=("layer",), measures=("rewrite", "paraphrase", "neighbourhood", "tracing_effect")),
}
"""The rows of every command that can be compared. A column that is not named here is left out of a comparison."""

VARIANTS = {
    ("heads", "by_source"): Rows(axes=("layer", "head", "position"), measures=("direct_effect",), position="position"),
    ("extract", "early"): Rows(
        axes=("early_layer", "layer"), measures=("target_rank", "target_score"), labels=("extracted",)
    ),
    ("enrich", "layer"): Rows(
        axes=("layer", "neuron"),
        measures=("activation", "size", "attributes_rate", "other_subject_rate"),
        labels=("top_tokens",),
    ),
}
"""Other rows of a command where a field of its spec is set: heads by source, early states, neurons."""
