"""Compiles a Triton kernel for a GPU that is not there, and reads from the machine code what it will cost.

    report = compile_report(kernel, {"x_ptr": "*i8", "K": "i32"}, {"BK": 128}, target="sm_90", num_warps=4)
    report.registers, report.spills, report.shared, report.count("wgmma"), report.sass["PRMT"]

Registers and spills are ptxas's own figures; instruction counts are of the SASS that nvdisasm prints; both tools come
with Triton. Shared memory is Triton's figure: compiling does not check it against the chip, `fits` does. For AMD's
gfx942 everything is read from the assembly that Triton's AMD backend writes; there the kernels take their plain paths
(ASM=False), and only compiling is tried: `dispatch` does not use them on AMD.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

TARGETS = {"sm_75": 75, "sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
_ARCHITECTURE = {"sm_90": "sm_90a", "sm_100": "sm_100a"}
_KIBIBYTES = {"sm_75": 64, "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
_WARPS = {"sm_75": 32, "sm_89": 48}
_REGISTER_FILE = 65536


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled kernel costs: registers a thread, bytes spilled, bytes of shared memory, instructions.

    `waits` are, in program order, how many warpgroup products may still run behind each wait for them (sm_90).
    `warnings` are ptxas's of serialized warpgroup products (C75xx), `hazards` what `early_writes` finds. For gfx942
    `sass` counts the instructions of its assembly, which also stands in `ptx`; `binary` is then empty.
    """

    target: str
    registers: int
    spills: int
    shared: int
    warps: int
    ptx: str
    warnings: tuple[str, ...]
    binary: bytes = dataclasses.field(repr=False)
    waits: tuple[int, ...] = ()

    @functools.cached_property
    def _listing(self) -> str:
        # Disassembling takes as long as compiling, so that it waits until somebody asks for it.
        return _disassemble(self.binary) if self.binary else ""

    @functools.cached_property
    def sass(self) -> collections.Counter[str]:
        """How often each machine instruction occurs, by its name without modifiers."""
        if not self.binary:
            return collections.Counter(re.findall(r"^\s+([a-z]\w+)", self.ptx, re.M))
        instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)"
        return collections.Counter(re.findall(instruction, self._listing, re.M))

    @functools.cached_property
    def accesses(self) -> dict[str, int]:
        """How often global memory is accessed, by kind and width in bits where it is not 32: "LDG.128", "STG", ..."""
        found = re.findall(r"\b(LDG|STG|RED|ATOMG)\.E((?:\.\w+)*)", self._listing)
        widths = [(kind, re.search(r"\.(U8|U16|64|128)\b", rest)) for kind, rest in found]
        return dict(collections.Counter(kind + (width[0] if width else "") for kind, width in widths))

    @functools.cached_property
    def before_wait(self) -> frozenset[str]:
        """Memory instructions that stand before the wait for the kernel before (griddepcontrol.wait), or anywhere.

        "CCTL.PF2" is a request to the L2 cache. Constants, which hold the arguments, and barriers are left out.
        """
        code = self._listing.split("ACQBULK")[0]
        kinds = r"(LD\w*|ST\w*|RED\w*|ATOM\w*|CCTL\w*|UTMA\w*|UBLK\w*)(\.[\w.]*)?"
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?" + kinds, code, re.M)
        named = {name + (".PF2" if ".PF2" in (rest or "") else "") for name, rest in found}
        return frozenset(named - {"LDC"})

    @functools.cached_property
    def loop(self) -> collections.Counter[str]:
        """`sass` of the loops with a warpgroup product alone."""
        names = re.findall(r"^(?:@!?U?P\d+\s+)?([A-Z0-9]+)", "\n".join(_loops_twice(self._listing)[1]), re.M)
        return collections.Counter(names)

    @functools.cached_property
    def hazards(self) -> tuple[str, ...]:
        """Instructions that overwrite an operand of a product too early; none are looked for on gfx942."""
        return early_writes(self._listing)

    def count(self, instruction: str) -> int:
        """How often a PTX instruction whose name starts with `instruction` occurs."""
        return len(re.findall(rf"^\s*(?:@!?%p\d+ )?{re.escape(instruction)}", self.ptx, re.M))

    @property
    def int8_products(self) -> int:
        """Tensor-core instructions on int8 operands with int32 sums."""
        products = r"(?:wgmma\.mma_async|mma\.sync)[\w.:]*\.s32\.s8\.s8|v_mfma_i32_\w*_i8"
        return len(re.findall(products, self.ptx))

    @property
    def e4m3_products(self) -> int:
        """Tensor-core instructions on e4m3 operands with float32 sums."""
        products = r"(?:wgmma\.mma_async|mma\.sync)[\w.:]*\.f32\.e4m3\.e4m3|tcgen05\.mma[\w.:]*kind::f8f6f4"
        return len(re.findall(products, self.ptx))

    @property
    def register_operands(self) -> int:
        """Warpgroup products whose left operand comes from registers, not from shared memory."""
        return len(re.findall(r"wgmma\.mma_async[^;]*?\},\s*\{", self.ptx, re.S))

    @property
    def fits(self) -> bool:
        """Whether the target has the shared memory."""
        return self.shared <= _KIBIBYTES[self.target] * 1024

    @property
    def programs_per_processor(self) -> int:
        """How many programs run on one processor at a time, by registers and shared memory."""
        by_registers = _REGISTER_FILE // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_memory = _KIBIBYTES[self.target] * 1024 // max(self.shared, 1)
        return min(by_registers, by_memory, _WARPS.get(self.target, 64) // self.warps)


def compile_report(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    target: str,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Report:
    """Compiles `kernel` for one of `TARGETS` and reads the result.

    `types` gives a Triton type ("*i8", "i32", "fp32") for every argument that is not in `constants`. Pointers, strides
    and the integers in `aligned` are taken to be multiples of 16, as Triton finds out at a launch for encoder sizes.
    `options` are num_warps, num_stages, maxnreg.
    Raises ValueError for an unknown target, RuntimeError with ptxas's message where it refuses.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {sorted(TARGETS)}, got {target!r}.")
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    multiples = [n for n, type_ in types.items() if type_.startswith("*") or n.startswith("stride") or n in aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    if target == "gfx942":
        compiled = triton.compile(source, target=GPUTarget("hip", TARGETS[target], 64), options=options)
        return _amd_report(compiled.asm["amdgcn"], compiled.metadata.shared, options.get("num_warps", 4))
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options=options)
    ptx = compiled.asm["ptx"]
    messages, binary = _assemble(ptx, target)
    used = re.search(r"Used (\d+) registers", messages)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas did not report registers and spills: {messages[-400:]}")
    return Report(
        target=target,
        registers=int(used[1]),
        spills=int(spilled[1]) + int(spilled[2]),
        shared=compiled.metadata.shared,
        warps=options.get("num_warps", 4),
        ptx=ptx,
        warnings=tuple(re.findall(r"\(C75\d\d\)[^\n]*|C75\d\d[^\n]*", messages)),
        binary=binary,
        waits=tuple(map(int, re.findall(r"warp_group_dot_wait.*pendings = (\d+)", compiled.asm["ttgir"]))),
    )


def _amd_report(assembly: str, shared: int, warps: int) -> Report:
    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly does not report its {name}.")
        return int(found[1])

    return Report(
        target="gfx942",
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count") + count("sgpr_spill_count"),
        shared=shared,
        warps=warps,
        ptx=assembly,
        warnings=(),
        binary=b"",
    )


_WIDTHS = {".64": 2, ".WIDE": 2, ".128": 4, ".M88.4": 4}


def early_writes(sass: str) -> tuple[str, ...]:
    """Instructions that overwrite a warpgroup product's register operand before the wait for that product.

    Triton and ptxas have been seen to emit such code (triton-lang/triton issue 9433, pull request 11781): the product
    may then read the new value. A scan in program order, through every loop that multiplies twice, so that a step's
    products still run when the next step begins; it does not prove the pattern's absence across other branches.
    """
    lines, _ = _loops_twice(sass)
    running: list[set[int]] = []  # operands of the groups of products that may not be done, oldest first
    group: set[int] = set()  # those of products since the last one that ends a group
    found = []
    for line in lines:
        text = re.sub(r"^@!?U?P\d+\s+", "", line)
        product = re.match(r"[IHQ]GMMA\S*\s+R\d+,\s*(?:R(\d+)|gdesc)", text)
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text)
        write = re.match(r"([A-Z0-9_.]+)\s+(?:U?P\d+,\s*)?R(\d+)\b", text)
        if product:
            group |= set(range(int(product[1]), int(product[1]) + 4)) if product[1] else set()
            if "gsb0" in text:
                running, group = [*running, group], set()
        elif wait:
            running = running[max(0, len(running) - int(wait[1], 16)) :]
        elif line.startswith(("BRA", "EXIT")):
            running, group = [], set()  # what stands below is reached from elsewhere
        elif write and not re.match(r"(ST|RED|BAR|LDGSTS|UTMA)", write[1]):
            width = next((w for suffix, w in _WIDTHS.items() if suffix in write[1]), 1)
            written = range(int(write[2]), int(write[2]) + width)
            if any(operands.intersection(written) for operands in [*running, group]):
                found.append(text)
    return tuple(found)


def _loops_twice(sass: str) -> tuple[list[str], list[str]]:
    """All instructions, loops with a warpgroup product repeated once, and those of these loops alone, once."""
    places: dict[str, int] = {}
    code: list[str] = []
    loops: list[str] = []
    for instruction, label in re.findall(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+([^;]*);|(\.L_\w+):)", sass, re.M):
        if label:
            places[label] = len(code)
            continue
        code.append(instruction)
        back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if back and back[1] in places and any("GMMA" in line for line in code[places[back[1]] :]):
            body = code[places[back[1]] :]
            code, loops = code + body, loops + body
    return code, loops


def _assemble(ptx: str, target: str) -> tuple[str, bytes]:
    """ptxas's messages and its output."""
    ptxas = nvidia.get_ptxas(TARGETS[target]).path
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={_ARCHITECTURE.get(target, target)}", str(source), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"ptxas refuses the kernel: {run.stderr[-400:]}")
        return run.stderr, binary.read_bytes()


def _disassemble(binary: bytes) -> str:
    """The machine code of a cubin, as nvdisasm prints it."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([str(nvdisasm), "-c", file.name], capture_output=True, text=True, check=True).stdout
