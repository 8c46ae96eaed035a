"""DPO on UltraFeedback's prompts with answers by Llama-3-8B-Instruct itself: what SimPO is compared with.

Paper     Rafailov et al. 2023, arXiv:2305.18290, as Meng et al. 2024, arXiv:2405.14734, ran it; the latter's code,
          princeton-nlp/SimPO
Model     meta-llama/Meta-Llama-3-8B-Instruct
Data      hf:princeton-nlp/llama3-ultrafeedback
Hardware  8 × H100 in the paper; planned here for a v5e:8x16
Run       rljax run experiments/cards/dpo_ultrafeedback_llama3_8b.py
Expected  AlpacaEval 2: 40.3 length-controlled, 37.9 plain; Arena-Hard: 32.6. SimPO on the same pairs: 44.7, 40.5, 33.8;
          the model as it was: 26.0, 25.3, 22.3 (README of the code, "v0.1")
Settings  β = 0.01, AdamW 7e-7 (README of the code, "For DPO, the best hyperparameters", Llama3-Instruct), 128 pairs
          (there, "Hyperparameter tuning"); a warm-up over a tenth and a cosine, 1 epoch, 2,048 tokens, as for SimPO
          (training_configs/llama-3-8b-instruct-simpo.yaml) [unverified: the code has no configuration of DPO]
Differs   the code cuts a row at 2,048 tokens in all, a prompt at 1,800; here a prompt has at most 1,024 and an answer
          at most 1,024. One epoch is counted as 59,776 pairs [unverified].
Shape     batch 128, 1024 + 1024 tokens, microbatches 1, remat full, float32
Plan      rljax plan experiments/cards/dpo_ultrafeedback_llama3_8b.py --topology v5e:8x16
              meta-llama/Meta-Llama-3-8B-Instruct: 8.03 billion parameters on v5e:8x16, 128 devices (TPU v5e), mesh
                data=1 fsdp=128 tensor=1 context=1, microbatches=1
              update: fits, 8.88 GiB of 15.75 GiB free (56%)
              at best 922 ms, bound by compute (compute 922 ms, HBM 276 ms, ICI 479 ms)
"""

import functools

from rljax import losses, offline, train

experiment = offline.Preference(
    model="meta-llama/Meta-Llama-3-8B-Instruct",
    data="hf:princeton-nlp/llama3-ultrafeedback",
    loss=functools.partial(losses.dpo_loss, beta=0.01),
    learning_rate=7e-7,
    schedule=functools.partial(train.cosine, warmup=46),
    batch=128,
    steps=467,
    max_prompt=1024,
    max_completion=1024,
    eval_rows=512,
    eval_every=100,
    save_every=100,
    remat="full",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
