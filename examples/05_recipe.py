"""You want a pipeline in a file, reviewed and versioned like code.

The same from a shell:

    peftc apply BASE -o OUT --recipe recipe.yaml
"""

from tiny import tiny_checkpoint, workplace

import peftc

folder = workplace()
base = tiny_checkpoint(folder)
recipe = folder / "recipe.yaml"
recipe.write_text("""\
peftc: 1
passes:
  - lora:
      rank: 16
      alpha: 32
      targets: [q_proj, k_proj, v_proj, o_proj]
      layers: 0-1
      dropout: 0.05
""")
artifact = peftc.apply(base, peftc.Recipe.load(recipe).build(), folder / "applied")
print("wrote", sorted(artifact.manifest["files"]))

# A typo is an error that names the near miss, before any work.
recipe.write_text("peftc: 1\npasses:\n  - lora: {rnak: 16}\n")
try:
    peftc.Recipe.load(recipe).build()
except peftc.PeftcError as error:
    print(error)
