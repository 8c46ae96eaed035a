"""An exported reward model in transformers (torch): the same token is scored, whatever pads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rljax import policy  # noqa: E402
from rljax.models import heads, hf  # noqa: E402
from rljax.types import Tokens  # noqa: E402

TEXTS = ["Once upon a time there was a dog.", "Tom was happy", "No"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["</s>", "<unk>", None])
def test_transformers_scores_the_token_that_we_score(stories, tmp_path, pad, side):
    start = policy.load(str(stories), dtype="float32")
    start.tokenizer.pad_token = pad
    head = {"kernel": jax.random.normal(jax.random.key(2), (64,)), "bias": jnp.float32(0.4)}
    params = {"model": start.params, "head": head}
    hf.save_reward(tmp_path / "out", start.model, params, tokenizer=start.tokenizer, stop_ids=start.stop_ids)
    ids = [np.asarray([*start.tokenizer(text)["input_ids"], start.tokenizer.eos_token_id]) for text in TEXTS]
    tokens: Tokens = policy.left_pad(ids, rows=3, width=max(map(len, ids)))
    ours = np.asarray(heads.reward_model(start.model).scores(params, jax.tree.map(jnp.asarray, tokens)))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
    batch = tokenizer.pad({"input_ids": [list(map(int, row)) for row in ids]}, return_tensors="pt")
    assert int(batch["attention_mask"].sum()) == sum(map(len, ids))
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0].numpy()
    bias = theirs.config.rljax["reward_bias"]
    np.testing.assert_allclose(scores + bias, ours, atol=1e-4)
