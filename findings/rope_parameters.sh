#!/usr/bin/env bash
# transformers 4 opens a model that transformers 5 saved with another rotary base, without a word.
#
# Versions: transformers 5.23.0 writes, transformers 4.57.6 reads; no torch is needed to see it.
# One would guess: a config.json of a Llama with base 100,000 is read as such by the last version of 4, or refused, or at
#   least warned of: the file says which version wrote it.
# Seen: 5 writes the base and the scaling of rotary positions under `rope_parameters` alone. 4.57 keeps that key as one it
#   does not know and takes its defaults: base 10,000, no scaling. Every logit differs; nothing is printed.
# Why users of this field care: trainers move to 5 while inference engines and evaluation harnesses pin 4. A checkpoint
#   that was trained well then scores badly, most on long texts. Writing `rope_theta` and `rope_scaling` beside
#   `rope_parameters` makes both read the same.
#
# PYTHON names the Python to use (3.11 or newer).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q --disable-pip-version-check "transformers==$version"
done
cat > "$folder/write.py" << 'PY'
import sys
from transformers import LlamaConfig

scaled = {"rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
scaled["original_max_position_embeddings"] = 2048
config = LlamaConfig(rope_parameters=scaled, max_position_embeddings=16384)
config.save_pretrained(sys.argv[1])
print("written by 5:", config.rope_parameters)
PY
cat > "$folder/read.py" << 'PY'
import sys
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1])
print("read by 4:   ", {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling})
sys.exit(0 if (config.rope_theta, config.rope_scaling) == (10000.0, None) else 1)
PY
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
"$folder/5.23.0/bin/python" "$folder/write.py" "$folder/model" 2> /dev/null
"$folder/4.57.6/bin/python" "$folder/read.py" "$folder/model"
