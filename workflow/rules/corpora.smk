"""Texts: documents, a trained tokenizer, token streams."""


rule text_documents:
    input:
        corpus_files,
    output:
        train=ensure("results/corpora/{corpus}/train.parquet", non_empty=True),
        calibration=ensure(
            "results/corpora/{corpus}/calibration.parquet", non_empty=True
        ),
        evaluation=ensure("results/corpora/{corpus}/evaluation.parquet", non_empty=True),
        counts=ensure("results/corpora/{corpus}/counts.json", non_empty=True),
    log:
        "results/logs/text_documents/{corpus}.log",
    benchmark:
        "results/benchmarks/text_documents/{corpus}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("text_documents"),
        settings=source_settings,
    script:
        "../scripts/text_documents.py"


rule train_tokenizer:
    input:
        lambda wildcards: (
            f"results/corpora/{config['checkpoints'][wildcards.base]['train']['corpus']}/train.parquet"
        ),
    output:
        directory("results/tokenizers/{base}"),
    log:
        "results/logs/train_tokenizer/{base}.log",
    benchmark:
        "results/benchmarks/train_tokenizer/{base}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("train_tokenizer"),
        settings=lambda wildcards: settings(
            ("checkpoints", wildcards.base, "train", "vocabulary")
        ),
    script:
        "../scripts/train_tokenizer.py"


rule tokenize:
    input:
        documents="results/corpora/{corpus}/{split}.parquet",
        tokenizer=tokenizer_of,
    output:
        ensure("results/tokens/{base}/{corpus}/{split}.safetensors", non_empty=True),
    log:
        "results/logs/tokenize/{base}/{corpus}.{split}.log",
    benchmark:
        "results/benchmarks/tokenize/{base}/{corpus}.{split}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("tokenize"),
        settings=lambda wildcards: settings(("corpora", wildcards.corpus, "boundary")),
    script:
        "../scripts/tokenize.py"
