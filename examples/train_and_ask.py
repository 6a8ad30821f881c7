"""Train with QLoRA from Python, then ask: python examples/train_and_ask.py ROWS.jsonl [MODEL] [OUT]"""

import sys

import halfbyte as hb

rows = sys.argv[1]
model = sys.argv[2] if len(sys.argv) > 2 else "starter"
out = sys.argv[3] if len(sys.argv) > 3 else "runs/first"

run = hb.train(model=model, data=rows, method="qlora", out=out, train={"max_steps": 20}, lora={"rank": 16, "alpha": 32})
print("held-out loss:", run.summary["first_eval_loss"], "->", run.summary["final_eval_loss"])
print(run.generate("Play some jazz in the kitchen.", system="Reply in JSON.", max_new_tokens=24))
print("report:", run.report)
