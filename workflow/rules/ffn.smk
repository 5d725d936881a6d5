"""FFN channels: which can others carry, and at what loss?"""


rule ffn_activations:
    input:
        checkpoint="results/checkpoints/{recipe}",
        tokens=lambda wildcards: tokens_of(
            wildcards.recipe, wildcards.corpus, "calibration"
        ),
    output:
        ensure(
            "results/ffn/{recipe}/activations/{corpus}-s{seed}.safetensors",
            non_empty=True,
        ),
    log:
        "results/logs/ffn_activations/{recipe}/{corpus}-s{seed}.log",
    benchmark:
        "results/benchmarks/ffn_activations/{recipe}/{corpus}-s{seed}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(2.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("ffn_activations"),
        settings=model_settings(
            "ffn.calibration.window", "ffn.calibration.sequences", "ffn.ridge"
        ),
    script:
        "../scripts/ffn_activations.py"


rule ffn_gradients:
    input:
        checkpoint="results/checkpoints/{recipe}",
        tokens=lambda wildcards: tokens_of(
            wildcards.recipe, wildcards.corpus, "calibration"
        ),
    output:
        ensure(
            "results/ffn/{recipe}/gradients/{corpus}-s{seed}.safetensors",
            non_empty=True,
        ),
    log:
        "results/logs/ffn_gradients/{recipe}/{corpus}-s{seed}.log",
    benchmark:
        "results/benchmarks/ffn_gradients/{recipe}/{corpus}-s{seed}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(3.5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("ffn_gradients"),
        settings=model_settings(
            "ffn.calibration.window", "ffn.calibration.gradient_sequences"
        ),
    script:
        "../scripts/ffn_gradients.py"


rule prune_channels:
    input:
        unpack(prune_inputs),
        checkpoint="results/checkpoints/{parent}",
    output:
        checkpoint=directory("results/checkpoints/{parent}+{prune}"),
        rescue=ensure("results/ffn/{parent}/prunes/{prune}/rescue.json", non_empty=True),
        report=ensure("results/ffn/{parent}/prunes/{prune}/rescue.txt", non_empty=True),
        plan=ensure(
            "results/ffn/{parent}/prunes/{prune}/plan.safetensors", non_empty=True
        ),
        provenance="results/provenance/checkpoints/{parent}+{prune}.json",
    log:
        "results/logs/prune_channels/{parent}/{prune}.log",
    benchmark:
        "results/benchmarks/prune_channels/{parent}/{prune}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(5),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("prune_channels"),
        settings=model_settings(
            "ffn.calibration.window",
            "ffn.calibration.sequences",
            "ffn.calibration.heldout",
            "ffn.ridge",
            "ffn.multiple",
            "ffn.transport",
        ),
    script:
        "../scripts/prune_channels.py"


rule ffn_sweep:
    input:
        unpack(sweep_inputs),
        checkpoint="results/checkpoints/{recipe}",
    output:
        documents=ensure(
            "results/ffn/{recipe}/sweep/{corpus}/s{seed}/documents.parquet",
            non_empty=True,
        ),
        layers=ensure(
            "results/ffn/{recipe}/sweep/{corpus}/s{seed}/layers.parquet",
            non_empty=True,
        ),
        setting=ensure(
            "results/ffn/{recipe}/sweep/{corpus}/s{seed}/setting.json", non_empty=True
        ),
        provenance="results/provenance/ffn_sweep/{recipe}/{corpus}-s{seed}.json",
    log:
        "results/logs/ffn_sweep/{recipe}/{corpus}-s{seed}.log",
    benchmark:
        "results/benchmarks/ffn_sweep/{recipe}/{corpus}-s{seed}.jsonl"
    priority: 1  # the longest job of the study: it must not start last
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(8),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        batch=config["evaluation"]["batch"],
        failures=failures,
    params:
        code=code_digest("ffn_sweep"),
        settings={
            **model_settings(
                "ffn.calibration.window",
                "ffn.calibration.sequences",
                "ffn.calibration.heldout",
                "ffn.ridge",
                "ffn.multiple",
                "ffn.transport",
                "evaluation.window",
                "evaluation.sequences",
                "evaluation.choice",
            ),
            "steps": FFN_STEPS,
        },
    script:
        "../scripts/ffn_sweep.py"


rule ffn_figures:
    input:
        documents=sweep_files("documents.parquet"),
        layers=sweep_files("layers.parquet"),
        settings=sweep_files("setting.json"),
    output:
        csv=ffn_shown(
            "figures/{corpus}/table.csv",
            "ffn_table",
            "Pruning",
            "table (CSV)",
            corpus="{corpus}",
        ),
        html=ffn_shown(
            "figures/{corpus}/table.html",
            "ffn_table",
            "Pruning",
            "table",
            corpus="{corpus}",
        ),
        verdicts="results/ffn/{recipe}/figures/{corpus}/verdicts.csv",
        perplexity=ffn_shown(
            "figures/{corpus}/perplexity.png",
            "ffn_perplexity",
            "Pruning",
            "perplexity against ratio",
            corpus="{corpus}",
        ),
        rescue=ffn_shown(
            "figures/{corpus}/rescue.png",
            "ffn_rescue",
            "Transport",
            "rescue and dilution",
            corpus="{corpus}",
        ),
        svg=expand(
            "results/ffn/{{recipe}}/figures/{{corpus}}/{figure}.svg",
            figure=["perplexity", "rescue"],
        ),
    log:
        "results/logs/ffn_figures/{recipe}/{corpus}.log",
    benchmark:
        "results/benchmarks/ffn_figures/{recipe}/{corpus}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("ffn_figures"),
        settings=settings("evaluation.bootstrap", "ffn.calibration.seeds"),
    script:
        "../scripts/ffn_figures.py"


rule plan_figure:
    input:
        "results/ffn/{recipe}/prunes/{prune}/plan.safetensors",
    output:
        png=ffn_shown(
            "figures/plan_{prune}.png",
            "ffn_plan",
            "Transport plan",
            "transport plan",
            step="{prune}",
        ),
        svg="results/ffn/{recipe}/figures/plan_{prune}.svg",
    log:
        "results/logs/plan_figure/{recipe}/{prune}.log",
    benchmark:
        "results/benchmarks/plan_figure/{recipe}/{prune}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("plan_figure"),
        settings={},
    script:
        "../scripts/plan_figure.py"
