"""Check the installed specdec: it must generate text, with the native runtime if the CPU supports that.

--no-kernels: it was installed without a compiler; it must then say once that the kernels are missing.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from specdec.runtimes.native import library


def specdec(*args: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:  # away from the sources
        command = [str(Path(sys.executable).with_name("specdec")), *args]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(run.stdout + run.stderr)
    assert run.returncode == 0 and run.stdout.strip()
    return run


able, built = library.could_run(), "--no-kernels" not in sys.argv
specdec("generate", "--help")
options = ["--dtype", "bfloat16", "--max-new-tokens", "16", "--num-speculative-tokens", "2"]
run = specdec("generate", "Name three colours.", "--drafter", "m2r2", *options)
assert library.runs() == ("runtime: native" in run.stderr) == (able and built)
assert run.stderr.count("kernels are not built") == (able and not built)
