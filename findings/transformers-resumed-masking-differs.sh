#!/usr/bin/env bash
# A resumed run of masked language modelling has other masks than one left alone
#
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0.
# Trainer restores the random state of its last checkpoint, and accelerate's data loader makes each batch one step ahead.
# The state of a checkpoint is therefore that of a batch that has been drawn already, and DataCollatorForLanguageModeling,
# which draws masks when a batch is made, draws others after resuming: the weights differ, on a CPU, with one process, from
# the same seed. Without random draws in the collator they are equal to the last bit, and so are two runs left alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/finding.py" <<'PYTHON'
import tempfile

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, DataCollatorForLanguageModeling
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

folder = tempfile.mkdtemp()
with open(f"{folder}/vocab.txt", "w") as file:
    file.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]))
tokenizer = BertTokenizerFast.from_pretrained(folder)
torch.manual_seed(0)
rows = [{"input_ids": torch.randint(5, 50, (12,)).tolist(), "attention_mask": [1] * 12} for _ in range(64)]
labelled = [{**row, "labels": row["input_ids"]} for row in rows]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def trained(name, data, collate, resume=None, callbacks=()):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = TrainingArguments(f"{folder}/{name}", max_steps=6, per_device_train_batch_size=8, save_steps=3, seed=0,
                             learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(BertForMaskedLM(config), args, collate, data, callbacks=list(callbacks), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


for title, data, collate in (
    ("DataCollatorWithPadding", labelled, DataCollatorWithPadding(tokenizer)),
    ("DataCollatorForLanguageModeling", rows, DataCollatorForLanguageModeling(tokenizer)),
):
    whole = trained(f"{title}-whole", data, collate)
    again = trained(f"{title}-again", data, collate)
    trained(f"{title}-cut", data, collate, callbacks=[Stop()])
    resumed = trained(f"{title}-cut", data, collate, resume=f"{folder}/{title}-cut/checkpoint-3")
    print(f"{title}: run again {torch.equal(whole, again)}, stopped and resumed {torch.equal(whole, resumed)}")
PYTHON
cat > "$folder/expected" <<'TEXT'
DataCollatorWithPadding: run again True, stopped and resumed True
DataCollatorForLanguageModeling: run again True, stopped and resumed False
TEXT
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python finding.py 2> errors | grep '^DataCollator' | tee seen || { cat errors; exit 1; }
diff expected seen && echo "as found: A resumed run of masked language modelling has other masks than one left alone"
