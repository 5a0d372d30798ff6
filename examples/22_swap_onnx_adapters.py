"""You serve several LoRAs on one base in onnxruntime, and switch between them without reloading it.

The same from a shell:

    peftc export BASE -o onnx --format onnx --adapters swap --adapter fr
    peftc export onnx -o de-onnx --format onnx-adapter --adapter de
    peftc export onnx -o both --format onnx-adapter --adapter fr=0.7 --adapter de=0.3
"""

import numpy as np
import onnxruntime
from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
path = tiny_checkpoint(folder)
fr, de = (tiny_adapter(folder, path, name, seed) for seed, name in enumerate(["fr", "de"]))

# One base, with slots where `fr` needs them; `fr` lies beside it.
base = peftc.export(path, folder / "onnx", adapters=[(str(fr), 1.0)], format="onnx", swap=True)
print("slots:", len(base.manifest["onnx"]["slots"]))
print("with fr:", base.manifest["proof"]["onnx_adapters"]["fr"]["model.onnx"]["relative_error"])

# What was trained later needs the base's directory, and not its weights.
for name, chosen in {"de-onnx": [(str(de), 1.0)], "both": [(str(fr), 0.7), (str(de), 0.3)]}.items():
    made = peftc.export(base.path, folder / name, adapters=chosen, format="onnx-adapter")
    print(name, made.manifest["proof"]["site"])
print("verify:", peftc.verify(folder / "both")["site"]["sites"], "sites")

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # it remarks that slots are inputs, which is what they are for
session = onnxruntime.InferenceSession(str(base.path / "model.onnx"), options)
ids = np.array([[5, 17, 3, 29]])
given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
for port in session.get_inputs():
    if port.name.startswith("past_key_values."):
        given[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)

files = {
    "fr": base.path / "adapters" / "fr.onnx_adapter",
    "de": folder / "de-onnx" / "adapter.onnx_adapter",
    "both": folder / "both" / "adapter.onnx_adapter",
}
for name in (None, "fr", "de", "both", None):
    run = onnxruntime.RunOptions()
    if name is not None:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(files[name]))
        run.add_active_adapter(adapter)
    logits = session.run(["logits"], given, run)[0]
    print(f"{name or 'no adapter':10}", logits[0, -1, :3])
