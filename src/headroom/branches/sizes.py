"""How large the models of the branches study are, before any is made (nothing heavy here)."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headroom.branches.runs import Architecture, Stack

STATE_BYTES = 16  # of a parameter: weight, gradient and Adam's two moments in float32
FFN_MULTIPLE = 64
LOGITS = 2**26  # that an evaluation holds at once, so that a large vocabulary fits
SAVED = 24  # activations of the width that a layer keeps for its backward pass, about


def ffn_width(hidden: int) -> int:
    """Return the width of the SwiGLU FFN, 64 · ⌈⌊8 hidden / 3⌋ / 64⌉."""
    return FFN_MULTIPLE * math.ceil(int(8 * hidden / 3) / FFN_MULTIPLE)


def parameters(architecture: "Architecture", branches: Mapping) -> int:
    """Return the parameters of a run, the tied embedding once."""
    hidden, size = architecture.hidden, architecture.head_size
    attention = 2 * hidden * hidden + 2 * hidden * branches["kv_heads"] * size
    layer = attention + 3 * hidden * ffn_width(hidden) + 2 * hidden
    return branches["vocabulary"] * hidden + branches["layers"] * layer + hidden


def training_bytes(stack: "Stack", branches: Mapping, on_gpu: bool) -> int:
    """Return about how many bytes of host memory it takes to train a stack.

    On a CPU states, activations and logits; with a GPU what it takes to save and load a state.
    """
    architecture, train = stack.group.architecture, branches["train"]
    state = STATE_BYTES * parameters(architecture, branches)
    if on_gpu:
        return 2 * len(stack.rotations) * state
    # An offset of up to its length moves a text, but takes no more columns.
    tokens = train["micro_texts"] * branches["length"]
    activations = branches["layers"] * SAVED * architecture.hidden + 3 * branches["vocabulary"]
    return len(stack.rotations) * (state + 4 * tokens * activations)


def evaluation_bytes(stack: "Stack", branches: Mapping, on_gpu: bool) -> int:
    """Return about how many bytes of host memory it takes to judge a stack."""
    architecture = stack.group.architecture
    weights = 2 * 4 * parameters(architecture, branches)
    tokens = branches["evaluation"]["micro_texts"] * branches["length"]
    layer = 0 if on_gpu else 4 * tokens * SAVED * architecture.hidden
    return len(stack.rotations) * (weights + layer) + 4 * LOGITS
