"""How fast would this kernel run on a TPU? Asked on a machine that has none.

libtpu compiles for any chip on a CPU host and can write down the final VLIW bundles of every program. A TPU core issues one bundle a
cycle and its scalar unit alone decides where control goes. So this file *executes the scalar half* of those bundles (grid loop, inner
loops, predicated regions, block-skip tables, DMA starts and waits), counts a cycle for each bundle, and leaves the vector half alone:

    cycles  = bundles executed                                compute = cycles / clock
    bytes   = sizes of the DMAs started                       dma     = bytes / bandwidth of HBM
    predicted = max(compute, dma)                             stalled = compute + waits for DMAs that were not there in time

Every branch is taken as the chip would take it, because grid indices, block-skip tables and prefetched scalars are known: concrete
arrays among `args` (and constants of the function) are known to the scalar program, `jax.ShapeDtypeStruct`s are not. Masked and unmasked
bodies are thus counted apart by themselves. Where a branch depends on data that is not known, the body is taken, or taken as often as
`trips` says; `Profile.assumed` lists these places.

    from tpu_static import profile
    x = jax.ShapeDtypeStruct((8, 16384, 256), jnp.bfloat16)
    p = profile(kernel, (x, x, x), chip="v6e", flops=4 * 8 * 16384**2 * 256)
    print(p)                                                # the table
    p.ms, p.tflops, p.cycles, p.dma_ms, p.spill_share       # figures
    p.programs["splash_mha_fwd"].share["mxu"]               # one kernel's slots
    profile(grad, args, chip="v5p", only="bwd|dkv|dq")      # count only programs whose name matches
    profile(ragged, args, chip="v6e", trips={"if0": 0.25, "loop0": 12})

    python kernels/bench/tpu_static.py MODULE:FUNCTION --chip v6e --chip v5p        # FUNCTION() gives (fn, args) or (fn, args, flops)

Not modelled: stalls inside the core (result FIFOs, bank conflicts of VMEM, instruction fetch), clock changes under heat or power,
HBM refresh and page misses (bandwidth is the data sheet's; strided DMAs count as full rate), DMAs that disturb each other, launch
time, traffic on ICI, the second core of a chip waiting for the first (each core runs alone; the slower one counts), and the values of
data: a loop or branch that depends on an unknown is what `trips` says. XLA's own fusions are counted in the same way, each once: a
program inside an XLA while loop must be multiplied by the caller.
"""

import argparse
import collections
import dataclasses
import glob
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chip:
    """One JAX device. clock in Hz; bandwidth in bytes/s and flops (bf16, dense) of the whole device; topology: the least libtpu knows."""

    topology: str
    clock: float
    cores: int
    bandwidth: float
    flops: float
    latency: float = 1e-6       # from the start of a DMA to its first byte


# Public data sheets; clocks from peak / (MXUs x size^2 x 2). A v5p device is a chip of two cores; a tpu7x device is one of its chip's two.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 1, 819e9, 197e12),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2, 2765e9, 459e12),
    "v6e": Chip("v6e:2x2", 1.75e9, 1, 1640e9, 918e12),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 1, 3690e9, 1153.5e12),
}
GRANULE = 32                    # bytes that a DMA's size is counted in
DELAY = 4                       # bundles after a branch that still run
# libtpu before 0.0.51 counts products and pushes of weights in one column, MXU.
SLOTS = {"mxu": ("MATMUL", "MXU"), "push": ("MATPUSH",), "xlu": ("XLU",), "valu": ("VALU",), "pop": ("VPOP",), "eup": ("EUP",),
         "load": ("VLOAD",), "fill": ("VLOAD:FILL",), "store": ("VSTORE",), "spill": ("VSTORE:SPILL",), "scalar": ("SALU",)}


# --- what is reported -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Bundles that run one after the other. used: slots taken by one run, by name of slot."""

    start: int
    bundles: int
    runs: int
    used: dict[str, int]

    @property
    def cycles(self) -> int:
        return self.bundles * self.runs


@dataclass(frozen=True)
class Program:
    """One kernel or fusion on the slowest core. overhead: cycles of bundles that hold no vector work and lie in blocks without any."""

    name: str
    clock: float
    bandwidth: float            # of one core
    cycles: int
    stalled_cycles: float       # with waits for DMAs
    bytes: float                # moved between HBM and the core
    vmem: int
    blocks: tuple[Block, ...]
    capacity: dict[str, int]    # slots of a bundle
    assumed: tuple[str, ...]

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.dma_ms)

    @property
    def compute_ms(self) -> float:
        return self.cycles / self.clock * 1e3

    @property
    def dma_ms(self) -> float:
        return self.bytes / self.bandwidth * 1e3

    @property
    def stalled_ms(self) -> float:
        return self.stalled_cycles / self.clock * 1e3

    @property
    def overhead(self) -> float:
        """Share of cycles in blocks that hold no vector work at all: grid loop, DMA control, branches."""
        vector = set(self.capacity) - {"scalar"}
        return sum(b.cycles for b in self.blocks if not any(b.used[slot] for slot in vector)) / max(self.cycles, 1)

    def count(self, slot: str) -> int:
        return sum(b.used[slot] * b.runs for b in self.blocks)

    @property
    def share(self) -> dict[str, float]:
        """Of all slots of a kind, those in use; "spill" of store slots in use, "fill" of load slots in use."""
        shares = {slot: self.count(slot) / max(self.cycles * n, 1) for slot, n in self.capacity.items()}
        shares["spill"] = self.count("spill") / max(self.count("store"), 1)
        shares["fill"] = self.count("fill") / max(self.count("load"), 1)
        return shares


@dataclass(frozen=True)
class Profile:
    chip: str
    programs: dict[str, Program]
    flops: float | None = None
    not_counted: tuple[str, ...] = ()       # programs that `only` left out

    @property
    def ms(self) -> float:
        """Predicted: each program's max(compute, DMA), added up."""
        return sum(p.ms for p in self.programs.values())

    @property
    def stalled_ms(self) -> float:
        return sum(p.stalled_ms for p in self.programs.values())

    @property
    def compute_ms(self) -> float:
        return sum(p.compute_ms for p in self.programs.values())

    @property
    def dma_ms(self) -> float:
        return sum(p.dma_ms for p in self.programs.values())

    @property
    def cycles(self) -> int:
        return sum(p.cycles for p in self.programs.values())

    @property
    def bytes(self) -> float:
        return sum(p.bytes for p in self.programs.values()) * CHIPS[self.chip].cores

    @property
    def vmem(self) -> int:
        return max((p.vmem for p in self.programs.values()), default=0)

    @property
    def tflops(self) -> float | None:
        return self.flops / self.ms / 1e9 if self.flops and self.ms else None

    @property
    def peak_share(self) -> float | None:
        return self.tflops and self.tflops * 1e12 / CHIPS[self.chip].flops

    @property
    def spill_share(self) -> float:
        return sum(p.count("spill") for p in self.programs.values()) / max(sum(p.count("store") for p in self.programs.values()), 1)

    @property
    def assumed(self) -> tuple[str, ...]:
        return tuple(f"{p.name}: {text}" for p in self.programs.values() for text in p.assumed)

    def figures(self) -> dict[str, Any]:
        """What a result file keeps."""
        names = ("chip", "ms", "tflops", "peak_share", "compute_ms", "dma_ms", "stalled_ms", "bytes", "vmem", "spill_share")
        rounded = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
        programs = {
            p.name: {k: rounded(v) for k, v in {"cycles": p.cycles, "overhead": p.overhead, "assumed": list(p.assumed), **p.share}.items()}
            for p in self.programs.values()
        }
        return {name: rounded(getattr(self, name)) for name in names} | {"programs": programs}

    def __str__(self) -> str:
        head = f"{self.chip}: {self.ms:.4g} ms"
        if self.tflops is not None:
            head += f", {self.tflops:.1f} TFLOP/s ({self.peak_share:.0%} of peak)"
        head += f"; compute {self.compute_ms:.4g} ms, DMA {self.dma_ms:.4g} ms ({self.bytes / 1e6:.1f} MB)"
        head += f", with waits {self.stalled_ms:.4g} ms"
        lines = [head, f"{'program':32} {'cycles':>12} {'ms':>8} {'dma ms':>8} {'waits':>8} {'vmem K':>7} {'ovhd':>5}  "
                 + " ".join(f"{slot:>6}" for slot in SLOTS)]
        percent = lambda x: f"{100 * x:5.1f}%"
        small = [p for p in self.programs.values() if p.stalled_ms < 0.01 * self.stalled_ms]
        if len(small) > 3:
            together = f"{sum(p.ms for p in small):.4g} ms, with waits {sum(p.stalled_ms for p in small):.4g} ms"
            lines.append(f"{len(small)} programs of less than 1 % each: {together}")
        for p in self.programs.values():
            if len(small) > 3 and p in small:
                continue
            lines.append(f"{p.name[:32]:32} {p.cycles:12,} {p.compute_ms:8.4g} {p.dma_ms:8.4g} {p.stalled_ms:8.4g} {p.vmem // 1024:7} "
                         f"{100 * p.overhead:4.1f}%  " + " ".join(f"{percent(p.share.get(slot, 0.0)):>6}" for slot in SLOTS))
            for b in sorted(p.blocks, key=lambda b: -b.cycles)[:12]:
                if b.cycles > 0.02 * p.cycles and len(p.blocks) > 1:
                    use = {slot: b.used[slot] / (b.bundles * n) for slot, n in p.capacity.items()}
                    use |= {"spill": b.used["spill"] / max(b.used["store"], 1), "fill": b.used["fill"] / max(b.used["load"], 1)}
                    lines.append(f"  {f'{b.start:#x}: {b.bundles} bundles x {b.runs}':46} {percent(b.cycles / p.cycles)} of cycles"
                                 f"{'':16} " + " ".join(f"{percent(use.get(slot, 0.0)):>6}" for slot in SLOTS))
        lines += [f"assumed: {text}" for text in self.assumed]
        return "\n".join(lines)


def profile(
    fn: Callable,
    args: Sequence[Any],
    flops: float | None = None,
    *,
    chip: str = "v6e",
    trips: dict[str, float] | None = None,
    only: str | None = None,
    flags: str = "",
) -> Profile:
    """Compile fn(*args) for one device of a chip and predict its time.

    args: arrays (the scalar program knows their values) or ShapeDtypeStructs (it does not), or trees of them. flops: useful work, for
    TFLOP/s.
    trips: for branches ("if0") and loops ("loop0") that depend on unknown data: the share of times the body runs, the number of rounds.
    only: a regular expression; programs whose name it does not match are left out (a backward pass whose forward stands before it).
    flags: more for libtpu, e.g. "--xla_tpu_scoped_vmem_limit_kib=65536" for kernels that do not ask for the memory they need.

    Runs in a process of its own, for libtpu reads its flags once. Raises ValueError when the compiler refuses the function or the rounds
    of a loop are not known.
    """
    if chip not in CHIPS:
        raise ValueError(f"the profiler knows the chips {', '.join(CHIPS)}; got {chip!r}")
    import cloudpickle

    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request")
        request.write_bytes(cloudpickle.dumps((fn, tuple(args), chip, trips or {}, only)))
        flags += f" --xla_jf_dump_to={folder}/dump --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"
        unwanted = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")
        environment = {k: v for k, v in os.environ.items() if k not in unwanted} | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": flags.strip(),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        child = subprocess.run([sys.executable, __file__, "--child", folder], env=environment, capture_output=True, text=True)
        answer = Path(folder, "answer")
        if not answer.exists():
            raise ValueError(f"{chip} refuses this function: {child.stderr.strip()[-3000:]}")
        programs, left_out = pickle.loads(answer.read_bytes())
    built = [Program(**{**p, "blocks": tuple(Block(**b) for b in p["blocks"])}) for p in programs]
    return Profile(chip, {p.name: p for p in built}, None if flops is None else float(flops), left_out)


PASSES = "final_bundles|final_hlo-static|original"


# --- bundles ----------------------------------------------------------------------------------------------------------------------


REGIONS = re.compile(r"Start(?:/End empty)? region (\d+)")
BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +([A-Z]{2})? *: *(?:> *)*\{(.*)\}(?: *@([\d,]*))? *$")
INSTRUCTION = re.compile(r"^(?:%(\w+) = )?([\w.]+)(.*)$")
PREDICATE = re.compile(r"\((!?)%(p\w+)(?:, %(\w+))?\)")
OPERAND = re.compile(r"\[smem:\[[^]]*\]\]|(?:\w+=)?(?:\[[^]]*\]|%\w+|\$\w+|-?\d[\w.+-]*)")
SPILL = re.compile(r"\[smem:\[(#allocation\d+_spill)\]\]")


@dataclass(frozen=True)
class Instruction:
    """dest = op(operands) if the predicate holds (or does not, when negated), else `otherwise`. Names are SSA names with the register at
    the end: s17_s3 is value 17 in register s3. offset: its bundle's place in the block."""

    dest: str | None
    op: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    otherwise: str | None


def parse(text: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    """The scalar, control and DMA instructions of each bundle, and the bundle at which each region starts."""

    def comment(match: re.Match) -> str:
        return f" @{','.join(found)}" if (found := REGIONS.findall(match[0])) else ""

    bundles: list[list[Instruction]] = []
    regions: dict[str, int] = {}
    nameless: list[int] = []
    text = re.sub(r"/\*(\w+)=\*/", r"\1=", text)          # labels of operands; they also stand within comments
    for line in re.sub(r"/\*.*?\*/", comment, text, flags=re.S).splitlines():
        if not (match := BUNDLE.match(line)):
            continue
        assert int(match[1], 16) == len(bundles), f"bundle {match[1]} follows {len(bundles) - 1:#x}"
        for name in filter(None, (match[4] or "").split(",")):
            regions.setdefault(name, len(bundles))
        if match[2] and not match[4]:
            nameless.append(len(bundles))
        found = [i for part in match[3].split(" ;; ") if (i := instruction(part.strip()))]
        bundles.append(sorted(found, key=lambda i: i.op != "sphi"))     # the others of its bundle read what a phi gives
    for at, bundle in enumerate(bundles):
        for i in bundle:
            if i.op.startswith("sbr") and (name := i.operands[-1].removeprefix("$region")) not in regions:
                # a way out whose label gave way to another comment: the next label without a name
                regions[name] = next(label for label in nameless if label > at)
    return bundles, regions


def instruction(text: str) -> Instruction | None:
    """None for what the vector units do for themselves."""
    match = INSTRUCTION.match(text)
    if not match:
        return None
    dest, op, rest = match.groups()
    if not (dest and re.fullmatch(r"[sp]\d+_[sp]\d+", dest)):
        dest = None
        if not op.startswith(("sst", "dma", "sbr", "scall", "sret")):
            return None
    if op.startswith("inlined_call_operand") and (index := re.search(r"index: (\d+)", rest)):
        return Instruction(dest, op, (index[1],), None, False, None)
    predicate = PREDICATE.search(rest)
    rest = re.sub(r"\[(?:thread|resolvable):[^]]*\]", "", PREDICATE.sub("", rest))
    if predicate is None:
        return Instruction(dest, op, tuple(OPERAND.findall(rest)), None, False, None)
    return Instruction(dest, op, tuple(OPERAND.findall(rest)), predicate[2], bool(predicate[1]), predicate[3])


# --- the scalar program, as Python ------------------------------------------------------------------------------------------------


class Unknown:
    """A scalar that depends on data. It swallows arithmetic, and only a branch minds it."""

    def __repr__(self) -> str:
        return "?"

    def _self(self, *_: Any) -> "Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = _self
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __neg__ = _self  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __or__(self, other: Any) -> Any:
        return 1 if other is True else self         # a predicate

    def __and__(self, other: Any) -> Any:
        return other if not isinstance(other, Unknown) and other == 0 else self

    def __mul__(self, other: Any) -> Any:
        return 0 if isinstance(other, int) and other == 0 else self

    __ror__, __rand__, __rmul__ = __or__, __and__, __mul__


UNKNOWN: Any = Unknown()


def word(x: Any) -> Any:
    """As a signed 32-bit integer."""
    return x if x is UNKNOWN or -(1 << 31) <= x < 1 << 31 else ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def unsigned(x: Any) -> Any:
    return x if x is UNKNOWN else x & 0xFFFFFFFF


def pick(predicate: Any, yes: Any, no: Any) -> Any:
    if predicate is UNKNOWN:
        return yes if yes is no or (yes is not UNKNOWN and no is not UNKNOWN and yes == no) else UNKNOWN
    return yes if predicate else no


COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ARITHMETIC = {
    "sadd.s32": "word({0} + {1})", "ssub.s32": "word({0} - {1})", "smul.u32": "word({0} * {1})", "smul.s32": "word({0} * {1})",
    "smulhi.u32": "word(unsigned({0}) * unsigned({1}) >> 32)", "smulhi.s32": "{0} * {1} >> 32",
    "sshll.u32": "word({0} << {1})", "sshra.s32": "{0} >> {1}", "sshrl.u32": "unsigned({0}) >> {1}",
    "sand.u32": "{0} & {1}", "sor.u32": "{0} | {1}", "sxor.u32": "{0} ^ {1}",
    "smov": "{0}", "smov.u32": "{0}", "smov.f32": "{0}", "pmov": "{0}", "sadd.u32": "word({0} + {1})", "ssub.u32": "word({0} - {1})",
    "por": "{0} | {1}", "pand": "{0} & {1}", "pnand": "({0} & {1}) ^ True",
    "pnor": "({0} | {1}) ^ True", "pxor": "{0} ^ {1}", "pneg": "{0} ^ True",
    "scalar_select": "pick({0}, {1}, {2})",
    "smin.s32": "pick({0} < {1}, {0}, {1})", "smax.s32": "pick({0} > {1}, {0}, {1})",
    "smin.u32": "pick(unsigned({0}) < unsigned({1}), {0}, {1})", "smax.u32": "pick(unsigned({0}) > unsigned({1}), {0}, {1})",
}  # fmt: skip


class Machine:
    """One core: time, HBM's queue, sync flags and scalar memory. Times are in cycles."""

    def __init__(self, chip: Chip, memory: dict[int, Any], core: int):
        self.rate = chip.bandwidth / chip.cores / chip.clock        # bytes a cycle
        self.latency = chip.latency * chip.clock
        self.memory = memory
        self.free = self.bytes = 0.0
        self.flags: dict[Any, collections.deque] = collections.defaultdict(collections.deque)
        self.notes: dict[str, None] = {}

    def start(self, now: float, predicate: Any, granules: Any, flag: Any, hbm: int) -> None:
        """A DMA; hbm: how often it crosses HBM's pins."""
        if predicate is UNKNOWN:
            self.notes["DMAs whose predicate is unknown are taken to run"] = None
        elif not predicate:
            return
        if granules is UNKNOWN:
            self.notes["DMAs of unknown size are not counted"] = None
            granules = 0
        if hbm:
            self.bytes += hbm * granules * GRANULE
            self.free = max(now, self.free) + hbm * granules * GRANULE / self.rate
        self.flags[flag].append([max(now, self.free if hbm else now) + self.latency, granules])

    def wait(self, now: float, predicate: Any, flag: Any, granules: Any) -> float:
        """The time at which so much has arrived under the flag."""
        if predicate is not UNKNOWN and not predicate:
            return now
        queue = self.flags[flag]
        if granules is UNKNOWN:
            granules = sum(size for _, size in queue)
        while queue and granules > 0:
            arrives, size = queue[0]
            now = max(now, arrives)
            if size > granules:
                queue[0][1] -= granules
            else:
                queue.popleft()
            granules -= size
        return now


class Code:
    """The scalar half of a program, translated to one Python function a block."""

    def __init__(self, text: str):
        self.bundles, self.regions = parse(text)
        self.starts = {0}
        self.branches: dict[int, int] = {}                          # bundle -> bundle it may go to
        for at, bundle in enumerate(self.bundles):
            for i in bundle:
                if i.op.startswith("sbr"):
                    self.branches[at] = self.regions[i.operands[-1].removeprefix("$region")]
                    self.starts |= {self.branches[at], at + 1 + DELAY}
                elif i.op.startswith(("scall", "sret")):
                    raise NotImplementedError(f"the profiler does not follow {i.op}")
        self.starts = {at for at in self.starts if at < len(self.bundles)}
        self.slots: dict[str, int] = {}
        self.live = self._live()
        self.phi_registers = {i.dest.split("_")[1] for b in self.bundles for i in b if i.op == "sphi" and i.dest in self.live}

    def _live(self) -> set[str]:
        """Names that control flow, DMAs or memory depend on; the rest (bounds checks) is not run."""
        needs: dict[str, set[str]] = collections.defaultdict(set)
        roots: set[str] = set()
        for bundle in self.bundles:
            for i in bundle:
                names = {n for operand in i.operands for n in self._names(operand)} | {n for n in (i.predicate, i.otherwise) if n}
                if i.op == "sst" and (spill := SPILL.fullmatch(i.operands[0])):
                    needs[spill[1]] |= names
                elif i.dest:
                    needs[i.dest] |= names
                else:
                    roots |= names
        live, todo = set(), list(roots)
        while todo:
            if (name := todo.pop()) not in live:
                live.add(name)
                todo += needs[name]
        return live

    def _names(self, operand: str) -> list[str]:
        return [spill[1]] if (spill := SPILL.fullmatch(operand)) else re.findall(r"%([sp]\d+_[sp]\d+)", operand)

    def _slot(self, name: str) -> str:
        return f"V[{self.slots.setdefault(name, len(self.slots))}]"

    def _value(self, operand: str) -> str:
        operand = re.sub(r"^\w+=", "", operand)
        if name := re.fullmatch(r"%([sp]\d+_[sp]\d+)", operand):
            return self._slot(name[1])
        if re.fullmatch(r"-?\d+", operand):
            return str(word(int(operand)))
        if address := re.fullmatch(r"\[(?:smem:\[)?([^]]*)\]+", operand):
            return "(" + " + ".join(self._term(term) for term in address[1].split(" + ")) + ")"
        return "UNKNOWN"

    def _term(self, term: str) -> str:
        if allocation := re.fullmatch(r"#allocation(\d+)(_spill)?", term):
            return str(address(int(allocation[1])))
        return str(int(term[1:], 16)) if term.startswith("$") else self._value(term)

    def _line(self, i: Instruction, at: int) -> str | None:
        """Python for one instruction; `at` is the offset of its bundle in the block."""
        test = f"({self._slot(i.predicate)}{' ^ True' if i.negated else ''})" if i.predicate else "True"
        if i.op.startswith("dma"):
            named = {k: v for operand in i.operands if "=" in operand for k, v in [operand.split("=", 1)]}
            if ".wait" in i.op:
                if "done" not in i.op:
                    return None
                flag, granules = (self._value(o) for o in i.operands[:2])
                return f"t = m.wait(t + {at}, {test}, {flag}, {granules}) - {at}"
            flag = named.get("dst_syncflagno") or named.get("syncflagno") or next((v for k, v in named.items() if "sync" in k), "0")
            crossings = i.op.count("hbm")
            return f"m.start(t + {at}, {test}, {self._value(named.get('size_in_granules', '?'))}, {self._value(flag)}, {crossings})"
        if i.op == "sst":
            value = self._value(i.operands[1])
            if spill := SPILL.fullmatch(i.operands[0]):
                return f"{self._slot(spill[1])} = {value}" if spill[1] in self.live else None
            return f"M[{self._value(i.operands[0])}] = pick({test}, {value}, M.get({self._value(i.operands[0])}, UNKNOWN))"
        if not i.dest or i.dest not in self.live:
            return None
        register = i.dest.split("_")[1]
        values = [self._value(operand) for operand in i.operands]
        if i.op == "sphi":
            value = self._slot(register)
        elif i.op == "sld":
            spill = SPILL.fullmatch(i.operands[0])
            value = self._slot(spill[1]) if spill else f"M.get({values[0]}, UNKNOWN)"
        elif i.op.startswith("scmp") and "f32" not in i.op:
            _, relation, kind = i.op.split(".")[:3]
            a, b = (f"unsigned({v})" if kind == "u32" else v for v in values[:2])
            value = f"({a} {COMPARE[relation]} {b})"
        elif i.op.startswith("scalar_lea"):
            value = f"{values[0]} + {values[1]}"
        elif i.op.startswith("int_to_ptr"):
            value = values[0]
        elif i.op.startswith("inlined_call_operand"):
            place = address(OPERANDS + int(i.operands[0]))
            # a pointer into scalar memory, or the one number of an operand that stands in no memory
            value = str(place) if i.op.endswith(".smem") else f"M.get({place}, UNKNOWN)" if i.op.endswith(".") else "UNKNOWN"
        elif i.op in ARITHMETIC:
            value = ARITHMETIC[i.op].format(*values)
        else:
            value = "UNKNOWN"
        if i.otherwise:
            value = f"pick({test}, {value}, {self._slot(i.otherwise)})"
        elif i.predicate:
            value = f"pick({test}, {value}, {self._slot(i.dest)})"
        copy = f"{self._slot(register)} = " if register in self.phi_registers else ""
        return f"{self._slot(i.dest)} = {copy}{value}"

    def functions(self) -> tuple[dict[int, Callable], dict[int, int]]:
        """For each block: (V, M, m, t, ask) -> (next block or None, time); and its number of bundles."""
        edges = sorted(self.starts) + [len(self.bundles)]
        lengths = {a: b - a for a, b in zip(edges, edges[1:])}
        source = []
        for start, length in lengths.items():
            lines, target = [], None
            for at in range(length):
                for i in self.bundles[start + at]:
                    if i.op.startswith("sbr"):
                        taken = f"({self._slot(i.predicate)}{' ^ True' if i.negated else ''})" if i.predicate else "True"
                        lines.append(f"go = {taken}")
                        lines.append(f"go = ask({start + at}) if go is UNKNOWN else go")
                        target = self.branches[start + at]
                    elif line := self._line(i, at):
                        lines.append(line)
            after = start + length if start + length < len(self.bundles) else None
            step = f"return ({target} if go else {after}), t + {length}" if target is not None else f"return {after}, t + {length}"
            source.append("\n    ".join([f"def b{start}(V, M, m, t, ask):", *lines, step]))
        scope = {"UNKNOWN": UNKNOWN, "word": word, "unsigned": unsigned, "pick": pick}
        exec("\n".join(source), scope)
        return {start: scope[f"b{start}"] for start in lengths}, lengths


OPERANDS = 1 << 15              # "allocations" of operands that stand in scalar memory


def address(allocation: int) -> int:
    """Allocations lie far apart; scalar memory and sync flags are told apart by their allocation."""
    return allocation << 18


def run(
    text: str,
    usage: str,
    name: str,
    chip: Chip,
    operands: Sequence[Any],
    trips: dict[str, float],
    vmem: int = 0,
    prefetched: dict[int, int] | None = None,
    core_index: Sequence[int] = (0,),
) -> Program:
    """Execute a program of final bundles. usage: libtpu's table of slots. operands: words of scalar memory of each operand, None if not
    known. prefetched: allocation -> operand that stands in it. core_index: the allocations that hold the core's number."""
    code = Code(text)
    functions, lengths = code.functions()
    header = next(line for line in usage.splitlines() if line.startswith(SLOTS["mxu"]))
    columns = [column.strip() for column in header.split(",")]
    rows = [tuple(map(int, line.split())) for line in usage.splitlines() if re.fullmatch(r"[\d ]+", line.strip() or "x")]
    capacity, rows = rows[0], rows[1:]
    assert len(rows) == len(code.bundles), f"{name}: {len(rows)} rows of use for {len(code.bundles)} bundles"
    place = {slot: columns.index(label) for slot, labels in SLOTS.items() for label in labels if label in columns}
    used = {start: {slot: sum(row[c] for row in rows[start : start + n]) for slot, c in place.items()} for start, n in lengths.items()}
    unknown = {at: f"{'loop' if to <= at else 'if'}" for at, to in code.branches.items()}
    slowest: Program | None = None
    for core in range(chip.cores):
        memory: dict[int, Any] = {address(allocation): core for allocation in core_index}
        for allocation, operand in (prefetched or {}).items():
            if operands[operand] is not None:
                memory.update(enumerate(operands[operand], address(allocation)))
        for operand, words in enumerate(operands):
            memory.update(enumerate(words or (), address(OPERANDS + operand)))
        machine = Machine(chip, memory, core)
        values: list[Any] = [UNKNOWN] * (len(code.slots) + 1)
        labels: dict[int, str] = {}
        state: dict[int, list[float]] = {}
        assumed: dict[str, None] = {}

        def ask(at: int) -> bool:
            """Does an unknown branch jump? Bodies run as often as `trips` says, spread evenly."""
            if at not in labels:
                kind = unknown[at]
                labels[at] = f"{kind}{sum(label.startswith(kind) for label in labels.values())}"
                state[at] = [0.0, 0.0]
            label, seen = labels[at], state[at]
            if label.startswith("loop"):
                if label not in trips:
                    raise ValueError(
                        f"{name}: the rounds of the loop at bundle {code.branches[at]:#x} depend on data that is not known; say "
                        f"trips={{'{label}': rounds}}, or pass arrays for the arguments that they depend on"
                    )
                seen[0] += 1
                again = seen[0] < trips[label]
                seen[0] = seen[0] if again else 0.0
                assumed[f"{label} at {code.branches[at]:#x} takes {trips[label]} rounds"] = None
                return again
            share = trips.get(label, 1.0)
            assumed[f"{label} at {at:#x} runs {share:.4g} of the times"] = None
            seen[0] += share
            body = seen[0] >= 1 - 1e-9
            seen[0] -= body
            return not body

        runs = collections.Counter()
        block: int | None = 0
        now = 0.0
        while block is not None:
            runs[block] += 1
            block, now = functions[block](values, memory, machine, now, ask)
        blocks = tuple(Block(start, n, runs[start], used[start]) for start, n in lengths.items() if runs[start])
        cycles = sum(b.cycles for b in blocks)
        program = Program(name, chip.clock, chip.bandwidth / chip.cores, cycles, now, machine.bytes, vmem, blocks,
                          {slot: capacity[c] for slot, c in place.items()}, (*assumed, *machine.notes))
        if slowest is None or program.ms > slowest.ms:
            slowest = program
    assert slowest is not None
    return slowest


# --- what the scalar program knows: constants and concrete arguments --------------------------------------------------------------


def known_operands(fn: Callable, args: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Each pallas_call of fn in order: its name, and its operands' values (None where they depend on unknown arguments)."""
    import jax
    import numpy as np

    leaves, tree = jax.tree.flatten(tuple(args))
    values = [None if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf) for leaf in leaves]
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)))(*shapes)
    calls: list[tuple[str, list[Any]]] = []

    def holds_kernels(params: dict[str, Any]) -> bool:
        inner = [x for value in params.values() for x in (value if isinstance(value, tuple) else (value,))]
        jaxprs = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        return any(eqn.primitive.name == "pallas_call" or holds_kernels(eqn.params) for jaxpr in jaxprs for eqn in jaxpr.eqns)

    def walk(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = {}
        read = lambda v: v.val if hasattr(v, "val") else env.get(v)
        env.update(zip(jaxpr.constvars, consts))
        env.update(zip(jaxpr.invars, inputs))
        for eqn in jaxpr.eqns:
            ins, outs = [read(v) for v in eqn.invars], [None] * len(eqn.outvars)
            inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
            known = all(x is not None for x in ins)
            small = all(np.prod(v.aval.shape) < 1 << 20 for v in eqn.outvars if hasattr(v.aval, "shape"))
            if known and small and "pallas_call" not in str(eqn.primitive) and not holds_kernels(eqn.params):
                result = eqn.primitive.bind(*ins, **eqn.params)
                outs = list(result) if eqn.primitive.multiple_results else [result]
            elif eqn.primitive.name == "pallas_call":
                info = eqn.params.get("name_and_src_info")
                calls.append((getattr(info, "name", None) or eqn.params.get("name") or "", ins))
            elif eqn.primitive.name == "cond":
                index, *rest = ins
                branches = eqn.params["branches"]
                for n, branch in enumerate(branches):
                    if index is None or n == int(index):
                        result = walk(branch.jaxpr, branch.consts, rest)
                        outs = result if index is not None else outs
            elif inner is not None and eqn.primitive.name in ("scan", "while"):
                walk(inner.jaxpr, inner.consts, [None] * len(inner.jaxpr.invars))
            elif inner is not None:
                body, consts_ = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
                outs = walk(body, consts_, ins if len(ins) == len(body.invars) else [None] * len(body.invars))
            env.update((v, x) for v, x in zip(eqn.outvars, outs) if x is not None)
        return [read(v) for v in jaxpr.outvars]

    walk(closed.jaxpr, closed.consts, values)
    return calls


def scalar_memory(x: Any, layout: str) -> list[int] | None:
    """The 32-bit words that an array takes in scalar memory, in the tiled layout of the HLO text ("{1,0:T(8,128)(4,1)}"); None where
    this file does not know the layout."""
    import numpy as np

    x = np.asarray(x)
    if x.dtype.kind not in "iub" or x.dtype.itemsize > 4:
        return None
    x = x.astype(np.uint8) if x.dtype == bool else x
    tiles = [tuple(map(int, tile.split(","))) for tile in re.findall(r"\(([\d,]+)\)", re.sub(r"S\(\d+\)", "", layout))]
    pack = 4 // x.dtype.itemsize
    if x.ndim < 2:
        if pack > 1:
            return None
        return [int(v) for v in x.reshape(-1).astype(np.int64)]
    (rows, lanes), rest = tiles[0] if tiles and len(tiles[0]) == 2 else (1, 128), tiles[1:]
    if pack > 1 and rest != [(pack, 1)]:
        return None
    *outer, r, c = x.shape
    x = np.pad(x.reshape(-1, r, c), ((0, 0), (0, -r % rows), (0, -c % lanes)))
    o, r, c = x.shape
    x = x.reshape(o, r // rows, rows // pack, pack, c // lanes, lanes).transpose(0, 1, 4, 2, 5, 3)
    return [int(v) for v in np.ascontiguousarray(x).view(np.int32).reshape(-1)]


ALLOCATION = re.compile(r"#allocation(\d+) \[shape = '[^']*', space=(\w+), size = 0x([0-9a-f]+)[^\n]*?tag = '([^']*)'")


def count(folder: Path, chip: str, calls: list[tuple[str, list[Any]]], trips: dict[str, float], only: str | None):
    """Every program of a dump, executed; and the names of those that `only` left out."""
    dumps = folder / "dump"
    hlo = "\n".join(path.read_text() for path in dumps.glob("*-hlo.txt"))
    layouts = dict(re.findall(r"%(\S+) = \w+\[[\d,]*\](\{[^}]*\})? ", hlo))
    custom_calls = re.findall(r"%(\S+) = [^\n]*? custom-call\(([^)]*)\)", hlo)
    operands_of = {name: re.findall(r"%([\w.<>-]+)", inner) for name, inner in custom_calls}
    programs: dict[str, Program] = {}
    left_out = []
    waiting = list(calls)
    for path in sorted(dumps.glob("*-final_bundles.txt")):
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        if "schedule-analysis" in path.name or name == "TLP" or name.startswith("<late"):
            continue
        call = next((c for c in waiting if re.fullmatch(re.escape(re.sub(r"\W", "_", c[0])) + r"(\.\d+)*", name)), None)
        if call:
            waiting.remove(call)
        if only and not re.search(only, name):
            left_out.append(name)
            continue
        beside = lambda kind: next(dumps.glob(f"*-{glob.escape(name)}-[0-9]*-{kind}.txt")).read_text()
        allocations = ALLOCATION.findall(beside("original"))
        vmem = sum(int(size, 16) for _, space, size, _ in allocations if space == "vmem")
        prefetched = {int(n): int(tag.split()[-1]) for n, _, _, tag in allocations if tag.startswith("prefetched SMEM operand")}
        core_index = [int(n) for n, _, _, tag in allocations if tag.endswith("core index")]
        names = operands_of.get(name, [])
        operands = [None if x is None else scalar_memory(x, layouts.get(names[n], "") if n < len(names) else "")
                    for n, x in enumerate(call[1])] if call else []
        operands += [None] * (1 + max(prefetched.values(), default=0) - len(operands))
        usage = beside("final_hlo-static-per-bundle-utilization")
        programs[name] = run(path.read_text(), usage, name, CHIPS[chip], operands, trips, vmem, prefetched, core_index)
    return programs, tuple(left_out)


def child(folder: Path) -> None:
    fn, args, chip, trips, only = pickle.loads((folder / "request").read_bytes())
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    calls = known_operands(fn, args)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), x.dtype, sharding=place), args)
    jax.jit(fn).trace(*abstract).lower(lowering_platforms=("tpu",)).compile()
    programs, left_out = count(folder, chip, calls, trips, only)
    (folder / "answer").write_bytes(pickle.dumps(([dataclasses.asdict(p) for p in programs.values()], left_out)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a kernel's time on TPUs, on a machine without one.")
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="a function that returns (fn, args) or (fn, args, flops)")
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: all four; may be given several times")
    parser.add_argument("--only", help="count only programs whose name matches this regular expression")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    module, function = options.function.split(":")
    fn, args, *flops = getattr(importlib.import_module(module), function)()
    for chip in options.chip or CHIPS:
        print(profile(fn, args, chip=chip, flops=flops[0] if flops else None, only=options.only))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        main()
