"""Peak memory and time of converting a large checkpoint, and of exporting, verifying, loading it.

Makes a pipeline folder with random bfloat16 weights at the true shapes of CogVideoX-5b or Wan
2.1 14B and their text encoders, and runs each step in a process of its own. `--layers 42` and
`--layers 40` are the whole transformers, `--encoder-layers 24` the whole encoders (21 and 40 GB,
and as much again for each copy). Memory must not grow with the number of layers. With `--rounds 3`
the conversion is timed against `cp -r` and `sync` of the same folder, in turn.

    python benchmarks/convert_memory.py --layers 6 --folder /tmp/convert_memory
    python benchmarks/convert_memory.py --model wan --layers 40 --rounds 3 --steps verify
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from measured import provenance_of
from safetensors.numpy import save_file

from svg_jax.convert.tables.registry import MODEL_CLASSES
from svg_jax.convert.tables.rules import LAYER, Rule
from svg_jax.convert.versions import package_versions

# Per model, each component's class and what its config says beside the number of layers.
MODELS: Mapping[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cogvideox": {
        "transformer": (
            "CogVideoXTransformer3DModel",
            {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        ),
        "text_encoder": ("T5EncoderModel", {"model_type": "t5", "feed_forward_proj": "gated-gelu"}),
    },
    "wan": {
        "transformer": ("WanTransformer3DModel", {}),
        "text_encoder": (
            "UMT5EncoderModel",
            {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "vocab_size": 256384},
        ),
    },
    "wan-1.3b": {
        "transformer": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960}),
    },
}
PIPELINES = {
    "cogvideox": "CogVideoXPipeline",
    "wan": "WanPipeline",
    "wan-1.3b": "WanPipeline",
}
STEPS = ("verify", "export", "load")
STEP = r"""
import json, re, sys, time
from svg_jax.convert import convert_pipeline, export_pipeline, load_transformer, verify_pipeline
def peak():
    # Not getrusage, which begins with the parent's memory.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
step, source, destination = sys.argv[1:]
if step == "convert":
    import svg_jax.convert.pipeline
else:
    from svg_jax.convert.checkpoint import export, load, verify  # noqa: F401
base, start = peak(), time.perf_counter()
if step == "convert":
    convert_pipeline(source, destination)
elif step == "export":
    export_pipeline(source, destination)
elif step == "verify":
    verify_pipeline(source)
else:
    load_transformer(source)
print(json.dumps({"seconds": round(time.perf_counter() - start, 1),
                  "peak_bytes": peak(), "peak_bytes_before": base}))
"""


def write_component(folder: Path, class_name: str, config: dict, rules: tuple[Rule, ...]) -> dict:
    """Write one shard a layer, and give the sizes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = [[rule for rule in rules if not rule.stacked]]
    shards += [[rule for rule in rules if rule.stacked]] * config["num_layers"]
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


def write_source(folder: Path, model: str, layers: Mapping[str, int]) -> dict:
    """Write a pipeline folder, and give the sizes of its components."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": PIPELINES[model]}
    sizes = {}
    for name, (class_name, options) in MODELS[model].items():
        library = "transformers" if "Encoder" in class_name else "diffusers"
        index[name] = [library, class_name]
        model_class, config = MODEL_CLASSES[class_name], {**options, "num_layers": layers[name]}
        rules = model_class.rules(model_class.read_config(config))
        sizes[name] = write_component(folder / name, class_name, config, rules)
    (folder / "model_index.json").write_text(json.dumps(index))
    return sizes


def run_step(step: str, *paths: Path) -> dict[str, Any]:
    """Run one step in a process of its own, which has no children."""
    command = [sys.executable, "-c", STEP, step, *map(str, paths)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def time_against_copies(source: Path, work: Path, rounds: int) -> dict[str, Any] | None:
    """Seconds of `cp -r` with `sync` and of converting, in turn, each to a place of its own."""
    if not rounds:
        return None
    seconds: dict[str, list[float]] = {"cp": [], "convert": []}
    for _ in range(rounds):
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, work / "copy"], check=True)
        os.sync()
        seconds["cp"].append(round(time.perf_counter() - start, 1))
        shutil.rmtree(work / "copy")
        os.sync()
        seconds["convert"].append(run_step("convert", source, work / "timed")["seconds"])
        shutil.rmtree(work / "timed")
    speed = statistics.median(seconds["cp"]) / statistics.median(seconds["convert"])
    return {"seconds": seconds, "speed_to_cp": round(speed, 3)}


def main() -> None:
    """Measures, prints, and fails where a step takes more than 2 GB and the largest tensor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="cogvideox")
    parser.add_argument("--layers", type=int, default=6, help="of the transformer")
    parser.add_argument("--encoder-layers", type=int, default=1, help="of the text encoder")
    parser.add_argument("--rounds", type=int, default=0, help="of timing against cp")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: print it only)")
    parser.add_argument(
        "--steps",
        nargs="*",
        choices=STEPS,
        default=STEPS,
        help="after converting (loading takes the model's memory)",
    )
    parser.add_argument("--keep", type=Path, help="where to leave the converted folder")
    arguments = parser.parse_args()

    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    layers = {"transformer": arguments.layers, "text_encoder": arguments.encoder_layers}
    try:
        sizes = write_source(work / "source", arguments.model, layers)
        timing = time_against_copies(work / "source", work, arguments.rounds)
        steps = {"convert": run_step("convert", work / "source", work / "converted")}
        shutil.rmtree(work / "source")
        for step in arguments.steps:
            steps[step] = run_step(step, work / "converted", work / "exported")
        if arguments.keep:
            shutil.move(work / "converted", arguments.keep)
    finally:
        shutil.rmtree(work)
    report = {
        **provenance_of("benchmarks/convert_memory.py"),
        "components": sizes,
        "steps": steps,
        "against_cp": timing,
    }
    report["versions"] |= package_versions(["orbax-checkpoint"])
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    largest = max(component["largest_tensor_bytes"] for component in sizes.values())
    for step in steps.keys() - {"load"}:
        if steps[step]["peak_bytes"] > 2e9 + largest:
            raise SystemExit(f"{step}: more than 2 GB + the largest tensor")
    if timing and timing["speed_to_cp"] < 0.6:
        raise SystemExit("convert: slower than 60 % of cp")


if __name__ == "__main__":
    main()
