"""You tuned a prompt and want to run it in onnxruntime, where nothing knows of virtual tokens.

The same from a shell:

    peftc export TUNED -o OUT --format onnx
    peftc run OUT --prompt "Hello" --max-new-tokens 12
    peftc bench OUT --prompt-tokens 16 --new-tokens 8
"""

from tiny import tiny_talker, workplace

import peftc
from peftc.running import Figures, Sampling, answer, open_runner
from peftc.text import Text
from peftc.timing import bench

folder = workplace()
base = tiny_talker(folder)
peftc.apply(base, [peftc.PromptTuning(virtual_tokens=4)], folder / "tuned")

# The virtual tokens are run once, now; the graph starts from their keys and values.
artifact = peftc.export(folder / "tuned", folder / "onnx", format="onnx")
print("virtual tokens:", artifact.manifest["constant_cache"]["tokens"])
print("onnxruntime against the live tuned model:", artifact.manifest["proof"]["onnx"]["model.onnx"])

sampling = Sampling(max_new_tokens=12, temperature=0.8, top_k=40, seed=1)
for directory, engine in (("onnx", "genai"), ("onnx", "onnxruntime"), ("tuned", "transformers")):
    runner = open_runner(folder / directory, engine=engine)
    text, figures = Text(runner.folder), Figures()
    pieces = list(answer(runner, text, text.encode("Hello"), sampling, figures))
    print(f"{runner.engine}: {''.join(pieces)!r}, {figures.rate:.0f} tokens/s")

(timing,) = bench(open_runner(folder / "onnx"), text, [2], [16], [8], rounds=2)
print(f"two texts at once: {timing.prefill:.0f} tokens/s read, {timing.decode:.0f} written")
