"""Our kernels as gfx942 and gfx950 machine code: compiled by Triton or XLA:ROCm and executed by our interpreter.

The operators' own test modules run their contracts on both architectures through the fixture `implementation`. Here:
both compilers, head counts, resources at the shipped block sizes, races, repeats, the model, and mutations.
"""

import dataclasses
import itertools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from jax.experimental import pallas as pl
from support import attention, indexer, published, topk
from support.division import DIVISION, assert_same, quotients
from support.marks import rarely, slow

from pallas_kernels import _call, cdna, targets
from pallas_kernels.cdna import code_object, device_context
from pallas_kernels.cdna.interpreter import control_flow
from pallas_kernels.cdna.interpreter.assembly import parse
from pallas_kernels.cdna.program import LDS_BYTES, MAX_THREADS
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8, KINDS
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.serving.scoring import score

COMPILED = [(arch, compiler) for compiler in cdna.COMPILERS for arch in cdna.ARCHITECTURES]
RARE = published.RARE
ATTENTION_HEADS = (1, 6, 16, 64, 128)


@pytest.fixture(
    params=[slow(how, id="-".join(how)) if how == RARE else pytest.param(how, id="-".join(how)) for how in COMPILED]
)
def compiled(request):
    """A device for each architecture and compiler."""
    arch, compiler = request.param
    require_cdna(compiler)
    with cdna.device(arch, compiler=compiler) as device:
        yield device


# Rounding to nearest, and subnormals kept, in all float types: the only mode that the interpreter knows.
FLOAT_MODE = 0b1111_0000


def float_mode(kernel):
    """The mode that a kernel's waves start in."""
    (settings,) = struct.unpack_from("<I", code_object.descriptors(kernel.code_object)[kernel.name], 48)
    return settings >> 12 & 0xFF


def check_resources(device):
    """What every shipped kernel must respect; of a device, or of a published problem's execution."""
    assert device.launches, "no kernel was executed"
    kernels = list({id(launch.kernel): launch.kernel for launch in device.launches}.values())
    for kernel in kernels:
        r = kernel.resources
        assert (r.vgpr_spills, r.sgpr_spills, r.scratch) == (0, 0, 0), (kernel.name, r)
        assert r.lds <= LDS_BYTES[kernel.arch], (kernel.name, r)
        assert kernel.threads <= MAX_THREADS and r.vgprs <= 512, (kernel.name, r)
        assert float_mode(kernel) == FLOAT_MODE and "s_setreg" not in kernel.assembly, kernel.name


# --- results and resources -------------------------------------------------------------------------------------------
def heads_and_kinds():
    """(compiled, heads, kind): 6 (padded), 16 and 128, machines in turn; the others as slow tests."""
    often = [("gfx950", "triton", 6), ("gfx942", "triton", 16), ("gfx950", "xla", 16), ("gfx942", "triton", 128)]
    for how in COMPILED:
        for number, heads in enumerate(ATTENTION_HEADS):
            values = how, heads, FP8[number % 2]
            yield values if (*how, heads) in often else slow(*values)


@pytest.mark.parametrize(("compiled", "heads", "kind"), list(heads_and_kinds()), indirect=["compiled"], ids=str)
def test_attention_heads(compiled, heads, kind):
    """DeepSeek-V3.2's shapes: empty, short and ragged rows, NaN in every slot that no row names."""
    attention.Case(heads, kind, "bfloat16", 512, 64, 128, lengths=(0, 1, 17, 70)).verify("triton", sinks_too=False)
    check_resources(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("q_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", attention.KINDS)
@pytest.mark.parametrize("heads", ATTENTION_HEADS)
def test_attention_matrix(compiled, heads, kind, q_dtype, two):
    lengths = (0, 1, 15, 16, 17, 100, 33)
    attention.Case(heads, kind, q_dtype, 512, 64, 128, lengths=lengths, two=two).verify("triton", sinks_too=two)
    check_resources(compiled)


@published.group("sparse_mla_v4")
@pytest.mark.parametrize(("arch", "compiler"), rarely(COMPILED, [how for how in COMPILED if how != RARE]))
def test_keys_of_a_step_are_asked_for_together(arch, compiler):
    """No wait for memory between the loads of a key block's seven tiles."""
    kind = published.native(catalogue.kernel_case("sparse_mla_v4"), arch)
    (launch,) = published.measured("sparse_mla_v4", kind, arch, compiler).launches
    blocks = [block.instructions for block in parse(launch.kernel.assembly).blocks]
    loop = max(blocks, key=lambda block: sum("mfma" in i.opcode for i in block))
    loads = [n for n, i in enumerate(loop) if i.opcode == "global_load_dwordx4"][:7]
    assert len(loads) == 7
    assert not [i.text for i in loop[loads[0] : loads[-1]] if "vmcnt" in i.text]


def sizes(arch, compiler):
    """Parameters of every published case in both flavours, the foreign one as slow tests; so are most of XLA:ROCm."""
    for case in catalogue.KERNEL_CASES:
        for kind in published.kinds(case):
            marks = published.marks(case.name, kind, arch, compiler)
            yield pytest.param(arch, compiler, case.name, kind, marks=marks)


@pytest.mark.parametrize(("arch", "compiler", "name", "kind"), [p for how in COMPILED for p in sizes(*how)])
def test_published_sizes(arch, compiler, name, kind):
    executed = published.measured(name, kind, arch, compiler)
    assert executed.measurement.error <= executed.measurement.bound
    check_resources(executed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *itertools.product(["indexer", "paged_indexer", "sparse_mla", "norm_rope_query"], ATTENTION_HEADS),
        # Of other models: fewer indexer heads, and keys of other widths.
        *[("indexer", 32), ("paged_indexer", 32)],
        *[(f"sparse_mla_{form}", None) for form in ("narrow", "sinks", "nope", "wide")],
    ],
)
def test_published_sizes_of_other_heads(compiled, name, heads, kind):
    problem = catalogue.kernel_case(name).build(kind, heads)
    assert problem.error(jax.jit(problem.fn)(*problem.args)) <= problem.bound
    check_resources(compiled)


@pytest.mark.parametrize(("columns", "k"), [(1, 1), (2047, 512), (4097, 2048)])
def test_top_k_equals_a_stable_sort(compiled, columns, k):
    topk.check_rows(columns, k, 33, "triton")
    check_resources(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("k", topk.KS)
@pytest.mark.parametrize("columns", topk.COLUMNS)
def test_top_k_equals_a_stable_sort_everywhere(compiled, columns, k):
    topk.check_rows(columns, k, 33, "triton")
    check_resources(compiled)


def test_top_k_twenty_times(compiled):
    scores = np.round(np.random.default_rng(0).standard_normal((3, 5000)) * 2).astype(np.float32)
    select = jax.jit(lambda s: topk.top_k(s, 512, implementation="triton"))
    assert len({np.asarray(select(scores)).tobytes() for _ in range(20)}) == 1
    assert len(compiled.launches) == 20


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("shape", indexer.SHAPES, ids=["decode", "prefill"])
def test_indexer_with_poison(compiled, shape, kind):
    inputs, keys, slots = indexer.paged_inputs(kind, jnp.bfloat16, **shape)
    want = indexer.oracle(inputs[0], keys, inputs[1], slots)
    indexer.verify(indexer.paged, "triton", want, *inputs, max_length=slots.shape[1])
    check_resources(compiled)


# --- division --------------------------------------------------------------------------------------------------------
def divide(a_ref, b_ref, out_ref):
    i = pl.program_id(0) * 64 + jnp.arange(64, dtype=jnp.int32)
    _call.store(out_ref.at[i], _call.load(a_ref.at[i]) / _call.load(b_ref.at[i]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_division(compiled):
    """The sequence of the interpreter's own test is the compilers', and its quotients are rounded once."""
    a, b = quotients(seed=4, count=256)

    @jax.jit
    def run(a, b):
        out = jax.ShapeDtypeStruct(a.shape, a.dtype)
        how = {"out_shape": out, "grid": (a.size // 64, 1, 1), "name": "divide", "num_warps": 1}
        return targets.by_target(lambda target, *x: _call.call(divide, *x, target=target, **how), a, b)

    assert_same(np.asarray(run(a, b)), a / b)
    check_resources(compiled)
    sequence = [line.split()[0] for line in DIVISION.strip().splitlines()]
    emitted = [i.opcode for i in parse(compiled.launches[0].kernel.assembly).instructions]
    bare = [opcode.removesuffix("_e32") for opcode in sequence]
    start = emitted.index(bare[0])
    assert [o for o in emitted[start:] if o.startswith("v_")] == bare


# --- races -----------------------------------------------------------------------------------------------------------
def orders():
    """Parameters of every published case in every order of waves; one of the two that differ most is slow.

    "reverse" shows what "together" and "forward" hide alike: a wave that reads before an earlier one has written.
    """
    for case in catalogue.KERNEL_CASES:
        for order in control_flow.ORDERS[1:]:
            rare = [pytest.mark.slow] if order == "forward" or case.name in published.OTHER_SIZES else []
            yield pytest.param(case.name, order, marks=[published.group(case.name), *rare])


def test_orders_of_waves():
    assert control_flow.ORDERS == ("together", "forward", "reverse")


@pytest.mark.parametrize(("name", "order"), list(orders()))
@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_the_order_of_waves_does_not_matter(arch, name, order):
    kind = published.native(catalogue.kernel_case(name), arch)
    together, other = (published.measured(name, kind, arch, order=o).output_bytes for o in ("together", order))
    assert together == other


# --- the model -------------------------------------------------------------------------------------------------------
def check_fixture(folder, arch, compiler, tokens):
    require_cdna(compiler)
    config, params = load_checkpoint(folder, dtype="float32")
    expected = np.load(folder / "expected.npz")
    ids, logits = expected["input_ids"], expected["logits"]
    with cdna.device(arch, compiler=compiler) as device:
        got = score(
            params,
            config,
            ids[:, :tokens],
            prompt_length=8,
            cache_dtype="float32",
            implementation="triton",
        )
    assert {launch.kernel.name for launch in device.launches} >= {"top_k", "sparse_mla"}
    np.testing.assert_allclose(got, logits[:, :tokens], rtol=0, atol=5e-5)


# More tokens on both architectures, by another way: in test_model.
@pytest.mark.parametrize("arch", rarely(list(cdna.ARCHITECTURES), ["gfx950"]))
def test_fixture_logits(fixtures, arch):
    check_fixture(fixtures / "deepseek_v32_tiny", arch, "triton", 12)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "compiler"), COMPILED)
def test_fixture_logits_of_the_whole_file(fixtures, arch, compiler):
    check_fixture(fixtures / "deepseek_v32_tiny", arch, compiler, None)


# --- mutations -------------------------------------------------------------------------------------------------------
def without_line(kernel, line):
    """The kernel with one line of its assembly made a comment."""
    lines = kernel.assembly.splitlines()
    lines[line - 1] = f"; {lines[line - 1]}"
    return dataclasses.replace(kernel, assembly="\n".join(lines))


# The equivalence tests that a mutant must get past, per kernel; inputs and answers are made once for all mutants.
def attention_suite():
    case = attention.Case(6, "float8_e4m3fnuz", "bfloat16", 128, 64, 128, lengths=(0, 1, 15, 16, 17, 100))
    q, ((cache, rows, keys, plain),), _ = case.build()
    want = attention.oracle(q, [(keys, plain)], case.latent)
    how = dict(bounds=case.bounds("triton"), value_dim=case.latent)
    return lambda: attention.verify("triton", want, q, cache, rows, **how)


def top_k_suite():
    batches = [(topk.oracle(s, 512, *interval), s, 512, *interval) for s, *interval in topk.cases(2047, 512, 33)]
    return lambda: [topk.select.check("triton", *batch) for batch in batches]


SUITES = {
    "sparse_mla": attention_suite,
    "ragged_indexer_logits": lambda: lambda: indexer.check_contiguous("triton", "float8_e4m3fnuz"),
    "top_k": top_k_suite,
}
TRIALS = 10


def why_unseen(instruction):
    """Why results can not show that an instruction is gone."""
    if instruction.opcode == "s_barrier":
        return "waves take turns in orders in which the data is there already"
    if instruction.opcode.startswith("s_cbranch_exec"):
        return "skips a region that no active lane would change"
    return "its result is zero, the same as before, or not read in these inputs"


def noticed(suite, turns, order):
    """Whether the tests of a suite fail while waves take turns in this order."""
    turns["order"] = order
    try:
        suite()
    except (AssertionError, RuntimeWarning):  # numpy warns of the NaN before the comparison sees it
        return True
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        assert "InterpreterError" in str(error), error
        return True
    return False


def survivors(name, arch, monkeypatch):
    """Instructions of one kernel that could be deleted without its tests noticing, and why."""
    suite, mutant, turns = SUITES[name](), {}, {"order": "together", "budget": None}

    def execute(kernel, arrays, order, budget):
        del order, budget
        return cdna.execute(mutant.get(kernel.assembly, kernel), arrays, **turns)

    monkeypatch.setattr(device_context, "execute", execute)
    found = []
    with cdna.device(arch) as device:
        suite()
        first = device.launches[0].kernel
        same = [launch.counts.per_block for launch in device.launches if launch.kernel.assembly == first.assembly]
        executions = dict(
            (i.line, n)
            for i, n in dataclasses.replace(device.launches[0].counts, per_block=sum(same)).per_instruction()
        )
        # Waves of short rows end early, so the longest wave executes more than the average one.
        waves = max(int(np.prod(launch.kernel.grid)) * -(-launch.kernel.threads // 64) for launch in device.launches)
        turns["budget"] = 4 * max(launch.counts.total for launch in device.launches) // waves * 4
        # Not drawn: what no result can show, waits and hazards, and what these inputs never reach.
        everything = parse(first.assembly).instructions
        instructions = [i for i in everything if i.opcode not in ("s_nop", "s_waitcnt") and executions[i.line]]
        rng = np.random.default_rng([sum(name.encode()), sum(arch.encode())])
        for k in rng.choice(len(instructions), TRIALS, replace=False):
            mutant[first.assembly] = without_line(first, instructions[k].line)
            # Waves one after the other, backwards: a barrier that is gone shows only so.
            if any(noticed(suite, turns, order) for order in ("together", "reverse")):
                continue
            found.append((name, arch, instructions[k], why_unseen(instructions[k])))
        return found


# Each suite on one machine by default; on both, 60 mutants.
@pytest.mark.parametrize("machines", [1, slow(2)])
def test_deleted_instructions_are_noticed(machines, monkeypatch):
    """Those that no test notices are listed with the reason."""
    require_cdna("triton")
    archs = cdna.ARCHITECTURES
    chosen = [(name, archs[(n + i) % 2]) for n, name in enumerate(SUITES) for i in range(machines)]
    unnoticed = [survivor for name, arch in chosen for survivor in survivors(name, arch, monkeypatch)]
    for name, arch, instruction, reason in unnoticed:
        print(f"{name} on {arch}, line {instruction.line}: {instruction.text}: {reason}")
    trials = len(chosen) * TRIALS
    assert trials == 30 * machines and len(unnoticed) <= 0.25 * trials
