"""What every checkpoint is judged by: perplexity, accuracy, size and decoding speed."""


rule evaluate:
    input:
        checkpoint="results/checkpoints/{recipe}",
        tokens=lambda wildcards: tokens_of(
            wildcards.recipe, wildcards.corpus, "evaluation"
        ),
        documents="results/corpora/{corpus}/evaluation.parquet",
        seen=seen_documents,
    output:
        summary=ensure("results/evaluations/{recipe}/{corpus}.json", non_empty=True),
        documents=ensure(
            "results/evaluations/{recipe}/{corpus}.parquet", non_empty=True
        ),
        provenance="results/provenance/evaluations/{recipe}/{corpus}.json",
    log:
        "results/logs/evaluate/{recipe}/{corpus}.log",
    benchmark:
        "results/benchmarks/evaluate/{recipe}/{corpus}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(2.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        batch=config["evaluation"]["batch"],
        failures=failures,
    params:
        code=code_digest("evaluate"),
        settings=model_settings(
            "evaluation.window",
            "evaluation.sequences",
            "evaluation.choice",
            "evaluation.bootstrap",
        ),
    script:
        "../scripts/evaluate.py"


rule decode_latency:
    input:
        checkpoints=latency_checkpoints,
    output:
        ensure("results/latency/{recipe}.json", non_empty=True),
    log:
        "results/logs/decode_latency/{recipe}.log",
    benchmark:
        "results/benchmarks/decode_latency/{recipe}.jsonl"
    conda:
        "../../envs/torch.yaml"
    # Alone on the machine, so that no other job of this workflow slows a measurement.
    threads: all_threads()
    resources:
        mem_mb=memory(2.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("decode_latency"),
        settings=model_settings("evaluation.latency"),
    script:
        "../scripts/decode_latency.py"
