"""Attention heads: which copy one another, and what does merging them cost?"""


rule head_similarity:
    input:
        checkpoint="results/checkpoints/{recipe}",
        tokens=lambda wildcards: tokens_of(
            wildcards.recipe, wildcards.corpus, "calibration"
        ),
    output:
        ensure(
            "results/heads/{recipe}/similarity/{metric}/{corpus}.safetensors",
            non_empty=True,
        ),
    log:
        "results/logs/head_similarity/{recipe}/{metric}.{corpus}.log",
    benchmark:
        "results/benchmarks/head_similarity/{recipe}/{metric}.{corpus}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(2.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("head_similarity"),
        settings=model_settings(
            "heads.calibration.window", "heads.calibration.sequences", "heads.random"
        ),
    script:
        "../scripts/head_similarity.py"


rule similar_heads:
    input:
        "results/heads/{recipe}/similarity/{metric}/{corpus}.safetensors",
    output:
        lists=SIMILAR_HEADS,
    log:
        "results/logs/similar_heads/{recipe}/{metric}.{corpus}.log",
    benchmark:
        "results/benchmarks/similar_heads/{recipe}/{metric}.{corpus}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("similar_heads"),
        settings=settings("heads.thresholds", "heads.quantiles"),
    script:
        "../scripts/similar_heads.py"


rule attention_inputs:
    input:
        checkpoint="results/checkpoints/{recipe}",
        tokens=lambda wildcards: tokens_of(
            wildcards.recipe, wildcards.corpus, "calibration"
        ),
    output:
        ensure(
            "results/heads/{recipe}/attention_inputs/{corpus}.safetensors",
            non_empty=True,
        ),
    log:
        "results/logs/attention_inputs/{recipe}/{corpus}.log",
    benchmark:
        "results/benchmarks/attention_inputs/{recipe}/{corpus}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(3.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("attention_inputs"),
        settings=model_settings("heads.calibration.window", "heads.calibration.inputs"),
    script:
        "../scripts/attention_inputs.py"


rule reduce_heads:
    input:
        unpack(step_inputs),
        checkpoint="results/checkpoints/{parent}",
    output:
        checkpoint=directory("results/checkpoints/{parent}+{step}"),
        log=ensure(
            "results/heads/{parent}/merges/{step}/merge_log.json", non_empty=True
        ),
        provenance="results/provenance/checkpoints/{parent}+{step}.json",
    log:
        "results/logs/reduce_heads/{parent}/{step}.log",
    benchmark:
        "results/benchmarks/reduce_heads/{parent}/{step}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(2.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("reduce_heads"),
        settings=model_settings("heads.cross_group", "heads.ridge"),
    script:
        "../scripts/reduce_heads.py"


rule head_controls:
    input:
        unpack(step_inputs),
        checkpoint="results/checkpoints/{parent}",
        tokens=lambda wildcards: tokens_of(
            wildcards.parent, wildcards.corpus, "evaluation"
        ),
    output:
        ensure(
            "results/heads/{parent}/merges/{step}/{corpus}/controls.parquet",
            non_empty=True,
        ),
    log:
        "results/logs/head_controls/{parent}/{step}.{corpus}.log",
    benchmark:
        "results/benchmarks/head_controls/{parent}/{step}.{corpus}.jsonl"
    priority: 1  # the longest job of the study: it must not start last
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(3.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        batch=config["evaluation"]["batch"],
        failures=failures,
    params:
        code=code_digest("head_controls"),
        settings=lambda wildcards: {
            **model_settings(
                "heads.cross_group",
                "heads.ridge",
                "evaluation.window",
                "evaluation.sequences",
                "evaluation.choice",
            ),
            "controls": families.controls(config["heads"])[wildcards.step],
        },
    script:
        "../scripts/head_controls.py"


rule compare_heads:
    input:
        log="results/heads/{parent}/merges/{step}/merge_log.json",
        original=multiext("results/evaluations/{parent}/{corpus}", ".json", ".parquet"),
        merged=multiext(
            "results/evaluations/{parent}+{step}/{corpus}", ".json", ".parquet"
        ),
        controls=lambda wildcards: (
            [
                f"results/heads/{wildcards.parent}/merges/{wildcards.step}/{wildcards.corpus}/controls.parquet"
            ]
            if wildcards.step in families.controls(config["heads"])
            else []
        ),
    output:
        ensure(
            "results/heads/{parent}/merges/{step}/{corpus}/evaluation_results.json",
            non_empty=True,
        ),
    log:
        "results/logs/compare_heads/{parent}/{step}.{corpus}.log",
    benchmark:
        "results/benchmarks/compare_heads/{parent}/{step}.{corpus}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("compare_heads"),
        settings=settings("evaluation.bootstrap"),
    script:
        "../scripts/compare_heads.py"


rule similarity_maps:
    input:
        similarity=f"results/heads/{{recipe}}/similarity/{{metric}}/{CALIBRATION}.safetensors",
    output:
        png=shown(
            "similarity_{metric}.png", "similarity_maps", "Similarity", "{metric}"
        ),
        svg="results/heads/{recipe}/figures/similarity_{metric}.svg",
    log:
        "results/logs/similarity_maps/{recipe}/{metric}.log",
    benchmark:
        "results/benchmarks/similarity_maps/{recipe}/{metric}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("similarity_maps"),
        settings={},
    script:
        "../scripts/similarity_maps.py"


rule similarity_distribution:
    input:
        similarities=expand(
            f"results/heads/{{recipe}}/similarity/{{metric}}/{CALIBRATION}.safetensors",
            metric=config["heads"]["metrics"],
            allow_missing=True,
        ),
    output:
        png=shown(
            "similarity_distribution.png",
            "similarity_distribution",
            "Similarity",
            "all",
        ),
        svg="results/heads/{recipe}/figures/similarity_distribution.svg",
    log:
        "results/logs/similarity_distribution/{recipe}.log",
    benchmark:
        "results/benchmarks/similarity_distribution/{recipe}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("similarity_distribution"),
        settings=settings("heads.metrics", "heads.thresholds"),
    script:
        "../scripts/similarity_distribution.py"


rule head_figures:
    input:
        results=lambda wildcards: [
            f"results/heads/{wildcards.recipe}/merges/{step}/{wildcards.corpus}/evaluation_results.json"
            for step in families.steps(config["heads"])
        ],
    output:
        csv=shown("{corpus}/table.csv", "table", "Merging", "table (CSV)"),
        html=shown("{corpus}/table.html", "table", "Merging", "table"),
        metrics_comparison=merging_figure("metrics_comparison"),
        metrics_change=merging_figure("metrics_change"),
        merged_pairs=merging_figure("merged_pairs_per_layer"),
        damage_threshold=merging_figure("damage_threshold"),
        damage_parameters=merging_figure("damage_parameters"),
        controls=merging_figure("controls"),
        svg=expand(
            "results/heads/{{recipe}}/figures/{{corpus}}/{figure}.svg",
            figure=MERGING_FIGURES,
        ),
    log:
        "results/logs/head_figures/{recipe}/{corpus}.log",
    benchmark:
        "results/benchmarks/head_figures/{recipe}/{corpus}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("head_figures"),
        settings=lambda wildcards: {"steps": families.steps(config["heads"])},
    script:
        "../scripts/head_figures.py"


rule latency_figure:
    input:
        "results/latency/{recipe}.json",
    output:
        png=shown("decode_latency.png", "decode_latency", "Cost", "decoding speed"),
        svg="results/heads/{recipe}/figures/decode_latency.svg",
    log:
        "results/logs/latency_figure/{recipe}.log",
    benchmark:
        "results/benchmarks/latency_figure/{recipe}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("latency_figure"),
        settings={},
    script:
        "../scripts/latency_figure.py"
