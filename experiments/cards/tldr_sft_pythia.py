"""RLHF on TL;DR, first of three steps: summaries by the posts' authors.

Paper     Huang et al. 2024, arXiv:2403.17031 ("The N+ implementation details of RLHF with PPO"), sections 3 to 5; its
          code, vwxyzjn/summarize_from_feedback_details
Model     EleutherAI/pythia-2.8b-deduped
Data      hf:vwxyzjn/summarize_from_feedback_tldr_3_filtered
Sizes     --model EleutherAI/pythia-1b-deduped or EleutherAI/pythia-6.9b-deduped in the first step. The steps find each
          other under runs/: start every size in a folder of its own.
Hardware  8 × H100 in the paper; planned here for a v5e:4x8
Run       rljax run experiments/cards/tldr_sft_pythia.py
Then      rljax export runs/tldr_sft_pythia runs/tldr_sft_pythia/export, and tldr_reward_model_pythia.py
Expected  ROUGE rises with the size (section 5.1); no figure could be checked
Settings  AdamW, ε = 1e-5, 3e-6 falling by a cosine, 128 rows, 1 epoch of 116,722 rows (911 updates), no dropout; the
          loss is on query and summary (sft.py, reference_output/sft.txt); queries of 512 tokens, summaries of 53
          (tldr_dataset.py). Weight decay 0.01, torch's default for AdamW.
Shape     batch 128, 512 + 53 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/tldr_sft_pythia.py --topology v5e:4x8
              EleutherAI/pythia-2.8b-deduped: 2.78 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: every token of a row may be trained, as in texts and chats; where rows have prompts fewer are
              update: fits, 8.24 GiB of 15.75 GiB free (52%)
              at best 196 ms, bound by ICI (compute 195 ms, HBM 69 ms, ICI 196 ms)
          rljax plan experiments/cards/tldr_sft_pythia.py --topology v5e:4x8 --model EleutherAI/pythia-1b-deduped
              EleutherAI/pythia-1b-deduped: 1.01 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: every token of a row may be trained, as in texts and chats; where rows have prompts fewer are
              update: fits, 12.26 GiB of 15.75 GiB free (78%)
              at best 81.8 ms, bound by ICI (compute 69.5 ms, HBM 30.9 ms, ICI 81.8 ms)
          rljax plan experiments/cards/tldr_sft_pythia.py --topology v5e:4x8 --model EleutherAI/pythia-6.9b-deduped
              EleutherAI/pythia-6.9b-deduped: 6.86 billion parameters on v5e:4x8, 32 devices (TPU v5e), mesh data=1
                fsdp=32 tensor=1 context=1, microbatches=1
              note: every token of a row may be trained, as in texts and chats; where rows have prompts fewer are
              update: fits, 4.45 GiB of 15.75 GiB free (28%)
              at best 478 ms, bound by compute (compute 478 ms, HBM 241 ms, ICI 455 ms)
"""

import functools

import _tldr

from rljax import offline, train

experiment = offline.SFT(
    model="EleutherAI/pythia-2.8b-deduped",
    data=_tldr.texts,
    optimizer=functools.partial(train.adamw, eps=1e-5, weight_decay=0.01),
    learning_rate=3e-6,
    schedule=train.cosine,
    clip_norm=None,
    batch=128,
    steps=911,
    max_prompt=_tldr.QUERY,
    max_completion=53,
    eval_rows=256,
    eval_every=100,
    save_every=100,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
