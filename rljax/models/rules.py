"""Where the parameters live on a mesh: ordered (regex, PartitionSpec), read by rljax.sharding.

`fsdp` splits the hidden size, `tensor` the heads, the feed-forward and the vocabulary; layers stay whole, since the
scan walks over them. The rules hold for optimizer moments as well, whose paths end in those of the params.
"""

from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    (r"embed/tokens$", P("tensor", "fsdp")),
    (r"embed/positions$", P(None, "fsdp")),
    (r"unembed/kernel$", P("fsdp", "tensor")),
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"(out|down)/bias$", P()),
    (r"norm/(scale|bias)$", P()),
    (r"head/(kernel|bias)$", P()),
)
