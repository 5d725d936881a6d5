"""Attention heads: targets, inputs and how the report shows a figure."""

CALIBRATION = config["heads"]["calibration"]["corpus"]


SIMILAR_HEADS = [
    f"results/heads/{{recipe}}/similarity/{{metric}}/{{corpus}}/similar_heads_{kind}_{canonical(value)}.json"
    for kind in ("threshold", "quantile")
    for value in config["heads"][f"{kind}s"]
]
MERGING_FIGURES = (
    "metrics_comparison",
    "metrics_change",
    "merged_pairs_per_layer",
    "damage_threshold",
    "damage_parameters",
    "controls",
)


def shown(name, caption, subcategory, figure):
    """A figure or table of the study that the report shows."""
    return report(
        f"results/heads/{{recipe}}/figures/{name}",
        caption=f"../report/{caption}.rst",
        category="Attention heads",
        subcategory=subcategory,
        labels={"checkpoint": "{recipe}", "figure": figure}
        | ({"corpus": "{corpus}"} if "{corpus}" in name else {}),
    )


def merging_figure(name):
    """One of the figures over all merges, as a picture in the report."""
    return shown(f"{{corpus}}/{name}.png", name, "Merging", name.replace("_", " "))


def chosen_heads(recipe):
    """The lists of similar heads of one studied checkpoint, for every metric and threshold."""
    for metric in config["heads"]["metrics"]:
        for path in SIMILAR_HEADS:
            yield path.format(recipe=recipe, metric=metric, corpus=CALIBRATION)


def heads_targets():
    """Everything that the heads study shows."""
    targets = []
    for recipe in config["heads"]["checkpoints"]:
        root = f"results/heads/{recipe}/figures"
        targets += chosen_heads(recipe)
        targets += [
            f"{root}/similarity_{metric}.png" for metric in config["heads"]["metrics"]
        ]
        targets += [f"{root}/similarity_distribution.png", f"{root}/decode_latency.png"]
        if families.steps(config["heads"]):
            targets += [
                f"{root}/{corpus}/table.csv"
                for corpus in config["evaluation"]["corpora"]
            ]
    return targets


def step_inputs(wildcards):
    """What a merge or a removal reads beside its parent: similarities, calibration inputs."""
    step, root = parse_step(wildcards.step), f"results/heads/{wildcards.parent}"
    needed = {"inputs": f"{root}/attention_inputs/{CALIBRATION}.safetensors"}
    if isinstance(step, Merge) and step.criterion != "error":
        metric = families.metric_of(step.criterion)
        needed["similarity"] = f"{root}/similarity/{metric}/{CALIBRATION}.safetensors"
    return needed
