"""The jobs of the gates study, from files to files."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headroom.checkpoints import (
    copy_tokenizer,
    load_tokenizer,
    read_json,
    resolve_device,
    write_json,
    write_manifest,
)
from headroom.corpora.pair_tokens import collate, encode_pairs, load
from headroom.corpora.pairs import read_pairs
from headroom.evaluation.translation import COUNTS, bleu_counts, check_case, score, translate
from headroom.gates import removal
from headroom.gates.cost import flops, latency
from headroom.gates.gated import kept_heads
from headroom.gates.reports import Reporter, write_record, write_text
from headroom.gates.roles import roles
from headroom.gates.runs import gate_run
from headroom.gates.translator import build, fit, save_translator
from headroom.recipes import parse_step

CHECKED = 32  # held-out pairs on which a removed model is held against the gated one
TOLERANCE = 1e-4  # of their logits; rounding to float32 makes some 1e-5 of large ones
LOOK_TOKENS = 4096  # of a batch of translations while a model trains
FLOP_TOKENS = 20  # on each side of the sentence pair whose FLOPs are counted


def _only(table: Mapping) -> Mapping:
    """The one entry of a table in a job's settings."""
    (value,) = table.values()
    return value


def how_to_translate(settings: Mapping, batch_tokens: int = LOOK_TOKENS) -> dict:
    """Return what decides translations and their scores, from a job's settings."""
    pairs = _only(settings["pairs"])
    return {
        "batch_tokens": batch_tokens,
        "longest": _only(settings["translators"])["longest"],
        "lowercase": pairs["lowercase"],
        "tokenize": pairs["tokenize"],
    }


def reporter_of(settings: Mapping, validation: str | Path, tokenizer: str | Path) -> Reporter:
    """Return what translates the first validation sentences while a model trains."""
    sources, references = read_pairs(validation)
    most = settings["evaluation"]["translation"]["validation"]
    how = how_to_translate(settings)
    return Reporter(load_tokenizer(tokenizer), sources[:most], references[:most], how)


def train_translator(
    settings: Mapping, inputs: Mapping, outputs: Mapping, state: Path, halvings: int
) -> None:
    """Train a Marian from scratch and write it with its record.

    Args:
        settings: of the job.
        inputs: tokens, tokenizer, validation.
        outputs: empty folders checkpoint, record, events.
        state: folder of the training state.
        halvings: how often micro-batches are halved from the start.
    """
    translator = _only(settings["translators"])
    train = translator["train"]
    reporter = reporter_of(settings, inputs["validation"], inputs["tokenizer"])
    device = resolve_device(settings["compute"]["device"])
    sizes = {**train, "vocabulary": len(reporter.tokenizer)}
    model = build(sizes, translator["longest"], train["seed"]).to(device)
    progress = fit(model, train, load(inputs["tokens"]), state, reporter, halvings)
    save_translator(model, inputs["tokenizer"], outputs["checkpoint"])
    write_record(outputs["record"], outputs["events"], progress, reporter)


def gate_translator(
    settings: Mapping, name: str, inputs: Mapping, outputs: Mapping, state: Path, halvings: int
) -> None:
    """Run a recipe step on a translator; write what is left of it, twice, and the run's record.

    Args:
        settings: of the job.
        name: the recipe step.
        inputs: checkpoint, tokens, validation; for a run from scratch ``kept``, the record of
            the run whose heads it has.
        outputs: empty folders checkpoint (stock shape, closed heads zero), removed, record, events.
        state: folder of the training states.
        halvings: how often micro-batches are halved from the start.
    """
    gates, checkpoint = settings["gates"], inputs["checkpoint"]
    translator = _only(settings["translators"])
    reporter = reporter_of(settings, inputs["validation"], checkpoint)
    model = removal.load(checkpoint, settings["compute"]["device"])
    base = (
        {**translator["train"], "vocabulary": model.config.vocab_size}
        if "train" in translator
        else None
    )
    checked = _checked_batch(model, reporter, settings)
    kept = read_json(Path(inputs["kept"]) / "removal.json")["kept"] if "kept" in inputs else None
    gated, progress = gate_run(
        model,
        parse_step(name),
        {**gates, "base": base, "longest": translator["longest"]},
        load(inputs["tokens"]),
        reporter,
        state,
        kept,
        halvings,
    )
    found = remove_heads(gated.model, gated.gates(), checked, checkpoint, outputs)
    write_json(outputs["record"] / "removal.json", found)
    write_record(outputs["record"], outputs["events"], progress, reporter, gated.names)


def _checked_batch(model, reporter: Reporter, settings: Mapping) -> dict[str, Tensor]:
    """A padded batch of held-out pairs to compare logits on, made before anything is trained."""
    pairs = encode_pairs(
        reporter.sources[:CHECKED],
        reporter.references[:CHECKED],
        reporter.tokenizer,
        reporter.how["longest"],
        _longest_key(settings),
    )
    return collate(pairs, range(pairs.pairs), model.config.pad_token_id, model.device)


def _longest_key(settings: Mapping) -> str:
    return f"translators.{next(iter(settings['translators']))}.longest"


def remove_heads(
    model, gates: Mapping[str, Tensor], batch: Mapping, tokenizer: str | Path, outputs: Mapping
) -> dict:
    """Write a gated model without its closed heads, and in stock shape; check both against it.

    Args:
        model: with its weights as trained, in evaluation mode.
        gates: by attention module.
        batch: held-out pairs to compare logits on.
        tokenizer: folder of its tokenizer.
        outputs: empty folders checkpoint and removed.

    Returns:
        heads kept, gates, sizes before and after, and the largest difference of a logit.

    Raises:
        RuntimeError: if what was written does not compute what the gated model does.
    """
    before = _sizes(model, "_before")
    smaller, stock = copy.deepcopy(model), copy.deepcopy(model)
    removal.remove(smaller, gates)
    removal.fold(stock, gates)
    differences = [removal.difference(model, gates, other, [batch]) for other in (smaller, stock)]
    if not max(differences) < TOLERANCE:
        raise RuntimeError(f"logits without the closed heads differ by {max(differences)}")
    save_translator(stock, tokenizer, outputs["checkpoint"])
    copy_tokenizer(tokenizer, outputs["removed"])
    kept = kept_heads(gates)
    removal.save(smaller, outputs["removed"], kept)
    return {
        "kept": kept,
        "gates": {name: values.tolist() for name, values in gates.items()},
        "open_heads": sum(map(len, kept.values())),
        "heads": sum(map(len, gates.values())),
        "largest_logit_difference": max(differences),
        **before,
        **_sizes(smaller, ""),
    }


def _sizes(model, suffix: str) -> dict[str, int]:
    tokens = min(FLOP_TOKENS, model.config.max_position_embeddings)
    return {
        f"parameters{suffix}": sum(
            tensor.numel()
            for name, tensor in model.named_parameters()
            if "embed_positions" not in name  # sinusoids, which are computed and never saved
        ),
        f"flops{suffix}": flops(model, tokens, tokens),
    }


def measure_roles(settings: Mapping, checkpoint: str, tokens: str, validation: str) -> list[dict]:
    """Return the roles of a translator's gated heads on the first validation sentences."""
    model = removal.load(checkpoint, settings["compute"]["device"])
    torch.set_num_threads(settings["compute"]["threads"])
    sources, targets = read_pairs(validation)
    most = settings["evaluation"]["translation"]["validation"]
    longest, words = _only(settings["translators"])["longest"], load_tokenizer(checkpoint)
    seen = load(tokens).source_ids.long()
    frequency_V = torch.bincount(seen, minlength=model.config.vocab_size)
    pairs = encode_pairs(sources[:most], targets[:most], words, longest, _longest_key(settings))
    pad = model.config.pad_token_id
    single = [collate(pairs, [index], pad, model.device) for index in range(pairs.pairs)]
    return roles(model, single, frequency_V, settings["gates"]["attentions"])


def translate_test(
    settings: Mapping, checkpoint: str, tokenizer: str, test: str, output: Path
) -> tuple[dict, list[dict]]:
    """Translate a test set with each beam size and score it.

    Args:
        settings: of the job.
        checkpoint: a translator, or what is left of one.
        tokenizer: folder of the translator's tokenizer.
        test: the test pairs.
        output: an empty folder for source, reference and translations, a sentence a line.

    Returns:
        scores by beam size, and BLEU's counts, a row a sentence and beam size.
    """
    torch.set_num_threads(settings["compute"]["threads"])
    wanted = settings["evaluation"]["translation"]
    how = how_to_translate(settings, wanted["batch_tokens"])
    model = removal.load(checkpoint, settings["compute"]["device"], settings["compute"]["dtype"])
    words, (sources, references) = load_tokenizer(tokenizer), read_pairs(test)
    case = (how["lowercase"], how["tokenize"])
    scores: dict = {"sentences": len(sources)}
    rows = []
    write_text(output / "source.txt", sources)
    write_text(output / "reference.txt", references)
    for beams in wanted["beams"]:
        found = translate(model, words, sources, beams, how["batch_tokens"], how["longest"])
        check_case(found, references, how["lowercase"], _key(settings), how["tokenize"])
        scores[f"beam{beams}"] = score(found, references, *case)
        write_text(output / f"beam{beams}.txt", found)
        for place, counts in enumerate(bleu_counts(found, references, *case)):
            named = zip(COUNTS, map(int, counts), strict=True)
            rows.append({"beams": beams, "sentence": place, **dict(named)})
    write_manifest(output)
    return scores, rows


def _key(settings: Mapping) -> str:
    return f"pairs.{next(iter(settings['pairs']))}"


def measure_latency(settings: Mapping, checkpoints: Sequence[str]) -> list[dict]:
    """Return how fast a translator and what is left of it generate, measured in turns."""
    wanted, compute = settings["evaluation"]["translation"]["latency"], settings["compute"]
    models = {
        Path(path).name: removal.load(path, compute["device"], compute["dtype"])
        for path in checkpoints
    }
    sizes = (wanted["batches"], wanted["source"], wanted["new_tokens"], wanted["runs"])
    return latency(models, *sizes, compute["threads"])
