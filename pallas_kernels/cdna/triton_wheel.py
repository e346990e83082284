"""Compiles Triton IR to a code object with the public Triton wheel. Runs in a worker process."""

from __future__ import annotations

import pathlib
import tempfile


def compile_ir(text: str, arch: str, num_warps: int, num_stages: int) -> tuple[bytes, int]:
    """Runs all of Triton's passes on one kernel; returns (ELF code object, bytes of dynamic LDS)."""
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    target = GPUTarget("hip", arch, 64)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    # Triton's own cache goes too: ours keeps the result, and Triton's needs a home that can be written.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        path = pathlib.Path(folder) / "kernel.ttir"
        path.write_text(text)
        context = ir.context()
        ir.load_dialects(context)
        backend = HIPBackend(target)
        backend.load_dialects(context)
        module = ir.parse_mlir_module(str(path), context)
        module.context = context
        # Run the passes on Triton IR here: `compile` skips them for a file with the suffix .ttir.
        path.write_text(str(backend.make_ttir(module, {}, backend.parse_options(options))))
        done = triton_compile(str(path), target=target, options=options)
    return done.asm["hsaco"], done.metadata.shared
