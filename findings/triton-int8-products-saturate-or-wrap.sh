#!/usr/bin/env bash
# One tl.dot of int8 saturates at the ends of int32 on sm_80 and wraps on sm_90
#
# triton 3.7.1, torch 2.13.0 (which is not used).
# For sm_80, 89 and 120 the product becomes mma.sync with .satfinite, which clamps sums beyond int32; for sm_90 it becomes
# wgmma without, which wraps (PTX ISA, mma and wgmma.mma_async). Nothing in Triton's documentation says so, and the
# interpreter wraps. Sums can get there: 128 * 128 * K reaches 2^31 at K = 131,072, and earlier where codes are scaled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
cat > "$folder/finding.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out):
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    tl.store(out + i * 64 + j, tl.dot(tl.load(a + i * 64 + j), tl.load(b + i + j * 64), out_dtype=tl.int32))


for arch in (80, 89, 90, 120):
    source = ASTSource(product, signature={"a": "*i8", "b": "*i8", "out": "*i32"}, constexprs={})
    source.attrs = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    print(arch, sorted({(kind, "satfinite" in rest) for kind, rest in re.findall(r"(wgmma|mma)\.(\S*s8\.s8\S*)", ptx)}))
PYTHON
cat > "$folder/expected" <<'TEXT'
80 [('mma', True)]
89 [('mma', True)]
90 [('wgmma', False)]
120 [('mma', True)]
TEXT
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/finding.py" | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
