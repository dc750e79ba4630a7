"""Builds kvlink._C (CPU operators and transports; a C++20 compiler is enough) and, where nvcc is
found, kvlink._cuda. Environment:

KVLINK_CUDA         auto (default: built if nvcc is found), 1 (demanded), 0 (left out)
KVLINK_CUDA_ARCHS   for example "90a" or "80;90a;100" (default)
KVLINK_UCX_HOME     where include/ucp/api/ucp.h is (default: the libucx package of the Python that
                    builds, then /usr); without it the ucx path is left out. 0: leave it out
KVLINK_EMULATION    1: builds, and builds alone, kvlink._cuda_emulated, whose kernels run on
                    the host (csrc/emulation); for tests, which do this by themselves
KVLINK_SANITIZE     for example "address,undefined": a build for tests, not for use
CXX, CXXFLAGS       the compiler (default: c++), and flags that come after ours
MAX_JOBS            compilers run at once (default: the CPUs)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Sources named *_simd.cpp are compiled once per level, into a namespace of that name; the level is
# chosen at run time.
SIMD_LEVELS: dict[str, list[str]] = {"portable": []}
if IS_X86:
    SIMD_LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SIMD_LEVELS["avx512"] = [
        *SIMD_LEVELS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]

EMULATION = os.environ.get("KVLINK_EMULATION", "0") == "1"
SANITIZE = os.environ.get("KVLINK_SANITIZE", "")
SANITIZE_FLAGS = (
    [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if SANITIZE
    else []
)


def find_ucx_headers() -> Path | None:
    """The include folder of UCX: its functions are found at run time, its types are needed here."""
    wanted = os.environ.get("KVLINK_UCX_HOME", "")
    if wanted == "0":
        return None
    homes = [Path(wanted)] if wanted else [Path("/usr/local"), Path("/usr")]
    package = None if wanted else importlib.util.find_spec("libucx")
    if package is not None and package.submodule_search_locations:
        homes.insert(0, Path(package.submodule_search_locations[0]))
    for home in homes:
        if (home / "include" / "ucp" / "api" / "ucp.h").exists():
            return home / "include"
    if wanted:
        raise SystemExit(f"KVLINK_UCX_HOME={wanted}: there is no include/ucp/api/ucp.h")
    return None


def cpu_sources() -> list[Path]:
    folders = ("base", "layout", "cpu", "transport")
    sources = [path for name in folders for path in (CSRC / "kvlink" / name).rglob("*.cpp")]
    if find_ucx_headers() is None:
        sources = [path for path in sources if path.parent.name != "ucx"]
    bindings = [path for path in (CSRC / "bindings").glob("*.cpp") if "cuda" not in path.stem]
    return sorted(sources + bindings)


# What kvlink._cuda has beside its kernels.
CUDA_HOST_SOURCES = [
    *sorted((CSRC / "bindings").glob("cuda_*.cpp")),
    *(
        CSRC / "bindings" / f"{name}.cpp"
        for name in ("attention_args", "errors", "op_args", "pool", "tensor")
    ),
    CSRC / "kvlink" / "layout" / "serialise.cpp",
]


def find_nvcc() -> str | None:
    wanted = os.environ.get("KVLINK_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"KVLINK_CUDA: expected auto, 0 or 1; got {wanted!r}")
    if wanted == "0" or (SANITIZE and wanted == "auto"):
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    if nvcc is None and wanted == "1":
        raise SystemExit("KVLINK_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
    return os.path.realpath(nvcc) if nvcc else None


def nvcc_paths(nvcc: str, variable: str, flag: str) -> list[str]:
    """Flags for the toolkit's headers or libraries, wherever they are (nvcc may be a wrapper)."""
    command = [nvcc, "-dryrun", "-E", "-x", "cu", os.devnull]
    plan = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = [line for line in plan.splitlines() if line.startswith(f"#$ {variable}=")]
    if not found:
        raise SystemExit(f"{nvcc} -dryrun names no {variable}")
    words = shlex.split(found[0].split("=", 1)[1])
    return [word for part in words for word in part.split() if word.startswith(flag)]


def without_resources(report: str) -> str:
    """What nvcc has to say besides the resources of each kernel."""
    ours = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
    return "".join(line for line in report.splitlines(True) if not ours.match(line))


class BuildExtensions(build_ext):
    """Compiles in parallel, with flags per source, and only what changed.

    Objects are kept in build/objects whatever the command (an editable install compiles in
    temporary folders otherwise), one folder per Python and sanitizer.
    """

    def build_extension(self, ext: Extension) -> None:
        on_device = ext.name == "kvlink._cuda"
        compiles = {
            "kvlink._C": self.cpu_compiles,
            "kvlink._cuda": self.cuda_compiles,
            "kvlink._cuda_emulated": self.emulated_compiles,
        }[ext.name]()
        suffixes = (".h", ".hpp", ".cuh", ".inl")
        headers = [path for path in CSRC.rglob("*") if path.suffix in suffixes] + [Path(__file__)]
        newest_header = max(path.stat().st_mtime for path in headers)

        seconds: dict[str, float] = {}

        def compile_one(job: tuple[Path, Path, list[str]]) -> str:
            source, target, command = job
            flags = target.with_suffix(".flags")
            newest = max(newest_header, source.stat().st_mtime)
            text = " ".join(command)
            fresh = target.exists() and target.stat().st_mtime > newest
            if not (fresh and flags.exists() and flags.read_text() == text):
                target.parent.mkdir(parents=True, exist_ok=True)
                begin = time.monotonic()
                if source.suffix == ".cu" and on_device:  # ptxas reports on every kernel
                    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
                    sys.stderr.write(without_resources(done.stderr))
                    done.check_returncode()
                    target.with_suffix(".ptxas").write_text(done.stderr)
                else:
                    subprocess.run(command, check=True)
                flags.write_text(text)
                seconds[target.stem] = time.monotonic() - begin
            return str(target)

        jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, compiles))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*self.cxx(), "-shared", "-o", str(output), *objects, *SANITIZE_FLAGS, "-pthread"]
        if on_device:
            link += nvcc_paths(self.nvcc, "LIBRARIES", "-L")
            link += ["-lcudart_static", "-ldl", "-lrt"]
        elif not SANITIZE:
            link += ["-Wl,-s"]
        subprocess.run(link, check=True)
        if sum(seconds.values()) > 10:  # what it costs, for whoever reads the log
            slowest = max(seconds, key=lambda name: seconds[name])
            print(
                f"{ext.name}: {len(seconds)} sources in {sum(seconds.values()):.0f} s of {jobs} "
                f"jobs ({slowest}: {seconds[slowest]:.0f} s); {output.stat().st_size / 1e6:.1f} MB",
                file=sys.stderr,
            )

    @property
    def nvcc(self) -> str:
        nvcc = find_nvcc()
        assert nvcc is not None
        return nvcc

    def cxx(self) -> list[str]:
        return [*os.environ.get("CXX", "c++").split()]

    def target(self, source: Path, suffix: str = "") -> Path:
        tag = sysconfig.get_config_var("SOABI") + (f"-{SANITIZE}" if SANITIZE else "")
        flat = str(source.with_suffix("")).replace(os.sep, "__")
        return Path("build", "objects", tag, f"{flat}{suffix}.o")

    def cxx_flags(self) -> list[str]:
        optimise = ["-O1", "-g"] if SANITIZE else ["-O3", "-DNDEBUG"]
        return [
            *("-std=c++20", *optimise, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
            # Nobody reads floating-point exception flags; selects then vectorise.
            *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
            *("-pthread", *SANITIZE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))),
            *(f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
        ]

    def cpu_compiles(self) -> list[tuple[Path, Path, list[str]]]:
        levels = ",".join(SIMD_LEVELS)
        headers = find_ucx_headers()
        ucx = [f"-isystem{headers}", "-DKVLINK_HAVE_UCX"] if headers else []
        compiles = []
        for source in cpu_sources():
            variants = SIMD_LEVELS if source.stem.endswith("_simd") else {"": []}
            for level, flags in variants.items():
                target = self.target(source, f".{level}" if level else "")
                defines = [f"-DKVLINK_SIMD_LEVEL={level}"] if level else []
                command = [
                    *(*self.cxx(), *self.cxx_flags(), *flags, *defines),
                    *(ucx if "ucx" in str(source) else []),
                    *(f'-DKVLINK_SIMD_LEVELS="{levels}"', "-c", str(source), "-o", str(target)),
                ]
                compiles.append((source, target, command))
        # The slowest first, so that the last job to end is a short one.
        return sorted(compiles, key=lambda job: "simd" not in job[0].stem)

    def cuda_compiles(self) -> list[tuple[Path, Path, list[str]]]:
        wanted = os.environ.get("KVLINK_CUDA_ARCHS", "80;90a;100").replace(",", ";")
        archs = wanted.split(";")
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        includes = nvcc_paths(self.nvcc, "INCLUDES", "-I")
        compiles = []
        for source in sorted((CSRC / "kvlink" / "cuda").glob("*.cu")):
            target = self.target(source, ".cu")
            command = [
                *(self.nvcc, "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", *gencode),
                "-Xptxas=-v",
                *(["-DKVLINK_SM_90A"] if "90a" in archs else []),
                *("-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}", "-c", str(source)),
                *("-o", str(target)),
            ]
            compiles.append((source, target, command))
        for source in CUDA_HOST_SOURCES:
            target = self.target(source, ".cuda")
            command = [
                *(*self.cxx(), *self.cxx_flags(), *includes, f'-DKVLINK_CUDA_ARCHS="{wanted}"'),
                *("-DKVLINK_CUDA_MODULE=_cuda", "-c", str(source), "-o", str(target)),
            ]
            compiles.append((source, target, command))
        return compiles

    def emulated_compiles(self) -> list[tuple[Path, Path, list[str]]]:
        kernels = sorted((CSRC / "kvlink" / "cuda").glob("*.cu"))
        emulation = sorted((CSRC / "emulation").glob("*.c*"))
        compiles = []
        for source in [*kernels, *CUDA_HOST_SOURCES, *emulation]:
            target = self.target(source, ".emulated")
            command = [
                *(*self.cxx(), f"-I{CSRC / 'emulation' / 'include'}", *self.cxx_flags()),
                *("-O1", "-Wno-unknown-pragmas", "-Wno-psabi", '-DKVLINK_CUDA_ARCHS="emulated"'),
                "-DKVLINK_SM_90A",
                *("-DKVLINK_CUDA_MODULE=_cuda_emulated", "-x", "c++"),
                *("-c", str(source), "-o", str(target)),
            ]
            compiles.append((source, target, command))
        return compiles


extensions = [Extension("kvlink._C", sources=[str(path) for path in cpu_sources()])]
if EMULATION:
    extensions = [Extension("kvlink._cuda_emulated", sources=[])]
elif find_nvcc() and any((CSRC / "kvlink" / "cuda").glob("*.cu")):
    extensions.append(Extension("kvlink._cuda", sources=[]))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
