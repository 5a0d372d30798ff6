"""You want to train on a data file, go on where a killed run was, and see what was gained.

The same from a shell:

    peftc tune BASE --data words.jsonl -o OUT --epochs 60 --lr 1e-2 lora --rank 16
    peftc eval OUT --compare --data words.jsonl --generate 3
    peftc export OUT -o MERGED --merge
"""

import json

from tiny import tiny_talker, workplace

import peftc

folder = workplace()
base = tiny_talker(folder)
words = {"red": "rot", "blue": "blau", "green": "gruen", "black": "schwarz", "white": "weiss"}
data = folder / "words.jsonl"
data.write_text(
    "".join(json.dumps({"prompt": f"{a}=", "completion": b}) + "\n" for a, b in words.items())
)

tuning = peftc.Tuning(
    data=str(data), epochs=60, batch_size=5, lr=1e-2, schedule="constant", plot=False
)
artifact = peftc.tune(base, tuning, folder / "tuned", [peftc.Lora(rank=16, alpha=32)])
figures = artifact.manifest["training"]
print(f"loss {figures['first_loss']:.2f} → {figures['last_loss']:.2f} in {figures['steps']} steps")

how = peftc.Evaluation(data=str(data), compare=True, generate=3, max_new_tokens=10)
for scores in peftc.score([folder / "tuned"], how):
    name = scores.name.rpartition("/")[2]
    print(f"{name:14} perplexity {scores.perplexity:8.2f}  ROUGE-L {scores.rouge_l:5.1f}  "
          f"{scores.written}")  # fmt: skip

# A line that is no JSON is told by its number, before any work.
data.write_text(data.read_text() + '{"prompt": "grey=", "completion": "grau"\n')
try:
    peftc.tune(base, tuning, folder / "again", [peftc.Lora(rank=8)])
except peftc.PeftcError as error:
    print(error)
