"""A card for each method: its question, its recipe, what dark means, how it can mislead, its source."""

from __future__ import annotations

import streamlit as st

CARDS = {
    "prediction": """
**Does the model know it?** What the model expects after the prompt, and whether the answer is its own first choice.

1. Read the prompt once.
2. Softmax over the whole vocabulary at the last token.
3. List the ten most probable next tokens, and let the model go on greedily to the end of the sentence.
4. *Known*: every token of the answer is the first choice, given those before it.

**Can mislead:** one wording is one wording, so look at the paraphrases. A probability near 1 says nothing about how
firm the fact is. A model that recites facts also answers confidently about subjects that it never met.

**Source:** Geva et al. 2023, section 3 (arXiv 2304.14767).
""",
    "layers": """
**When does the answer come up?** The hidden state at two tokens, read as if it were the last layer's.

1. Take the state after each block, at the subject's last token and at the read-out token.
2. Send it through the model's own final norm and output embedding.
3. Plot the answer's probability, or its rank (1 is best).
4. "emb" is the embedding, before any block.

**Can mislead:** early states are not written in the output's terms; a low probability there does not mean that the
fact is absent.

**Source:** nostalgebraist 2020, *logit lens*; Geva et al. 2023, section 5.
""",
    "knockout": """
**Which tokens must be read, and when?** Attention knockout: forbid the read-out token to look at others, and see what
becomes of the answer.

1. Choose source tokens and a window of layers around each layer.
2. In these layers no head of the last token may attend to them; the other weights renormalise.
3. Compare the answer's probability with that of the uncut model.
4. The grey band is the null: as many random other tokens, matched for position 0.

**Dark means** that the answer's probability was destroyed (blue) or raised (orange). On a dark page, bright.

**Can mislead:** information can take a detour through other tokens; a wide window blurs the layer; percentages saturate
when p is near 1 (switch to log-odds). What does not leave the band is not an effect.

**Source:** Geva et al. 2023, section 4 (arXiv 2304.14767).
""",
    "edges": """
**Does this one path matter?** Cut any edges, all of them together, and compare before and after.

1. *From* is who reads, *to* is what is read: positions, or sets such as last, subject, relation.
2. Choose layers (3-6, or 2,5, or \\*) and, if you like, heads.
3. Each line is one group of edges; all lines are cut in one run.
4. An edge into the future does not exist in a causal model, so cutting it changes nothing.

**Can mislead:** two paths that can stand in for each other look unimportant one by one. Cut them together.

**Source:** Geva et al. 2023, section 4, generalised to any edges.
""",
    "lens": """
**Where does the answer appear?** Every layer's state at every token, read as a guess about the next token.

1. Take the block's output, or only what its MLP or its attention adds.
2. *Normed* goes through the model's own final norm and head, so the last column is the model's output. *Raw* is the
   output embedding times the state.
3. Show the top token and its probability, or the answer's probability, rank, or the entropy.
4. Click a cell to see its ten most probable tokens; pin one to follow it through the layers.

**Dark means** more: a higher probability, a better rank, more uncertainty (entropy). On a dark page, bright.

**Can mislead:** a lens reads states in the last layer's terms, which early layers need not use. An update alone is not
a prediction.

**Source:** nostalgebraist 2020; Geva et al. 2023, sections 5 and 6; Belrose et al. 2023 for what it misses.
""",
    "trace": """
**Which states carry it?** Causal tracing: blur the subject, put one clean state back, and see whether the answer
returns.

1. Run the prompt once as it is, and keep every state.
2. Add noise to the embeddings of the subject's tokens, in several samples: the answer falls. Or put another subject's
   tokens in their place.
3. Run again with one state put back to the clean run's: a block's output (purple), or the updates of a window of MLPs
   (green) or attention modules (red) at one token.
4. The colour is the mean probability over the samples, from the corrupted run's to the clean run's.

**Dark means** restored: this place brings the answer back. On a dark page, bright.

*Severed*: at the restored token all MLP (or attention) updates stay as they were in the corrupted run, so that the
state has to act by other ways.

**Can mislead:** the last states of the read-out token restore everything by construction. Noise of another strength or
seed moves the map; look at the band over seeds and at the total effect. A state that restores is enough for the answer,
not necessary. A strong trace does not say that editing there works (Hase et al. 2023).

**Source:** Meng et al. 2022, section 2 (arXiv 2202.05262); Zhang and Nanda 2023 (arXiv 2309.16042) for replaced
subjects; Hase et al. 2023 (arXiv 2301.04213).
""",
    "counterfactual": """
**What does a state of another fact do here?** Two questions that differ in subject or relation, instead of noise.

1. Ask both, and keep every state of both.
2. Run one of them again with one state, or the updates of a window of MLPs or attention modules, from the other.
3. Tokens are paired by what they are: before the subject, in it and after it, each counted from the end of its part.
4. The colour says how far the answer comes that belongs to the states: from this run's value to the other run's.

**Dark means** that the other question's answer has come. On a dark page, bright.

**Can mislead:** the last states of the read-out token bring everything by construction. Two subjects of different
length share fewer pairs. A state carries more than the fact: what differs between the two questions is all that it can
show.

**Source:** Vig et al. 2020 (arXiv 2004.12265); Zhang and Nanda 2023 (arXiv 2309.16042), also for the logit difference.
""",
    "roles": """
**Which kind of token carries it?** The map's rows gathered by what the token is: the subject's first, middle and last
tokens, the first token after it, further ones, and the read-out.

1. Take the panel that is named.
2. Average over the tokens of each role (a subject of one token is its first and its last).
3. Draw it between the corrupted run's level and the clean run's (dashed).
4. The bands are the lowest and the highest value over the seeds; without several seeds there is none.

**A high line means** restored.

**Can mislead:** one fact is one fact: the published curves are means over a thousand. Without several seeds nothing
here tells chance from effect.

**Source:** Meng et al. 2022, figure 2 and appendix B (arXiv 2202.05262).
""",
}


def card(method: str, name: str) -> None:
    """The help card of a method, behind a small button; ``name`` tells two buttons on one page apart."""
    with st.popover(
        "", key=f"help-{name}", icon=":material/help:", type="tertiary", help="What this shows, and how it can mislead"
    ):
        st.markdown(CARDS[method])


def definition(column: str) -> str | None:
    """What a number means, for its hover text; escaped for Streamlit's Markdown."""
    from factscope.columns import COLUMNS

    found = COLUMNS.get(column)
    if found is None:
        return None
    text = getattr(found, "meaning", str(found))
    unit = getattr(found, "unit", "")
    return (f"{text} ({unit})" if unit else text).replace("$", "\\$").replace("[", "\\[").replace("_", "\\_")
