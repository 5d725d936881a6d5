"""Continuations of prompts by a causal language model, in batches padded on the left."""

from collections.abc import Sequence


def continuations(
    model, prompts: Sequence[Sequence[int]], longest: int, ends: Sequence[int], processors=()
) -> list[list[int]]:
    """Return the tokens after each prompt, greedy unless a processor of logits adds noise.

    The configuration is one of its own: the model's may sample, with the global random state.

    Args:
        model: in evaluation mode.
        prompts: token numbers.
        longest: most tokens of a continuation.
        ends: tokens that end one; the first one pads.
        processors: of logits, as transformers takes them.
    """
    import torch
    from transformers import GenerationConfig

    width, pad = max(map(len, prompts)), ends[0] if ends else 0
    tokens_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=longest,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
    )
    with torch.inference_mode():
        made_BT = model.generate(
            tokens_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            logits_processor=list(processors),
        )
    return made_BT[:, width:].tolist()


def end_tokens(model, tokenizer) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's and those that the model stops at."""
    named = model.generation_config.eos_token_id
    named = model.config.eos_token_id if named is None else named
    named = list(named) if isinstance(named, list | tuple) else [named]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})
