#!/usr/bin/env bash
# LoRA for classification trains and stores DistilBERT's pre_classifier in full, unnamed
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# task_type="SEQ_CLS" adds modules_to_save=["classifier"], which is matched by the end of a name, so that DistilBERT's
# pre_classifier (hidden size x hidden size, float) is copied, trained and saved too: at hidden size 768 that is 590,592
# parameters beside the 147,456 of LoRA with rank 8 on queries and values. Sizes of adapters that were computed from the
# configuration are wrong by that much. With target_modules="all-linear" the same module is asked for twice, and refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/finding.py" <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import DistilBertConfig, DistilBertForSequenceClassification


def model():
    config = DistilBertConfig(vocab_size=50, dim=64, n_layers=1, n_heads=2, hidden_dim=64)
    return DistilBertForSequenceClassification(config)


adapter = get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], r=8))
print("modules_to_save:", sorted(adapter.peft_config["default"].modules_to_save))
for name, parameter in adapter.named_parameters():
    if parameter.requires_grad:
        print(name.removeprefix("base_model.model."), parameter.numel())
try:
    get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
except TypeError as error:
    print("all-linear:", type(error).__name__)
PYTHON
cat > "$folder/expected" <<'TEXT'
modules_to_save: ['classifier', 'score']
distilbert.transformer.layer.0.attention.q_lin.lora_A.default.weight 512
distilbert.transformer.layer.0.attention.q_lin.lora_B.default.weight 512
pre_classifier.modules_to_save.default.weight 4096
pre_classifier.modules_to_save.default.bias 64
classifier.modules_to_save.default.weight 128
classifier.modules_to_save.default.bias 2
all-linear: TypeError
TEXT
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python finding.py 2> errors | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: LoRA for classification trains and stores DistilBERT's pre_classifier in full, unnamed"
