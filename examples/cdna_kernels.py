# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A kernel, from Pallas to CDNA machine code
#
# Sparse attention of DeepSeek-V3.2, compiled for MI300X (gfx942) and MI355X (gfx950) on a machine that has neither,
# and executed by our interpreter. Counts and results are exact; time, hazards and waits are not modelled. Needs the
# extra `cdna`.

# %%
import dataclasses
import logging

import jax
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels import cdna
from pallas_kernels.cdna import cost, lowering
from pallas_kernels.cdna.program import ARCHITECTURES, PRODUCT
from pallas_kernels.plans import plan_for
from sparse_mla_jax.cases import catalogue

# The ROCm plugin reports that this machine has no AMD GPU.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
problem = catalogue.kernel_case("sparse_mla").build("float8_e4m3fnuz", 16)
print("q", problem.args[0].shape, "| cache", problem.args[1].latent.shape, "| slots", problem.args[2].shape)

# %% [markdown]
# ## Triton IR
#
# Lowering needs no GPU and no plugin: Pallas writes Triton IR, with the target's FP8 instruction in it.

# %%
(call,) = lowering.pallas_calls(problem.fn, *problem.args, arch="gfx942")
print(f"{call.name}: grid {call.grid}, {call.num_warps} waves, {len(call.ir.splitlines())} lines of Triton IR")
print(next(line.strip()[:110] for line in call.ir.splitlines() if "v_cvt_f32_fp8" in line))

# %% [markdown]
# ## Machine code
#
# Two compilers make code objects of it: the public Triton wheel, and XLA:ROCm, which is what jax would launch.

# %%
kernels = {
    (arch, compiler): cdna.compile(problem.fn, *problem.args, arch=arch, compiler=compiler).pallas_kernels[0]
    for arch in ARCHITECTURES
    for compiler in ("triton", "xla")
}
for kernel in kernels.values():
    r = kernel.resources
    print(
        f"{kernel.arch} {kernel.compiler:15} {len(kernel.code_object):6} bytes  VGPRs {r.vgprs}  spills {r.vgpr_spills}"
        f"  LDS {r.lds}  waves per SIMD {r.occupancy}"
    )

# %%
lines = kernels["gfx942", "triton"].assembly.splitlines()
first = next(k for k, line in enumerate(lines) if "v_mfma" in line)
print("\n".join(lines[first - 6 : first + 6]))

# %% [markdown]
# ## Executed
#
# Within `cdna.device` a jitted function runs as before, its kernels as machine code in our interpreter.


# %%
def executed(arch, compiler="triton", plan=None):
    """(launch, error) of the kernel on an architecture."""
    with cdna.device(arch, compiler=compiler) as device:
        out = jax.block_until_ready(jax.jit(lambda *args: problem.fn(*args, plan=plan))(*problem.args))
    return device.launches[0], problem.error(out)


launches = {}
for arch, compiler in kernels:
    launches[arch, compiler], error = executed(arch, compiler)
    print(f"{arch} {compiler:7} {launches[arch, compiler].counts.total} wave-instructions, error {error:.2e}")
    assert error <= problem.bound

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3), sharey=True)
for axis, arch in zip(axes, ARCHITECTURES):
    for offset, compiler in ((-0.2, "triton"), (0.2, "xla")):
        counts = launches[arch, compiler].counts.by_class
        axis.bar(
            np.arange(len(counts)) + offset, list(counts.values()), 0.4, label=launches[arch, compiler].kernel.compiler
        )
    axis.set_xticks(np.arange(len(counts)), list(counts), rotation=45, ha="right")
    axis.set_title(f"{PRODUCT[arch]} ({arch})")
axes[0].set_ylabel("wave-instructions")
axes[0].legend()
plt.show()

# %% [markdown]
# Which instructions those are, and how often each line of the assembly was executed:

# %%
counts = launches["gfx942", "triton"].counts
for opcode, times in list(counts.by_opcode().items())[:10]:
    print(f"{times:7} {opcode}")
times = np.array([n for _, n in counts.per_instruction()])
plt.figure(figsize=(11, 2.2))
plt.fill_between(np.arange(len(times)), times, step="mid")
plt.gca().set(xlabel="instruction, in the order of the text", ylabel="executions", title="The loop over key blocks")
plt.show()

# %% [markdown]
# ## A lower bound
#
# LLVM's scheduling model gives each instruction's cost. Summed per pipe over the whole grid and spread over the
# machine, that is a bound that ignores latency; beside it stands what memory bandwidth asks for.

# %%
for arch in ARCHITECTURES:
    bound = cost.lower_bound(launches[arch, "triton"].counts, arch)
    busiest = max(bound.microseconds, key=bound.microseconds.get)
    floor = cost.hbm_floor(problem.bytes, arch)
    print(f"{arch}: {busiest} pipe {bound.microseconds[busiest]:.3f} us, HBM floor {floor:.3f} us")

# %% [markdown]
# ## Change a plan, see what it costs
#
# Waves of one program repeat index arithmetic and scores. Fewer waves execute less, until registers run out.

# %%
shipped = plan_for(problem.fn, *problem.args, target="gfx942")
rows = []
for waves in (1, 2, 4):
    launch, error = executed("gfx942", plan=dataclasses.replace(shipped, num_warps=waves))
    rows.append((waves, launch.counts.total, launch.kernel.resources.vgprs, launch.kernel.resources.vgpr_spills))
    assert error <= problem.bound
for waves, total, vgprs, spills in rows:
    print(f"{waves} waves: {total} wave-instructions, {vgprs} VGPRs, {spills} spilled")
