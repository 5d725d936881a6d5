"""Parallel branches: targets, stacks, inputs and how the report shows a figure."""

BRANCHES = config["branches"]
STACKS = grid.plan(BRANCHES, Path("results/branches/stacks"))
HOMES = grid.homes(BRANCHES, STACKS)
# What decides a training beside its name: not the grid, so that a new ratio is one new run.
STACK_SETTINGS = [
    f"branches.{name}"
    for name in ("offsets.train", "layers", "kv_heads", "theta", "train")
]


def branches_shown(name, caption, figure):
    """A figure or table of an ablation that the report shows.

    Architectures stand in the figure's label: where a label of their own had two values, the
    report's page would make a switch of it and go blank for what has no second.
    """
    return report(
        f"results/branches/{{ablation}}/{name}",
        caption=f"../report/{caption}.rst",
        category="Parallel branches",
        subcategory="{ablation}",
        labels={"ablation": "{ablation}", "figure": figure},
    )


def architectures_of(ablation):
    """The names of an ablation's architectures."""
    found = {run.group.architecture for run in grid.ablation_runs(BRANCHES, ablation)}
    return [architecture.name for architecture in sorted(found)]


def branches_targets():
    """Everything that the branches study shows."""
    targets = []
    for ablation in BRANCHES["ablations"]:
        root = f"results/branches/{ablation}"
        names = architectures_of(ablation)
        targets += [f"{root}/results.csv"]
        targets += [f"{root}/figures/loss-{name}.png" for name in names]
        if len(names) > 1:
            targets.append(f"{root}/figures/architectures.png")
    return targets


def branch_corpus(split):
    """Documents of the study's corpus."""
    return f"results/corpora/{BRANCHES['corpus']}/{split}.parquet"


def text_inputs(wildcards):
    """Documents of a split; training texts that are held-out ones as well are left out."""
    others = (
        {"others": branch_corpus("evaluation")} if wildcards.split == "train" else {}
    )
    return {"documents": branch_corpus(wildcards.split), **others}


def text_memory(wildcards, input, attempt):
    """Megabytes of a job that holds the texts of its documents, doubled by each attempt."""
    return int(700 + 10 * input.size_mb) * 2 ** (attempt - 1)


def stack_settings(wildcards):
    """What decides a training: of the rates by hidden size only its own."""
    found = settings("compute.device", *STACK_SETTINGS)
    train = found["branches"]["train"]
    hidden = runs.parse_group(wildcards.group).architecture.hidden
    train["learning_rate"] = grid.learning_rate(train, hidden)
    del train["learning_rates"]
    return found


def stack_memory(size):
    """Megabytes of a job on a stack by an estimate of its bytes, doubled by each attempt."""

    def mem_mb(wildcards, attempt):
        stack = runs.parse_stack(wildcards.group, wildcards.stack)
        found = size(stack, BRANCHES, config["compute"]["gpus"] > 0)
        return int(config["compute"]["mem_mb"] + found / 1e6) * 2 ** (attempt - 1)

    return mem_mb


def ablation_stacks(wildcards):
    """The stacks that an ablation's runs are read from, each once."""
    wanted = grid.ablation_runs(BRANCHES, wildcards.ablation)
    return list(dict.fromkeys(HOMES[run] for run in wanted))


def ablation_folders(wildcards):
    """The folders of an ablation's stacks."""
    root = Path("results/branches/stacks")
    return [stack.folder(root) for stack in ablation_stacks(wildcards)]


def ablation_losses(wildcards):
    """The losses of an ablation's runs, a file a stack and number of branches."""
    root, own = Path("results/branches/losses"), set(ablation_stacks(wildcards))
    counts = BRANCHES["ablations"][wildcards.ablation]["evaluation_branches"]
    return [
        stack.folder(root) / f"{count}.parquet"
        for stack, count in grid.evaluations(BRANCHES, STACKS)
        if stack in own and count in counts
    ]


def ablation_settings(wildcards):
    """What decides an ablation's tables."""
    return settings(
        "evaluation.bootstrap",
        "branches.seeds",
        ("branches", "ablations", wildcards.ablation),
    )
