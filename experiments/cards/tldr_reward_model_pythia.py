"""RLHF on TL;DR, second of three steps: a reward model on people's comparisons.

Paper     Huang et al. 2024, arXiv:2403.17031 ("The N+ implementation details of RLHF with PPO"), section 6
Model     EleutherAI/pythia-2.8b-deduped after tldr_sft_pythia.py
Data      hf:openai/summarize_from_feedback:comparisons
Sizes     --model EleutherAI/pythia-1b-deduped or EleutherAI/pythia-6.9b-deduped in the first step. The steps find each
          other under runs/: start every size in a folder of its own.
Hardware  8 × H100 in the paper; planned here for a v5e:4x8
Run       rljax run experiments/cards/tldr_reward_model_pythia.py
Then      rljax export runs/tldr_reward_model_pythia runs/tldr_reward_model_pythia/export, and tldr_ppo_pythia.py
Expected  accuracy on the validation split: 0.628 with 1B, 0.669 with 2.8B, 0.689 with 6.9B (section 6.1) [unverified:
          from a summary of the paper]
Settings  AdamW, ε = 1e-5, 3e-6 falling by a cosine (sbatches/reward.sbatch), 64 pairs, 1 epoch of 92,832 pairs (1,450
          updates; reference_output/reward.txt), queries of 512 tokens, summaries of 169 (tldr_dataset.py)
Differs   scores are brought to mean 0 and standard deviation 1 on samples of the SFT model (arXiv:1909.08593), where
          the paper subtracts the mean on the authors' summaries; accuracy is of pairs set aside from the training split
Shape     batch 64, 512 + 169 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/tldr_reward_model_pythia.py --topology v5e:4x8 --model
              EleutherAI/pythia-2.8b-deduped
              EleutherAI/pythia-2.8b-deduped: 2.78 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              update: fits, 8.22 GiB of 15.75 GiB free (52%)
              at best 222 ms, bound by compute (compute 222 ms, HBM 131 ms, ICI 168 ms)
          rljax plan experiments/cards/tldr_reward_model_pythia.py --topology v5e:4x8 --model
              EleutherAI/pythia-1b-deduped
              EleutherAI/pythia-1b-deduped: 1.01 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              update: fits, 13.17 GiB of 15.75 GiB free (84%)
              at best 72.1 ms, bound by compute (compute 72.1 ms, HBM 25.5 ms, ICI 59.8 ms)
          rljax plan experiments/cards/tldr_reward_model_pythia.py --topology v5e:4x8 --model
              EleutherAI/pythia-6.9b-deduped
              EleutherAI/pythia-6.9b-deduped: 6.86 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              update: fits, 3.92 GiB of 15.75 GiB free (25%)
              at best 556 ms, bound by compute (compute 556 ms, HBM 361 ms, ICI 411 ms)
"""

import functools

import _tldr

from rljax import offline, train

experiment = offline.RewardModel(
    model="runs/tldr_sft_pythia/export",
    data=_tldr.comparisons,
    optimizer=functools.partial(train.adamw, eps=1e-5, weight_decay=0.01),
    learning_rate=3e-6,
    schedule=train.cosine,
    clip_norm=None,
    normalize=256,
    batch=64,
    steps=1450,
    max_prompt=_tldr.QUERY,
    max_completion=169,
    eval_rows=1024,
    eval_every=145,
    save_every=145,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
