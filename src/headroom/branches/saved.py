"""Runs on disk: one at ratio 0 is a stock Llama, the others are loaded here alone."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file, save_file

from headroom.branches.model import EPSILON, INITIAL, Stack
from headroom.branches.rope import BRANCH, pair_kinds
from headroom.branches.runs import Rotation
from headroom.checkpoints import POSITIONS, check_manifest, read_config, write_json
from headroom.errors import InputError

WEIGHTS = "model.safetensors"
MODEL_TYPE = "headroom_branches"  # unknown to transformers, which would turn its pairs otherwise
OWN = "headroom_branches"  # key of config.json: rotation and mask


def save_run(stack: Stack, k: int, folder: Path, head: Mapping[str, int | None]) -> None:
    """Write a member's weights and configuration.

    Where no pair turns with the branch coordinate it is a stock ``LlamaForCausalLM``, which gives
    the same logits for one branch.

    Args:
        stack: trained.
        k: which member.
        folder: an existing folder.
        head: numbers of special tokens under a configuration's names, such as ``bos_token_id``.
    """
    rotation, sizes = stack.rotations[k], stack.sizes
    own = {field.name: getattr(rotation, field.name) for field in fields(Rotation)}
    kinds = pair_kinds(stack.head_size, rotation.ratio, rotation.coordinate, rotation.band)
    stock = not bool((kinds == BRANCH).any())
    config = {
        "model_type": "llama" if stock else MODEL_TYPE,
        "architectures": ["LlamaForCausalLM" if stock else "Stack"],
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": stack.ffn,
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": stack.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "initializer_range": INITIAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["theta"]},
        "max_position_embeddings": sizes.get("positions", POSITIONS),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        OWN: {"rotation": own, "mask": stack.mask},
        **head,
    }
    tensors = {name: tensor.float().cpu() for name, tensor in stack.member(k).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def load_stack(folders: Sequence[Path]) -> Stack:
    """Return saved runs as one stack, on the CPU.

    Args:
        folders: of :func:`save_run`; runs of one size and mask.

    Raises:
        InputError: if there is none, one is no such run, or sizes or masks differ.
    """
    if not folders:
        raise InputError("a stack of no runs (allowed: at least one folder of a trained run)")
    found = [_facts(Path(folder)) for folder in folders]
    sizes, _, mask = found[0]
    for folder, (other, _, other_mask) in zip(folders, found, strict=True):
        if (other, other_mask) != (sizes, mask):
            raise InputError(
                f"run {folder} is of other sizes or mask than {folders[0]} (allowed: runs of one "
                f"architecture and mask)"
            )
    stack = Stack(sizes, [rotation for _, rotation, _ in found], mask)
    for k, folder in enumerate(folders):
        stack.load_member(k, load_file(Path(folder) / WEIGHTS))
    return stack


def _facts(folder: Path) -> tuple[dict, Rotation, str]:
    """Return sizes, rotation and mask of a saved run."""
    check_manifest(folder)
    config = read_config(folder)
    if OWN not in config or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} is no trained run (allowed: a run of a stack of this study)")
    sizes = {
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "layers": config["num_hidden_layers"],
        "theta": config["rope_parameters"]["rope_theta"],
        "positions": config["max_position_embeddings"],
    }
    return sizes, Rotation(**config[OWN]["rotation"]), config[OWN]["mask"]
