"""The public Triton wheel as compiler: Triton IR to a code object. Runs in a worker process."""

from __future__ import annotations

import pathlib
import tempfile


def compile_ir(text: str, arch: str, num_warps: int, num_stages: int) -> tuple[bytes, int]:
    """(ELF code object, bytes of dynamic LDS) of one kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.ttir"
        path.write_text(text)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        done = triton_compile(str(path), target=GPUTarget("hip", arch, 64), options=options)
    return done.asm["hsaco"], done.metadata.shared
