"""A card for each method: its question, its recipe in four lines, what dark means, how it can mislead, its source.

One text for all places: pages show a card behind the question mark of a figure, ``docs/methods.md`` is written from all
of them (``tools/write_methods.py``), and the docstring of an experiment's module opens with the card's question. A new
method adds a ``Method`` to ``_ALL``. Texts are plain; ``markdown`` escapes what Markdown would act on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#$|~])")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a person should know before reading a figure.

    Attributes:
        name: identifier, by which a page asks for the card.
        title: the method's name in the field's words.
        question: what it answers, one question.
        answer: how, in one sentence.
        recipe: exactly four steps.
        dark: what the strong end of the colours means; empty where there are none.
        misleads: how the figure can be read wrongly.
        source: paper and section.
        module: the experiment behind it, in ``factscope.experiments``; empty where it is none of its own.
    """

    name: str
    title: str
    question: str
    answer: str
    recipe: tuple[str, str, str, str]
    misleads: str
    source: str
    dark: str = ""
    module: str = ""


_ALL = (
    Method(
        name="prediction",
        title="Prediction",
        module="prediction",
        question="Does the model know it?",
        answer="What the model expects after the prompt, and whether the answer is its own first choice.",
        recipe=(
            "Read the prompt once; softmax over the whole vocabulary at the last token.",
            "List the ten most probable next tokens.",
            "Let the model go on with its most probable token, to the end of the sentence.",
            "Known: every token of the answer is the first choice, given those before it.",
        ),
        misleads="One wording is one wording, so look at the paraphrases. A probability near 1 says nothing "
        "about how firm the fact is. A model that recites facts also answers confidently about subjects that it "
        "never met.",
        source="Geva et al. 2023, section 3 (arXiv 2304.14767).",
    ),
    Method(
        name="layers",
        title="The answer over the layers",
        question="When does the answer come up?",
        answer="The hidden state at two tokens, read as if it were the last layer's.",
        recipe=(
            "Take the state after each block, at the subject's last token and at the read-out token.",
            "Send it through the model's own final norm and output embedding.",
            "Plot the answer's probability, or its rank (1 is best).",
            "“emb” is the embedding, before any block.",
        ),
        misleads="Early states are not written in the output's terms; a low probability there does not mean that the "
        "fact is absent.",
        source="nostalgebraist 2020, logit lens; Geva et al. 2023, section 5 (arXiv 2304.14767).",
    ),
    Method(
        name="knockout",
        title="Attention knockout",
        module="attention_knockout",
        question="Which tokens must be read, and when?",
        answer="Forbid the read-out token to look at others, and see what becomes of the answer.",
        recipe=(
            "Choose source tokens and a window of layers around each layer.",
            "In these layers no head of the last token may attend to them; the other weights renormalise.",
            "Compare the answer with the uncut model's: percent of p, log-odds, or its logit against a foil's.",
            "The null is grey: as many random other tokens, matched for position 0, or the same on random weights.",
        ),
        dark="The answer was destroyed (blue) or raised (orange); on a dark page, bright.",
        misleads="Information can take a detour through other tokens; a wide window blurs the layer; percentages "
        "saturate when p is near 1 (switch to log-odds). What does not leave the null is not an effect.",
        source="Geva et al. 2023, section 4 (arXiv 2304.14767).",
    ),
    Method(
        name="edges",
        title="Edge builder",
        question="Does this one path matter?",
        answer="Cut any edges, all of them together, and compare before and after.",
        recipe=(
            "From is who reads, to is what is read: positions, or sets such as last, subject, relation.",
            "Choose layers (3-6, or 2,5, or *) and, if you like, heads.",
            "Each line is one group of edges; all lines are cut in one run.",
            "An edge into the future does not exist in a causal model, so cutting it changes nothing.",
        ),
        misleads="Two paths that can stand in for each other look unimportant one by one. Cut them together.",
        source="Geva et al. 2023, section 4 (arXiv 2304.14767), generalised to any edges.",
    ),
    Method(
        name="lens",
        title="Logit lens",
        module="logit_lens",
        question="Where does the answer appear?",
        answer="Every layer's state at every token, read as a guess about the next token.",
        recipe=(
            "Take the block's output, or only what its MLP or its attention adds.",
            "Normed goes through the model's own final norm and head, so the last column is the model's output; "
            "raw is the output embedding times the state.",
            "Show the top token and its probability, or the answer's probability, rank, or the entropy.",
            "Click a cell to see its ten most probable tokens; pin one to follow it through the layers.",
        ),
        dark="More: a higher probability, a better rank, more uncertainty (entropy); on a dark page, bright.",
        misleads="A lens reads states in the last layer's terms, which early layers need not use. An update alone is "
        "not a prediction.",
        source="nostalgebraist 2020, logit lens; Geva et al. 2023, sections 5 and 6 (arXiv 2304.14767); Belrose "
        "et al. 2023 (arXiv 2303.08112) for what it misses.",
    ),
    Method(
        name="enrichment",
        title="Subject enrichment",
        module="subject_enrichment",
        question="Is the subject's last token enriched with attributes, where, and by what?",
        answer="Of the tokens that a state speaks for, how many belong to the subject.",
        recipe=(
            "Attributes are the tokens of text about the subject: taught facts, a CSV, or a folder searched with BM25.",
            "Project the state with the output embedding alone, take the top 500 tokens, and drop stop words, short "
            "ones and the subject's name.",
            "Of the first 50 that are left, the rate is the share that are attributes.",
            "Dashed is the ceiling that so few attributes allow; the band is the same for ten other subjects' "
            "attributes.",
        ),
        dark="Grey is no higher than for every other subject: no enrichment is seen there, and no peak is named.",
        misleads="With few attributes the rate jumps by single tokens. Words common to all text count too, which is "
        "what the band is for. A raw projection of early layers reads them in the last layer's terms.",
        source="Geva et al. 2023, section 5 (arXiv 2304.14767).",
    ),
    Method(
        name="sublayer",
        title="Sublayer knockout",
        question="Which updates enrich the subject?",
        answer="Cancel the MLP's or the attention's updates at the subject, and read its last token later.",
        recipe=(
            "Choose a window of layers around each layer, and a later layer that is read.",
            "At the subject's tokens zeros take the place of what these MLPs (or attentions) add.",
            "Measure the attributes rate of the subject's last token at the layer that is read.",
            "The dotted line is the rate when nothing is cancelled.",
        ),
        dark="Low means that these updates were needed. Grey: the rate was no higher than other subjects' to begin "
        "with, so there was nothing to lose.",
        misleads="A zero update is a state that the model never meets; a window behind the read layer does nothing.",
        source="Geva et al. 2023, section 5 (arXiv 2304.14767).",
    ),
    Method(
        name="neurons",
        title="Sub-updates of an MLP",
        module="sub_updates",
        question="Which neurons of an MLP write the attributes?",
        answer="An MLP's update is a sum over its neurons: activation times a fixed row.",
        recipe=(
            "Take the MLP of the cursor's layer, at the subject's last token.",
            "Rank its neurons by the length of what they add.",
            "Project each part to tokens.",
            "Its attributes rate is measured like a state's.",
        ),
        misleads="Parts can cancel each other; a neuron's top tokens are no proof that it is for them.",
        source="Geva et al. 2022 (arXiv 2203.14680); LM-Debugger (arXiv 2204.12130).",
    ),
    Method(
        name="trace",
        title="Causal tracing",
        module="causal_tracing",
        question="Which states carry the fact?",
        answer="Blur the subject, put one clean state back, and see whether the answer returns.",
        recipe=(
            "Run the prompt once as it is, and keep every state.",
            "Add noise to the embeddings of the subject's tokens, in several samples: the answer falls. Or put "
            "another subject's tokens in their place.",
            "Run again with one state put back to the clean run's: a block's output (purple), or the updates of "
            "a window of MLPs (green) or attention modules (red) at one token. Severed: there, all MLP (or "
            "attention) updates stay corrupted, so that the state has to act by other ways.",
            "The colour is the mean probability over the samples, from the corrupted run's to the clean run's.",
        ),
        dark="Restored: this place brings the answer back; on a dark page, bright.",
        misleads="The last states of the read-out token restore everything by construction, and so do the first states "
        "of a subject of one token, until another token carries something. Noise of another "
        "strength or seed moves the map; look at the band over seeds and at the total effect. A state that "
        "restores is enough for the answer, not necessary. A strong trace does not say that editing there works "
        "(Hase et al. 2023).",
        source="Meng et al. 2022, section 2 (arXiv 2202.05262); Zhang and Nanda 2023 (arXiv 2309.16042) for replaced "
        "subjects; Hase et al. 2023 (arXiv 2301.04213).",
    ),
    Method(
        name="roles",
        title="Causal tracing by role",
        question="Which kind of token carries it?",
        answer="The map's rows gathered by what the token is: the subject's first, middle and last tokens, the "
        "first token after it, further ones, and the read-out.",
        recipe=(
            "Take the panel that is named.",
            "Average over the tokens of each role (a subject of one token is its first and its last).",
            "Draw it between the corrupted run's level and the clean run's (dashed); a high line means restored.",
            "The bands are the lowest and the highest value over the seeds; without several seeds there is none.",
        ),
        misleads="One fact is one fact: the published curves are means over a thousand. Without several seeds "
        "nothing here tells chance from effect.",
        source="Meng et al. 2022, figure 2 and appendix B (arXiv 2202.05262).",
    ),
    Method(
        name="severed",
        title="Severed traces",
        question="By which way does the restored state act?",
        answer="Restore the subject's last token, and keep what the MLPs (or attention) add there as it was without.",
        recipe=(
            "Corrupt the subject, and restore the state of its last token after one layer.",
            "Do it with the MLPs severed: at that token the MLP updates of all layers stay as in the corrupted run.",
            "And with the attention severed.",
            "Compare what each gives back, layer by layer: the gap is what went through the severed part.",
        ),
        misleads="At the last layer nothing is left to sever, so the curves meet. Severing puts together states that "
        "no run has. The published figure is a mean over a thousand facts; one fact need not look like it.",
        source="Meng et al. 2022, section 2.2 and figure 3 (arXiv 2202.05262).",
    ),
    Method(
        name="counterfactual",
        title="Counterfactual patching",
        module="counterfactual_patching",
        question="What does a state of another fact do here?",
        answer="Two questions that differ in subject or relation, instead of noise.",
        recipe=(
            "Ask both, and keep every state of both.",
            "Run one of them again with one state, or the updates of a window of MLPs or attention modules, "
            "from the other.",
            "Tokens are paired by what they are: before the subject, in it and after it, each counted from the "
            "end of its part.",
            "The colour says how far the answer comes that belongs to the states: from this run's value to the "
            "other run's.",
        ),
        dark="The other question's answer has come; on a dark page, bright.",
        misleads="The last states of the read-out token bring everything by construction. Two subjects of different "
        "length share fewer pairs. A state carries more than the fact: what differs between the two questions "
        "is all that it can show.",
        source="Vig et al. 2020 (arXiv 2004.12265); Zhang and Nanda 2023 (arXiv 2309.16042), also for the logit "
        "difference.",
    ),
    Method(
        name="zeroing",
        title="Representation zeroing",
        module="representation_zeroing",
        question="Which updates must be there?",
        answer="Put zeros in the place of MLP or attention updates, without corrupting anything else.",
        recipe=(
            "Run the prompt once as it is.",
            "Choose sets of tokens, or each position, and a window of layers.",
            "Run again with these updates zero, and compare the answer's probability.",
            "The effect is the share of the plain run's probability that is gone.",
        ),
        misleads="A zero is a state that the model never meets, so a loss may be damage rather than a fact that "
        "is gone. Updates that can stand in for each other look unimportant one by one.",
        source="Hase et al. 2023, appendix on representation zeroing (arXiv 2301.04213).",
    ),
    Method(
        name="compare",
        title="A and B",
        question="What does a change of fact, model or parameter change?",
        answer="The same experiment twice, side by side on one scale, and what B has more than A.",
        recipe=(
            "Pin what is asked now as A: fact, model and parameters.",
            "Change anything: that is B. Both are drawn with the same axes and colour limits.",
            "Rows meet by layer and token; tokens of two prompts by role, subject-last with subject-last.",
            "Subtract: B − A, zero in the colour of the page; ranks by their ratio.",
        ),
        dark="B is lower (blue) or higher (orange) than A; on a dark page, bright.",
        misleads="A difference of two numbers has the noise of both: compare it with that of the random "
        "controls. Two facts differ in more than the subject, and layers of models of different depth meet by "
        "number only.",
        source="FactScope.",
    ),
    Method(
        name="heads",
        title="Attention heads",
        module="heads",
        question="Who extracts it?",
        answer="The attention update at the read-out token is a sum over heads; each head's part goes straight on to "
        "the answer's logit.",
        recipe=(
            "Record what each head gives at the last token, and send it through its own part of the output projection.",
            "Hold the final norm at the scale that it has in this run: what is left is linear, so parts add up.",
            "The part's share of the answer's logit is its direct effect, in nats; of answer - foil, the difference of "
            "two.",
            "The null is the same on random weights: what is no larger is grey.",
        ),
        dark="a strong push: orange up, blue down",
        misleads="A direct effect leaves out what later layers make of the head's part. Heads that push all city names "
        "push Paris too: compare answer - foil. Knock the head out to see what depends on it.",
        source="Elhage et al. 2021; Chughtai et al. 2024 (arXiv 2402.07321).",
    ),
    Method(
        name="head",
        title="One attention head",
        module="attention_pattern",
        question="Where does a head look?",
        answer="Its attention from every token, what it takes from each at the read-out, and which tokens it pushes.",
        recipe=(
            "Bars: the direct effect by the token that the head reads; numbers: the attention that it pays.",
            "Pattern: every token's attention to every token before it.",
            "Promoted and suppressed: the tokens whose logits the head's part raises and lowers most.",
            "Mapping: what its weights alone make of the subject's input embedding; found if the answer is among the "
            "first ten.",
        ),
        dark="a large share of the attention; in the bars orange pushes up, blue down",
        misleads="Much attention can carry little, above all to the first token.",
        source="Chughtai et al. 2024 (arXiv 2402.07321); Geva et al. 2023, section 6 (arXiv 2304.14767); Dar et al. "
        "2022 (arXiv 2209.02535).",
    ),
    Method(
        name="extraction",
        title="Attribute extraction",
        module="attribute_extraction",
        question="Where is the answer taken out?",
        answer="What attention (MHSA) and MLP add at the read-out token, read as tokens.",
        recipe=(
            "Take what a layer's attention, or its MLP, adds at the last token.",
            "Multiply it with the output embedding (raw: no norm).",
            "An extraction event: the answer is on top, rank 1.",
            "Edge variants: in each layer alone the read-out may not read some tokens, or only some; block:all is the "
            "null, the output bias alone.",
        ),
        misleads="One fact is one fact. In parallel blocks the MLP does not see its layer's attention. Reading one "
        "token alone gives it all the attention; the extra line shows what it contributes with the attention that it "
        "had.",
        source="Geva et al. 2023, section 6 (arXiv 2304.14767).",
    ),
    Method(
        name="edit",
        title="Editing a fact",
        module="editing",
        question="Can I change a fact, and what else moves?",
        answer="Compute a change of some MLPs that makes the model say something else, and ask before and after.",
        recipe=(
            "ROME gives one layer's MLP another value for the subject's key, MEMIT spreads it over several layers, FT "
            "trains the same matrix.",
            "The problem decides what the edit is to do: inject an error, erase, amplify or force the fact, or say "
            "what the model says of a blurred subject.",
            "Ask other words for the fact, neighbours with the same answer, the subject's other facts, and your own.",
            "No weight is written: an edit is put on for a forward, and undone by leaving it out.",
        ),
        misleads="Neighbours that gave the new answer no probability are easily left alone: look at NS, and at the "
        "subject's other facts, which an edit often damages. A high rewrite score alone is one sentence by heart.",
        source="Meng et al. 2022 (arXiv 2202.05262) and 2023 (arXiv 2210.07229); Hase et al. 2023 (arXiv 2301.04213).",
    ),
    Method(
        name="layers_edit",
        title="The best layer for an edit",
        module="edit_layers",
        question="Where should one edit?",
        answer="The same edit at every layer, beside what causal tracing says of that layer.",
        recipe=(
            "Trace the fact: the tracing effect of a layer is the largest share of what the corruption took that it "
            "gives back.",
            "Edit at every layer, each time from the same weights.",
            "Score every edit: the fact, other words for it, neighbours; the best layer has the highest harmonic mean.",
            "Compare by eye: the layers of one fact are no sample, so nothing is correlated.",
        ),
        dark="Bars are the tracing effect. A grey bar gives back no more than the same trace on random weights, and is "
        "not named as a peak.",
        misleads="One fact is one fact. Over many facts Hase et al. found that tracing does not tell the better layer; "
        "a small model may behave otherwise. At the last layer ROME and MEMIT write where nothing reads any more.",
        source="Hase et al. 2023 (arXiv 2301.04213), sections 3 to 5.",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every card by its name."""


def markdown(method: Method, *, heading: str = "") -> str:
    """A card as Markdown.

    Args:
        heading: what stands before its title, "## "; empty leaves the title out.
    """
    parts = [f"{heading}{plain(method.title)}"] if heading else []
    parts.append(f"**{plain(method.question)}** {plain(method.answer)}")
    parts.append("\n".join(f"{i}. {plain(step)}" for i, step in enumerate(method.recipe, start=1)))
    named = (("Dark means:", method.dark), ("Can mislead:", method.misleads), ("Source:", method.source))
    parts += [f"**{name}** {plain(text)}" for name, text in named if text]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text that Markdown takes literally."""
    return _SPECIAL.sub(r"\\\1", text)


def page() -> str:
    """``docs/methods.md``: all cards."""
    opening = (
        "# Methods\n\nThe cards behind the question marks of the pages. Written by `python tools/write_methods.py` "
        "from `factscope/methods.py`.\n"
    )
    return "\n".join([opening, *(markdown(method, heading="## ") for method in _ALL)])
