"""Translator heads: which does a model give up when L0 gates charge for them?"""


ruleorder: train_translator > import_translator


rule sentence_pairs:
    input:
        pair_files,
    output:
        train=ensure("results/pairs/{pairs}/train.parquet", non_empty=True),
        validation=ensure("results/pairs/{pairs}/validation.parquet", non_empty=True),
        test=ensure("results/pairs/{pairs}/test.parquet", non_empty=True),
        counts=ensure("results/pairs/{pairs}/counts.json", non_empty=True),
    log:
        "results/logs/sentence_pairs/{pairs}.log",
    benchmark:
        "results/benchmarks/sentence_pairs/{pairs}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("sentence_pairs"),
        settings=pair_settings,
    script:
        "../scripts/sentence_pairs.py"


rule train_pair_tokenizer:
    input:
        pairs_file("train"),
    output:
        directory("results/tokenizers/{translator}"),
    log:
        "results/logs/train_pair_tokenizer/{translator}.log",
    benchmark:
        "results/benchmarks/train_pair_tokenizer/{translator}.jsonl"
    wildcard_constraints:
        translator=TRAINED_TRANSLATORS,
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("train_pair_tokenizer"),
        settings=lambda wildcards: settings(
            ("translators", wildcards.translator, "train", "vocabulary")
        ),
    script:
        "../scripts/train_pair_tokenizer.py"


rule tokenize_pairs:
    input:
        pairs=pairs_file("train"),
        tokenizer=translator_tokenizer,
    output:
        ensure("results/pair_tokens/{translator}.safetensors", non_empty=True),
    log:
        "results/logs/tokenize_pairs/{translator}.log",
    benchmark:
        "results/benchmarks/tokenize_pairs/{translator}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("tokenize_pairs"),
        settings=lambda wildcards: settings(
            ("translators", wildcards.translator, "longest")
        ),
    script:
        "../scripts/tokenize_pairs.py"


rule train_translator:
    input:
        tokens="results/pair_tokens/{translator}.safetensors",
        tokenizer="results/tokenizers/{translator}",
        validation=pairs_file("validation"),
    output:
        checkpoint=directory("results/checkpoints/{translator}"),
        record=directory("results/gates/{translator}/training/record"),
        events=directory("results/events/{translator}"),
        provenance="results/provenance/checkpoints/{translator}.json",
    log:
        "results/logs/train_translator/{translator}.log",
    benchmark:
        "results/benchmarks/train_translator/{translator}.jsonl"
    wildcard_constraints:
        translator=TRAINED_TRANSLATORS,
    priority: 2  # everything of the study waits for it
    conda:
        "../../envs/torch.yaml"
    threads: lambda wildcards: config["translators"][wildcards.translator]["train"]["threads"]
    resources:
        mem_mb=memory(0),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("train_translator"),
        settings=lambda wildcards: settings(
            "compute.device",
            ("translators", wildcards.translator, "train"),
            *look_settings(wildcards.translator),
        ),
    script:
        "../scripts/train_translator.py"


rule import_translator:
    input:
        translator_files,
    output:
        checkpoint=directory("results/checkpoints/{translator}"),
        provenance="results/provenance/checkpoints/{translator}.json",
    log:
        "results/logs/import_translator/{translator}.log",
    benchmark:
        "results/benchmarks/import_translator/{translator}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory(0),
        failures=failures,
    params:
        code=code_digest("import_translator"),
        settings=lambda wildcards: (
            settings(
                ("translators", wildcards.translator, "path"),
            )
            if "path" in config["translators"][wildcards.translator]
            else settings(
                ("translators", wildcards.translator, "hub"),
                ("translators", wildcards.translator, "revision"),
            )
        ),
    script:
        "../scripts/import_translator.py"


rule head_roles:
    input:
        checkpoint="results/checkpoints/{translator}",
        tokens="results/pair_tokens/{translator}.safetensors",
        validation=pairs_file("validation"),
    output:
        ensure("results/gates/{translator}/roles.parquet", non_empty=True),
    log:
        "results/logs/head_roles/{translator}.log",
    benchmark:
        "results/benchmarks/head_roles/{translator}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(2),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("head_roles"),
        settings=lambda wildcards: model_settings(
            "gates.attentions",
            "evaluation.translation.validation",
            ("translators", wildcards.translator, "longest"),
        ),
    script:
        "../scripts/head_roles.py"


rule gate_heads:
    input:
        unpack(run_inputs),
        checkpoint="results/checkpoints/{translator}",
        tokens="results/pair_tokens/{translator}.safetensors",
        validation=pairs_file("validation"),
    output:
        checkpoint=directory("results/checkpoints/{translator}+{gate}"),
        removed=directory("results/removed/{translator}+{gate}"),
        record=directory("results/gates/{translator}/runs/{gate}"),
        events=directory("results/events/{translator}+{gate}"),
        provenance="results/provenance/checkpoints/{translator}+{gate}.json",
    log:
        "results/logs/gate_heads/{translator}/{gate}.log",
    benchmark:
        "results/benchmarks/gate_heads/{translator}/{gate}.jsonl"
    priority: 1
    conda:
        "../../envs/torch.yaml"
    threads: run_threads
    resources:
        mem_mb=memory(6),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("gate_heads"),
        settings=run_settings,
    script:
        "../scripts/gate_heads.py"


rule translate:
    input:
        checkpoint=translated_model,
        tokenizer=lambda wildcards: (
            f"results/checkpoints/{wildcards.translation.split('+')[0]}"
        ),
        test=translation_source,
    output:
        translations=directory("results/translations/{translation}"),
        scores=ensure("results/translations/{translation}.json", non_empty=True),
        counts=ensure("results/translations/{translation}.parquet", non_empty=True),
        provenance="results/provenance/translations/{translation}.json",
    log:
        "results/logs/translate/{translation}.log",
    benchmark:
        "results/benchmarks/translate/{translation}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(3),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("translate"),
        settings=translation_settings,
    script:
        "../scripts/translate.py"


rule translation_latency:
    input:
        checkpoints=timed_models,
    output:
        ensure("results/gates/{translator}/latency.json", non_empty=True),
    log:
        "results/logs/translation_latency/{translator}.log",
    benchmark:
        "results/benchmarks/translation_latency/{translator}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: all_threads()
    resources:
        mem_mb=memory(3),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("translation_latency"),
        settings=model_settings("evaluation.translation.latency"),
    script:
        "../scripts/translation_latency.py"


rule training_figures:
    input:
        record="results/gates/{translator}/training/record",
    output:
        curves=gates_shown(
            "training/curves.png", "gates_curves", "Translator", "training curves"
        ),
        svg="results/gates/{translator}/training/curves.svg",
        translations=gates_shown(
            "training/translations.html",
            "gates_translations",
            "Translator",
            "translations while it trained",
        ),
    log:
        "results/logs/training_figures/{translator}.log",
    benchmark:
        "results/benchmarks/training_figures/{translator}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("training_figures"),
        settings={},
    script:
        "../scripts/training_figures.py"


rule run_figures:
    input:
        record="results/gates/{translator}/runs/{gate}",
        roles="results/gates/{translator}/roles.parquet",
    output:
        run=gates_shown(
            "figures/{gate}/run.html",
            "gates_run",
            "Gated runs",
            "gates while they train",
            run="{gate}",
        ),
        translations=gates_shown(
            "figures/{gate}/translations.html",
            "gates_translations",
            "Gated runs",
            "translations",
            run="{gate}",
        ),
        gif="results/gates/{translator}/figures/{gate}/p_open.gif",
        png=expand(
            "results/gates/{{translator}}/figures/{{gate}}/{figure}.{kind}",
            figure=["p_open", "layers", "curves"],
            kind=["png", "svg"],
        ),
    log:
        "results/logs/run_figures/{translator}/{gate}.log",
    benchmark:
        "results/benchmarks/run_figures/{translator}/{gate}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("run_figures"),
        settings={},
    script:
        "../scripts/run_figures.py"


rule gates_figures:
    input:
        scores=study_files("results/translations/{name}.json"),
        counts=study_files("results/translations/{name}.parquet"),
        removals=lambda wildcards: [
            f"results/gates/{wildcards.translator}/runs/{step}"
            for step in gate_steps(wildcards.translator)
        ],
        latency="results/gates/{translator}/latency.json",
    output:
        csv=gates_shown("figures/runs.csv", "gates_table", "Quality", "table (CSV)"),
        html=gates_shown("figures/runs.html", "gates_table", "Quality", "table"),
        trade_off=gates_shown(
            "figures/trade_off.png", "gates_trade_off", "Quality", "BLEU against heads"
        ),
        strength=gates_shown(
            "figures/open_against_lambda.png",
            "gates_lambda",
            "Quality",
            "open heads against λ",
        ),
        svg=expand(
            "results/gates/{{translator}}/figures/{figure}.svg",
            figure=["trade_off", "open_against_lambda"],
        ),
    log:
        "results/logs/gates_figures/{translator}.log",
    benchmark:
        "results/benchmarks/gates_figures/{translator}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("gates_figures"),
        settings=lambda wildcards: {
            **settings(
                "evaluation.bootstrap",
                "evaluation.translation.beams",
                ("pairs", pairs_of(wildcards.translator), "lowercase"),
                ("pairs", pairs_of(wildcards.translator), "tokenize"),
            ),
            "steps": gate_steps(wildcards.translator),
        },
    script:
        "../scripts/gates_figures.py"
