"""A batch that follows the gradient noise in a loop of your own; docs/accelerate.md explains it.

    python examples/accelerate_loop.py
    accelerate launch --config_file accelerate_configs/ddp_cpu.yaml examples/accelerate_loop.py

Then `hf-adaptive-batch report runs/loop` draws what happened.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaptive_batch import AdaptiveBatch
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from hf_adaptive_batch.corpus import load_text
from hf_adaptive_batch.packing import pack


def main(output_dir: str = "runs/loop", max_train_samples: int = 3000) -> None:
    torch.manual_seed(0)
    documents, _ = load_text("python-stdlib")
    blocks = pack(documents.select(range(100)), byte_tokenizer(), 128).with_format("torch")
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 192}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, optimizer = accelerator.prepare(model, optimizer)

    adaptive = AdaptiveBatch(
        accelerator,
        model,
        optimizer,
        DataLoader(blocks, batch_size=4, shuffle=True),  # the first micro-batch of each process
        max_train_samples=max_train_samples,
        max_global_batch_size=64,
        max_micro_batch_size=16,
        output_dir=output_dir,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - adaptive.progress)
    accelerator.register_for_checkpointing(adaptive, schedule)

    for step in adaptive:
        for batch in step:
            ids = batch["input_ids"].long()
            step.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if adaptive.run.clock.steps % 10 == 0:
            seen, size = adaptive.run.clock.samples_seen, adaptive.plan.global_batch_size
            accelerator.print(f"{seen:>6,} samples  loss {step.loss:.3f}  next batch {size}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
