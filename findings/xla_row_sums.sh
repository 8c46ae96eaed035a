#!/usr/bin/env bash
# The float32 sum of a row depends on how many other rows are in the array, and from which size on changed with XLA.
#
# Versions: jax 0.10.1 (Python 3.11) and jax 0.12.0.1 (Python 3.12 or newer), on CPU, numpy 2.4.6.
# One would guess: the sum over the last axis of x[:k] is that of the first k rows of x, bit for bit, in a given version;
#   and if an upgrade changes the bits of anything, it is of the large products.
# Seen: products are the same bits in both versions. Sums are not: how XLA adds up a row is chosen by the size of the whole
#   array, so a row's sum has other bits beside 4 rows than beside 255. In jax 0.10.1 that begins between rows
#   of 100 and of 128 numbers here; in 0.12.0.1 rows of 64 have it already, for up to 40 rows and no more at 64. The newer
#   sums are nearer to the exact ones (the error of rows of 512 falls by about a third).
# Why users of this field care: "batch companions, microbatches and padding change nothing" holds to rounding only. Golden
#   bits that were taken with short rows or few of them survive an upgrade, those of real sequences do not; losses,
#   norms and log-sum-exps of a sampler and of a trainer whose batches differ in size differ in their last bits.
#
# PYTHON_OLD (3.11) and PYTHON_NEW (3.12 or newer) name the two Pythons.
set -euo pipefail
old=${PYTHON_OLD:-python3.11} new=${PYTHON_NEW:-python3.13}
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
cat > "$folder/sums.py" << 'PY'
import hashlib, json, sys
import jax, numpy as np

draw, found = np.random.default_rng(0), {}
for width in (64, 128, 512):
    x = draw.standard_normal((256, width)).astype(np.float32)
    sums = lambda rows: np.asarray(jax.jit(lambda a: a.sum(1))(rows))
    whole = sums(x)
    found[width] = {
        "other bits": {rows: int((sums(x[:rows]) != whole[:rows]).sum()) for rows in (4, 16, 40, 64)},
        "error": float(np.sqrt(np.mean((whole - x.astype(np.float64).sum(1)) ** 2))),
        "sums": hashlib.sha256(whole.tobytes()).hexdigest(),
        "products": hashlib.sha256(np.asarray(jax.jit(lambda a: a @ a.T)(x)).tobytes()).hexdigest(),
    }
json.dump(found, open(sys.argv[1], "w"))
PY
measure() { # PYTHON VERSION
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install --quiet --disable-pip-version-check "jax==$2" "jaxlib==$2" numpy==2.4.6
  JAX_PLATFORMS=cpu "$folder/$2/bin/python" "$folder/sums.py" "$folder/$2.json"
}
measure "$old" 0.10.1
measure "$new" 0.12.0.1
"$folder/0.12.0.1/bin/python" - "$folder" << 'PY'
import json, pathlib, sys

old, new = (json.loads(pathlib.Path(sys.argv[1], f"{v}.json").read_text()) for v in ("0.10.1", "0.12.0.1"))
for width in old:
    for version, found in (("0.10.1", old[width]), ("0.12.0.1", new[width])):
        print(f"rows of {width:>3}, jax {version:<8}: sums with other bits than beside 255 rows {found['other bits']}, error {found['error']:.2e}")
assert all(old[w]["products"] == new[w]["products"] for w in old), "products differ between the versions"
assert not any(old["64"]["other bits"].values()), "0.10.1: a row of 64 depends on its neighbours"
assert new["64"]["other bits"]["40"] and not new["64"]["other bits"]["64"], "0.12.0.1: rows of 64"
assert old["512"]["other bits"]["40"] and not new["512"]["other bits"]["40"], "rows of 512"
assert old["512"]["sums"] != new["512"]["sums"] and new["512"]["error"] < 0.8 * old["512"]["error"], "sums of 512"
print("the sum of a row depends on the number of rows, and from which size on depends on the version")
PY
