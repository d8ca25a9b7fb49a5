"""Pretrain a Llama whose batch size follows its gradient noise, on any number of processes.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml examples/pretrain_llama.py \
        --output_dir runs/llama --dataset my_text/ --max_train_tokens 100_000_000

The script, its flags and its logs are the same with every configuration of `accelerate_configs/`,
and those of `hf-adaptive-batch pretrain`, which this runs: `--help` lists them. To train a model of
your own, exchange the Trainer of your script instead (README, "Your own script").
"""

import sys

from hf_adaptive_batch.cli import main


if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
