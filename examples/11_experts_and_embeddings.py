"""You have a mixture of experts, and want LoRA on its attention, its embedding and its experts.

transformers fuses experts when it loads them; what is exported has one matrix an expert again.
"""

import torch
import transformers
from tiny import workplace

import peftc

work = workplace()
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, head_dim=8,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
    num_experts_per_tok=2, decoder_sparse_step=1, tie_word_embeddings=False,
)  # fmt: skip
transformers.Qwen3MoeForCausalLM(config).save_pretrained(work / "base")

# Attention's query and value by the model's structure; the embedding and the experts by name.
attention = peftc.Lora(rank=4, targets="role:query,value", adapter="attention")
rest = peftc.Lora(
    rank=4,
    targets="embed_tokens",
    parameters=["experts.gate_up_proj", "experts.down_proj"],
    adapter="rest",
)
program = peftc.Pipeline([attention, rest]).run(peftc.capture(work / "base"))

model = peftc.materialize(program)
ids = torch.arange(48).reshape(4, 12)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

trained = peftc.absorb(program, model)
merged = peftc.Pipeline([peftc.Merge()]).run(trained)
artifact = peftc.to_safetensors(merged, work / "merged")
print("largest relative error of a layer:", artifact.manifest["proof"]["site"]["relative_error"])

again = transformers.AutoModelForCausalLM.from_pretrained(work / "merged")
with torch.no_grad():
    same = torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
print("plain transformers gives the trained model's logits:", same)
