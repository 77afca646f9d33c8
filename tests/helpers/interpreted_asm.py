"""Lets Triton's interpreter run the kernels' inline assembly: straight-line 32-bit PTX, executed with numpy.

Importing this module replaces the interpreter's "not implemented" by an emulator of the few instructions the kernels
use. An operand is a tensor whose elements fill 32-bit words in groups of `pack`; an output may take several words a
group (four fp16 values are two registers).

It also replaces the interpreter's float32 to e4m3, which loses the carry where a mantissa rounds up to the next power
of two, by torch's, which rounds half to even as the GPU does; and its fused multiply-add of float32, which Triton 3.6
rounds twice, by one in twice the digits, and its minimum and maximum, where 3.6 lets NaN through.
"""

import re
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _half(word):
    return word.view(np.float16)


def _lop3(a, b, c, table):
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            terms = [value if i >> (2 - j) & 1 else ~value for j, value in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _prmt(a, b, selector):
    """Byte permute: nibble n of the selector picks byte 0-3 of a or 4-7 of b, or its sign, for byte n of the result."""
    pool = np.stack([(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for n in range(4):
        picked = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = np.take_along_axis(pool, (picked & np.uint32(7))[None].astype(np.int64), 0)[0]
        # Bit 3 of a nibble asks for the byte's sign in all of its bits.
        byte = np.where(picked > 7, np.where(byte > 127, np.uint32(255), np.uint32(0)), byte)
        result |= byte << np.uint32(8 * n)
    return result


OPERATIONS = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "sub.rn.f16x2": lambda a, b: (_half(a) - _half(b)).view(np.uint32),
    "sub.f16x2": lambda a, b: (_half(a) - _half(b)).view(np.uint32),
}


def run_ptx(text, outputs, inputs):
    """Executes the block `text`; returns the words of registers $0 .. $outputs-1."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    shape = inputs[0].shape

    def value(operand):
        return registers[operand] if operand in registers else np.full(shape, int(operand, 0), np.uint32)

    for statement in text.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        operation, operands = statement.split(None, 1)
        target, *sources = re.split(r"\s*,\s*", operands.strip())
        if operation == "lop3.b32":
            registers[target] = _lop3(*(value(s) for s in sources[:3]), int(sources[3], 0))
        else:
            registers[target] = OPERATIONS[operation](*(value(s) for s in sources))
    return [registers[f"${i}"] for i in range(outputs)]


def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
    shape = values[0].data.shape
    words = []
    for operand in values:
        data = np.ascontiguousarray(np.broadcast_to(operand.data, shape)).reshape(-1)
        assert data.itemsize * pack == 4, "inputs must fill one 32-bit register a group"
        words.append(data.view(np.uint32))
    results = iter(run_ptx(text, constraints.count("="), words))
    handles = []
    for type_ in (getattr(t, "scalar", t) for t in types):
        numpy_type = np.dtype(interpreter._get_np_dtype(type_))
        registers = [next(results) for _ in range(numpy_type.itemsize * pack // 4)]
        data = np.stack(registers, axis=1).reshape(-1).view(numpy_type).reshape(shape)
        handles.append(interpreter.TensorHandle(data, type_))
    return SimpleNamespace(get_result=lambda i: handles[i])


interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm

_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp


def create_fp_to_fp(self, source, type_, rounding):
    if source.dtype.scalar != tl.float32 or type_.scalar != tl.float8e4nv:
        return _fp_to_fp(self, source, type_, rounding)
    data = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return interpreter.TensorHandle(data.reshape(source.data.shape), type_.scalar)


interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def create_fma(self, x, y, z):
    # In float64 the product of two float32 numbers is exact; rounding the sum there first, to 53 bits, is the one
    # difference from a fused multiply-add, and needs a sum within 2^-29 of the middle between two float32 numbers.
    wide = np.float64 if z.data.dtype == np.float32 else z.data.dtype
    total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = create_fma
interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
