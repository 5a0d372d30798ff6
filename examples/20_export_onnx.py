"""You want to run what you trained in onnxruntime, and keep one directory for transformers too.

The same from a shell:

    peftc export BASE -o merged --merge --adapter ADAPTER --format onnx
"""

import numpy as np
import onnxruntime
from tiny import tiny_adapter, tiny_checkpoint, workplace
from transformers import AutoModelForCausalLM

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
adapter = tiny_adapter(folder, base, "adapter", seed=1)

artifact = peftc.export(
    base, folder / "merged", merge=True, adapters=[(str(adapter), 1.0)], format="onnx"
)
print("onnxruntime against eager torch:", artifact.manifest["proof"]["onnx"]["model.onnx"])
print("files:", sorted(artifact.manifest["files"]))

# Plain onnxruntime: token by token, each step from the keys and values of those before.
session = onnxruntime.InferenceSession(str(folder / "merged" / "model.onnx"))
outputs = [output.name for output in session.get_outputs()]
cache = {
    given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
    for given in session.get_inputs()
    if given.name.startswith("past_key_values.")
}
ids, new = [5, 17, 3], np.array([[5, 17, 3]])
for _ in range(12):
    positions = np.arange(len(ids))[None, -new.shape[1] :]
    mask = np.ones((1, len(ids)), np.int64)
    given = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **cache}
    logits, *present = session.run(outputs, given)
    cache = dict(zip(cache, present, strict=True))
    new = logits[:, -1:].argmax(-1)
    ids.append(int(new[0, 0]))
print("onnxruntime: ", ids)

# And transformers, from the same weights.
model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")
prompt = model.dummy_inputs["input_ids"].new_tensor([[5, 17, 3]])
print("transformers:", model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist())
