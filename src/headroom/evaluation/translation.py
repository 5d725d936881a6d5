"""Translations of an encoder-decoder and their BLEU and chrF, with intervals over sentences.

Shapes: N sentences, S seeds, R resamples; 10 counts a sentence (:data:`COUNTS`), which are all that
corpus BLEU needs, so that a bootstrap adds counts up and never reads a sentence twice.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from headroom.errors import InputError
from headroom.progress import progress
from headroom.statistics import Interval, interval, interval_over_seeds, resampled_sums

ORDERS = 4  # of n-grams
COUNTS = (
    *(f"correct_{order}" for order in range(1, ORDERS + 1)),
    *(f"total_{order}" for order in range(1, ORDERS + 1)),
    "hypothesis_length",
    "reference_length",
)
# Lower-cased German against its own cased reference has 25 BLEU, English, where little but a
# sentence's first letter is a capital, 90 (Multi30k); below 5 BLEU a broken model, which repeats
# a few frequent words, gains as much from lower-casing.
CASE_GAIN, CASE_FLOOR = 1.02, 5.0


def translate(
    model, tokenizer, sentences: Sequence[str], beams: int, batch_tokens: int, longest: int
) -> list[str]:
    """Translate with beam search, or greedily with one beam; what else its config says holds.

    Every sentence has the same limit, ``longest``: one that grew with the source would cut the
    words of a short number, and one of the batch would tie a translation to its neighbours. So a
    translation is a function of its sentence alone, up to rounding.

    Args:
        model: an encoder-decoder of transformers; its training mode, and the random state, are left
            as they were.
        tokenizer: the model's own; it ends a source as the model was trained on it.
        sentences: sources, any length order.
        batch_tokens: source tokens at once, padding and beams counted; a sentence that has more
            goes alone.
        longest: tokens a translation has at most, its end token included.

    Returns:
        A translation a sentence, on one line, in the order of the sentences.

    Raises:
        InputError: for a source without a token, or for tokens beyond the model's positions.
    """
    import torch

    sources = _encoded(model, tokenizer, sentences, longest)
    found, modes = [""] * len(sources), [(part, part.training) for part in model.modules()]
    batches = list(_batches([len(source) for source in sources], batch_tokens // beams))
    # Shown only where it takes long: looks in the midst of a training have its bar above them.
    shown = progress(batches, "translation", unit="batch", delay=5)
    model.eval()
    try:
        for places in shown:
            with torch.no_grad():  # inference tensors that a hook keeps could not be trained on
                tokens_BT = _generated(model, [sources[i] for i in places], beams, longest)
            texts = tokenizer.batch_decode(
                tokens_BT, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for place, text in zip(places, texts, strict=True):
                found[place] = " ".join(text.splitlines()).strip()
    finally:
        for part, mode in modes:
            part.training = mode
    return found


def _encoded(model, tokenizer, sentences: Sequence[str], longest: int) -> list[list[int]]:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"config key translators: longest is {longest} (allowed: at most {positions}, the "
            f"model's max_position_embeddings)"
        )
    if not sentences:
        return []
    # "</s>" inside a sentence is text, here as where a translator was trained.
    options = {"split_special_tokens": True, "verbose": False}
    sources = tokenizer(list(sentences), **options)["input_ids"]
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for number, source in enumerate(sources, start=1):
        if set(source) <= framing:
            raise InputError(
                f"config key pairs: source sentence {number} of {len(sources)} is empty (allowed: "
                f"at least one token)"
            )
        if positions is not None and len(source) > positions:
            raise InputError(
                f"config key pairs: source sentence {number} of {len(sources)} has {len(source)} "
                f"tokens (allowed: at most {positions}, the model's max_position_embeddings)"
            )
    return sources


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield places, the longest first, so that what does not fit is seen at once."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _generated(model, sources: Sequence[Sequence[int]], beams: int, longest: int):
    import torch

    lengths_B = torch.tensor([len(source) for source in sources])
    mask_BT = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
    tokens_BT = torch.full(mask_BT.shape, model.config.pad_token_id, dtype=torch.long)
    tokens_BT[mask_BT] = torch.tensor([token for source in sources for token in source])
    # max_length counts the start token. A limit by max_new_tokens would warn about the max_length
    # that published configs carry.
    return model.generate(
        input_ids=tokens_BT.to(model.device),
        attention_mask=mask_BT.long().to(model.device),
        num_beams=beams,
        num_return_sequences=1,
        do_sample=False,
        max_length=longest + 1,
        max_new_tokens=None,
        return_dict_in_generate=False,
    )


def score(
    hypotheses: Sequence[str], references: Sequence[str], lowercase: bool, tokenize: str = "13a"
) -> dict:
    """Return corpus BLEU and chrF of sacreBLEU with their signatures.

    Papineni et al. 2002; Popović 2015; Post 2018. Both 0 to 100, on words and characters.

    Args:
        lowercase: compare without case; the signatures say so.
        tokenize: of BLEU, as sacreBLEU names it.

    Returns:
        bleu, chrf, bleu_signature, chrf_signature, sentences, brevity_penalty and length_ratio
        (words of the hypotheses over those of the references).

    Raises:
        InputError: for no sentence, not one hypothesis a reference, or an unknown tokenizer.
    """
    from sacrebleu.metrics import CHRF

    _check_pairs(hypotheses, references)
    bleu_metric, chrf_metric = _bleu_metric(lowercase, tokenize), CHRF(lowercase=lowercase)
    found = bleu_metric.corpus_score(hypotheses, [references])
    return {
        "bleu": found.score,
        "chrf": chrf_metric.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu_metric.get_signature()),
        "chrf_signature": str(chrf_metric.get_signature()),
        "sentences": len(hypotheses),
        "brevity_penalty": found.bp,
        "length_ratio": found.ratio,
    }


def _check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise InputError(
            f"{len(hypotheses)} hypotheses for {len(references)} references (allowed: one a "
            f"reference, at least one)"
        )


def _bleu_metric(lowercase: bool, tokenize: str, **more):
    from sacrebleu.metrics import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        allowed = ", ".join(BLEU.TOKENIZERS)
        raise InputError(f"config key pairs: tokenize is {tokenize} (allowed: {allowed})")
    try:
        return BLEU(lowercase=lowercase, tokenize=tokenize, **more)
    except (ImportError, RuntimeError, OSError) as error:  # a package or a download is missing
        reason = " ".join(str(error).split())
        raise InputError(
            f"config key pairs: tokenize {tokenize} can't be used here: {reason} (allowed: what "
            f"sacreBLEU needs for it, or another such as 13a)"
        ) from error


def check_case(
    hypotheses: Sequence[str],
    references: Sequence[str],
    lowercase: bool,
    key: str,
    tokenize: str = "13a",
) -> None:
    """Refuse a cased score of lower-cased hypotheses, which is that of another task.

    They hold letters but no capital, the references hold capitals, and without case BLEU is above
    :data:`CASE_FLOOR` and higher by more than a factor :data:`CASE_GAIN`.

    Args:
        lowercase: of the score; without case there is nothing to refuse.
        key: of the pairs in the configuration, such as ``pairs.NAME``.

    Raises:
        InputError: naming the key.
    """
    _check_pairs(hypotheses, references)
    if lowercase or not " ".join(hypotheses).islower():
        return
    if not any(letter.isupper() for reference in references for letter in reference):
        return
    cased, uncased = (
        bleu(bleu_counts(hypotheses, references, lower, tokenize).sum(0)) for lower in (False, True)
    )
    if uncased >= CASE_FLOOR and uncased > CASE_GAIN * cased:
        raise InputError(
            f"config key {key}.lowercase: hypotheses are lower-cased, references are not: "
            f"{cased:.1f} BLEU, {uncased:.1f} without case (allowed: {key}.lowercase: true, or a "
            f"translator of cased text)"
        )


def bleu_counts(
    hypotheses: Sequence[str], references: Sequence[str], lowercase: bool, tokenize: str = "13a"
) -> np.ndarray:
    """Count for each sentence what corpus BLEU adds up, as sacreBLEU does.

    Returns:
        int64 (N, 10), columns as in :data:`COUNTS`; lengths in words.

    Raises:
        InputError: for no sentence, not one hypothesis a reference, or an unknown tokenizer.
    """
    _check_pairs(hypotheses, references)
    # The effective order changes a sentence's score, never its counts, and without it every
    # sentence would be warned about.
    metric = _bleu_metric(lowercase, tokenize, effective_order=True)
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found = metric.sentence_score(hypothesis, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, dtype=np.int64)


def bleu(sums_10: np.ndarray) -> float:
    """Return corpus BLEU, 0 to 100, of counts summed over sentences.

    BLEU = min(1, exp(1 − r/h)) · exp(¼ Σ_n ln p_n), p_n = correct_n / total_n in percent, h and r
    the lengths (Papineni et al. 2002), with sacreBLEU's exponential smoothing of a p_n of 0.
    """
    from sacrebleu.metrics import BLEU

    *ngrams, hypothesis, reference = map(int, sums_10)
    correct, total = ngrams[:ORDERS], ngrams[ORDERS:]
    return BLEU.compute_bleu(correct, total, hypothesis, reference, smooth_method="exp").score


def bleu_interval(counts_N10: np.ndarray, bootstrap: Mapping) -> Interval:
    """Percentile bootstrap of corpus BLEU over sentences (Koehn 2004).

    Args:
        counts_N10: of :func:`bleu_counts`.
        bootstrap: resamples, confidence and seed.

    Raises:
        InputError: with fewer than two sentences or resamples.
    """
    every = _resampled_bleu(np.asarray(counts_N10)[None], bootstrap)[:, 0]
    return interval(every[0], every[1:], bootstrap["confidence"])


def bleu_difference(
    first_SN10: np.ndarray, second_SN10: np.ndarray, bootstrap: Mapping
) -> Interval:
    """Bootstrap over sentences and seeds of what ``second`` has more, in BLEU.

    mean_s BLEU(second_s) − BLEU(first_s). A resample draws sentences and, independently, seeds with
    replacement, the same ones for both systems. One seed leaves only the sentences' spread. A
    bootstrap over S seeds holds (S − 1)/S of their variance, so that at three it is too narrow:
    read it with the signs of the single seeds (:func:`headroom.statistics.verdict`).

    Args:
        first_SN10, second_SN10: counts by seed and sentence; a system of one seed is held against
            each seed of the other.
        bootstrap: resamples, confidence and seed.

    Raises:
        InputError: with fewer than two sentences or resamples, or of different references.
    """
    first, second = np.asarray(first_SN10), np.asarray(second_SN10)
    lengths_N = first[0, :, -1]
    for counts_SN10 in (first, second):
        if any(not np.array_equal(counts_N10[:, -1], lengths_N) for counts_N10 in counts_SN10):
            raise InputError("translations can't be compared: scored on different references")
    seeds = max(len(first), len(second))
    if {len(first), len(second)} - {1, seeds}:
        raise ValueError(f"{len(first)} seeds against {len(second)}")
    # Both draw the sentences of bootstrap["seed"] and N, so row r is the same resample in both.
    every = _resampled_bleu(second, bootstrap) - _resampled_bleu(first, bootstrap)
    return interval_over_seeds(every, bootstrap["seed"], bootstrap["confidence"])


def _resampled_bleu(counts_SN10: np.ndarray, bootstrap: Mapping) -> np.ndarray:
    """BLEU (1 + R, S): of all sentences first, then of each resample."""
    seeds, sentences, width = counts_SN10.shape
    if sentences < 2:
        raise InputError(f"an interval needs at least 2 sentences (found {sentences})")
    columns = np.moveaxis(counts_SN10, 0, 1).reshape(sentences, seeds * width)
    resampled = resampled_sums(columns, bootstrap["resamples"], bootstrap["seed"])
    every = np.vstack([columns.sum(0), resampled]).reshape(-1, seeds, width)
    return np.array([[bleu(sums_10) for sums_10 in sums_S10] for sums_S10 in every])
