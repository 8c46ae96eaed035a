"""Supervised fine-tuning on the preferred answers of Anthropic's dialogues: where DPO on them starts.

Paper     Rafailov et al. 2023, arXiv:2305.18290, section 6 and appendix B; its code,
          eric-mitchell/direct-preference-optimization
Model     EleutherAI/pythia-2.8b
Data      hf:Anthropic/hh-rlhf
Hardware  4 × A100 80 GB, 1.5 hours (README of the paper's code, in bfloat16); planned here for a v5e:4x4
Run       rljax run experiments/cards/sft_hh_pythia_2p8b.py
Then      rljax export runs/sft_hh_pythia_2p8b runs/sft_hh_pythia_2p8b/export, and dpo_hh_pythia_2p8b.py
Expected  no score is published for this step
Settings  RMSprop, 5e-7 after 150 steps of warm-up, 64 rows, 1 epoch, 256 + 256 tokens, gradients clipped at 10
          (config/config.yaml of the code). Pythia's weights in float32, products in bfloat16 (README).
Differs   the code cuts a row at 512 tokens in all and a prompt at 256 only then; here a prompt has at most 256 and an
          answer at most 256. One epoch is counted as 160,800 rows [unverified].
Shape     batch 64, 256 + 256 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/sft_hh_pythia_2p8b.py --topology v5e:4x4
              EleutherAI/pythia-2.8b: 2.78 billion parameters on v5e:4x4, 16 devices (TPU v5e), mesh data=1 fsdp=16
                tensor=1 context=1, microbatches=1
              note: every token of a row may be trained, as in texts and chats; where rows have prompts fewer are
              update: fits, 8.12 GiB of 15.75 GiB free (52%)
              at best 199 ms, bound by ICI (compute 179 ms, HBM 89.7 ms, ICI 199 ms)
"""

import functools

import jax
import optax

from rljax import data, offline, policy, train


def preferred(start: policy.Policy, key: jax.Array, *, source: str = "hf:Anthropic/hh-rlhf", split: str = "train"):
    """{"prompt", "completion"}: dialogues with the answer that people preferred."""
    del start, key
    rows = (data.hh_row(row) for row in data.read(source, split=split))
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


experiment = offline.SFT(
    model="EleutherAI/pythia-2.8b",
    data=preferred,
    optimizer=functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),  # as in torch
    learning_rate=5e-7,
    schedule=functools.partial(train.constant, warmup=150),
    clip_norm=10.0,
    batch=64,
    steps=2512,
    max_prompt=256,
    max_completion=256,
    eval_rows=256,
    eval_every=312,
    save_every=312,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
