"""Random models of several architectures, small enough to differentiate sample by sample."""

import torch
import transformers

COMMON = {"vocab_size": 40, "pad_token_id": 0}
LLAMA = COMMON | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama_tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", LLAMA | {"tie_word_embeddings": False}),
    "llama_biased": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA),
    "gpt2": ("GPT2", GPT2),  # Conv1D, learned positions, LayerNorm, tied
    "opt": (
        "OPT",
        COMMON
        | {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "dropout": 0.0,
        },
    ),
}


def small(name: str, dtype: torch.dtype = torch.float32):
    """A random model whose norms and biases are no ones and zeros."""
    family, options = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**options)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def samples(lengths=(7, 12, 5, 9), vocabulary: int = 40, seed: int = 1):
    """Random samples: tokens and the place of the first answer token; tokens recur."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        tokens = torch.randint(1, vocabulary // 2, (length,), generator=draw).tolist()
        answer = int(torch.randint(1, length - 1, (1,), generator=draw))
        found.append((tokens, answer))
    return found


def by_autograd(model, sample):
    """Gradients of one sample by autograd, alone and unpadded: {parameter: (p,)}."""
    tokens, answer = sample
    model.requires_grad_(True)
    logits = model(torch.tensor([tokens])).logits[0, answer - 1 : -1]  # transformers' is float32
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[answer:]))
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.requires_grad_(False)
    return loss.detach(), {
        name: torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
        for (name, p), g in zip(model.named_parameters(), found, strict=True)
        if name in names
    }
