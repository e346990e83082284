"""Costs by LLVM's scheduling model: against AMD's data sheets, through both kinds of text, and as pictures."""

import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest

from pallas_kernels.cdna import cost, toolchain
from pallas_kernels.cdna.execution import Counts
from pallas_kernels.cdna.interpreter.assembly import CLASSES, InterpreterError, parse
from pallas_kernels.cdna.program import BANDWIDTH, CLOCK, COMPUTE_UNITS


def missing(tool):
    """Why a tool of LLVM can not be used here, or None."""
    try:
        toolchain.find_llvm(tool)
    except toolchain.ToolMissing as reason:
        return str(reason)


def needs(*tools):
    reasons = [reason for reason in map(missing, tools) if reason]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


needs_mca = needs("llvm-mca")

LOOP = """
\t.text
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0      ; 8-byte Folded Reload
\tv_lshlrev_b32_e32 v1, 2, v0
\ts_mov_b32 s4, 0
\ts_waitcnt lgkmcnt(0)
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[4:7], v1, s[2:3]
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[4:5], v[6:7], a[0:3]
\tds_write_b32 v1, v4
\tv_exp_f32_e32 v4, v4
\tv_cvt_f32_f16_sdwa v5, v6 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1
\tv_add_f32_dpp v6, v6, v6 row_shr:1 row_mask:0xf bank_mask:0xf
\ts_add_i32 s4, s4, 1
\ts_cmp_lt_i32 s4, 8
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_barrier
\tv_accvgpr_read_b32 v8, a0
\tglobal_store_dword v1, v8, s[2:3]
\ts_endpgm
"""


def assembly(text, arch="gfx942"):
    return parse(f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\nkernel:\n{text}')


def cycles_of(line, arch="gfx942"):
    (found,) = cost.instruction_cycles(assembly(line, arch))
    return found


@pytest.fixture
def counts():
    """The loop above, executed by 3 waves, 8 times round."""
    parsed = assembly(LOOP)
    times = {0: 3, parsed.labels[".LBB0_1"]: 24}
    rounds = [times.get(block.number, 3) if block.instructions else 0 for block in parsed.blocks]
    return Counts(parsed, np.array(rounds, np.int64))


# Peak operations a second of MI300X and MI355X (AMD's data sheets, dense), in 1e12; none for a rate they do not state.
PEAKS = [
    ("gfx942", "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", 64 * 4, 163.4),
    ("gfx942", "v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]", 16 * 16 * 4 * 2, 163.4),
    ("gfx942", "v_mfma_f32_32x32x2_f32 v[0:15], v16, v17, v[0:15]", 32 * 32 * 2 * 2, 163.4),
    ("gfx942", "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]", 16 * 16 * 16 * 2, 1307.4),
    ("gfx942", "v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]", 32 * 32 * 8 * 2, 1307.4),
    ("gfx942", "v_mfma_f32_16x16x32_fp8_fp8 v[0:3], v[4:5], v[6:7], v[0:3]", 16 * 16 * 32 * 2, 2614.9),
    ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8 v[0:15], v[16:17], v[18:19], v[0:15]", 32 * 32 * 16 * 2, 2614.9),
    ("gfx942", "v_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]", 64 * 2, 81.7),
    ("gfx942", "v_mfma_f64_16x16x4_f64 v[0:7], v[8:9], v[10:11], v[0:7]", 16 * 16 * 4 * 2, 163.4),
    ("gfx950", "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", 64 * 4, 157.3),
    ("gfx950", "v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]", 16 * 16 * 4 * 2, 157.3),
    ("gfx950", "v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]", 16 * 16 * 32 * 2, 2516.6),
    ("gfx950", "v_mfma_f32_32x32x16_f16 v[0:15], v[16:19], v[20:23], v[0:15]", 32 * 32 * 16 * 2, 2516.6),
    ("gfx950", "v_mfma_f64_16x16x4_f64 v[0:7], v[8:9], v[10:11], v[0:7]", 16 * 16 * 4 * 2, 78.6),
]


@needs_mca
@pytest.mark.parametrize("arch, line, flops, peak", PEAKS, ids=lambda x: x.split()[0] if isinstance(x, str) else "")
def test_rates_are_those_of_the_data_sheets(arch, line, flops, peak):
    """A machine that does nothing else reaches the published peak: this fixes the unit, four clocks a cycle."""
    (cycles,) = cycles_of(line, arch).values()
    rate = flops / (cycles * cost.CLOCKS) * cost.SIMDS * COMPUTE_UNITS[arch] * CLOCK[arch]
    assert rate / 1e12 == pytest.approx(peak, rel=1e-3)


@needs_mca
def test_where_the_model_is_wrong():
    """What the docstring of `cost` says of LLVM 22; when this fails, LLVM has become better and the text is stale."""
    assert cycles_of("v_exp_f32_e32 v0, v1") == cycles_of("v_cvt_f32_f16_e32 v0, v1") == {"vector": 1}
    assert cycles_of("ds_read_b128 v[0:3], v4") == cycles_of("ds_read_u8 v0, v4") == {"LDS": 1}
    assert cycles_of("global_load_dwordx4 v[0:3], v[4:5], off") == {"memory": 1}
    assert cycles_of("s_waitcnt vmcnt(0)") == cycles_of("s_nop 7") == {"scalar": 1}
    assert cycles_of("v_add_co_u32_e32 v0, vcc, v1, v2") == {"scalar": 1, "vector": 1}
    fp8 = cycles_of("v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], v[0:3]", "gfx950")
    rate = 16 * 16 * 128 * 2 / (fp8["matrix"] * cost.CLOCKS) * cost.SIMDS * COMPUTE_UNITS["gfx950"] * CLOCK["gfx950"]
    assert rate / 1e12 == pytest.approx(2 * 5033.2, rel=1e-3)


@needs_mca
@pytest.mark.parametrize(
    "line, expected",
    [
        ("v_add_f32_e32 v0, v1, v2", {"vector": 1}),
        ("v_accvgpr_write_b32 a0, v1", {"vector": 1}),
        ("ds_bpermute_b32 v0, v1, v2", {"LDS": 1}),
        ("s_load_dwordx8 s[4:11], s[0:1], 0x8", {"scalar": 1}),
        ("s_and_saveexec_b64 s[0:1], vcc", {"scalar": 1}),
        ("buffer_store_short v0, v1, s[12:15], 0 offen", {"memory": 1}),
        ("s_barrier", {"branch": 1}),
        ("x: s_nop 0\ns_cbranch_execz x", {"branch": 1}),
    ],
)
def test_pipes(line, expected):
    assert cost.instruction_cycles(assembly(line.replace(": ", ":\n")))[-1] == expected


@needs_mca
def test_one_instruction_may_take_two_pipes():
    assert cycles_of("global_load_lds_dwordx4 v[0:1], off", "gfx950") == {"LDS": 1, "memory": 1}
    assert cycles_of("v_permlane32_swap_b32_e32 v0, v1", "gfx950") == {"vector": 2}


@needs("llvm-mca", "llvm-mc", "llvm-objdump")
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_text_of_objdump_costs_the_same(tmp_path, arch):
    source, code = tmp_path / "a.s", tmp_path / "a.o"
    source.write_text(LOOP)
    target = ["-triple=amdgcn-amd-amdhsa", f"-mcpu={arch}"]
    subprocess.run([toolchain.find_llvm("llvm-mc"), *target, "-filetype=obj", str(source), "-o", str(code)], check=True)
    command = [toolchain.find_llvm("llvm-objdump"), "-d", "--symbolize-operands", f"--mcpu={arch}", str(code)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    body = re.sub(r"(?m)^[0-9a-f]+ <(\w+)>:", r"\1:", dump.split("<kernel>:")[1])
    assert "//" in body and "L0:" in body
    assert cost.instruction_cycles(assembly(body, arch)) == cost.instruction_cycles(assembly(LOOP, arch))


@needs_mca
def test_busy_cycles_are_executions_times_cycles(counts):
    assert cost.busy_cycles(counts) == {
        "vector": 3 * 2 + 24 * 3,
        "matrix": 24 * 4,
        "LDS": 24,
        "memory": 24 + 3,
        "scalar": 3 * (1 + 1 + 1 + 1) + 24 * 3,
        "branch": 24 + 3,
    }
    assert list(cost.busy_cycles(counts)) == list(cost.PIPES)


@needs_mca
def test_lower_bound(counts):
    full = cost.lower_bound(counts, "gfx942")
    assert (full.arch, full.simds, full.pipe) == ("gfx942", 4 * 304, "matrix")
    assert full.total == pytest.approx(96 * 4 / 2.1e9 / (4 * 304) * 1e6)
    assert full == cost.lower_bound(counts)
    # A unit that four SIMDs share starts one instruction each clock.
    assert full.microseconds["LDS"] == pytest.approx(24 / 304 / 2.1e9 * 1e6)
    one = cost.lower_bound(counts, workgroups=1, threads=192)
    assert one.simds == 3 and one.total == pytest.approx(full.total * 4 * 304 / 3)
    assert cost.lower_bound(counts, workgroups=2).simds == 8
    assert cost.lower_bound(counts, workgroups=10**6, threads=64).simds == 4 * 304
    assert cost.lower_bound(dataclasses.replace(counts, per_block=0 * counts.per_block)).total == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(arch="gfx90a"), "arch is 'gfx90a'; expected one of gfx942, gfx950"),
        (dict(arch="gfx950"), "counts is of a kernel for gfx942"),
        (dict(workgroups=0), "workgroups is 0"),
        (dict(threads=-1), "threads is -1"),
    ],
)
def test_lower_bound_refuses(counts, arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.lower_bound(counts, **arguments)


def test_hbm_floor():
    for arch, bandwidth in BANDWIDTH.items():
        assert cost.hbm_floor(bandwidth, arch) == pytest.approx(1e6)
    assert cost.hbm_floor(0, "gfx942") == 0
    with pytest.raises(ValueError, match="nbytes is -1"):
        cost.hbm_floor(-1, "gfx942")
    with pytest.raises(ValueError, match="arch is 'MI300X'"):
        cost.hbm_floor(1, "MI300X")


@pytest.mark.parametrize(
    "opcode, lds, memory",
    [
        ("ds_read_b128", 16, 0),
        ("ds_write_b8", 1, 0),
        ("ds_read_u16_d16_hi", 2, 0),
        ("ds_read2st64_b32", 8, 0),
        ("ds_write2_b64", 16, 0),
        ("ds_bpermute_b32", 4, 0),
        ("ds_add_rtn_u32", 4, 0),
        ("ds_read_b64_tr_b16", 8, 0),
        ("global_load_dword", 0, 4),
        ("global_load_dwordx3", 0, 12),
        ("buffer_load_dwordx4", 0, 16),
        ("buffer_store_short", 0, 2),
        ("global_load_ubyte_d16_hi", 0, 1),
        ("global_atomic_add", 0, 4),
        ("global_atomic_add_x2", 0, 8),
        ("global_load_lds_dwordx4", 16, 16),
        ("buffer_inv", 0, 0),
        ("s_load_dwordx8", 0, 0),
        ("v_add_f32", 0, 0),
    ],
)
def test_lane_bytes(opcode, lds, memory):
    assert cost.lane_bytes(opcode) == {k: n for k, n in (("LDS", lds), ("memory", memory)) if n}


def test_transfer_time(counts):
    clocks = {"LDS": 24 * 4 * 64 / 128, "memory": (24 * 16 + 3 * 4) * 64 / 128}
    found = cost.transfer_time(counts)
    assert found == pytest.approx({k: n / 304 / 2.1e9 * 1e6 for k, n in clocks.items()})


def test_missing_tool_is_one_line(monkeypatch):
    monkeypatch.setattr(cost, "_known", {})
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    toolchain.find_llvm.cache_clear()
    with pytest.raises(toolchain.ToolMissing, match="llvm-22") as error:
        cycles_of("v_mov_b32_e32 v0, 0")
    assert "\n" not in str(error.value)


@needs_mca
def test_unreadable_instruction_is_named():
    text = "v_mov_b32_e32 v0, 0\nv_permlane32_swap_b32_e32 v0, v1"
    with pytest.raises(InterpreterError, match=r"line 4: `v_permlane32_swap_b32_e32 v0, v1`: llvm-mca for gfx942"):
        cost.instruction_cycles(assembly(text))


@needs_mca
def test_llvm_is_asked_once(monkeypatch):
    monkeypatch.setattr(cost, "_known", {})
    first = cost.instruction_cycles(assembly(LOOP))
    monkeypatch.setattr(subprocess, "run", None)
    assert cost.instruction_cycles(assembly(LOOP + "\n\tv_exp_f32_e32 v4, v4  ; again")) == [*first, {"vector": 1}]


# --- the picture -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture_shows_the_counts(tmp_path, counts, suffix, start):
    pytest.importorskip("matplotlib")
    from pallas_kernels.cdna.picture import picture

    path = tmp_path / f"counts.{suffix}"
    twice = dataclasses.replace(counts, per_block=2 * counts.per_block)
    figure = picture([("loop\ngfx942", counts), ("the same, twice", twice)], path)
    assert path.read_bytes().startswith(start)
    for k, drawn in enumerate((counts, twice)):
        bar, along = figure.axes[2 * k : 2 * k + 2]
        assert [c.get_label() for c in bar.containers] == list(CLASSES)
        widths = {c.get_label(): sum(p.get_width() for p in c) for c in bar.containers}
        areas = {c.get_label(): sum(p.get_width() * p.get_height() for p in c) for c in along.containers}
        assert widths == areas == drawn.by_class
        assert bar.get_xlim() == (0, drawn.total)
        edges = sorted((p.get_x(), p.get_width()) for c in along.containers for p in c)
        assert [x for x, _ in edges] == [0, *np.cumsum([w for _, w in edges])[:-1]]
        assert f"{drawn.total:,}" in bar.get_title(loc="left")
    assert "loop, gfx942" in figure.axes[0].get_title(loc="left")


def test_picture_of_nothing(tmp_path):
    from pallas_kernels.cdna.picture import picture

    with pytest.raises(ValueError, match="results is empty"):
        picture([], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
