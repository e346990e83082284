"""What a kernel may use in the interpreter: registers that its descriptor allocates, and the machine's memory."""

import cdna_program as cp
import numpy as np
import pytest

from pallas_kernels.cdna.interpreter import control_flow, dispatch
from pallas_kernels.cdna.interpreter.assembly import InterpreterError, parse
from pallas_kernels.cdna.interpreter.dispatch import Dispatch
from pallas_kernels.cdna.program import LDS_BYTES, SCRATCH_BYTES


def source(body, arch="gfx942", **settings):
    """A kernel of these lines whose descriptor has these settings."""
    lines = "".join(f"    .amdhsa_{name} {value}\n" for name, value in settings.items())
    return cp.source(body, arch=arch).replace(".end_amdhsa_kernel", f"{lines}.end_amdhsa_kernel")


def granted(**settings):
    found = dispatch.registers(parse(source("s_nop 0", **settings)))
    return found["v"], found["a"], found["s"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (256, 256, 102)),
        ({"next_free_vgpr": 24}, (24, 24, 102)),
        ({"next_free_vgpr": 1}, (8, 8, 102)),
        ({"next_free_vgpr": 17, "accum_offset": 20}, (20, 4, 102)),
        ({"next_free_vgpr": 16, "accum_offset": 16}, (16, 0, 102)),
        ({"next_free_vgpr": 512, "accum_offset": 256}, (256, 256, 102)),
        ({"next_free_vgpr": 512, "accum_offset": 4}, (4, 256, 102)),
        ({"next_free_vgpr": 8, "accum_offset": 256}, (8, 0, 102)),
        ({"next_free_sgpr": 1}, (256, 256, 16)),
        ({"next_free_sgpr": 33}, (256, 256, 48)),
        ({"next_free_sgpr": 112}, (256, 256, 102)),
    ],
    ids=str,
)
def test_granted_registers(settings, expected):
    """Vector registers come in eights and scalar ones in sixteens; accumulation registers begin at their offset."""
    assert granted(**settings) == expected


@pytest.mark.parametrize(
    ("good", "bad", "settings"),
    [
        ("v_mov_b32_e32 v{}, 1", 24, {"next_free_vgpr": 20}),
        ("v_mov_b32_e32 v0, v{}", 12, {"next_free_vgpr": 64, "accum_offset": 12}),
        ("v_accvgpr_write_b32 a{}, v0", 4, {"next_free_vgpr": 16, "accum_offset": 12}),
        ("s_mov_b32 s{}, 1", 32, {"next_free_sgpr": 20}),
        ("v_mov_b32_e32 v{}, 1", 256, {}),
        ("v_accvgpr_write_b32 a{}, v0", 256, {"next_free_vgpr": 512}),
        ("s_mov_b32 s{}, 1", 102, {}),
    ],
)
def test_the_last_register(good, bad, settings):
    """The last one that was granted can be used; the next one is refused before anything runs."""
    cp.run_text(source(good.format(bad - 1), **settings))
    line = good.format(bad)
    text = source(f"s_branch .LBB0_1\n{line}\n.LBB0_1:", **settings)
    with pytest.raises(
        InterpreterError, match=rf"^line \d+: `{line}`: kernel kernel has {bad} \w+ registers, so there"
    ):
        cp.run_text(text)


def test_no_register_wraps():
    """A block of scalar registers that reaches VCC is no block of scalar registers."""
    cp.fails("s_load_dwordx16 s[92:107], s[8:9], 0x0", "so there is no s107")
    cp.run("s_mov_b32 vcc_lo, 1\ns_mov_b32 m0, vcc_hi\ns_mov_b32 exec_hi, 0")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("v_mov_b32_e32 v[5:3], 0", "ends before it begins"),
        ("v_lshlrev_b64 v[2:3], 1, v4", "`v4` has 1 registers, and the instruction needs 2"),
        ("v_lshlrev_b64 v2, 1, v[4:5]", "`v2` has 1 registers, and the instruction needs 2"),
        ("global_load_dwordx4 v[2:3], v4, s[8:9]", "`v[2:3]` has 2 registers, and the instruction needs 3"),
        ("global_store_dwordx2 v4, v2, s[10:11]", "`v2` has 1 registers, and the instruction needs 2"),
        ("global_load_dword v2, v4, s8", "`s8` has 1 registers, and the instruction needs 2"),
        ("global_load_dword v2, v4, ttmp[2:3]", "`ttmp[2:3]` is not a scalar register"),
        ("s_load_dwordx2 s20, s[8:9], 0x0", "`s20` has 1 registers, and the instruction needs 2"),
        ("s_load_dword s20, ttmp[2:3], 0x0", "`ttmp[2:3]` is not a scalar register"),
        ("s_load_dword s20, s[8:9], ttmp2", "`ttmp2` is not an offset"),
        ("s_mov_b64 s20, 1", "`s20` has 1 registers, and the instruction needs 2"),
        ("s_mov_b64 s[20:21], s22", "`s22` has 1 registers, and the instruction needs 2"),
        ("v_cndmask_b32_e64 v1, v2, v3, s20", "`s20` has 1 registers, and the instruction needs 2"),
        ("v_cndmask_b32_e64 v1, v2, v3, src_vccz", "`src_vccz` is not a scalar register"),
        ("v_addc_co_u32_e64 v1, vcc, v2, v3, s20", "`s20` has 1 registers, and the instruction needs 2"),
        ("buffer_load_dword v1, v2, s[20:21], 0 offen", "`s[20:21]` has 2 registers, and the instruction needs 4"),
        ("buffer_load_dword v1, v2, s[20:23], v3 offen", "`v3` is not a scalar offset"),
        ("scratch_load_dword v1, s20, off", "is not a vector offset and a scalar one"),
        ("v_mfma_f32_16x16x4_f32 a[0:3], s2, v3, a[0:3]", "operands are not vector registers"),
        ("v_mfma_f32_16x16x4_f32 a[0:3], v2, v3, a[0:15]", "C has 16 of them; 4 expected"),
        ("s_branch", "no label "),
    ],
)
def test_operands_of_another_kind_or_size(line, why):
    """What an operand does not name is neither read nor written."""
    body = f"v_mov_b32_e32 v4, 0\nv_mov_b32_e32 v5, 0\n{line}"
    with pytest.raises(InterpreterError) as error:
        cp.run(body, [np.zeros(64, np.uint32)], [np.zeros(64, np.uint32)], scratch=64)
    assert f"`{line}`: " in str(error.value) and why in str(error.value), error.value


@pytest.mark.parametrize("line", ["image_load v[0:3], v[4:5], s[0:7]", ".long 0xdeadbeef", "garbage", "exp mrt0 off"])
def test_lines_that_are_no_instructions(line):
    """They are refused, not left out."""
    cp.fails(line, "this is no instruction")


# --- memory and threads ----------------------------------------------------------------------------------------------
def launch(text, **how):
    parsed = parse(text)
    memory = control_flow.Memory([("arguments", np.zeros(1, np.uint64), False)])
    return control_flow.run(parsed, memory, Dispatch(**{"arguments": 0, "grid": (1, 1, 1), "threads": 64, **how}))


@pytest.mark.parametrize("arch", list(LDS_BYTES))
def test_lds_of_a_workgroup(arch):
    """64 KiB on gfx942, 160 KiB on gfx950, whether the kernel or the launch asks; the last byte can be used."""
    most = LDS_BYTES[arch]
    assert most == {"gfx942": 64, "gfx950": 160}[arch] << 10
    last = f"v_mov_b32_e32 v1, {most - 4:#x}\nds_write_b32 v1, v0"
    for settings, dynamic in (({"group_segment_fixed_size": most}, 0), ({}, most)):
        launch(source(last, arch, **settings), lds_bytes=dynamic)
    for settings, dynamic in (({"group_segment_fixed_size": most + 1}, 0), ({}, most + 1)):
        with pytest.raises(InterpreterError, match=f"asks for {most + 1} bytes of LDS; {arch} has {most}"):
            launch(source(last, arch, **settings), lds_bytes=dynamic)
    beyond = f"v_mov_b32_e32 v1, {most:#x}\nds_read_b32 v1, v1"
    with pytest.raises(InterpreterError, match=f"access of 4 bytes at byte {most} of an LDS of {most}"):
        launch(source(beyond, arch, group_segment_fixed_size=most))


def test_scratch_of_a_lane(monkeypatch):
    """As much as a wave can have, also by many waves, which then do not all run together."""
    monkeypatch.setattr(control_flow, "MAX_SCRATCH", 2 * 64 * SCRATCH_BYTES)
    text = source(f"scratch_store_dword off, v0, off offset:0\nv_mov_b32_e32 v1, {SCRATCH_BYTES - 4:#x}\n"
                  "scratch_store_dword v1, v0, off", private_segment_fixed_size=SCRATCH_BYTES)  # fmt: skip
    assert launch(text, grid=(3, 1, 1)).sum() == 3
    with pytest.raises(InterpreterError, match=f"asks for {SCRATCH_BYTES + 1} bytes of scratch memory a lane; gfx942"):
        launch(source("s_nop 0", private_segment_fixed_size=SCRATCH_BYTES + 1))


@pytest.mark.parametrize(("threads", "good"), [(1, True), (1024, True), (1025, False), (0, False)])
def test_threads_of_a_workgroup(threads, good):
    if good:
        launch(source("s_nop 0"), threads=threads)
        return
    with pytest.raises(ValueError, match=f"threads is {threads}; a workgroup has 1 to 1024"):
        launch(source("s_nop 0"), threads=threads)


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 1, -1), (1, 1), ()])
def test_no_grid(grid):
    with pytest.raises(ValueError, match="expected three numbers of workgroups, each at least 1"):
        launch(source("s_nop 0"), grid=grid)


def test_more_vector_registers_than_a_lane_has():
    with pytest.raises(InterpreterError, match="asks for 520 vector registers a lane; gfx942 has 512"):
        launch(source("s_nop 0", next_free_vgpr=520))


def test_another_machine():
    with pytest.raises(InterpreterError, match="kernel kernel is for gfx90a; expected one of gfx942, gfx950"):
        launch(source("s_nop 0", "gfx90a"))
