"""The letters this project uses, and nothing but these letters.

Code, docs and reports name dimensions and quantities from this one table.
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
