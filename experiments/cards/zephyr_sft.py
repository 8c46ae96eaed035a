"""Zephyr, first step: Mistral-7B learns to chat from UltraChat.

Paper     Tunstall et al. 2023, arXiv:2310.16944; huggingface/alignment-handbook, recipes/zephyr-7b-beta
Model     mistralai/Mistral-7B-v0.1 with Zephyr's chat template, which zephyr_template.py gives it
Data      hf:HuggingFaceH4/ultrachat_200k
Hardware  planned for a v5e:8x8
Run       rljax run experiments/cards/zephyr_template.py && rljax run experiments/cards/zephyr_sft.py
Then      rljax export runs/zephyr_sft runs/zephyr_sft/export, and zephyr_dpo.py
Expected  AlpacaEval 2: 8.4 length-controlled, 6.2 plain; Arena-Hard: 1.3 (alignment-handbook/zephyr-7b-sft-full in the
          README of princeton-nlp/SimPO)
Settings  AdamW 2e-5 with a warm-up over a tenth and a cosine, 128 rows of 2,048 tokens, 1 epoch (sft/config_full.yaml,
          on 8 devices [unverified])
Differs   dialogues are packed into rows, in which attention does not cross from one to the next, and only the
          assistant's turns are trained. One epoch is counted as 1,090 steps [unverified].
Shape     batch 128, 1024 + 1024 tokens, microbatches 1, remat full, float32
Plan      rljax plan experiments/cards/zephyr_sft.py --topology v5e:8x8 --model mistralai/Mistral-7B-v0.1
              mistralai/Mistral-7B-v0.1: 7.24 billion parameters on v5e:8x8, 64 devices (TPU v5e), mesh data=1 fsdp=64
                tensor=1 context=1, microbatches=1
              update: fits, 10.68 GiB of 15.75 GiB free (68%)
              at best 1.18 s, bound by compute (compute 1.18 s, HBM 296 ms, ICI 601 ms)
"""

import functools

from rljax import offline, train

experiment = offline.SFT(
    model="runs/zephyr_template/model",
    data="hf:HuggingFaceH4/ultrachat_200k",
    split="train_sft",
    packing=True,
    learning_rate=2e-5,
    schedule=functools.partial(train.cosine, warmup=109),
    batch=128,
    steps=1090,
    max_prompt=1024,
    max_completion=1024,  # rows of 2,048 tokens
    eval_rows=512,
    eval_every=109,
    save_every=109,
    remat="full",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
