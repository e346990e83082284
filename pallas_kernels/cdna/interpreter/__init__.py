"""A functional interpreter of CDNA3 and CDNA4 machine code on numpy arrays.

`assembly` parses the text. `dispatch` describes a launch and checks it against what the kernel was granted and what
the machine has. `machine` holds registers and memory. `operands` reads operands and writes results with
their modifiers. Each kind of instruction has a file (`vector_alu`, `matrix`, `cross_lane`, `lds`, `memory_access`,
`scalar_alu`) with a table from opcode to meaning. `control_flow` runs the waves of a grid.

One numpy operation executes an instruction for all waves that are at it, so a wide grid costs little more than one
workgroup. The interpreter models results, bit for bit if the hardware rounds correctly. It does not model time,
hazards, `s_waitcnt` (a missing wait is not detected), denormal modes (subnormals are kept) or traps. Transcendental
instructions are rounded correctly here, but only to within one ulp on the hardware, so the last bit may differ.
"""
