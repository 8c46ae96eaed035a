"""DPO on Anthropic's helpful and harmless dialogues.

Paper     Rafailov et al. 2023, arXiv:2305.18290, section 6.2, figure 3 and appendix B
Model     EleutherAI/pythia-2.8b after sft_hh_pythia_2p8b.py
Data      hf:Anthropic/hh-rlhf
Hardware  4 × A100 80 GB, 2.75 hours (README of the paper's code, in bfloat16); planned here for a v5e:4x4
Run       rljax run experiments/cards/dpo_hh_pythia_2p8b.py
Expected  GPT-4 prefers its answers to the data set's preferred ones; about as good as best of 128 samples of the SFT
          model (figure 3) [unverified]
Settings  β = 0.1, RMSprop, 1e-6 after 150 steps of warm-up, 64 pairs (appendix B), gradients clipped at 10, 1 epoch,
          256 + 256 tokens (config/config.yaml of the code, whose own rate is 5e-7)
Differs   the code cuts a row at 512 tokens in all; here a prompt has at most 256 and an answer at most 256. One epoch
          is counted as 160,800 rows [unverified].
Shape     batch 64, 256 + 256 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/dpo_hh_pythia_2p8b.py --topology v5e:4x4 --model EleutherAI/pythia-2.8b
              EleutherAI/pythia-2.8b: 2.78 billion parameters on v5e:4x4, 16 devices (TPU v5e), mesh data=1 fsdp=16
                tensor=1 context=1, microbatches=1
              update: fits, 6.31 GiB of 15.75 GiB free (40%)
              at best 259 ms, bound by compute (compute 259 ms, HBM 195 ms, ICI 199 ms)
"""

import functools

import optax

from rljax import losses, offline, train

experiment = offline.Preference(
    model="runs/sft_hh_pythia_2p8b/export",
    data="hf:Anthropic/hh-rlhf",
    loss=functools.partial(losses.dpo_loss, beta=0.1),
    optimizer=functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),  # as in torch
    learning_rate=1e-6,
    schedule=functools.partial(train.constant, warmup=150),
    clip_norm=10.0,
    batch=64,
    steps=2512,
    max_prompt=256,
    max_completion=256,
    eval_rows=256,
    eval_every=312,
    save_every=312,
    best="eval/rewards/accuracies",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
