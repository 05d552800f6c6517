"""Compile the row kernel for GPUs that are not here: registers, spills and shared memory as JSON, one line per variant.

Run without TRITON_INTERPRET, in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

from ensemble_kd.losses.row_kernel import WARPS, block, kernel

POINTERS = {"bias": "*fp32", "counts": "*fp32", "weights": "*fp32", "statistics": "*fp32", "kd": "*fp32"}
NUMBERS = {"rows": "i32", "v": "i32", "plane": "i64", "stride": "i64", "inverse": "fp32"}


def resources(capability: int, product: str, n: int, tempered: bool) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"logits": f"*{product}", **POINTERS, **NUMBERS}
    sizes = {name: size for name, size in block(n).items() if name != "num_warps"}
    switches = {"with_bias": True, "with_kd": n > 1, "tempered": tempered, "with_grad": True}
    constants = {"N": n, **switches, **sizes}
    unaligned = ("rows", "v", "inverse")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}
    source = ASTSource(
        fn=kernel(),
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
        done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {
        "capability": capability,
        "n": n,
        "product": product,
        "tempered": tempered,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    for capability in (80, 90):
        for product, n, tempered in (("bf16", 3, True), ("bf16", 8, True), ("fp32", 3, False), ("bf16", 1, False)):
            print(json.dumps(resources(capability, product, n, tempered)), flush=True)
