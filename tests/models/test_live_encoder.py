"""Parity of the encoders with the installed transformers (torch): random models of every family, and real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rljax.models import encoder, resolve  # noqa: E402
from tests.models.make_encoder_fixtures import (  # noqa: E402
    CASES,
    DISTIL,
    LABELS,
    ROBERTA,
    SIZES,
    outputs,
    random_encoder,
    rows,
)

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
WIDE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_hidden_layers": 5}
ONE = {"id2label": {0: "score"}, "label2id": {"score": 0}}
MORE = [
    ("BertForMaskedLM", SIZES),
    ("BertForPreTraining", SIZES),
    ("BertModel", {**SIZES, **WIDE, "hidden_act": "gelu_new", "layer_norm_eps": 1e-12}),
    ("BertForSequenceClassification", {**SIZES, **WIDE, **ONE, "hidden_act": "relu", "type_vocab_size": 3}),
    ("DistilBertForMaskedLM", DISTIL),
    ("DistilBertModel", {**DISTIL, "activation": "relu", "sinusoidal_pos_embds": True, "n_layers": 4}),
    ("DistilBertForSequenceClassification", {**DISTIL, **ONE, "pad_token_id": 5}),
    ("RobertaForMaskedLM", ROBERTA),
    ("RobertaModel", {**ROBERTA, **WIDE, "type_vocab_size": 2}),
    ("RobertaForSequenceClassification", {**ROBERTA, **LABELS, **WIDE, "pad_token_id": 0, "type_vocab_size": 2}),
]
VARIANTS = [*CASES.values(), *MORE]


@pytest.mark.parametrize(("seed", "variant"), list(enumerate(VARIANTS)), ids=[name for name, _ in VARIANTS])
def test_random_encoders(seed, variant, tmp_path):
    architecture, settings = variant
    theirs = random_encoder(architecture, settings, seed + 100)
    theirs.save_pretrained(tmp_path)
    batch = rows(theirs.config, seed, (16, 3, 11, 1))
    want = outputs(theirs, batch)
    model, params = encoder.load(tmp_path)
    ids, segments, types = (jnp.asarray(batch[key]) for key in ("ids", "segments", "types"))
    types = types if model.config.num_types > 1 else None
    hidden = jax.jit(model.apply)(params, ids, segments, types=types)
    hidden = np.asarray(hidden) * batch["segments"][:, :, None]
    np.testing.assert_allclose(hidden, want["hidden"], atol=TOLERANCE, rtol=0)
    assert bool(model.config.labels) == ("logits" in want)
    if model.config.labels:
        logits = np.asarray(jax.jit(model.classify)(params, ids, segments, types=types))
        np.testing.assert_allclose(logits, want["logits"], atol=TOLERANCE, rtol=0)
        assert list(model.config.labels) == list(theirs.config.id2label.values())


TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "",
    "Das Pferd frisst keinen Gurkensalat — 42 % 日本語",
    "The court held that the agreement, having been signed under duress, could not be enforced. " * 30,
]


def test_minilm():
    """all-MiniLM-L6-v2 as its model card computes it: the mean over the tokens of a padded batch, of length 1."""
    try:
        folder = resolve.resolve("all-minilm-l6-v2")
    except ValueError as error:
        pytest.skip(f"all-minilm-l6-v2 cannot be had: {error}")
    model, params = encoder.load(folder)
    batch = resolve.load_tokenizer(folder)(
        TEXTS, padding=True, truncation=True, max_length=model.config.max_tokens, return_tensors="np"
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask.sum(1).tolist() == [15, 2, 22, 256]
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
        kept = torch.tensor(mask)[:, :, None].float()
        want = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1)).numpy()
    real = mask > 0
    ours = np.asarray(jax.jit(model.apply)(params, jnp.asarray(ids), jnp.asarray(mask)))
    np.testing.assert_allclose(ours[real], hidden.numpy()[real], atol=TOLERANCE, rtol=0)
    got = np.asarray(jax.jit(encoder.embed, static_argnums=0)(model, params, jnp.asarray(ids), jnp.asarray(mask)))
    np.testing.assert_allclose(got, want, atol=TOLERANCE / 10, rtol=0)
