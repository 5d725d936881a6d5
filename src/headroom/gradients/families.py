"""What the gradients study is made of, and what of it is possible; light."""

from collections.abc import Mapping

from headroom.corpora.paraphrase import KINDS, check_paraphraser
from headroom.digest import registry_names
from headroom.errors import InputError

SETTINGS = ("paraphrased", "model_generated")
EXACT = ("auto", "exact", "ghost")
FIGURES = ("heatmap", "accuracy", "greedy", "layers", "parameters", "self_similarity")


def backends() -> tuple[str, ...]:
    """Names of all backends, those added by hand among them."""
    return ("auto", *registry_names("headroom.gradients.features", "FEATURES"))


def check(config: Mapping) -> None:
    """Refuse what the study can't do, naming the key.

    Raises:
        InputError: for unknown names and sizes that don't fit each other.
    """
    own = config["gradients"]
    known = backends()
    for name in own["backends"]:
        if name not in known:
            raise InputError(
                f"config key gradients.backends: {name} is unknown (allowed: {', '.join(known)})"
            )
    if own["block"] % own["batch"]:
        raise InputError(
            f"config key gradients.block: {own['block']} is not a multiple of gradients.batch "
            f"{own['batch']}"
        )
    template = own["template"]
    if template != "auto" and "{prompt}" not in template["prompt"]:
        raise InputError(
            "config key gradients.template.prompt lacks {prompt} (allowed: a text that holds it)"
        )
    for name, source in config["instructions"].items():
        kind, paraphraser = paraphraser_of(source)
        if kind != "path":
            check_paraphraser(kind, paraphraser, name)


def paraphraser_of(source: Mapping) -> tuple[str, dict]:
    """Return the kind of an instruction set's paraphraser and its settings."""
    own = source["paraphraser"]
    kind = next(kind for kind in (*KINDS, "path") if kind in own)
    return kind, own[kind]


def parts(count: int) -> list[str]:
    """Return the names of partitions: ``1-of-4`` …"""
    return [f"{number + 1}-of-{count}" for number in range(count)]


def parse_part(name: str) -> tuple[int, int]:
    """Return a partition's number, from 0, and how many there are."""
    number, count = name.split("-of-")
    return int(number) - 1, int(count)
