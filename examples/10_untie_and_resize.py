"""You add tokens to a model whose head is its embedding, and merge an adapter on that head.

The same from a shell:

    peftc apply BASE -o OUT untie resize_vocabulary --size 260 --pad-to-multiple-of 8
    peftc export OUT -o merged --merge --adapter ADAPTER
"""

import peft
import torch
import transformers
from tiny import workplace

import peftc
from peftc.passes.resize_vocabulary import ResizeVocabulary
from peftc.passes.untie import Untie

folder = workplace()
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=256, tie_word_embeddings=True,
)  # fmt: skip
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")

passes = [Untie(), ResizeVocabulary(size=260, pad_to_multiple_of=8)]
peftc.apply(folder / "base", passes, folder / "out")
bigger = folder / "out" / "base"  # a checkpoint like any other

model = transformers.AutoModelForCausalLM.from_pretrained(bigger)
ids = torch.arange(12)[None]
old = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
same = torch.equal(model(ids).logits[..., :256], old(ids).logits)
print(f"{model.config.vocab_size} tokens, tied: {model.config.tie_word_embeddings}")
print("logits of the old tokens are the same, bit for bit:", same)

# Stands for training: an adapter on the head, which could not be merged while it was tied.
lora = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
merged = peftc.export(
    bigger, folder / "merged", merge=True, adapters=[(str(folder / "adapter"), 1.0)]
)
print("merged:", merged.manifest["proof"]["site"])
