#!/usr/bin/env bash
# Triton 3.6.0's interpreter runs no loop over an argument with numpy 2.4
#
# triton 3.6.0, numpy 2.4.6 and 2.3.5, torch 2.13.0.
# `for i in range(0, n, BLOCK)` with n an argument of the kernel: 3.6.0 hands Python's range() an array of one element and
# one dimension. numpy 2.3 makes an integer of it, 2.4 refuses ("only 0-dimensional arrays can be converted to Python
# scalars"). triton 3.6.0 asks for no version of numpy, so pip installs the pair. Compiled kernels do not meet it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.6.0
cat > "$folder/finding.py" <<'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n, BLOCK):
        sums += tl.load(x + i + tl.arange(0, BLOCK))
    tl.store(out, tl.sum(sums, 0))


out = torch.zeros(1)
try:
    total[(1,)](torch.arange(16.0), out, 16, BLOCK=8)
    print("numpy", numpy.__version__, out.tolist())
except Exception as error:
    print("numpy", numpy.__version__, "only 0-dimensional arrays can be converted" in str(error))
PYTHON
cat > "$folder/expected" <<'TEXT'
numpy 2.3.5 [120.0]
numpy 2.4.6 True
TEXT
for version in 2.3.5 2.4.6; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "numpy==$version"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/finding.py"
done | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
