#!/usr/bin/env bash
# Triton 3.9's interpreter refuses a mask that joins a block's condition with a program's; 3.8 does not, the compiler takes it
#
# triton 3.9.0 and 3.8.0, torch 2.13.0, numpy 2.4.6.
# `mask = (tl.arange(0, B) < n) & (row < rows)` broadcasts the single condition of the program to the block. Compiled, that
# works in both versions. With TRITON_INTERPRET=1, 3.8 computes the same; 3.9 raises "mask has unsupported dtype". A kernel
# that only runs compiled is right, its interpreter tests fail. One comparison, `tl.arange(0, B) < tl.where(row < rows, n, 0)`,
# works in all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import os

import torch
import triton
import triton.language as tl


@triton.jit
def joined(x, out, n, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = (i < n) & (row < rows)
    tl.store(out + i, tl.load(x + i, mask=mask), mask=mask)


@triton.jit
def one(x, out, n, rows, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < tl.where(tl.program_id(0) < rows, n, 0)
    tl.store(out + i, tl.load(x + i, mask=mask), mask=mask)


if os.environ.get("TRITON_INTERPRET") == "1":
    for kernel in (joined, one):
        out = torch.zeros(8)
        try:
            kernel[(1,)](torch.arange(8.0), out, 5, 1, BLOCK=8)
            print(triton.__version__, kernel.fn.__name__, out.tolist())
        except Exception as error:
            print(triton.__version__, kernel.fn.__name__, "mask has unsupported dtype" in str(error))
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "rows": "i32", "BLOCK": "constexpr"}
    source = ASTSource(joined, signature=signature, constexprs={(4,): 8})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(triton.__version__, "compiles:", "ld.global" in compiled.asm["ptx"])
PYTHON
cat > "$folder/expected" <<'TEXT'
3.8.0 joined [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]
3.8.0 one [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]
3.8.0 compiles: True
3.9.0 joined True
3.9.0 one [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]
3.9.0 compiles: True
TEXT
for version in 3.8.0 3.9.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" "triton==$version"
  PYTHONPATH="$folder/$version" TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/finding.py"
  PYTHONPATH="$folder/$version" TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/finding.py"
done | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
