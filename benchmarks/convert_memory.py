"""Peak memory and time of converting a large checkpoint, and of exporting and loading it.

Makes a CogVideoX pipeline folder of the 5b's width with random bfloat16 weights, and runs each
step in a process of its own. `--layers 42 --encoder-layers 24` is the whole 5b with its text
encoder (21 GB, and as much again for each copy). What is measured must not grow with the number of
layers.

    python benchmarks/convert_memory.py --layers 6 --folder /tmp/convert_memory
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from svg_jax.convert import cogvideox, t5
from svg_jax.convert.rules import LAYER, Rule
from svg_jax.models.cogvideox_config import CogVideoXConfig
from svg_jax.models.t5 import T5Config

STEP = r"""
import json, re, sys, time
from svg_jax.convert import convert_pipeline, export_pipeline, load_transformer
def peak():
    # Not getrusage, which begins with the parent's memory.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
step, source, destination = sys.argv[1:]
if step == "convert":
    import svg_jax.convert.pipeline
else:
    import svg_jax.convert.export, svg_jax.convert.load
base, start = peak(), time.perf_counter()
if step == "convert":
    convert_pipeline(source, destination)
elif step == "export":
    export_pipeline(source, destination)
else:
    load_transformer(source)
print(json.dumps({"seconds": round(time.perf_counter() - start, 1),
                  "peak_bytes": peak(), "peak_bytes_before": base}))
"""


def write_component(folder: Path, class_name: str, config: dict, rules: tuple[Rule, ...]) -> dict:
    """Writes one shard a layer; returns the sizes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    num_layers = config["num_layers"]
    shards = [[rule for rule in rules if not rule.stacked]]
    shards += [[rule for rule in rules if rule.stacked]] * num_layers
    random = np.random.default_rng(0)
    weight_map, sizes = {}, []
    for number, shard in enumerate(shards):
        tensors = {}
        for rule in shard:
            bits = random.integers(0, 0x3F80, rule.source_shape, np.uint16)  # 0 to 1 in bfloat16
            tensors[rule.source.replace(LAYER, str(number - 1))] = bits.view(ml_dtypes.bfloat16)
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        sizes += [tensor.nbytes for tensor in tensors.values()]
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def write_source(folder: Path, layers: int, encoder_layers: int) -> dict:
    """Writes a pipeline folder; returns the sizes of its components."""
    config: dict[str, Any] = {
        "num_layers": layers,
        "num_attention_heads": 48,
        "use_rotary_positional_embeddings": True,
    }
    encoder: dict[str, Any] = {"num_layers": encoder_layers}
    index = {
        "_class_name": "CogVideoXPipeline",
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "text_encoder": ["transformers", "T5EncoderModel"],
    }
    rules = cogvideox.rules(CogVideoXConfig(**config)), t5.rules(T5Config(**encoder))
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    return {
        "transformer": write_component(
            folder / "transformer", "CogVideoXTransformer3DModel", config, rules[0]
        ),
        "text_encoder": write_component(
            folder / "text_encoder", "T5EncoderModel", encoder, rules[1]
        ),
    }


def main() -> None:
    """Measures, prints, and fails where a step takes more than 2 GB and the largest tensor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=6, help="of the transformer; the 5b has 42")
    parser.add_argument("--encoder-layers", type=int, default=1, help="of T5; the XXL has 24")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: print it only)")
    arguments = parser.parse_args()

    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        sizes = write_source(work / "source", arguments.layers, arguments.encoder_layers)
        steps = {}
        for step, source, destination in (
            ("convert", "source", "converted"),
            ("export", "converted", "exported"),
            ("load", "converted", "-"),
        ):
            paths = [str(work / source), str(work / destination)]
            command = [sys.executable, "-c", STEP, step, *paths]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            steps[step] = json.loads(result.stdout)
    finally:
        shutil.rmtree(work)
    versions = {n: importlib.metadata.version(n) for n in ("jax", "orbax-checkpoint", "numpy")}
    report = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions},
        "components": sizes,
        "steps": steps,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    largest = max(component["largest_tensor_bytes"] for component in sizes.values())
    for step in ("convert", "export"):
        if steps[step]["peak_bytes"] > 2e9 + largest:
            raise SystemExit(f"{step}: more than 2 GB + the largest tensor")


if __name__ == "__main__":
    main()
