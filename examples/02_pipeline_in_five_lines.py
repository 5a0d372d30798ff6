"""You want the compiler's steps in your own hands: capture, a pipeline of passes, an exporter."""

from tiny import tiny_adapter, tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
adapter = tiny_adapter(folder, base, "adapter", seed=1)

program = peftc.capture(base)
pipeline = peftc.Pipeline([peftc.Attach(path=str(adapter)), peftc.Merge()])
program = pipeline.run(program)
peftc.to_safetensors(program, folder / "merged")

for entry in program.journal:
    print(f"{entry.title}: {entry.sites} sites, {entry.effect}, {entry.measured}")
