"""Parallel branches: rotary shares, branch counts, heads and head sizes, trained in stacks."""


rule train_branch_tokenizer:
    input:
        branch_corpus("train"),
    output:
        directory("results/branches/tokenizer"),
    log:
        "results/logs/train_branch_tokenizer/tokenizer.log",
    benchmark:
        "results/benchmarks/train_branch_tokenizer/tokenizer.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=text_memory,
        failures=failures,
    params:
        code=code_digest("train_branch_tokenizer"),
        settings=settings("branches.vocabulary"),
    script:
        "../scripts/train_branch_tokenizer.py"


rule branch_texts:
    input:
        unpack(text_inputs),
        tokenizer="results/branches/tokenizer",
    output:
        texts=directory("results/branches/texts/{split}"),
    log:
        "results/logs/branch_texts/{split}.log",
    benchmark:
        "results/benchmarks/branch_texts/{split}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=text_memory,
        failures=failures,
    params:
        code=code_digest("branch_texts"),
        settings=lambda wildcards: settings(
            "branches.length",
            "branches.long_texts",
            f"branches.texts.{wildcards.split}",
        ),
    script:
        "../scripts/branch_texts.py"


rule train_stack:
    input:
        texts="results/branches/texts/train",
        tokenizer="results/branches/tokenizer",
    output:
        stack=directory("results/branches/stacks/{group}/{stack}"),
        provenance="results/provenance/branches/{group}/{stack}.json",
    log:
        "results/logs/train_stack/{group}/{stack}.log",
    benchmark:
        "results/benchmarks/train_stack/{group}/{stack}.jsonl"
    priority: 1
    conda:
        "../../envs/torch.yaml"
    threads: BRANCHES["train"]["threads"]
    resources:
        mem_mb=stack_memory(training_bytes),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("train_stack"),
        settings=stack_settings,
    script:
        "../scripts/train_stack.py"


rule evaluate_stack:
    input:
        stack="results/branches/stacks/{group}/{stack}",
        texts="results/branches/texts/evaluation",
    output:
        ensure(
            "results/branches/losses/{group}/{stack}/{branches}.parquet",
            non_empty=True,
        ),
    log:
        "results/logs/evaluate_stack/{group}/{stack}/{branches}.log",
    benchmark:
        "results/benchmarks/evaluate_stack/{group}/{stack}/{branches}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=stack_memory(evaluation_bytes),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("evaluate_stack"),
        settings=settings(
            "compute.device",
            "compute.threads",
            "branches.offsets.evaluation",
            "branches.evaluation",
        ),
    script:
        "../scripts/evaluate_stack.py"


rule branch_results:
    input:
        stacks=ablation_folders,
        losses=ablation_losses,
    output:
        results=branches_shown(
            "results.csv", "branches_results", "every run and count (CSV)"
        ),
        means=ensure("results/branches/{ablation}/means.csv", non_empty=True),
        csv=ensure("results/branches/{ablation}/hypotheses.csv", non_empty=True),
        setting=ensure("results/branches/{ablation}/setting.json", non_empty=True),
        hypotheses=branches_shown(
            "hypotheses.html", "branches_hypotheses", "hypotheses"
        ),
    log:
        "results/logs/branch_results/{ablation}.log",
    benchmark:
        "results/benchmarks/branch_results/{ablation}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("branch_results"),
        settings=ablation_settings,
    script:
        "../scripts/branch_results.py"


rule branch_figures:
    input:
        means="results/branches/{ablation}/means.csv",
        setting="results/branches/{ablation}/setting.json",
    output:
        loss=branches_shown(
            "figures/loss-{architecture}.png",
            "branches_loss",
            "loss against branches, {architecture}",
        ),
        ratio=branches_shown(
            "figures/ratio-{architecture}.png",
            "branches_ratio",
            "loss against ratio, {architecture}",
        ),
        svg=expand(
            "results/branches/{{ablation}}/figures/{figure}-{{architecture}}.svg",
            figure=["loss", "ratio"],
        ),
    log:
        "results/logs/branch_figures/{ablation}/{architecture}.log",
    benchmark:
        "results/benchmarks/branch_figures/{ablation}/{architecture}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("branch_figures"),
        settings={},
    script:
        "../scripts/branch_figures.py"


rule branch_architectures:
    input:
        means="results/branches/{ablation}/means.csv",
        setting="results/branches/{ablation}/setting.json",
    output:
        figure=branches_shown(
            "figures/architectures.png",
            "branches_architectures",
            "loss by architecture",
        ),
        svg="results/branches/{ablation}/figures/architectures.svg",
    log:
        "results/logs/branch_architectures/{ablation}.log",
    benchmark:
        "results/benchmarks/branch_architectures/{ablation}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("branch_architectures"),
        settings={},
    script:
        "../scripts/branch_architectures.py"
