"""Controlled sentiment, first step: GPT-2-large learns to write movie reviews.

Paper     Rafailov et al. 2023, arXiv:2305.18290, section 6.1, figure 2 (left) and appendix C.1
Model     openai-community/gpt2-large
Data      hf:stanfordnlp/imdb
Hardware  planned for a v5e:2x4
Run       rljax run experiments/cards/imdb_sft_gpt2_large.py
Then      rljax export runs/imdb_sft_gpt2_large runs/imdb_sft_gpt2_large/export, then imdb_dpo_gpt2_large.py and
          imdb_ppo_gpt2_large.py
Expected  no score is published for this step
Settings  1 epoch on a subset of the reviews (appendix C.1). Rate, batch and length are not given: 1e-5, 64 rows and 512
          tokens are ours, and the subset is the labelled half (25,000 rows).
Shape     batch 64, 256 + 256 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/imdb_sft_gpt2_large.py --topology v5e:2x4
              openai-community/gpt2-large: 0.77 billion parameters on v5e:2x4, 8 devices (TPU v5e), mesh data=1 fsdp=8
                tensor=1 context=1, microbatches=1
              note: every token of a row may be trained, as in texts and chats; where rows have prompts fewer are
              update: fits, 7.87 GiB of 15.75 GiB free (50%)
              at best 111 ms, bound by compute (compute 111 ms, HBM 81.2 ms, ICI 67.1 ms)
"""

import functools

from rljax import offline, train

experiment = offline.SFT(
    model="openai-community/gpt2-large",
    data="hf:stanfordnlp/imdb",  # or tfds:imdb_reviews
    learning_rate=1e-5,
    schedule=functools.partial(train.cosine, warmup=20),
    batch=64,
    steps=390,
    max_prompt=256,
    max_completion=256,  # texts of 512 tokens in all
    eval_every=50,
    save_every=100,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
