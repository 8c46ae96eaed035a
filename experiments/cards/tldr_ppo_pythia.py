"""RLHF on TL;DR, last of three steps: PPO against the reward model.

Paper     Huang et al. 2024, arXiv:2403.17031 ("The N+ implementation details of RLHF with PPO"), section 7
Model     EleutherAI/pythia-2.8b-deduped after tldr_sft_pythia.py; critic and reward from tldr_reward_model_pythia.py
Data      hf:vwxyzjn/summarize_from_feedback_tldr_3_filtered
Sizes     --model EleutherAI/pythia-1b-deduped or EleutherAI/pythia-6.9b-deduped in the first step. The steps find each
          other under runs/: start every size in a folder of its own.
Hardware  8 × H100 in the paper; planned here for a v5p:2x4x4 (a v5e:4x8 is too small for the 512 rows in one piece:
          --microbatches)
Run       rljax run experiments/cards/tldr_ppo_pythia.py
Expected  GPT-3.5 prefers 6.9B's summaries to the authors' in about 80% of cases; 1B over-optimises the reward at a KL
          of 50 to 85 nats (section 7.1) [unverified: from a summary of the paper]
Settings  512 queries, 1,000,000 episodes (1,953 iterations), 4 epochs of one minibatch, AdamW with ε = 1e-5, 3e-6
          falling by a cosine, KL in the reward with β = 0.05, γ = 1, λ = 0.95, clips 0.2, value coefficient 0.1, T =
          0.7, score −1 without an end token, rewards whitened without their mean, biased variances, 53 tokens
          (ppo_left_padding_new.py, reference_output/ppo.txt)
Differs   advantages are whitened over the batch, which is the paper's minibatch. The mean of the reward: see the step
          before.
Shape     batch 512, 512 + 53 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/tldr_ppo_pythia.py --topology v5e:4x8 --model EleutherAI/pythia-2.8b-deduped
              EleutherAI/pythia-2.8b-deduped: 2.78 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: the reward preference reads the policy's tokens on the devices, if its tokenizer is theirs
              iteration (the longest case: every row is written to its last token): does not fit: needs 41.45 GiB of
                15.75 GiB, 25.70 GiB over; use more microbatches, --remat full, a smaller batch, or more devices on
                the fsdp or tensor axis
          rljax plan experiments/cards/tldr_ppo_pythia.py --topology v5p:2x4x4 --model EleutherAI/pythia-2.8b-deduped
              EleutherAI/pythia-2.8b-deduped: 2.78 billion parameters on v5p:2x4x4, 32 devices (TPU v5p), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: the reward preference reads the policy's tokens on the devices, if its tokenizer is theirs
              iteration (the longest case: every row is written to its last token): fits, 36.13 GiB of 95.74 GiB free
                (38%)
              at best 6.03 s, bound by HBM (compute 2.89 s, HBM 6.03 s, ICI 548 ms)
              note: a loop whose rounds data decide is counted once: jit(_whole)/while
          rljax plan experiments/cards/tldr_ppo_pythia.py --topology v5p:2x4x4 --model EleutherAI/pythia-1b-deduped
              EleutherAI/pythia-1b-deduped: 1.01 billion parameters on v5p:2x4x4, 32 devices (TPU v5p), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: the reward preference reads the policy's tokens on the devices, if its tokenizer is theirs
              iteration (the longest case: every row is written to its last token): fits, 74.58 GiB of 95.74 GiB free
                (78%)
              at best 2.02 s, bound by HBM (compute 938 ms, HBM 2.02 s, ICI 207 ms)
              note: a loop whose rounds data decide is counted once: jit(_whole)/while
          rljax plan experiments/cards/tldr_ppo_pythia.py --topology v5p:2x4x4 --model EleutherAI/pythia-6.9b-deduped
              EleutherAI/pythia-6.9b-deduped: 6.86 billion parameters on v5p:2x4x4, 32 devices (TPU v5p), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: the reward preference reads the policy's tokens on the devices, if its tokenizer is theirs
              iteration (the longest case: every row is written to its last token): fits, 16.60 GiB of 95.74 GiB free
                (17%)
              at best 10.3 s, bound by HBM (compute 7.3 s, HBM 10.3 s, ICI 3.6 s)
              note: a loop whose rounds data decide is counted once: jit(_whole)/while
"""

import functools

import _tldr

from rljax import presets, rewards, train

REWARD_MODEL = "runs/tldr_reward_model_pythia/export"

experiment = presets.ppo_huang2024(
    model="runs/tldr_sft_pythia/export",
    data=_tldr.queries,
    reward=rewards.from_checkpoint(REWARD_MODEL, name="preference"),
    critic=REWARD_MODEL,
    optimizer=functools.partial(train.adamw, eps=1e-5, weight_decay=0.01),
    schedule=train.cosine,
    whiten_rewards=True,
    whiten_ddof=0,
    batch=512,
    steps=1953,
    max_prompt=_tldr.QUERY,
    max_completion=53,
    eval_every=100,
    save_every=50,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
