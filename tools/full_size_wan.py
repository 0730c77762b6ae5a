"""A folder of Wan2.1-T2V-1.3B's sizes with random weights, as diffusers writes it, and the memory of its conversion.

    python tools/full_size_wan.py FOLDER        # 6.2 GB of disk, and 3.4 GB for what is written from it

The result is in results/convert-wan.json.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from dicode.convert.files import write_tensors
from dicode.provenance import write_result

SHARD_BYTES = 5_000_000_000  # as the published folder is cut
SIZES = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
COMMAND = "python tools/full_size_wan.py FOLDER"
CONVERT = (
    "import sys; from dicode.cli.app import main; from dicode.device import peak_memory_mib; "
    "code = main(sys.argv[1:]); print('PEAK', peak_memory_mib()); sys.exit(code)"
)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Values of the module's shapes, one number repeated: no memory until they are written."""
    return {name: torch.randn(1).expand(value.shape) for name, value in module.state_dict().items()}


def write_wan(folder: Path) -> None:
    """The folder: transformer in shards, autoencoder, and a file of the null prompt's rows."""
    with torch.device("meta"):
        transformer, vae = WanTransformer3DModel(**SIZES), AutoencoderKLWan()
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in random_state(transformer).items():
        if sum(own.numel() * 4 for own in shards[-1].values()) + value.numel() * 4 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / "transformer" / file, shard, torch.float32)
        places |= dict.fromkeys(shard, file)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_tensors(folder / "vae/diffusion_pytorch_model.safetensors", random_state(vae), torch.float32)
    for part, model in (("transformer", transformer), ("vae", vae)):
        model.save_config(folder / part)
    write_tensors(folder / "null.safetensors", {"null": torch.zeros(512, SIZES["text_dim"])}, torch.float32)
    classes = {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **classes}))


def main(folder: Path) -> None:
    """Write it, convert it in another process, and keep that one's peak."""
    write_wan(folder)
    largest = max(file.stat().st_size for file in folder.rglob("*.safetensors"))
    words = ["convert", "wan", str(folder), "-o", str(folder / "out"), "--null-text", str(folder / "null.safetensors")]
    done = subprocess.run([sys.executable, "-c", CONVERT, *words], check=True, capture_output=True, text=True)
    peak = float(done.stdout.rpartition("PEAK ")[2]) * 2**20
    written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    values = {"largest_file_bytes": largest, "peak_bytes": peak, "ratio": peak / largest, "written_bytes": written}
    print(done.stdout, values)
    write_result(Path("results/convert-wan.json"), "conversion of Wan2.1-T2V-1.3B", values, 1, 0, COMMAND, "cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
