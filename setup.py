# SPDX-License-Identifier: Apache-2.0
"""Builds ``cogview_kernels._C`` with ninja. No PyTorch and no GPU is needed.

Where a C++ compiler is found, the CPU part is built: each ``csrc/<op>/*_cpu.cpp`` once per instruction set,
the rest once, so that one binary serves every processor and picks at run time. The CUDA part,
``csrc/<op>/*_cuda.cu``, is built when an nvcc is found too; ``csrc/<op>/*_sm90.cu``, whose instructions
Hopper alone has, for compute capability 9.0 and no other.

Environment variables
    COGVIEW_CUDA             0 leaves the CUDA part out, 1 makes a missing nvcc an error.
    COGVIEW_CUDA_ARCHS       e.g. "70;90": compute capabilities without the dot. The default is every one
                             of DEFAULT_CUDA_ARCHS that the nvcc knows. PTX of the newest is added.
    COGVIEW_SANITIZE         ops, e.g. "decode_attention", whose CPU part AddressSanitizer and
                             UndefinedBehaviorSanitizer watch (`make sanitize`). The others are not optimised.
    COGVIEW_SKIP_EXTENSION   1 installs the Python part alone (the Makefile builds the extension apart).
    CXX, NVCC, CUDA_HOME     the compilers: CUDA_HOME/bin comes before PATH, NVCC before both.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
# One per binary-compatible family: 8.6 and 8.9 run what is built for 8.0, newer ones the PTX of the last.
DEFAULT_CUDA_ARCHS = (70, 75, 80, 90)

# Instruction sets compiled per kernel file; the name is also the C++ namespace.
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS = {
        "portable": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
        ],
    }
    BF16_ISA_FLAGS = {
        "avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"],
        "amx": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }
else:
    ISA_FLAGS = {"portable": []}
    BF16_ISA_FLAGS = {}
# Ops, or files of them, whose matrix products gain from bfloat16 instructions (declared with
# COGVIEW_DECLARE_PER_ISA_WITH_BF16).
BF16_SOURCES = (
    *("three_region_attention", "decode_attention", "decode_linear", "linear_cross_entropy"),
    "local_attention_2d/forward_cpu.cpp",
)

CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"),
    # GCC 12 warns of its own AVX-512 headers; Clang does not know the option and says so unless told not to.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]


SANITIZED_OPS = os.environ.get("COGVIEW_SANITIZE", "").split()
SANITIZERS = "-fsanitize=address,undefined"


def runs_here(isa: str) -> bool:
    """Whether this processor has the instruction set, where Linux tells."""
    feature = {"avx512": "avx512dq", "avx512bf16": "avx512_bf16", "amx": "amx_bf16"}.get(isa)
    told = Path("/proc/cpuinfo")
    return feature is None or not told.exists() or feature in told.read_text().split()


def sanitizer_flags(source: Path, isa: str) -> list[str]:
    """What a file is compiled with besides; the bindings and what ops share are watched, too.

    What cannot run here is not: it would take more than half of the time. To optimise takes longer than the
    tests save by it, but for the large products of linear_cross_entropy.
    """
    if not SANITIZED_OPS:
        return []
    op = source.parent.name
    if op in (CSRC.name, "common", *SANITIZED_OPS) and runs_here(isa):
        level = "-O1" if op == "linear_cross_entropy" else "-O0"
        return [level, "-g1", SANITIZERS, "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    return ["-O0"]


def find_nvcc() -> str | None:
    wanted = os.environ.get("COGVIEW_CUDA", "")
    if wanted == "0":
        return None
    if named := os.environ.get("NVCC"):
        return shutil.which(named) or sys.exit(f"NVCC={named} was not found: name an nvcc, or unset NVCC")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit("COGVIEW_CUDA=1, but no nvcc was found: put it on PATH or set NVCC or CUDA_HOME")
    return nvcc


def cuda_archs(nvcc: str) -> list[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(a) for a in re.findall(r"compute_(\d+)", listed)}
    if wanted := os.environ.get("COGVIEW_CUDA_ARCHS"):
        names = re.split(r"[;,\s]+", wanted.strip())
        if not all(name.isdecimal() for name in names):
            sys.exit(f"COGVIEW_CUDA_ARCHS must be capabilities without the dot, as 70;90, got {wanted}")
        archs = [int(name) for name in names]
        if missing := [a for a in archs if a not in known]:
            sys.exit(
                f"COGVIEW_CUDA_ARCHS names {missing}, which {nvcc} does not know; it knows {sorted(known)}"
            )
        return sorted(archs)
    return [a for a in DEFAULT_CUDA_ARCHS if a in known]


def knows_sm_90a(nvcc: str) -> bool:
    """From CUDA 12 on. What is compiled for it runs on compute capability 9.0 alone."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)", version)
    return found is not None and int(found.group(1)) >= 12


def extensions() -> list[Extension]:
    """None where there is no compiler: plain PyTorch and Triton remain, and ``info`` says so."""
    if os.environ.get("COGVIEW_SKIP_EXTENSION") == "1":
        return []
    if shutil.which(CXX.split()[0]) is None:
        if "CXX" in os.environ or os.environ.get("COGVIEW_CUDA") == "1":
            sys.exit(f"the C++ compiler {CXX} was not found: put it on PATH or set CXX")
        print(f"cogview_kernels: no {CXX}, building without the compiled extension")
        return []
    return [Extension("cogview_kernels._C", [])]


def in_command(word: object) -> str:
    """For a rule's command, which a shell reads after ninja."""
    return shlex.quote(str(word)).replace("$", "$$")


def in_edge(path: Path) -> str:
    """For a line of ninja that names files; ninja itself quotes ``$in`` and ``$out``."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_script(build: Path, target: Path) -> str:
    """Compiles each source of csrc into an object in ``build``, and links them."""
    import pybind11

    nvcc = find_nvcc()
    archs = [] if nvcc is None else cuda_archs(nvcc)
    has_sm90 = nvcc is not None and 90 in archs and knows_sm_90a(nvcc)
    # Only the bindings see Python. The other objects are the same for every environment, so ninja, which
    # compiles again what another command would compile, keeps them for an isolated build of the wheel.
    python = [in_command(f"-I{path}") for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    headers = in_command(f"-I{CSRC}")
    defines = [f"-DCOGVIEW_HAS_CUDA={int(nvcc is not None)}", f"-DCOGVIEW_X86={int(len(ISA_FLAGS) > 1)}"]

    rules, edges, objects = [], [], []

    def edge(rule: str, source: Path, isa: str = "", flags: Sequence[str] = ()) -> None:
        name = source.relative_to(CSRC).as_posix().replace("/", "__")
        obj = build / (f"{name}.{isa}.o" if isa else f"{name}.o")
        objects.append(obj)
        edges.append(f"build {in_edge(obj)}: {rule} {in_edge(source)}")
        edges.append(f"  flags = {' '.join([*flags, *sanitizer_flags(source, isa)])}")

    rules.append(
        f"rule cxx\n  command = {CXX} -MMD -MF $out.d {' '.join(CXX_FLAGS + defines)} {headers} $flags "
        "-c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = c++ $out"
    )
    per_isa = sorted(CSRC.glob("*/*_cpu.cpp"))
    edge("cxx", CSRC / "bindings.cpp", flags=[*python, f"-DCOGVIEW_HAS_SM90={int(has_sm90)}"])
    for source in sorted(set(CSRC.glob("*/*.cpp")).difference(per_isa)):
        edge("cxx", source)
    for source in per_isa:
        names = (source.parent.name, source.relative_to(CSRC).as_posix())
        extra = BF16_ISA_FLAGS if any(name in BF16_SOURCES for name in names) else {}
        for isa, flags in {**ISA_FLAGS, **extra}.items():
            edge("cxx", source, isa, flags=[f"-DCOGVIEW_ISA={isa}", *flags])

    if nvcc is None:
        print("cogview_kernels: no nvcc, building the CPU part only")
        sanitize = f"{SANITIZERS} " if SANITIZED_OPS else ""
        link = f"{CXX} -shared -pthread {sanitize}-o $out $in -ldl"
    else:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        print(f"cogview_kernels: {nvcc}, compute capabilities {archs}")
        host = (
            f"-ccbin {CXX} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 2 "
            "-Wno-deprecated-gpu-targets"
        )
        parts = {"cuda": codes}
        if has_sm90:
            parts["sm90"] = ["-gencode=arch=compute_90a,code=sm_90a"]
        for part, options in parts.items():
            rules.append(
                f"rule nvcc_{part}\n  command = {in_command(nvcc)} -MD -MF $out.d {host} "
                f"{' '.join(options + defines)} {headers} -c $in -o $out\n"
                "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out"
            )
            for source in sorted(CSRC.glob(f"*/*_{part}.cu")):
                edge(f"nvcc_{part}", source)
        # The CUDA runtime is linked in: nothing is asked of the machine until a kernel is launched.
        flags = "-shared --cudart static -Xcompiler -pthread"
        link = f"{in_command(nvcc)} -ccbin {CXX} {flags} -o $out $in -ldl"

    rules.append(f"rule link\n  command = {link}\n  description = link $out")
    whole = f"build {in_edge(target)}: link {' '.join(map(in_edge, objects))}"
    return "\n".join([*rules, "", *edges, whole, f"default {in_edge(target)}", ""])


class NinjaBuildExt(build_ext):
    """Writes one build.ninja and runs it, so that a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        build = Path(self.build_temp).resolve() / "ninja"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        script, text = build / "build.ninja", ninja_script(build, target)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "--quiet"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            sys.exit(
                "the extension does not compile, for the reason above; COGVIEW_SKIP_EXTENSION=1 installs the "
                "Python part alone, where plain PyTorch and Triton remain"
            )


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
