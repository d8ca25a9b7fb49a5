"""The Llama that `hf-adaptive-batch pretrain` trains: whole on every process, or in shards."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainingArguments
from transformers.distributed import DistributedConfig

from .pretrain_arguments import ModelArguments


def build_model(
    model_args: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> LlamaForCausalLM:
    """Make the model, with random weights that the seed decides, however it is sharded.

    Args:
        model_args: Its sizes, and how it is sharded as it is loaded.
        args: Of the Trainer.
        tokenizer: Decides the vocabulary.
        block_size: Longest sequence, in tokens.

    Returns:
        The model.

    Raises:
        ValueError: If there are not as many processes as it is to be sharded over, or transformers
            is too old for it.
    """
    groups = model_args.num_key_value_heads
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model_args.hidden_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        num_key_value_heads=model_args.num_attention_heads if groups is None else groups,
        intermediate_size=model_args.intermediate_size,
        rms_norm_eps=model_args.rms_norm_eps,
        tie_word_embeddings=model_args.tie_word_embeddings,
        max_position_embeddings=block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sizes = _mesh(model_args)
    processes = math.prod(sizes.values())
    if processes == 1:
        return LlamaForCausalLM(config)
    if processes != args.world_size:
        given = " x ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(
            f"{given} must be the number of processes ({args.world_size}), because each holds a "
            "part of the model; change one, or --num_processes of accelerate launch."
        )
    if not hasattr(LlamaForCausalLM, "is_distributed_loading_by_transformers"):
        raise ValueError(
            f"transformers ({transformers.__version__}) must be 5.23 or newer, because older ones "
            "do not train a model that was loaded in shards; upgrade, or let accelerate shard it "
            "(accelerate_configs/fsdp2.yaml)."
        )
    return _loaded_in_shards(config, DistributedConfig(**sizes), args)


def _mesh(model_args: ModelArguments) -> dict[str, int]:
    """By the flags; or, for tensor parallelism, by the mesh that the launcher describes."""
    names = ("dp_replicate_size", "fsdp_size", "tp_size")
    sizes = {name: getattr(model_args, name) for name in names}
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return sizes
    mesh = ParallelismConfig()
    if mesh.tp_size == 1:
        return sizes
    if mesh.dp_replicate_size > 1:
        raise ValueError(
            f"parallelism_config_dp_replicate_size ({mesh.dp_replicate_size}) must be 1 with "
            f"parallelism_config_tp_size ({mesh.tp_size}), because transformers' Trainer counts "
            "replicas twice there; leave parallelism_config out, and pass --dp_replicate_size, "
            "--fsdp_size and --tp_size."
        )
    launched = {**sizes, "fsdp_size": mesh.dp_shard_size, "tp_size": mesh.tp_size}
    if any(size > 1 for size in sizes.values()) and sizes != launched:
        raise ValueError(
            f"--fsdp_size ({sizes['fsdp_size']}) and --tp_size ({sizes['tp_size']}) must be those "
            f"of the launcher's parallelism_config ({mesh.dp_shard_size} and {mesh.tp_size}), "
            "because both say how the model is sharded; give one."
        )
    return launched


def _loaded_in_shards(
    config: LlamaConfig, sharding: DistributedConfig, args: TrainingArguments
) -> LlamaForCausalLM:
    """Only what was saved can be loaded in shards: the first process makes it and saves it."""
    folder = Path(str(args.output_dir)) / ".initial_model"
    try:
        if args.process_index == 0:
            LlamaForCausalLM(config).save_pretrained(folder)
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(folder, distributed_config=sharding)
        dist.barrier()
    finally:
        if args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return model
