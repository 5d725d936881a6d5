"""Per-layer gradients: which recognise the sample that a paraphrase came from?"""


rule instruction_pairs:
    input:
        instruction_files,
    output:
        samples=ensure(
            "results/instructions/{instructions}/original.jsonl", non_empty=True
        ),
        counts=ensure(
            "results/instructions/{instructions}/original.json", non_empty=True
        ),
    log:
        "results/logs/instruction_pairs/{instructions}.log",
    benchmark:
        "results/benchmarks/instruction_pairs/{instructions}.jsonl"
    conda:
        "../../envs/text.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("instruction_pairs"),
        settings=instruction_settings,
    script:
        "../scripts/instruction_pairs.py"


rule paraphrase_pairs:
    input:
        paraphraser_files,
        originals="results/instructions/{instructions}/original.jsonl",
    output:
        samples=ensure(
            "results/instructions/{instructions}/paraphrased.jsonl", non_empty=True
        ),
        counts=ensure(
            "results/instructions/{instructions}/paraphrased.json", non_empty=True
        ),
        provenance="results/provenance/instructions/{instructions}.json",
    log:
        "results/logs/paraphrase_pairs/{instructions}.log",
    benchmark:
        "results/benchmarks/paraphrase_pairs/{instructions}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=paraphraser_memory,
        runtime=config["compute"]["runtime"],
        concurrency=paraphraser_resource("concurrency"),
        timeout=paraphraser_resource("timeout"),
        max_retries=paraphraser_resource("max_retries"),
        gpu=paraphraser_gpus,
        failures=failures,
    params:
        code=code_digest("paraphrase_pairs"),
        settings=paraphraser_settings,
    script:
        "../scripts/paraphrase_pairs.py"


rule answer_prompts:
    input:
        checkpoint="results/checkpoints/{recipe}",
        prompts="results/instructions/{instructions}/paraphrased.jsonl",
    output:
        ensure(
            "results/gradients/{recipe}/{instructions}/model_generated.jsonl",
            non_empty=True,
        ),
    log:
        "results/logs/answer_prompts/{recipe}/{instructions}.log",
    benchmark:
        "results/benchmarks/answer_prompts/{recipe}/{instructions}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=memory(3),
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        failures=failures,
    params:
        code=code_digest("answer_prompts"),
        settings=model_settings(
            "gradients.template",
            "gradients.length",
            "gradients.batch",
            "gradients.answers",
        ),
    script:
        "../scripts/answer_prompts.py"


rule plan_gradients:
    input:
        checkpoint="results/checkpoints/{recipe}",
        originals="results/instructions/{instructions}/original.jsonl",
        queries=queries_of,
    output:
        gradients_shown("plan.json", "gradients_plan", "plan (JSON)"),
    log:
        "results/logs/plan_gradients/{recipe}/{instructions}/{setting}-{backend}.log",
    benchmark:
        "results/benchmarks/plan_gradients/{recipe}/{instructions}/{setting}-{backend}.jsonl"
    priority: 10
    conda:
        "../../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory(1),
        failures=failures,
    params:
        code=code_digest("plan_gradients"),
        settings=gradient_settings(
            "gradients.memory_gb", "gradients.disk_gb", "gradients.partitions"
        ),
    script:
        "../scripts/plan_gradients.py"


rule gradient_dots:
    input:
        checkpoint="results/checkpoints/{recipe}",
        originals="results/instructions/{instructions}/original.jsonl",
        queries=queries_of,
    output:
        dots=ensure(f"{ROOT}/parts/{{part}}.dots.safetensors", non_empty=True),
        states=ensure(f"{ROOT}/parts/{{part}}.states.safetensors", non_empty=True),
    log:
        "results/logs/gradient_dots/{recipe}/{instructions}/{setting}-{backend}/{part}.log",
    benchmark:
        "results/benchmarks/gradient_dots/{recipe}/{instructions}/{setting}-{backend}/{part}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=gradient_memory,
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        held_mb=int(1000 * GRADIENTS["memory_gb"]),
        stored_mb=int(1000 * GRADIENTS["disk_gb"]),
        keep=int(GRADIENTS["keep_features"]),
        failures=failures,
    params:
        code=code_digest("gradient_dots"),
        settings=gradient_settings(),
    script:
        "../scripts/gradient_dots.py"


rule merge_dots:
    input:
        dots=gradient_parts("dots.safetensors"),
        states=gradient_parts("states.safetensors"),
    output:
        dots=ensure(f"{ROOT}/dots.safetensors", non_empty=True),
        states=ensure(f"{ROOT}/states.safetensors", non_empty=True),
    log:
        "results/logs/merge_dots/{recipe}/{instructions}/{setting}-{backend}.log",
    benchmark:
        "results/benchmarks/merge_dots/{recipe}/{instructions}/{setting}-{backend}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=merged_memory,
        failures=failures,
    params:
        code=code_digest("merge_dots"),
        settings={},
    script:
        "../scripts/merge_dots.py"


rule gradient_retrieval:
    input:
        dots=f"{ROOT}/dots.safetensors",
        states=f"{ROOT}/states.safetensors",
        originals="results/instructions/{instructions}/original.jsonl",
        queries=queries_of,
        read="results/instructions/{instructions}/original.json",
        paraphrased="results/instructions/{instructions}/paraphrased.json",
    output:
        retrieval=ensure(f"{ROOT}/retrieval.csv", non_empty=True),
        layers=ensure(f"{ROOT}/layers.csv", non_empty=True),
        greedy=ensure(f"{ROOT}/greedy.csv", non_empty=True),
        self_similarity=ensure(f"{ROOT}/self_similarity.parquet", non_empty=True),
        summary=ensure(f"{ROOT}/summary.json", non_empty=True),
        page=gradients_shown("table.html", "gradients_table", "table"),
        export=directory(f"{ROOT}/export"),
    log:
        "results/logs/gradient_retrieval/{recipe}/{instructions}/{setting}-{backend}.log",
    benchmark:
        "results/benchmarks/gradient_retrieval/{recipe}/{instructions}/{setting}-{backend}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=merged_memory,
        failures=failures,
    params:
        code=code_digest("gradient_retrieval"),
        settings=settings(
            "evaluation.bootstrap",
            "gradients.candidates",
            "gradients.permutations",
            "gradients.greedy",
        ),
    script:
        "../scripts/gradient_retrieval.py"


rule gradient_figures:
    input:
        retrieval=f"{ROOT}/retrieval.csv",
        layers=f"{ROOT}/layers.csv",
        greedy=f"{ROOT}/greedy.csv",
        self_similarity=f"{ROOT}/self_similarity.parquet",
    output:
        heatmap=gradients_shown(
            "figures/heatmap.png", "gradients_heatmap", "accuracy by layer"
        ),
        accuracy=gradients_shown(
            "figures/accuracy.png", "gradients_accuracy", "accuracy and baselines"
        ),
        greedy=gradients_shown(
            "figures/greedy.png", "gradients_greedy", "layers added one by one"
        ),
        layers=gradients_shown(
            "figures/layers.png", "gradients_layers", "layers and the full gradient"
        ),
        parameters=gradients_shown(
            "figures/parameters.png", "gradients_parameters", "parameters and norms"
        ),
        self_similarity=gradients_shown(
            "figures/self_similarity.png",
            "gradients_self_similarity",
            "self-similarity over depth",
        ),
        svg=expand(
            f"{ROOT}/figures/{{figure}}.svg",
            figure=gradient_families.FIGURES,
            allow_missing=True,
        ),
    log:
        "results/logs/gradient_figures/{recipe}/{instructions}/{setting}-{backend}.log",
    benchmark:
        "results/benchmarks/gradient_figures/{recipe}/{instructions}/{setting}-{backend}.jsonl"
    conda:
        "../../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=light_memory,
        failures=failures,
    params:
        code=code_digest("gradient_figures"),
        settings={},
    script:
        "../scripts/gradient_figures.py"


rule projection_errors:
    input:
        checkpoint="results/checkpoints/{recipe}",
        originals="results/instructions/{instructions}/original.jsonl",
        queries="results/instructions/{instructions}/paraphrased.jsonl",
    output:
        report(
            f"{ERRORS}/{{backend}}.csv",
            caption="../report/gradients_error.rst",
            category="Gradients",
            subcategory="errors of approximations",
            labels={
                "checkpoint": "{recipe}",
                "samples": "{instructions}",
                "figure": "{backend} (CSV)",
            },
        ),
    log:
        "results/logs/projection_errors/{recipe}/{instructions}/{backend}.log",
    benchmark:
        "results/benchmarks/projection_errors/{recipe}/{instructions}/{backend}.jsonl"
    conda:
        "../../envs/torch.yaml"
    threads: config["compute"]["threads"]
    resources:
        mem_mb=gradient_memory,
        runtime=config["compute"]["runtime"],
        gpu=config["compute"]["gpus"],
        held_mb=int(1000 * GRADIENTS["memory_gb"]),
        failures=failures,
    params:
        code=code_digest("projection_errors"),
        settings=gradient_settings("gradients.compared"),
    script:
        "../scripts/projection_errors.py"
