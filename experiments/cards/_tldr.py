"""TL;DR as OpenAI prepared it: Reddit posts with a title, their authors' summaries, and people's comparisons.

Format and truncation are those of the code of Huang et al. 2024 (arXiv:2403.17031, details 1 and 2; tldr_dataset.py),
which takes them from Stiennon et al. 2020 (arXiv:2009.01325; summarize-from-feedback, tasks.py): a query of at most 512
tokens, whose post loses its last paragraph until it fits. The end token after a summary is added by `rljax.data`.
"""

from __future__ import annotations

from typing import Any

import jax

from rljax import data, policy

FORMAT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
POSTS = "hf:vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # id, subreddit, title, post, summary
COMPARISONS = "hf:openai/summarize_from_feedback:comparisons"  # info, summaries, choice, …
QUERY = 512  # tokens


def query(row: data.Row, tokenizer: Any, longest: int = QUERY) -> str:
    """The prompt of a post {"subreddit", "title", "post"}; of a post without a line end its last character goes.

    ValueError where the rest alone is too long.
    """
    post = row["post"]
    while True:
        text = FORMAT.format(subreddit=row["subreddit"], title=row["title"], post=post)
        if len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) <= longest:
            return text
        if not post:
            raise ValueError(f"subreddit and title of {row['title'][:40]!r} alone have more than {longest} tokens")
        post = post[: post.rindex("\n") if "\n" in post else -1]


def demonstrations(
    start: policy.Policy, key: jax.Array, *, source: str = POSTS, split: str = "train", longest: int = QUERY
) -> list[dict]:
    """{"prompt", "completion"}: posts with the summaries of their authors."""
    del key
    rows = data.read(source, split=split)
    return [
        {"prompt": query(row, start.tokenizer, longest), "completion": f" {row['summary'].strip()}"} for row in rows
    ]


def texts(
    start: policy.Policy, key: jax.Array, *, source: str = POSTS, split: str = "train", longest: int = QUERY
) -> list[dict]:
    """{"text"}: the same as one text each, of which all is trained."""
    made = demonstrations(start, key, source=source, split=split, longest=longest)
    return [{"text": row["prompt"] + row["completion"]} for row in made]


def queries(
    start: policy.Policy, key: jax.Array, *, source: str = POSTS, split: str = "train", longest: int = QUERY
) -> list[dict]:
    """{"prompt"}: posts to be summarised."""
    made = demonstrations(start, key, source=source, split=split, longest=longest)
    return [{"prompt": row["prompt"]} for row in made]


def comparisons(
    start: policy.Policy, key: jax.Array, *, source: str = COMPARISONS, split: str = "train", longest: int = QUERY
) -> list[dict]:
    """{"prompt", "chosen", "rejected"}: two summaries of a post, of which people preferred one."""
    del key
    made = []
    for row in data.read(source, split=split):
        better, worse = (row["summaries"][i]["text"].strip() for i in (row["choice"], 1 - row["choice"]))
        prompt = query(row["info"], start.tokenizer, longest)
        made.append({"prompt": prompt, "chosen": f" {better}", "rejected": f" {worse}"})
    return made
