#!/usr/bin/env bash
# A model whose add_adapter was refused cannot be saved any more
#
# transformers 5.23.0, peft 0.21.2, torch 2.13.0.
# add_adapter marks the model as one that has adapters before peft looks at the configuration. Where peft then refuses it (a
# name in target_modules that is none, say), the mark stays: save_pretrained of the unchanged model writes no weights and
# raises. Whoever refuses configurations for good reasons, as quantized models do, meets this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/finding.py" <<'PYTHON'
import tempfile

from peft import LoraConfig
from transformers import BertConfig, BertModel

sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = BertModel(BertConfig(**sizes))
try:
    model.add_adapter(LoraConfig(target_modules=["nothing_of_this_name"]))
except ValueError as error:
    print("refused:", type(error).__name__)
print("parameters of an adapter:", sum("lora" in name for name, _ in model.named_parameters()))
try:
    model.save_pretrained(tempfile.mkdtemp())
    print("saved")
except Exception as error:
    print("save_pretrained:", type(error).__name__)
PYTHON
cat > "$folder/expected" <<'TEXT'
refused: NoMatchingPeftModuleError
parameters of an adapter: 0
save_pretrained: UnboundLocalError
TEXT
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python finding.py 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: A model whose add_adapter was refused cannot be saved any more"
