"""DPO on comparisons of summaries (TL;DR).

Paper     Rafailov et al. 2023, arXiv:2305.18290, section 6.2, figure 2 (right) and appendix B
Model     EleutherAI/pythia-2.8b-deduped after tldr_sft_pythia.py (GPT-J in the paper)
Data      hf:openai/summarize_from_feedback:comparisons
Hardware  planned for a v5e:4x4
Run       rljax run experiments/cards/dpo_tldr_pythia_2p8b.py
Expected  with GPT-J, GPT-4 prefers it to the authors' summaries in about 61% of cases at temperature 0, PPO in 57%
          (figure 2) [unverified]; none is published for Pythia-2.8B
Settings  β = 0.5 for TL;DR, RMSprop, 1e-6 after 150 steps of warm-up, 64 pairs (appendix B), gradients clipped at 10
          (config/config.yaml of the code); queries of 512 and summaries of 169 tokens as in arXiv:2403.17031
Differs   the model, and with it the SFT model: the paper takes one that was published for TL;DR
Shape     batch 64, 512 + 169 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/dpo_tldr_pythia_2p8b.py --topology v5e:4x4 --model EleutherAI/pythia-2.8b-deduped
              EleutherAI/pythia-2.8b-deduped: 2.78 billion parameters on v5e:4x4, 16 devices (TPU v5e), mesh data=1
                fsdp=16 tensor=1 context=1, microbatches=1
              update: fits, 6.01 GiB of 15.75 GiB free (38%)
              at best 294 ms, bound by HBM (compute 288 ms, HBM 294 ms, ICI 276 ms)
"""

import functools

import _tldr
import optax

from rljax import losses, offline, train

experiment = offline.Preference(
    model="runs/tldr_sft_pythia/export",
    data=_tldr.comparisons,
    loss=functools.partial(losses.dpo_loss, beta=0.5),
    optimizer=functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),  # as in torch
    learning_rate=1e-6,
    schedule=functools.partial(train.constant, warmup=150),
    clip_norm=10.0,
    batch=64,
    steps=1450,
    max_prompt=_tldr.QUERY,
    max_completion=169,
    eval_rows=256,
    eval_every=145,
    save_every=145,
    best="eval/rewards/accuracies",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
