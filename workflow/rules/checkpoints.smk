"""Base checkpoints: trained here, linked from a folder, or taken from a hub."""


ruleorder: train_checkpoint > import_checkpoint


rule train_checkpoint:
    input:
        tokens=lambda wildcards: tokens_of(
            wildcards.trained,
            config["checkpoints"][wildcards.trained]["train"]["corpus"],
            "train",
        ),
        tokenizer="results/tokenizers/{trained}",
    output:
        checkpoint=directory("results/checkpoints/{trained}"),
        provenance="results/provenance/checkpoints/{trained}.json",
    log:
        "results/logs/train_checkpoint/{trained}.log",
    benchmark:
        "results/benchmarks/train_checkpoint/{trained}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: lambda wildcards: config["checkpoints"][wildcards.trained]["train"]["threads"]
    resources:
        mem_mb=memory(0),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("train_checkpoint"),
        settings=lambda wildcards: settings(
            "compute.device", ("checkpoints", wildcards.trained, "train")
        ),
    script:
        "../scripts/train_checkpoint.py"


rule import_checkpoint:
    input:
        base_files,
    output:
        checkpoint=directory("results/checkpoints/{base}"),
        provenance="results/provenance/checkpoints/{base}.json",
    log:
        "results/logs/import_checkpoint/{base}.log",
    benchmark:
        "results/benchmarks/import_checkpoint/{base}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=import_memory,
        failures=failures,
    params:
        code=code_digest("import_checkpoint"),
        settings=lambda wildcards: settings(("checkpoints", wildcards.base)),
    script:
        "../scripts/import_checkpoint.py"
