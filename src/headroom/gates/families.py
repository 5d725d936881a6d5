"""Which gated runs a configuration asks for, and which it can't mean (nothing heavy here)."""

from collections.abc import Iterable, Mapping

from headroom.errors import InputError
from headroom.recipes import HEAD_CHOICES, PENALTIES, Gate, Mask, canonical, exact, format_step


def steps(gates: Mapping, trained: bool = True) -> list[str]:
    """Return the recipe steps of the study, λ = 0 first, each once.

    Args:
        gates: of the configuration.
        trained: whether the translator is trained here: one that is not has no settings to train
            the control ``scratch`` with, so it gets none.
    """
    lambdas = sorted({0.0, *gates["lambdas"]})
    made: list[Gate | Mask] = []
    for seed in gates["seeds"]:
        name = f"s{seed}" if seed else ""
        made += [Gate(f"l{canonical(value)}", name) for value in lambdas]
        for count in gates["target_heads"]:
            made.append(Gate(f"k{count}", name))
            made += [
                Mask(choice, f"k{count}", name)
                for choice in gates["controls"]
                if trained or choice != "scratch"
            ]
    return list(dict.fromkeys(map(format_step, made)))


def gated_heads(attentions: Iterable[str], config: Mapping) -> int:
    """Return how many heads are gated in a Marian of this ``config.json``."""
    encoder = config["encoder_layers"] * config["encoder_attention_heads"]
    decoder = config["decoder_layers"] * config["decoder_attention_heads"]
    return sum({"encoder": encoder, "decoder": decoder, "cross": decoder}[a] for a in attentions)


def check(gates: Mapping) -> None:
    """Refuse unknown names and values that would share a name with another.

    Raises:
        InputError: naming the key and what is allowed.
    """
    named = [("penalty", gates["penalty"], PENALTIES)]
    named += [("controls", control, HEAD_CHOICES) for control in gates["controls"]]
    for key, value, allowed in named:
        if value not in allowed:
            raise InputError(f"config key gates.{key} is {value!r} (allowed: {', '.join(allowed)})")
    if gates["trains"] == "none" and gates["target_heads"]:
        raise InputError(
            "config key gates.trains is none, but gates.target_heads trains weights once the heads "
            "are chosen (allowed: all, encoder)"
        )
    for value in gates["lambdas"]:
        try:
            exact(value)
        except InputError as error:
            raise InputError(f"config key gates.lambdas: {error}") from None


def check_translator(name: str, gates: Mapping | None, config: Mapping) -> None:
    """Refuse a translator that can't be gated as asked.

    Args:
        name: of the translator.
        gates: of the configuration; None for a translator that is not studied.
        config: the translator's ``config.json``.

    Raises:
        InputError: naming the key and what is allowed.
    """
    if config.get("model_type") != "marian":
        raise InputError(
            f"config key translators.{name}: model_type {config.get('model_type')!r} is no "
            f"translator that is served (allowed: marian)"
        )
    if gates is None:
        return
    heads = gated_heads(gates["attentions"], config)
    for count in gates["target_heads"]:
        if count > heads:
            raise InputError(
                f"config key gates.target_heads: {count} heads, but {heads} heads of {name} are "
                f"gated ({', '.join(gates['attentions'])}; allowed: at most {heads})"
            )


def marian_config(train: Mapping) -> dict:
    """Return the sizes of a translator that is trained here, named as in its ``config.json``."""
    return {
        "model_type": "marian",
        "encoder_layers": train["layers"],
        "decoder_layers": train["layers"],
        "encoder_attention_heads": train["heads"],
        "decoder_attention_heads": train["heads"],
    }
