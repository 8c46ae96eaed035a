"""Zephyr, second step: DPO on UltraFeedback.

Paper     Tunstall et al. 2023, arXiv:2310.16944; huggingface/alignment-handbook, recipes/zephyr-7b-beta
Model     mistralai/Mistral-7B-v0.1 after zephyr_sft.py
Data      hf:HuggingFaceH4/ultrafeedback_binarized
Hardware  16 × A100 in the paper [unverified]; planned here for a v5e:8x8
Run       rljax run experiments/cards/zephyr_dpo.py
Expected  MT-Bench 7.34, AlpacaEval 90.6% for Zephyr-7B-β (the paper's table 1) [unverified], which was trained with
          other settings; AlpacaEval 2: 15.1 length-controlled, 12.5 plain; Arena-Hard: 10.4 ("Mistral Base 7B DPO
          (Zephyr)" in the README of princeton-nlp/SimPO)
Settings  β = 0.01, AdamW 5e-7 with a warm-up over a tenth and a cosine, 1 epoch, 512 + 512 tokens
          (dpo/config_full.yaml: 8 × 2 pairs a device, 128 on 8 devices [unverified])
Differs   the recipe's 1,024 tokens are of a whole row, in which a prompt has at most 512; one epoch is counted as
          61,135 pairs [unverified]; what is evaluated on is set aside from the training split
Shape     batch 128, 512 + 512 tokens, microbatches 1, remat full, float32
Plan      rljax plan experiments/cards/zephyr_dpo.py --topology v5e:8x8 --model mistralai/Mistral-7B-v0.1
              mistralai/Mistral-7B-v0.1: 7.24 billion parameters on v5e:8x8, 64 devices (TPU v5e), mesh data=1 fsdp=64
                tensor=1 context=1, microbatches=1
              update: fits, 10.28 GiB of 15.75 GiB free (65%)
              at best 859 ms, bound by compute (compute 859 ms, HBM 223 ms, ICI 602 ms)
"""

import functools

from rljax import losses, offline, train

experiment = offline.Preference(
    model="runs/zephyr_sft/export",
    data="hf:HuggingFaceH4/ultrafeedback_binarized",
    split="train_prefs",
    loss=functools.partial(losses.dpo_loss, beta=0.01),
    learning_rate=5e-7,
    schedule=functools.partial(train.cosine, warmup=47),
    batch=128,
    steps=477,
    max_prompt=512,
    max_completion=512,
    eval_rows=512,
    eval_every=100,
    save_every=100,
    remat="full",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
