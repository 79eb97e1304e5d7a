"""Changed files of a Hugging Face checkpoint that is imported."""

import json
import shutil
from pathlib import Path
from random import Random

from tests.faults.harness import Harness, digests_in
from tests.faults.mutate import odd_bytes, odd_json, replace_file
from tests.faults.process import Result

DTYPES = (
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "BF16",
    "F16",
    "F64",
    "I32",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "x",
    "",
)
FIELDS = {
    "model_type": (["llama"], {}, None, "gpt2", "bert", "t5", "mixtral", "vit", "whisper", "x"),
    "rope_parameters": (5, "x", {"rope_type": "yarn"}, {"rope_type": "longrope"}, {"full_attention": 5}, {}),
    "rope_scaling": (
        {"type": "linear", "factor": "2"},
        {"type": []},
        [],
        {"rope_type": "llama3", "factor": 0},
    ),
    "num_hidden_layers": (10**12, 10**5, 0, -1, 2.5, "2", [1]),
    "hidden_size": ("16", 2**31, 10**12, 0, -16, 16.0, 18),
    "quantization_config": ({"quant_method": "fp8"}, 5, []),
    "layer_types": (["x"], "x", [[]], ["full_attention"] * 10**5),
    "eos_token_id": ([0, 1], [[]], "0", -1, 10**12),
}
NAMES = (
    "../x.safetensors",
    "/etc/passwd",
    "none.safetensors",
    ".",
    "",
    "config.json",
    5,
    None,
    {},
    [],
    "\udcff",
    "x/y",
)


def case(rng: Random, harness: Harness, number: int) -> Result:
    """Import a checkpoint with a changed config, tensor file or index."""
    folder = harness.folder()
    shutil.copytree(harness.checkpoint, folder / "hf")
    kind = rng.choice((_config, _config, _config, _header, _header, _index, _index, _any_file))
    tried = kind(rng, folder / "hf")
    describe = ["--mode=describe", "--workdir=imported"]
    imports = harness.import_command(folder / "hf")
    same = kind in (_header, _index)
    outcome = harness.run(folder, imports, *([describe] if same else []))
    silent = ""
    if same and outcome.code == 0:
        silent = "" if digests_in(outcome.out) == [(0, harness.imported)] else "other parameters"
    return outcome.result(tried, silent)


def _config(rng: Random, hf: Path) -> str:
    file = hf / rng.choice(("config.json",) * 6 + ("generation_config.json",))
    fields = json.loads(file.read_text())
    if file.name == "config.json" and rng.random() < 0.5:
        name = rng.choice(list(FIELDS))
        value = rng.choice(FIELDS[name])
        file.write_text(json.dumps(fields | {name: value}))
        return f"config {name}={str(value)[:60]}"
    file.write_text(odd_json(rng, fields), errors="surrogatepass")
    return f"JSON of {file.name}"


def _header(rng: Random, hf: Path) -> str:
    """Change the header of a safetensors file: its JSON, a dtype, or a bit."""
    file = rng.choice(sorted(hf.glob("*.safetensors")))
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, action = json.loads(data[8:end]), rng.random()
    if action < 0.4:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = rng.choice(DTYPES)
        text, tried = json.dumps(header), f"{name} of {header[name]['dtype']}"
    elif action < 0.7:
        text, tried = odd_json(rng, header), "JSON of a header"
    else:
        file.write_bytes(odd_bytes(rng, data[:end]) + data[end:])
        return "bytes of a header"
    encoded = text.encode(errors="surrogatepass")
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[end:])
    return f"{tried} in {file.name}"


def _index(rng: Random, hf: Path) -> str:
    file = hf / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    if rng.random() < 0.6:
        name, value = rng.choice(list(index["weight_map"])), rng.choice(NAMES)
        shutil.copy(hf / "model-0.safetensors", hf.parent / "x.safetensors")
        index["weight_map"][name] = value
        file.write_text(json.dumps(index))
        return f"{value!r} in the index"
    file.write_text(odd_json(rng, index), errors="surrogatepass")
    return "JSON of the index"


def _any_file(rng: Random, hf: Path) -> str:
    file = rng.choice([file for file in sorted(hf.iterdir()) if file.suffix in (".json", ".jinja")])
    if rng.random() < 0.4:
        return f"{replace_file(rng, file)} for {file.name}"
    file.write_bytes(odd_bytes(rng, file.read_bytes()))
    return f"bytes of {file.name}"
