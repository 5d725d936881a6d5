"""What is seen of a run while it trains: quality on held-out sentences, translations, gates."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headroom.checkpoints import write_manifest
from headroom.evaluation.translation import score, translate
from headroom.gates.gated import Gated, attention_kind, attention_layer

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from headroom.corpora.pair_tokens import Batches
    from headroom.training import Progress

LOG_EVERY = 10  # steps between two notes of the gates


class Reporter:
    """Translates the same held-out sentences again and again while a model trains."""

    def __init__(self, tokenizer, sources: Sequence[str], references: Sequence[str], how: Mapping):
        """Keep the sentences.

        Args:
            tokenizer: the model's.
            sources, references: validation sentences.
            how: ``lowercase``, ``tokenize`` (of BLEU), ``batch_tokens``, ``longest``.
        """
        self.tokenizer, self.how = tokenizer, how
        self.sources, self.references = list(sources), list(references)

    def watch(
        self, model: "nn.Module", batches: "Batches", every: int, steps: int
    ) -> Callable[[int], dict | None]:
        """Return what to note after a step: gates often, translations every ``every`` steps."""

        def look(step: int) -> dict | None:
            full = step % every == 0 or step == steps
            gated = isinstance(model, Gated)
            if not full and not (gated and step % LOG_EVERY == 0):
                return None
            row: dict = {"epoch": batches.epoch(step)}
            if gated:
                row["log_a"] = [values.detach().tolist() for values in model.log_a]
                row["p_open"] = [values.detach().tolist() for values in model.p_open()]
                row["gate"] = [values.tolist() for values in model.gates().values()]
            return row | self._quality(model) if full else row

        return look

    def _quality(self, model: "nn.Module") -> dict:
        if isinstance(model, Gated):
            with model.judged() as judged:
                hypotheses = self._translated(judged)
        else:
            hypotheses = self._translated(model)
        found = score(hypotheses, self.references, self.how["lowercase"], self.how["tokenize"])
        return {"bleu": found["bleu"], "chrf": found["chrf"], "translations": hypotheses}

    def _translated(self, model: "nn.Module") -> list[str]:
        return translate(
            model, self.tokenizer, self.sources, 1, self.how["batch_tokens"], self.how["longest"]
        )


def gate_table(names: Sequence[str], notes: Sequence[Mapping]) -> "pd.DataFrame":
    """Return one row a head of every note; ``full`` where translations were made at that step.

    Columns: step, epoch, full, attention, layer, head (both from 1), log_a, p_open, gate.
    """
    import pandas as pd

    rows = []
    for note in notes:
        for place, name in enumerate(names):
            for head, values in enumerate(
                zip(note["log_a"][place], note["p_open"][place], note["gate"][place], strict=True)
            ):
                rows.append(
                    (
                        note["step"],
                        note["epoch"],
                        "bleu" in note,
                        attention_kind(name),
                        attention_layer(name),
                        head + 1,
                        *values,
                    )
                )
    columns = ["step", "epoch", "full", "attention", "layer", "head", "log_a", "p_open", "gate"]
    return pd.DataFrame(rows, columns=columns)


def write_record(
    folder: Path,
    events: Path,
    progress: "Progress",
    reporter: Reporter,
    names: Sequence[str] = (),
) -> None:
    """Write what a training left: log, reports, translations, gates, and TensorBoard's events.

    Args:
        folder: where they go; what lies there enters the manifest too.
        events: an empty one, for TensorBoard.
        progress: what :func:`headroom.training.train` returned.
        reporter: whose sentences were translated.
        names: gated attention modules.
    """
    full = [note for note in progress.notes if "bleu" in note]
    _write_lines(folder / "log.jsonl", [_flat(line) for line in progress.log])
    _write_lines(folder / "reports.jsonl", [_report(note, len(reporter.sources)) for note in full])
    translations = folder / "translations"
    translations.mkdir()
    write_text(translations / "source.txt", reporter.sources)
    write_text(translations / "target.txt", reporter.references)
    for note in full:
        name = f"step_{note['step']:06d}_epoch_{note['epoch']:.2f}.txt"
        write_text(translations / name, note["translations"])
    if names:
        gate_table(names, progress.notes).to_parquet(folder / "gates.parquet", index=False)
    _write_events(events, progress, full)
    write_manifest(folder)


def _flat(line: Mapping) -> dict:
    """A line of the log with the names that figures show; the second group is the gates."""
    flat = {name: value for name, value in line.items() if name != "learning_rates"}
    flat["loss"] = flat.pop("cross_entropy", flat["loss"])
    if "penalty" in flat and len(line["learning_rates"]) > 1:
        flat["gate_learning_rate"] = line["learning_rates"][1]
    return flat


def _report(note: Mapping, sentences: int) -> dict:
    found = {name: note[name] for name in ("step", "epoch", "bleu", "chrf")}
    found["sentences"] = sentences
    if "gate" in note:
        gates = [value for values in note["gate"] for value in values]
        found |= {"open_heads": sum(value > 0 for value in gates), "heads": len(gates)}
    return found


def _write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def write_text(path: Path, lines: Sequence[str]) -> None:
    """Write sentences, one a line."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _write_events(folder: Path, progress: "Progress", full: Sequence[Mapping]) -> None:
    """Write scalars as TensorBoard events; they hold the time, so no rule reads them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for row in map(_flat, progress.log):
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, row["step"])
        for row in full:
            for name in ("bleu", "chrf"):
                writer.add_scalar(f"validation/{name}", row[name], row["step"])
        for row in progress.notes:
            for place, values in enumerate(row.get("p_open", ())):
                mean = sum(values) / len(values)
                writer.add_scalar(f"p_open/attention_{place + 1}", mean, row["step"])
