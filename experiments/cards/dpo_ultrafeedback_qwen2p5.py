"""DPO on UltraFeedback with Qwen2.5-7B-Instruct.

Paper     Rafailov et al. 2023, arXiv:2305.18290, with the settings of Zephyr's recipe (Tunstall et al. 2023,
          arXiv:2310.16944; huggingface/alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml)
Model     Qwen/Qwen2.5-7B-Instruct
Data      hf:HuggingFaceH4/ultrafeedback_binarized
Hardware  planned for a v5e:8x8
Run       rljax run experiments/cards/dpo_ultrafeedback_qwen2p5.py
Expected  no score is published for this model with these settings: eval/rewards/accuracies tells, and zephyr_dpo.py is
          the run to compare with
Settings  β = 0.01, AdamW 5e-7 with a warm-up over a tenth and a cosine, 128 pairs, 1 epoch, 512 + 512 tokens (the
          recipe)
Differs   the recipe's 1,024 tokens are of a whole row, in which a prompt has at most 512; one epoch is counted as
          61,135 pairs [unverified]; what is evaluated on is set aside from the training split
Shape     batch 128, 512 + 512 tokens, microbatches 1, remat full, float32
Plan      rljax plan experiments/cards/dpo_ultrafeedback_qwen2p5.py --topology v5e:8x8
              Qwen/Qwen2.5-7B-Instruct: 7.62 billion parameters on v5e:8x8, 64 devices (TPU v5e), mesh data=1 fsdp=64
                tensor=1 context=1, microbatches=1
              update: fits, 8.18 GiB of 15.75 GiB free (52%)
              at best 862 ms, bound by ICI (compute 833 ms, HBM 295 ms, ICI 862 ms)
"""

import functools

from rljax import losses, offline, train

experiment = offline.Preference(
    model="Qwen/Qwen2.5-7B-Instruct",
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
