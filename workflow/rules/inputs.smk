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
    found = settings(("corpora", wildcards.corpus))
    found["corpora"][wildcards.corpus].pop("boundary")
    return found


def tokenizer_of(wildcards):
    """Where a base checkpoint's tokenizer lies: trained here, or part of the checkpoint."""
    trained = "train" in config["checkpoints"][wildcards.base]
    return f"results/{'tokenizers' if trained else 'checkpoints'}/{wildcards.base}"


def base_files(wildcards):
    """The local files of a base checkpoint, so that changed weights rerun what follows."""
    folder = config["checkpoints"][wildcards.base].get("path")
    return source_files(folder) if folder else []


def import_memory(wildcards, attempt):
    """Megabytes: links cost nothing, pickled weights are held whole while they are written anew."""
    if not config["checkpoints"][wildcards.base].get("pickle"):
        return light_memory(wildcards, attempt)
    pickles = [file for file in base_files(wildcards) if file.endswith(".bin")]
    size = sum(map(os.path.getsize, pickles)) / 1e6
    return int(config["compute"]["mem_mb"] + 2.5 * size) * 2 ** (attempt - 1)


def evaluation_targets():
    """The evaluations that the configuration asks for by recipe."""
    return [
        f"results/evaluations/{recipe}/{corpus}.json"
        for recipe in config["evaluation"]["recipes"]
        for corpus in config["evaluation"]["corpora"]
    ]


def latency_checkpoints(wildcards):
    """A checkpoint and one derived one of each other shape: equal shapes decode equally fast."""
    shapes = {}
    for step in families.steps(config["heads"]):
        selection = parse_step(step).selection
        if selection.startswith("b"):
            shapes.setdefault(selection, f"{wildcards.recipe}+{step}")
    recipes = [wildcards.recipe, *shapes.values()]
    return [f"results/checkpoints/{recipe}" for recipe in recipes]


def texts_used(recipe):
    """The (corpus, split) whose documents made a checkpoint what it is."""
    steps, base = parse_recipe(recipe).steps, config["checkpoints"][base_of(recipe)]
    used = [(base["train"]["corpus"], "train")] if "train" in base else []
    if any(isinstance(step, (Merge, Remove)) for step in steps):
        used.append((config["heads"]["calibration"]["corpus"], "calibration"))
    if any(isinstance(step, Prune) for step in steps):
        used.append((config["ffn"]["calibration"]["corpus"], "calibration"))
    return used


def documents_of(used, corpus):
    """The documents of other corpora than one; the splits of one share no document as it is."""
    return [
        f"results/corpora/{other}/{split}.parquet"
        for other, split in used
        if other != corpus
    ]


def seen_documents(wildcards):
    """Documents of other corpora that a checkpoint has seen, to be held against the held-out."""
    return documents_of(texts_used(wildcards.recipe), wildcards.corpus)
