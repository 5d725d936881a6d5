"""Translator heads: targets, inputs and how the report shows a figure."""

GATES = config["gates"]
# What decides a gated run beside its name. The lists of runs are not among it: a new price makes
# one new run.
RUN_SETTINGS = [
    f"gates.{name}"
    for name in (
        "attentions",
        "trains",
        "beta",
        "penalty",
        "log_a",
        "steps",
        "batch_tokens",
        "learning_rate",
        "schedule",
        "warmup",
        "noam_step_factor",
        "smoothing",
        "gate_learning_rate",
        "multiplier_learning_rate",
        "report",
        "threads",
    )
]


def gates_shown(name, caption, subcategory, figure, **labels):
    """A figure or table of the study that the report shows.

    All of a subcategory need the same labels: the report's page goes blank otherwise.
    """
    return report(
        f"results/gates/{{translator}}/{name}",
        caption=f"../report/{caption}.rst",
        category="Translator heads",
        subcategory=subcategory,
        labels={"translator": "{translator}", "figure": figure} | labels,
    )


def gate_steps(translator):
    """The runs that are made of a translator."""
    return gate_families.steps(GATES, "train" in config["translators"][translator])


def gates_targets():
    """Everything that the gates study shows."""
    targets = []
    for translator in GATES["translators"]:
        root = f"results/gates/{translator}"
        targets.append(f"{root}/figures/trade_off.png")
        if translator in trained("translators"):
            targets.append(f"{root}/training/curves.png")
        targets += [
            f"{root}/figures/{step}/run.html"
            for step in gate_steps(translator)
            if step.startswith("gate-")
        ]
    return targets


def pairs_of(translator):
    """The name of the sentence pairs that a translator is trained and judged on."""
    return config["translators"][translator]["pairs"]


def pairs_file(split):
    """One split of a translator's sentence pairs."""
    return lambda wildcards: (
        f"results/pairs/{pairs_of(wildcards.translator)}/{split}.parquet"
    )


def pair_files(wildcards):
    """The local files that sentence pairs are read from."""
    path = config["pairs"][wildcards.pairs].get("path", {})
    return [file for split in path.values() for file in split]


def pair_settings(wildcards):
    """What decides the sentences; how BLEU splits them into words decides only scores."""
    found = settings(("pairs", wildcards.pairs))
    found["pairs"][wildcards.pairs].pop("tokenize")
    return found


def translator_tokenizer(wildcards):
    """Where a translator's tokenizer lies: trained here, or part of the checkpoint."""
    trained = "train" in config["translators"][wildcards.translator]
    return (
        f"results/{'tokenizers' if trained else 'checkpoints'}/{wildcards.translator}"
    )


def translator_files(wildcards):
    """The local files of a translator, so that changed weights rerun what follows."""
    folder = config["translators"][wildcards.translator].get("path")
    return source_files(folder) if folder else []


def look_settings(translator):
    """What decides how held-out sentences are translated and scored while a model trains."""
    pairs = pairs_of(translator)
    return (
        "evaluation.translation.validation",
        ("translators", translator, "longest"),
        ("pairs", pairs, "lowercase"),
        ("pairs", pairs, "tokenize"),
    )


def run_settings(wildcards):
    """What decides a gated run; one from scratch is trained as its translator was before."""
    keys = [*RUN_SETTINGS, *look_settings(wildcards.translator)]
    if wildcards.gate.startswith("mask-scratch"):
        keys.append(("translators", wildcards.translator, "train"))
    return settings("compute.device", *keys)


def run_threads(wildcards):
    """Threads of a gated run; one from scratch first trains as its translator did."""
    scratch = wildcards.gate.startswith("mask-scratch")
    source = config["translators"][wildcards.translator] if scratch else {}
    return max(GATES["threads"], source.get("train", {}).get("threads", 1))


def run_inputs(wildcards):
    """What a gated run reads beside its translator: from scratch, the heads that a run kept."""
    step = parse_step(wildcards.gate)
    if not isinstance(step, Mask) or step.choice != "scratch":
        return {}
    like = "-".join(filter(None, ("gate", step.count, step.seed)))
    return {"kept": f"results/gates/{wildcards.translator}/runs/{like}"}


def translated_model(wildcards):
    """The model behind a translation: a translator, or what is left of it."""
    folder = "removed" if "+" in wildcards.translation else "checkpoints"
    return f"results/{folder}/{wildcards.translation}"


def translation_source(wildcards):
    """The test sentences of a translation's translator."""
    return f"results/pairs/{pairs_of(wildcards.translation.split('+')[0])}/test.parquet"


def translation_settings(wildcards):
    """What decides how a test set is translated and scored."""
    translator = wildcards.translation.split("+")[0]
    pairs = pairs_of(translator)
    return model_settings(
        "evaluation.translation.beams",
        "evaluation.translation.batch_tokens",
        ("translators", translator, "longest"),
        ("pairs", pairs, "lowercase"),
        ("pairs", pairs, "tokenize"),
    )


def study_files(pattern):
    """A file of the translator and of each of its runs."""
    return lambda wildcards: [
        pattern.format(name=name)
        for name in (
            wildcards.translator,
            *(f"{wildcards.translator}+{s}" for s in gate_steps(wildcards.translator)),
        )
    ]


def timed_models(wildcards):
    """The translator and what the runs with a fixed number of heads, or the dearest, left."""
    name = wildcards.translator
    gated = [step for step in gate_steps(name) if step.startswith("gate-")]
    first = [step for step in gated if "-s" not in step] or gated
    chosen = [step for step in first if step.startswith("gate-k")] or first[-1:]
    return [
        f"results/checkpoints/{name}",
        *(f"results/removed/{name}+{step}" for step in chosen),
    ]
