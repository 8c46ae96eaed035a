"""Data: rows from files and data sets, tokenised examples, and batches that are pure functions of (seed, step).

rows = data.read("pairs.jsonl")
data.check(rows, data.preference_row)                                    # every mistake now, with file, line and field
pairs = data.memoized(rows, lambda row: data.preference_example(row, tokenizer, max_prompt=128, max_completion=128))
batches = data.Batches(
    lambda indices: data.collate_preference([pairs(i) for i in indices], 256), len(rows), batch=32, seed=0
)
for step, (chosen, rejected) in data.prefetch(batches, 0, 1000):
    ...
"""

from rljax.data.batches import (
    Packed,
    collate_comparison,
    collate_preference,
    collate_supervised,
    memoized,
    pack,
    pad,
    tokenize,
)
from rljax.data.examples import (
    Comparison,
    Example,
    Unpaired,
    chat_example,
    comparison_example,
    completion_example,
    mismatch,
    preference_example,
    prompt_example,
    prompt_ids,
    text_example,
    unpaired_example,
)
from rljax.data.forms import (
    chat_row,
    comparison_row,
    completion_row,
    hh_row,
    preference_row,
    prompt_row,
    text_row,
    unpair,
    unpaired_row,
)
from rljax.data.heldout import prompt_key, shared_prompts, split_prompts
from rljax.data.messages import Messages
from rljax.data.order import Batches, eval_batches, indices, prefetch
from rljax.data.rows import Row, Rows, check, concatenate, fingerprint, split, write_jsonl
from rljax.data.sources import files, read
from rljax.data.survey import Overlong, Survey, survey

__all__ = [
    "Batches",
    "Comparison",
    "Example",
    "Messages",
    "Overlong",
    "Packed",
    "Row",
    "Rows",
    "Survey",
    "Unpaired",
    "chat_example",
    "chat_row",
    "check",
    "collate_comparison",
    "collate_preference",
    "collate_supervised",
    "comparison_example",
    "comparison_row",
    "completion_example",
    "completion_row",
    "concatenate",
    "eval_batches",
    "files",
    "fingerprint",
    "hh_row",
    "indices",
    "memoized",
    "mismatch",
    "pack",
    "pad",
    "preference_example",
    "preference_row",
    "prefetch",
    "prompt_example",
    "prompt_ids",
    "prompt_key",
    "prompt_row",
    "read",
    "shared_prompts",
    "split",
    "split_prompts",
    "survey",
    "text_example",
    "text_row",
    "tokenize",
    "unpair",
    "unpaired_example",
    "unpaired_row",
    "write_jsonl",
]
