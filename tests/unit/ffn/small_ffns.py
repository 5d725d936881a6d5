"""Small random models whose FFNs matter, and what the ffn study needs to know of them."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headroom.ffn.fusion import Layer
from headroom.ffn.gradients import channel_statistics
from headroom.ffn.layers import FFN
from headroom.ffn.observe import observe
from headroom.ffn.pipeline import prune_model, score_layers, select
from headroom.ffn.task import Source
from headroom.recipes import parse_step

VOCABULARY = 40
SETTINGS = {"ridge": 1e-3, "multiple": 1, "transport": {"mass": 0.8}}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def build(family="llama", layers=2, width=16, channels=24, dtype=torch.float64, seed=0, **more):
    """A model with random norms and biases, whose FFNs are half of what happens."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=64,
        **{"tie_word_embeddings": False} | more,
    )
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise * 1.5 / math.sqrt(tensor.shape[-1]))
    return model


def tokens(sequences=7, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


def random_ffn(width=16, channels=24, biases=False, seed=0, dtype=torch.float64):
    """A layer on its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return FFN(
        gate_nD=draw(channels, width) / 2,
        up_nD=draw(channels, width) / 2,
        down_Dn=draw(width, channels) / 2,
        gate_bias_n=draw(channels) if biases else None,
        up_bias_n=draw(channels) if biases else None,
        down_bias_D=draw(width) if biases else None,
        activation=torch.nn.functional.silu,
    )


def inputs(width=16, parts=(3, 2), length=20, seed=5, dtype=torch.float64):
    """What a layer reads, in batches of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for size in parts
    ]


def layer_of(ffn, ridge=1e-3, **more):
    return Layer(ffn, inputs(ffn.gate_nD.shape[1], **more), ridge)


def hidden_of(ffn, parts):
    """H of all tokens, in numpy."""
    return torch.cat([ffn.hidden(x).flatten(0, 1) for x in parts]).double().numpy()


def output_error(dense, small, parts):
    """‖Y − Y'‖ / ‖Y‖ over all tokens."""
    wanted, found = (torch.cat([f(x).flatten(0, 1) for x in parts]) for f in (dense, small))
    return float((wanted - found).norm() / wanted.norm())


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def rebuilt(config, state):
    """The stock model of a configuration and tensors; refuses missing and unexpected ones."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    model = model.to(next(iter(state.values())).dtype)
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def logits(model, seed=3):
    return model(tokens(seed=seed)).logits


def source_of(model, gradients=False, **settings):
    """What a pruning of a model reads; measured as the jobs do."""
    settings, state, config = SETTINGS | settings, state_of(model), model.config.to_dict()
    windows = tokens()
    return Source(
        model=model,
        tensors=state,
        config=config,
        activations=observe(model, state, config, windows, settings["ridge"], batch=3),
        gradients=channel_statistics(model, windows[:2]) if gradients else None,
        windows_NT=windows,
        heldout_NT=tokens(5, seed=2),
        settings=settings,
        batch=3,
    )


def pruned(source, *steps):
    return prune_model(source, [parse_step(step) for step in steps])


def selection(source, step):
    step = parse_step(step)
    return select(source, step, score_layers(source, step.score, int(step.resolved("seed")[1:])))


def child(source, one):
    """The stock model that a pruning makes."""
    return rebuilt(one.config, source.tensors | one.tensors)


def weight(layer, part, kind="weight"):
    return f"model.layers.{layer}.mlp.{part}_proj.{kind}"
