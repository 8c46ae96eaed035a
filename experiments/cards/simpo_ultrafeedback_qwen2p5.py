"""SimPO on UltraFeedback with Qwen2.5-7B-Instruct.

Paper     Meng et al. 2024, arXiv:2405.14734; its code, princeton-nlp/SimPO
Model     Qwen/Qwen2.5-7B-Instruct
Data      hf:HuggingFaceH4/ultrafeedback_binarized
Hardware  planned for a v5e:8x8
Run       rljax run experiments/cards/simpo_ultrafeedback_qwen2p5.py
Expected  no score is published for this model with these settings: eval/rewards/accuracies tells, and
          dpo_ultrafeedback_qwen2p5.py is the run to compare with; simpo_ultrafeedback_llama3_8b.py has published scores
Settings  β = 2, γ/β = 0.5, AdamW 6e-7 with a warm-up over a tenth and a cosine, 1 epoch: those of Llama3-Base on the
          same pairs (training_configs/llama-3-8b-base-simpo.yaml); 128 pairs (README of the code, "Hyperparameter
          tuning")
Differs   the model, for which the learning rate should be searched over 3e-7 to 1e-6, says the README; 512 + 512
          tokens, as in the DPO run; one epoch is counted as 61,135 pairs [unverified]; what is evaluated on is set
          aside from the training split
Shape     batch 128, 512 + 512 tokens, microbatches 1, remat full, float32
Plan      rljax plan experiments/cards/simpo_ultrafeedback_qwen2p5.py --topology v5e:8x8
              Qwen/Qwen2.5-7B-Instruct: 7.62 billion parameters on v5e:8x8, 64 devices (TPU v5e), mesh data=1 fsdp=64
                tensor=1 context=1, microbatches=1
              update: fits, 8.18 GiB of 15.75 GiB free (52%)
              at best 862 ms, bound by ICI (compute 833 ms, HBM 295 ms, ICI 862 ms)
"""

import functools

from rljax import losses, offline, train

BETA, RATIO = 2.0, 0.5

experiment = offline.Preference(
    model="Qwen/Qwen2.5-7B-Instruct",
    data="hf:HuggingFaceH4/ultrafeedback_binarized",
    split="train_prefs",
    loss=functools.partial(losses.simpo_loss, beta=BETA, gamma=BETA * RATIO),
    average=True,
    reference=False,
    learning_rate=6e-7,
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
