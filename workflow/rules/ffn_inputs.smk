"""FFN channels: targets, inputs and how the report shows a figure."""

FFN_CALIBRATION = config["ffn"]["calibration"]["corpus"]
FFN_SEEDS = config["ffn"]["calibration"]["seeds"]
FFN_STEPS = ffn_families.steps(config["ffn"])


def ffn_shown(name, caption, subcategory, figure, **labels):
    """A figure or table of the study that the report shows.

    All of a subcategory need the same labels: the report's page goes blank otherwise.
    """
    return report(
        f"results/ffn/{{recipe}}/{name}",
        caption=f"../report/{caption}.rst",
        category="FFN channels",
        subcategory=subcategory,
        labels={"checkpoint": "{recipe}", "figure": figure} | labels,
    )


def ffn_targets():
    """Everything that the ffn study shows."""
    targets, saved = [], config["ffn"]["saved"]
    for recipe in config["ffn"]["checkpoints"]:
        for corpus in config["evaluation"]["corpora"]:
            if FFN_STEPS:
                targets.append(f"results/ffn/{recipe}/figures/{corpus}/table.csv")
            targets += [
                f"results/evaluations/{recipe}+{step}/{corpus}.json" for step in saved
            ]
        targets += [f"results/ffn/{recipe}/prunes/{step}/rescue.json" for step in saved]
        targets += [
            f"results/ffn/{recipe}/figures/plan_{step}.png"
            for step in saved
            if parse_step(step).transports
        ]
    return targets


def channel_statistics(recipe, seed, steps):
    """The files that prunings of a checkpoint read: activations, and gradients where needed."""
    root = f"results/ffn/{recipe}"
    found = {
        "activations": f"{root}/activations/{FFN_CALIBRATION}-s{seed}.safetensors",
        "calibration": tokens_of(recipe, FFN_CALIBRATION, "calibration"),
        "heldout": tokens_of(recipe, FFN_CALIBRATION, "evaluation"),
    }
    if any(map(ffn_families.reads_gradients, map(parse_step, steps))):
        found["gradients"] = f"{root}/gradients/{FFN_CALIBRATION}-s{seed}.safetensors"
    return found


def prune_inputs(wildcards):
    """What a pruning reads beside its parent."""
    seed = parse_step(wildcards.prune).resolved("seed")[1:]
    return channel_statistics(wildcards.parent, seed, [wildcards.prune])


def sweep_inputs(wildcards):
    """What a sweep reads beside its checkpoint."""
    found = channel_statistics(wildcards.recipe, wildcards.seed, FFN_STEPS)
    corpus, used = wildcards.corpus, texts_used(wildcards.recipe)
    used = dict.fromkeys([*used, (FFN_CALIBRATION, "calibration")])
    return found | {
        "evaluation": tokens_of(wildcards.recipe, corpus, "evaluation"),
        "documents": f"results/corpora/{corpus}/evaluation.parquet",
        "seen": documents_of(used, corpus),
    }


def sweep_files(name):
    """One of the files of the sweeps of all seeds."""
    return expand(
        "results/ffn/{{recipe}}/sweep/{{corpus}}/s{seed}/{name}",
        seed=FFN_SEEDS,
        name=name,
    )
