"""Inputs that rules look up: files of corpora and checkpoints, targets."""


def corpus_files(wildcards):
    """The local files a corpus reads, so that a changed text reruns what follows."""
    corpus = config["corpora"][wildcards.corpus]
    sources = [
        corpus,
        *(corpus.get(split, {}) for split in ("train", "calibration", "evaluation")),
    ]
    return [file for source in sources for file in source.get("path", [])]


def source_settings(wildcards):
    """What decides a corpus' documents; the boundary token decides only the token stream."""
    found = settings(f"corpora.{wildcards.corpus}")
    found["corpora"][wildcards.corpus].pop("boundary")
    return found


def tokenizer_of(wildcards):
    """Where a base checkpoint's tokenizer lies: trained here, or part of the checkpoint."""
    trained = "train" in config["checkpoints"][wildcards.base]
    return f"results/{'tokenizers' if trained else 'checkpoints'}/{wildcards.base}"


def base_files(wildcards):
    """The local files of a base checkpoint, so that changed weights rerun what follows."""
    folder = config["checkpoints"][wildcards.base].get("path")
    return sorted(map(str, Path(folder).iterdir())) if folder else []


def evaluation_targets():
    """The evaluations that the configuration asks for by recipe."""
    return [
        f"results/evaluations/{recipe}/{corpus}.json"
        for recipe in config["evaluation"]["recipes"]
        for corpus in config["evaluation"]["corpora"]
    ]


def latency_checkpoints(wildcards):
    """A checkpoint and its derived ones whose shape differs: the others decode just as fast."""
    recipes = [wildcards.recipe]
    for step in families.steps(config["heads"]):
        if parse_step(step).selection.startswith("b"):
            recipes.append(f"{wildcards.recipe}+{step}")
    return [f"results/checkpoints/{recipe}" for recipe in recipes]
