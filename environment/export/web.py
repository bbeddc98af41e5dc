"""Get ONNX Runtime for browsers, which `runkey report --try` puts into its page.

    python environment/export/web.py .venv-export    # .venv-export/onnxruntime-web/, three files

The package is the one that onnxruntime-web.txt names, checked by its hash; npm gets it from the
registry that it is set up for, and nothing of it is run. Without npm everything else works.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from runkey.progress import say

_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
_LOCK = Path(__file__).with_name("onnxruntime-web.txt")


def main() -> None:
    """Make the folder hold what is locked; do nothing if it does."""
    target = Path(sys.argv[1]) / "onnxruntime-web"
    pinned = _LOCK.read_text(encoding="utf-8").splitlines()[-1]
    stamp = target / "version"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == pinned:
        return
    name, version, integrity = pinned.split()
    npm = shutil.which("npm")
    if npm is None:
        say("environment: without npm `runkey report --try` makes no page; all else works")
        return
    with tempfile.TemporaryDirectory(prefix="runkey-npm-") as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            say(f"environment: npm could not get {name} ({why}); `runkey report --try` needs it")
            return
        archive = Path(folder) / done.stdout.split()[-1]
        digest = hashlib.sha512(archive.read_bytes()).digest()
        if integrity != f"sha512-{base64.b64encode(digest).decode()}":
            sys.exit(f"error: {name} {version}: not the package that {_LOCK.name} has the hash of")
        target.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        with tarfile.open(archive) as package:
            for file in _FILES:
                source = package.extractfile(f"package/dist/{file}")
                assert source
                (target / file).write_bytes(source.read())
        stamp.write_text(f"{pinned}\n", encoding="utf-8")
    say(f"environment: {name} {version} in {target}")


if __name__ == "__main__":
    main()
