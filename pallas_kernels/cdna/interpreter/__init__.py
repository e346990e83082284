"""A functional interpreter of CDNA3 and CDNA4 machine code on numpy arrays.

`assembly` reads the text, `machine` holds registers and memory, `operands` fetches and writes with modifiers, then one
file per kind of instruction (`vector_alu`, `matrix`, `cross_lane`, `lds`, `memory_access`, `scalar_alu`), each with
a table from opcode to meaning; `control_flow` runs the waves of a grid.

Every instruction works on all waves that stand at it, so a wide grid costs little more than one workgroup. What is
modelled: results, bit for bit where the hardware rounds correctly. What is not: time, hazards, `s_waitcnt` (a missing
wait is not found), denormal modes (subnormals are kept), traps, and the last bit of the transcendental instructions,
which are rounded correctly here and to within one unit on the hardware.
"""
