"""Per-layer gradients: targets, inputs and how the report shows a figure."""

GRADIENTS = config["gradients"]
ROOT = "results/gradients/{recipe}/{instructions}/{setting}/{backend}"
ERRORS = "results/gradients/{recipe}/{instructions}/errors"
# What decides a sample's gradient; the rest of the section is about how the work is cut.
MEASURED = [
    f"gradients.{name}" for name in ("template", "length", "too_long", "batch", "block")
]
# What else decides it, by backend; one added by hand may read them all.
OWN = {
    "auto": ["gradients.ghost_speed"],
    "exact": [],
    "ghost": [],
    "projection": ["gradients.projection"],
    "two_sided": ["gradients.two_sided"],
}


def gradients_shown(name, caption, figure):
    """A figure or page of a setting that the report shows."""
    return report(
        f"{ROOT}/{name}",
        caption=f"../report/{caption}.rst",
        category="Gradients",
        subcategory="{setting}, {backend}",
        labels={
            "checkpoint": "{recipe}",
            "samples": "{instructions}",
            "figure": figure,
        },
    )


def gradients_targets():
    """Everything that the gradients study shows."""
    targets = []
    for recipe, instructions, backend in itertools.product(
        *(GRADIENTS[name] for name in ("checkpoints", "instructions", "backends"))
    ):
        names = {
            "recipe": recipe,
            "instructions": instructions,
            "backend": backend,
        }
        targets += [
            f"{ROOT.format(setting=setting, **names)}/figures/accuracy.png"
            for setting in GRADIENTS["settings"]
        ]
        # Of one setting: the other's samples are about as many and as long.
        setting = GRADIENTS["settings"][0]
        targets.append(f"{ROOT.format(setting=setting, **names)}/plan.json")
        if backend not in gradient_families.EXACT:
            targets.append(f"{ERRORS.format(**names)}/{backend}.csv")
    return targets


def instruction_files(wildcards):
    """The local files that a set of samples is read from."""
    return config["instructions"][wildcards.instructions].get("path", [])


def instruction_settings(wildcards):
    """What decides a set of samples; its paraphraser doesn't."""
    found = settings(("instructions", wildcards.instructions))
    del found["instructions"][wildcards.instructions]["paraphraser"]
    return found


def paraphraser(wildcards):
    """The kind of a set's paraphraser, and its settings."""
    source = config["instructions"][wildcards.instructions]
    return gradient_families.paraphraser_of(source)


def paraphraser_files(wildcards):
    """The local files that paraphrases, or the model that makes them, are brought in."""
    kind, own = paraphraser(wildcards)
    if kind == "model" and "path" in own:
        return source_files(own["path"])
    return own["path"] if kind == "path" else []


def paraphraser_gpus(wildcards):
    """GPUs of a job in which a model rewrites."""
    kind, _ = paraphraser(wildcards)
    return config["compute"]["gpus"] if kind == "model" else 0


PASSING = (
    "concurrency",
    "timeout",
    "max_retries",
)  # decide no text, so they rerun nothing


def paraphraser_settings(wildcards):
    """What decides the paraphrases: not how many requests run at once, nor how long they may."""
    kind, own = paraphraser(wildcards)
    kept = {key: value for key, value in own.items() if key not in PASSING}
    return experiment.sanitised({"kind": kind, kind: kept})


def paraphraser_resource(name):
    """A setting of an endpoint that decides no text, in thousandths; -1 for what has none."""

    def found(wildcards):
        _, own = paraphraser(wildcards)
        return int(1000 * own[name]) if name in own else -1

    return found


def paraphraser_memory(wildcards, attempt):
    """Megabytes: little, unless a model rewrites."""
    kind, own = paraphraser(wildcards)
    size = config["compute"]["mem_mb"] if kind == "model" else 700
    if kind == "model" and "path" in own:
        size += (
            3 * sum(os.path.getsize(file) for file in source_files(own["path"])) / 1e6
        )
    return int(size) * 2 ** (attempt - 1)


def queries_of(wildcards):
    """The samples that are looked up among the originals."""
    if wildcards.setting == "paraphrased":
        return f"results/instructions/{wildcards.instructions}/paraphrased.jsonl"
    return f"results/gradients/{wildcards.recipe}/{wildcards.instructions}/model_generated.jsonl"


def gradient_settings(*keys):
    """What decides the dot products of a backend's features."""

    def found(wildcards):
        every = list(dict.fromkeys(itertools.chain(*OWN.values())))
        own = OWN.get(wildcards.backend, every)
        return model_settings(*MEASURED, *own, *keys) | {"backend": wildcards.backend}

    return found


def gradient_parts(kind):
    """The partitions' files of a kind."""

    def found(wildcards):
        names = gradient_families.parts(GRADIENTS["partitions"])
        return [f"{ROOT}/parts/{name}.{kind}" for name in names]

    return found


def gradient_memory(wildcards, input, attempt):
    """Megabytes: the model, a batch, and what may be held beside them."""
    held = int(1000 * GRADIENTS["memory_gb"])
    return memory(5)(wildcards, input, attempt) + held * 2 ** (attempt - 1)


def merged_memory(wildcards, input, attempt):
    """Megabytes of a job that holds dot products twice: as they are, and what is made of them."""
    return int(700 + 3 * input.size_mb) * 2 ** (attempt - 1)
