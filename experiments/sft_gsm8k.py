"""Supervised fine-tuning on prompts with completions: grade-school mathematics (Cobbe et al. 2021, arXiv:2110.14168).

    rljax run experiments/sft_gsm8k.py --model smollm2-135m-instruct --data.path gsm8k/train.jsonl.gz

Rows are {"question", "answer"}; the answer and the end token are trained, the question is not.
"""

from rljax import data, offline


def questions(policy, key, *, path: str = "gsm8k/train.jsonl.gz") -> list[dict]:
    """GSM8K's rows as prompts with completions."""
    return [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in data.read(path)
    ]


experiment = offline.SFT(
    model="smollm2-135m-instruct",
    data=questions,
    max_prompt=160,
    max_completion=160,
    steps=400,
    batch=8,
    learning_rate=2e-5,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
