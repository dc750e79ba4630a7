"""Builds the extension with sanitizers beside the normal one and runs tests with it.

    python python_tests/run_sanitized.py STEP address,undefined|thread BUILD_DIR TEST_FILE...

STEP: `build`; `test`, which runs the files on what was built; `objects` compiles ahead what `build`
then finds, one file at a time and with processor time that nobody else wants.

The first report of a sanitizer ends its process with a non-zero status, also that of a peer that a
test started. Where the compiler comes without the sanitizers' libraries, this says so and succeeds.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# libstdc++ comes along because ASan looks up __cxa_throw when it starts.
LIBRARIES = {
    "address,undefined": ("libasan.so", "libubsan.so", "libstdc++.so"),
    "thread": ("libtsan.so", "libstdc++.so"),
}
SUPPRESSIONS = Path(__file__).with_name("tsan.supp")
OPTIONS = {
    # Python itself leaks at exit; torch and numpy allocate with new and free with free().
    # NOTE: no detect_stack_use_after_return, whose fake stack gcc 12 aligns to 32 bytes where
    # 512-bit vectors in local variables need 64.
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # UCX's hooks in madvise run in threads that have ended as far as the sanitizer knows.
    "UCX_MEM_EVENTS": "n",
    "TSAN_OPTIONS": f"halt_on_error=1:history_size=4:suppressions={SUPPRESSIONS}",
}


def find_libraries(names: tuple[str, ...]) -> list[str]:
    """Their paths; an entry that the compiler does not have stays a bare name."""
    command = os.environ.get("CXX", "c++").split()
    return [
        subprocess.run(
            [*command, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]


def build(sanitizer: str, build_dir: str, command: str, *, emulation: bool) -> int:
    """`command`: that of setup.py; build_ext only compiles, and so disturbs no other build."""
    environment = os.environ | {"KVLINK_SANITIZE": sanitizer}
    shutil.rmtree(build_dir, ignore_errors=True)
    setup = [sys.executable, "setup.py", "-q"]
    subprocess.run([*setup, command, "--build-lib", build_dir], check=True, env=environment)
    if emulation:
        setup += ["build_ext", "--build-lib", f"{build_dir}/emulation"]
        subprocess.run(setup, check=True, env=environment | {"KVLINK_EMULATION": "1"})
    return 0


def main(step: str, sanitizer: str, build_dir: str, *tests: str) -> int:
    # As an error it ends also the process that is waited for.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    libraries = find_libraries(LIBRARIES[sanitizer])
    missing = [path for path in libraries if not os.path.isabs(path)]
    if missing:
        print(f"sanitize: left out, the compiler has no {', '.join(missing)}")
        return 0
    emulation = any("emulated" in test for test in tests)
    if step == "objects":
        os.environ["MAX_JOBS"] = "1"
        os.nice(19)
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        return build(sanitizer, build_dir, "build_ext", emulation=emulation)
    if step == "build":
        return build(sanitizer, build_dir, "build", emulation=emulation)
    if not tests:
        sys.exit("test: expected files")
    environment = os.environ | OPTIONS
    environment |= {
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": build_dir,
        "KVLINK_EXPECTED_BUILD": str(Path(build_dir).resolve()),
    }
    pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q"]
    if sys.version_info < (3, 11):  # no -P: keep the current folder off sys.path by other means
        pytest[1:4] = ["-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())"]
    if sanitizer == "thread" and shutil.which("setarch"):
        # Its shadow memory has a fixed place, which address randomisation may take.
        pytest[:0] = ["setarch", platform.machine(), "-R"]
    # --capture=sys: what a sanitizer writes to the process's stderr must not be captured.
    options = ["--capture=sys", "--hypothesis-profile", "sanitize"]
    options += ["-m", "not slow and not gpu"]
    return subprocess.run([*pytest, *options, *tests], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
