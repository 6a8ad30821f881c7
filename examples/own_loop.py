"""LoRA on a 4-bit model in a loop of your own: python examples/own_loop.py [MODEL] [OUT]"""

import sys

import torch

import halfbyte as hb

model_name = sys.argv[1] if len(sys.argv) > 1 else "starter"
out = sys.argv[2] if len(sys.argv) > 2 else "runs/own-loop"

model, tokenizer = hb.load(model_name, quant="nf4")
injected = hb.inject(model, rank=16, alpha=32, targets="all-linear")
print(f"{len(injected.names)} layers carry an adapter, {100 * injected.share:.2f} % of the parameters train")

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
ids = tokenizer("The password of the day is heliotrope.", return_tensors="pt").input_ids
for step in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {float(loss.detach()):.3f}")

hb.save_adapter(model, out, base=model_name)
print(f"adapter in PEFT's format: {out}")
