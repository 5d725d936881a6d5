"""A small random translation model whose heads all matter."""

import torch
from transformers import MarianConfig, MarianMTModel


def translator(d_model=32, layers=2, heads=4, ffn=48, vocabulary=61, seed=0) -> MarianMTModel:
    """A Marian in evaluation mode with random weights and biases; pad and start 0, end 1."""
    sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn}
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=d_model,
        max_position_embeddings=64,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in sizes.items()},
    )
    model = MarianMTModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed_positions" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.1 * noise if "norm.weight" in name else 0.3 * noise)
    return model


def batch(seed=0, lengths=((9, 7), (4, 5), (6, 2)), vocabulary=61) -> dict[str, torch.Tensor]:
    """Padded sentence pairs that end with the end of sentence; labels −100 where there is none."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(lengths), max(s for s, _ in lengths), dtype=torch.long)
    labels = torch.full((len(lengths), max(t for _, t in lengths)), -100)
    for row, (s, t) in enumerate(lengths):
        for into, length in ((source, s), (labels, t)):
            words = torch.randint(2, vocabulary, (length - 1,), generator=generator)
            into[row, :length] = torch.cat([words, torch.tensor([1])])
    return {"input_ids": source, "attention_mask": (source != 0).long(), "labels": labels}
