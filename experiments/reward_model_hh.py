"""A reward model on human preferences (Bai et al. 2022, arXiv:2204.05862; Ouyang et al. 2022, arXiv:2203.02155).

    rljax run experiments/reward_model_hh.py --model smollm2-135m-instruct --data hh_rlhf/harmless-base-test.jsonl.gz

Rows are pairs of whole dialogues, {"chosen", "rejected"}, or {"prompt", "chosen", "rejected"}; a decoder with a
scalar head on the last token learns which is better, and its scores are brought to mean 0 and std 1 on texts of the
policy, before and after (Ziegler et al. 2019, arXiv:1909.08593). `rljax export RUN FOLDER` writes a
…ForSequenceClassification checkpoint.
"""

import functools

from rljax import losses, offline, train

experiment = offline.RewardModel(
    model="smollm2-135m-instruct",
    data="hf:Anthropic/hh-rlhf",
    loss=losses.bradley_terry_loss,
    normalize=64,
    max_prompt=192,
    max_completion=64,
    steps=200,
    batch=8,
    learning_rate=1e-5,
    schedule=functools.partial(train.cosine, warmup=10),
    best="eval/accuracy",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
