#!/usr/bin/env bash
# One call with output_hidden_states=True leaves a forward hook on every layer for good
#
# transformers 5.23.0, torch 2.13.0.
# Hidden states and attention maps are captured by forward hooks that the first such call registers and nothing removes: the
# model, every later call, and every deep copy keep them. So "does this module have hooks?" cannot tell whether a user
# wants to see it run: whoever decides by that (fused paths, wrappers, graph capture) is switched off for the rest of the
# process by one call. lowbit leaves out hooks that transformers itself registered (lowbit/nn/unpadded/snapshot.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/finding.py" <<'PYTHON'
import copy

import torch
from transformers import BertConfig, BertModel

sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
model = BertModel(BertConfig(**sizes)).eval()
ids = torch.tensor([[2, 7, 3]])


def hooks(of):
    return [len(layer._forward_hooks) for layer in of.encoder.layer]


print("hooks on the layers:", hooks(model))
model(ids, output_hidden_states=True)
print("after one call with output_hidden_states=True:", hooks(model))
model(ids)
print("after a call without:", hooks(model))
print("of a deep copy:", hooks(copy.deepcopy(model)))
PYTHON
cat > "$folder/expected" <<'TEXT'
hooks on the layers: [0, 0]
after one call with output_hidden_states=True: [1, 1]
after a call without: [1, 1]
of a deep copy: [1, 1]
TEXT
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python finding.py 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: One call with output_hidden_states=True leaves a forward hook on every layer for good"
