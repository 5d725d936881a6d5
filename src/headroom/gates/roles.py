"""What heads do, after Voita et al. 2019 (arXiv 1905.09418): positional, confident, rare tokens.

Shapes: H heads, T queries, S keys, d head size, V tokens of the vocabulary.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headroom.attention import attention_modules, tapped
from headroom.errors import InputError
from headroom.gates.gated import attention_kind, attention_layer
from headroom.progress import progress

if TYPE_CHECKING:
    from transformers import MarianMTModel

ATTENTIONS = ("encoder", "decoder", "cross")
POSITIONAL = 0.9  # share of queries from which a head counts as positional


@dataclass(frozen=True)
class _Sentence:
    """The tokens that one attention relates, and what is known of them."""

    causal: bool
    real_T: Tensor  # queries that are no end of sentence
    real_S: Tensor  # keys that are none
    rarest_S: Tensor | None  # keys as rare as the rarest; None where keys are no source tokens


@dataclass
class _Tally:
    """What the heads of one module did over the sentences so far."""

    offsets: dict[int, Counter] = field(default_factory=lambda: defaultdict(Counter))  # by head
    confidences: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    rare: Counter = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    real: int = 0


@torch.no_grad()
def roles(
    model: "MarianMTModel",
    pairs: Sequence[Mapping[str, Tensor]],
    frequency: Tensor,
    attentions: Sequence[str] = ("encoder",),
) -> list[dict]:
    """Measure the role of each head over some sentence pairs.

    ``offset`` is the most frequent distance of the key with the largest weight from the query
    (the nearer one of equally frequent ones), ``positional`` the share of all queries at that
    distance, ``positional_inside`` the share of those queries that have a token there (a head that
    looks one back has nowhere to look from the first token). ``confidence`` is the mean over
    queries of the largest weight, ``rare`` the share of queries with the largest weight on a source
    token as rare as the rarest of its sentence, ``rare_baseline`` that share for a key drawn
    evenly; in these three the end of sentence counts neither as a query nor as a key.

    Args:
        model: in evaluation mode.
        pairs: single sentences without padding: input_ids (1, S), labels (1, T).
        frequency: (V,) how often each token occurs in training text.
        attentions: some of encoder, decoder (self attention) and cross.

    Returns:
        For each head: attention, layer and head (from 1), offset, positional, positional_inside and
        is_positional (at least 0.9 of all queries), confidence, rare, rare_baseline. The first four
        are None of cross attention, the last two of decoder self attention, whose keys are no
        source tokens.

    Raises:
        InputError: for another attention, or without a sentence that holds a token.
    """
    if unknown := set(attentions) - set(ATTENTIONS):
        raise InputError(f"attention {min(unknown)!r} (allowed: {', '.join(ATTENTIONS)})")
    places = {
        module: (attention_kind(name), attention_layer(name))
        for name, module in attention_modules(model)
    }
    wanted = {module: at for module, at in places.items() if at[0] in attentions}
    tallies = _observe(model, pairs, frequency, wanted)
    if not all(tally.real for tally in tallies.values()):
        raise InputError("there is no sentence with a token to measure the roles of heads on")
    return [
        {"attention": attention, "layer": layer, "head": head + 1, **_row(tally, head, attention)}
        for module, (attention, layer) in wanted.items()
        for tally in [tallies[module]]
        for head in range(len(tally.offsets))
    ]


def _observe(model, pairs, frequency: Tensor, wanted: Mapping) -> dict[nn.Module, _Tally]:
    """Show each pair to the model and tally what the wanted modules attend to."""
    tallies = {module: _Tally() for module in wanted}
    for pair in progress(pairs, "roles of heads", unit="sentence"):
        source_S, target_T = pair["input_ids"][0], _decoder_inputs(model, pair["labels"][0])
        sentences = _sentences(model, source_S, target_T, frequency.to(source_S.device))

        def look(module, q_BHTd, k_BHSd, v_BHSd, z_BTHd, sentences=sentences):
            if module in wanted:
                scores_HTS = (q_BHTd[0] @ k_BHSd[0].mT).float() * module.scaling
                _count(tallies[module], scores_HTS, sentences[wanted[module][0]])

        with tapped(model, look):
            model(input_ids=source_S[None], decoder_input_ids=target_T[None], use_cache=False)
    return tallies


def _decoder_inputs(model: "MarianMTModel", labels_T: Tensor) -> Tensor:
    start = labels_T.new_tensor([model.config.decoder_start_token_id])
    return torch.cat([start, labels_T[:-1]])


def _sentences(model, source_S: Tensor, target_T: Tensor, frequency_V: Tensor) -> dict:
    """Return what each kind of attention relates in one pair."""
    ends = torch.tensor(model.config.eos_token_id, device=source_S.device)
    real_S, real_T = ~torch.isin(source_S, ends), ~torch.isin(target_T, ends)
    often_S = frequency_V[source_S].double().masked_fill(~real_S, math.inf)
    rarest_S = real_S & (often_S == often_S.min())
    return {
        "encoder": _Sentence(False, real_S, real_S, rarest_S),
        "decoder": _Sentence(True, real_T, real_T, None),
        "cross": _Sentence(False, real_T, real_S, rarest_S),
    }


def _count(tally: _Tally, scores_HTS: Tensor, sentence: _Sentence) -> None:
    """Add one sentence to the tally of a module."""
    if sentence.causal:
        later = torch.ones_like(scores_HTS[0], dtype=torch.bool).triu(1)
        scores_HTS = scores_HTS.masked_fill(later, -math.inf)
    weights_HTS = scores_HTS.softmax(-1)
    heads, queries, _ = weights_HTS.shape
    tally.lengths.append(queries)
    steps = torch.arange(queries, device=weights_HTS.device)
    for head, offsets in enumerate((weights_HTS.argmax(-1) - steps).tolist()):
        tally.offsets[head].update(offsets)
    if not bool(sentence.real_T.any() and sentence.real_S.any()):
        return
    real_HTS = weights_HTS[:, sentence.real_T][:, :, sentence.real_S]
    tally.real += real_HTS.shape[1]
    largest_HT, key_HT = real_HTS.max(-1)
    for head in range(heads):
        tally.confidences[head].append(float(largest_HT[head].double().sum()))
    if sentence.rarest_S is not None:
        rarest_S = sentence.rarest_S[sentence.real_S]
        tally.chances.append(real_HTS.shape[1] * float(rarest_S.double().mean()))
        for head, hits in enumerate(rarest_S[key_HT].sum(-1).tolist()):
            tally.rare[head] += hits


def _row(tally: _Tally, head: int, attention: str) -> dict:
    """Return the roles of one head; sums are exact, so that the order of sentences is no matter."""
    row = dict.fromkeys(("offset", "positional", "positional_inside", "is_positional"))
    if attention != "cross":
        counts = tally.offsets[head]
        offset = min(counts, key=lambda step: (-counts[step], abs(step), step))
        inside = sum(max(0, length - abs(offset)) for length in tally.lengths)
        share = counts[offset] / sum(tally.lengths)
        row = {
            "offset": offset,
            "positional": share,
            "positional_inside": counts[offset] / inside,
            "is_positional": share >= POSITIONAL,
        }
    source = attention != "decoder"
    return {
        **row,
        "confidence": math.fsum(tally.confidences[head]) / tally.real,
        "rare": tally.rare[head] / tally.real if source else None,
        "rare_baseline": math.fsum(tally.chances) / tally.real if source else None,
    }
