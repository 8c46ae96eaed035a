"""Supervised fine-tuning on plain text, packed: the first step of the RLHF pipeline (Ouyang et al. 2022,
arXiv:2203.02155).

    rljax run experiments/sft_sentences.py --data sentences.jsonl --model smollm2-135m-instruct

`sentences.jsonl` holds {"text"} rows, for instance the 10,662 movie-review sentences of Pang and Lee (2005). Several
sentences share a row of 128 tokens; attention does not cross them.
"""

import functools

import optax

from rljax import offline, train

experiment = offline.SFT(
    model="smollm2-135m-instruct",
    data="sentences.jsonl",
    packing=True,
    max_prompt=64,
    max_completion=64,
    steps=200,
    batch=8,
    learning_rate=2e-5,
    schedule=functools.partial(train.cosine, warmup=10),
    optimizer=functools.partial(optax.adamw, weight_decay=0.01),
    eval_rows=128,
    best="eval/loss",
    best_mode="min",
    patience=3,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
