"""Budgets: how many heads stay, and the configuration of the smaller model.

Neither torch nor numpy here, so that a recipe can be refused before any job runs. H query heads,
G key/value heads; primes (H', G') are those of the smaller model, n = H' / G'.
"""

import re

from headroom.checkpoints import geometry
from headroom.errors import InputError


def resolve_budget(selection: str, heads: int, groups: int, unite: bool = True) -> tuple[int, int]:
    """Return (G', n): key/value heads that stay and query heads of each, for ``b4x2`` or ``b0.50``.

    A fraction means the feasible (G', n ≤ H/G) with G'·n nearest to that share of H, the larger G'
    where two are equally near.

    Args:
        selection: ``b{G'}x{n}`` or ``b{fraction of the query heads}``.
        heads, groups: H and G of the model.
        unite: whether key/value heads may be merged, so that n may exceed H/G.

    Raises:
        InputError: where the model can't be brought to that shape.
    """
    each = heads // groups
    if exact := re.fullmatch(r"b(\d+)x(\d+)", selection):
        kept, n = int(exact[1]), int(exact[2])
        least = -(-n // each) if unite else (1 if n <= each else groups + 1)
        if kept < 1 or n < 1 or kept * least > groups:
            limit = (
                f"n at most {each}" if not unite else f"G' times ceil(n/{each}) at most {groups}"
            )
            raise InputError(
                f"recipe part {selection!r}: not possible with {heads} query heads in {groups} "
                f"key/value heads (b{{G'}}x{{n}} is allowed with G' at most {groups}, {limit})"
            )
        return kept, n
    found = re.fullmatch(r"b(0\.\d+)", selection)
    if not found or not 0 < float(found[1]) < 1:
        raise InputError(
            f"recipe part {selection!r}: write b4x2 (key/value heads x query heads of each) or "
            f"b0.50 (fraction of the query heads, above 0 and below 1)"
        )
    shapes = [(kept, n) for kept in range(1, groups + 1) for n in range(1, each + 1)]
    wanted = float(found[1]) * heads
    return min(shapes, key=lambda shape: (round(abs(shape[0] * shape[1] - wanted), 9), -shape[0]))


def merged_config(config: dict, heads: int, groups: int) -> dict:
    """Return the ``config.json`` of a model with fewer heads.

    Head size and key/value heads are written out, because a reader's defaults for them follow the
    number of query heads. Stock Llama insists on hidden_size % heads = 0 although the head size is
    explicit; where that fails the model is saved as Mistral without a sliding window, which is the
    same function.

    Args:
        config: the parent's.
        heads, groups: H' and G'.

    Raises:
        InputError: if G' doesn't divide H', or if a Llama with biases would have to become Mistral.
    """
    shape = geometry(config)
    if heads % groups:
        raise InputError(f"budget: {heads} query heads don't divide into {groups} key/value heads")
    new = config | {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": shape.head_dim,
    }
    if shape.family != "llama" or shape.hidden % heads == 0:
        return new
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InputError(
                f"checkpoint config key {key} is true: a Llama whose hidden_size {shape.hidden} is "
                f"not a multiple of {heads} query heads has to be saved as Mistral, which has no "
                f"such bias (allowed: budgets with a number of query heads that divides it)"
            )
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp")
    new = {key: value for key, value in new.items() if key not in dropped}
    return new | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
