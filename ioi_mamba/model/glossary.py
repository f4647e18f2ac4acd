"""The letters this project uses, and nothing but these letters.

Code, docs and reports name dimensions and quantities from this one table, and take the words of the field from here.
"""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """One letter or symbol: the name it stands for, the paper's symbol, what it means."""

    letter: str
    name: str
    paper: str
    meaning: str


DIMENSIONS = (
    Term("batch", "batch", "B", "rows of one forward pass"),
    Term("pos", "position", "L", "token positions; BOS is position 0"),
    Term("target", "target position", "t", "the position whose read-out takes something"),
    Term("source", "source position", "s", "the position that it is taken from"),
    Term("D", "model dimension", "D", "width of the residual stream"),
    Term("E", "inner dimension", "E", "channels of the SSM branch"),
    Term("N", "state size", "N", "columns of the hidden state of one channel"),
    Term("H", "heads", "", "heads of a Mamba-2 mixer; E = H P"),
    Term("P", "head width", "", "channels of one head of a Mamba-2 mixer"),
    Term("G", "groups", "", "groups of heads that share B and C in a Mamba-2 mixer"),
    Term("R", "delta rank", "", "rank of the delta projection"),
    Term("K", "conv width", "", "taps of the causal convolution; slices are -(K-1) .. 0"),
    Term("vocab", "vocabulary", "V", "entries of the vocabulary"),
)

QUANTITIES = (
    Term("x", "SSM input", "x_t", "what the SSM reads: SiLU of the conv output"),
    Term("delta", "time step", "Delta_t", "softplus of delta_2; decides how much of a token enters the state"),
    Term("A", "decay rate", "A", "-exp(A_log), one number a channel and state column"),
    Term("A_bar", "decay", "A_bar_t", "exp(delta A): what part of the state survives this token"),
    Term("B_bar", "input weight", "B_bar_t", "delta B: how x enters the state (simplified Euler)"),
    Term("C", "read-out", "C_t", "how the state is read"),
    Term("h", "hidden state", "h_t", "the state after token t"),
    Term("y", "SSM read-out", "y_t", "sum over N of C_t h_t, before D x is added"),
)


class Word(NamedTuple):
    """A word of the field: what it means here, and the other forms in which it stands in a text."""

    word: str
    meaning: str
    forms: tuple[str, ...] = ()


WORDS = (
    Word("pair", "a clean prompt and a corrupted one, equally long, with the answers to both", ("pairs",)),
    Word("clean", "of a pair: the prompt whose answer the model is to give"),
    Word("corrupted", "of a pair: the prompt in which something is changed, so that the answer is another one"),
    Word("corruption", "what is changed between the two prompts of a pair", ("corruptions",)),
    Word("role", "a token with a meaning in the task, such as n2; n2+1 is one token after it", ("roles",)),
    Word("site", "a value of a layer that can be read and written", ("sites",)),
    Word("edit", "a new value for a site, or a function of the old one", ("edits",)),
    Word("patching", "a value of the clean run is replaced by the corrupted run's (resample ablation)", ("patched", "resampling", "resampled")),
    Word("effect", "of patching: 1 - (d_patched - d_corrupted) / (d_clean - d_corrupted); 0 acts like the clean run, 1 like the corrupted one", ("effects",)),
    Word("d", "the logit of the clean prompt's answer minus that of the corrupted prompt's"),
    Word("normalized logit diff", "(d_patched - d_corrupted) / |d_clean - d_corrupted|; 1 is the whole model"),
    Word("accuracy", "the share of prompts whose answer has the largest logit of its candidates"),
    Word("convolution", "mixes a token with the few before it, in every layer"),
    Word("slice", "one tap of a layer's convolution: slice -1 takes from the token before", ("slices",)),
    Word("state", "the memory of a layer that goes from token to token, of fixed size", ("states",)),
    Word("gate", "what a layer multiplies its read-out by, token by token (skip)", ("gates",)),
    Word("slot", "a place in the order of mention, from 1", ("slots",)),
    Word("node", "the embedding, a layer, or the output", ("nodes",)),
    Word("edge", "what one node adds to the input of a later one", ("edges",)),
    Word("part", "a conv slice, the state (ssm) or the gate (skip) of a layer; a feature, or the error, of a dictionary", ("parts",)),
    Word("dictionary", "a sparse autoencoder or a transcoder: encode to activations of features, decode back", ("dictionaries",)),
    Word("feature", "one entry of a dictionary; what all of them leave of a value is the error", ("features",)),
    Word("circuit", "the edges and parts that are kept, while all others are patched", ("circuits",)),
    Word("kept", "in the circuit"),
    Word("bottleneck", "the layer after layer 0 whose input at the changed token matters most"),
    Word("attribution", "an estimate of what patching an item does, from gradients; negative: patching lowers the metric", ("score", "scores")),
    Word("held-out", "prompts on which nothing was chosen", ("held out",)),
    Word("f", "faithfulness: (m - m_corrupted) / (m_clean - m_corrupted) of the mean logit difference m; 1 is the whole model"),
    Word("CPR", "the area under f over all circuit sizes: 1 is best"),
    Word("CMD", "the area between f and 1 over all circuit sizes: 0 is best"),
    Word("interval", "of 95 %, over prompts of different pairs", ("intervals",)),
    Word("logit lens", "what the model would answer if it stopped after a layer"),
)  # fmt: skip
