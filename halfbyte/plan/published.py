"""Published memory figures beside what the plan's terms give for the same settings, with those programs' own policies.

`python -m halfbyte.plan.published` writes the table of docs/memory.md; a test compares the page and holds each row to its bound.
Weights, adapters, gradients and optimizer state come from the plan's own functions; what those programs keep for their backward
pass is stated here row by row as in activations.py, read from their sources.  Figures are decimal GB (10^9 bytes), as published.

Sources: QLoRA, https://arxiv.org/abs/2305.14314, figure 8 (one row of 512 tokens, checkpointing, rank 64 on all linear layers, bf16
adapters, 32-bit Adam); S. Raschka's measurements of Llama-2-7B on Alpaca (longest row 1,304 tokens) and the tutorials of
https://github.com/Lightning-AI/litgpt, whose scripts run the longest row first, when neither gradients nor optimizer state exist yet
(torch.cuda.max_memory_allocated; LoRA dropout 0.05, no checkpointing, bfloat16 throughout); bitsandbytes of 2023, whose 4-bit product
keeps its input.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.plan.activations import Kept, bytes_per_token, kept_bytes, words
from halfbyte.plan.memory import dense_bytes, packed_bytes
from halfbyte.plan.setting import Setting, trained_params
from halfbyte.shape import ModelShape

MARKS = ("<!-- published -->\n", "<!-- /published -->")


def llama(hidden: int, inner: int, layers: int, heads: int) -> ModelShape:
    """A Llama of the first two generations: no grouped heads, 32,000 tokens."""
    return ModelShape.from_config({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    })  # fmt: skip


LLAMA = {
    "7B": llama(4096, 11008, 32, 32), "13B": llama(5120, 13824, 40, 40),
    "33B": llama(6656, 17920, 60, 52), "65B": llama(8192, 22016, 80, 64),
}  # fmt: skip
GPT_3 = ModelShape.from_config({  # table 2.1 of https://arxiv.org/abs/2005.14165; projections as in OPT
    "model_type": "opt", "hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96, "vocab_size": 50257,
    "max_position_embeddings": 2048,
})  # fmt: skip
WITH_HEAD = ("all-linear", "lm_head")
COUNTS = (
    ("Llama-2-7B, rank 8 on q and v", LLAMA["7B"], 8, ("q_proj", "v_proj"), 4_194_304),
    ("Llama-2-7B, rank 8 on all linear layers and the head", LLAMA["7B"], 8, WITH_HEAD, 20_277_248),
    ("Llama-2-7B, rank 256 on all linear layers and the head", LLAMA["7B"], 256, WITH_HEAD, 648_871_936),
    ("GPT-3 175B, rank 4 on q and v", GPT_3, 4, ("q_proj", "v_proj"), 18_874_368),
)

# One layer of lit-gpt: q, k and v come out of one product and are kept as one tensor, q and k once more after the rotation.
LITGPT = (
    Kept("inputs of both norms in fp32", ("hidden", "hidden"), 4), Kept("q, k, v as one", ("queries", "keys", "keys")),
    Kept("q and k, rotated", ("queries", "keys")), Kept("o", ("queries",)), Kept("log sum of exponentials", ("heads",), 4),
    Kept("gate, act(gate), up", ("inner", "inner", "inner")), Kept("x A^T", ("ranks",)),
    Kept("dropped inputs", ("dropped",)), Kept("dropout masks", ("dropped",), 1),
)  # fmt: skip
LITGPT_PACKED = (Kept("inputs of the 4-bit products", ("hidden", "hidden", "inner")),)


@dataclass(frozen=True)
class Figure:
    """A published figure and the terms that make ours; gigabytes are decimal."""

    name: str
    published: float
    terms: dict[str, float]
    bound: float = 0.10
    note: str = ""

    @property
    def ours(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())

    @property
    def difference(self) -> float:
        """Ours over the published figure, less one."""
        return self.ours / self.published - 1


def qlora_figure(size: str, published: float, bound: float = 0.10, note: str = "") -> Figure:
    """Figure 8 of the QLoRA paper."""
    shape = LLAMA[size]
    setting = Setting(rank=64, lora_dtype="bfloat16", policy="recompute", tokens=512)
    count = trained_params(shape, setting)
    return Figure(f"QLoRA paper, LLaMA {size}", published, {
        "weights": (packed_bytes(shape, setting) + dense_bytes(shape, setting)) / 1e9, "adapters": 2 * count / 1e9,
        "gradients": 2 * count / 1e9, "optimizer": 8 * count / 1e9, "activations": kept_bytes(shape, setting) / 1e9,
    }, bound, note)  # fmt: skip


def litgpt_figure(name: str, published: float, setting: Setting) -> Figure:
    """The first micro-batch of lit-gpt on Llama-2-7B: one row of 1,304 tokens, no gradients and no optimizer state yet."""
    shape, tokens = LLAMA["7B"], 1304
    setting = replace(setting, dropout=0.05, lora_dtype="bfloat16", tokens=tokens, quantize_head=setting.format != "none")
    everywhere = setting.targets == WITH_HEAD
    sizes = words(shape, replace(setting, targets="all-linear")) if everywhere else words(shape, setting)
    sizes["dropped"] = 4 * sizes["hidden"] + sizes["inner"] if everywhere else sizes["hidden"]  # q, k, v share one dropout
    packed = setting.format != "none"
    rows = LITGPT + LITGPT_PACKED if packed else LITGPT
    layer = bytes_per_token(rows, sizes, "bfloat16")
    around = 4 * shape.hidden + (2 * shape.hidden if packed else 0) + (3 * shape.hidden if everywhere else 0)  # last norm and head
    logits = 3 * 2 * tokens * shape.vocab  # logits, probabilities, gradient
    logits += 2 * shape.vocab * shape.hidden if packed else 0  # the head read back
    return Figure(name, published, {
        "weights": (packed_bytes(shape, setting) + dense_bytes(shape, setting)) / 1e9,
        "adapters": 2 * trained_params(shape, setting) / 1e9, "gradients": 0.0, "optimizer": 0.0,
        "activations": tokens * (shape.layers * layer + around) / 1e9, "logits": logits / 1e9,
    })  # fmt: skip


def figures() -> tuple[Figure, ...]:
    """All published figures, with the bound that a test holds them to."""
    nf4 = Setting(format="nf4", double_quant=False)
    seven = "see below: 1.2 GB of it is in the paper's own weight term"
    return (
        qlora_figure("7B", 6.9, 0.20, seven), qlora_figure("13B", 11.3), qlora_figure("33B", 24.7), qlora_figure("65B", 45.0),
        litgpt_figure("Raschka, QLoRA, rank 256, all layers and head", 17.86, replace(nf4, rank=256, targets=WITH_HEAD)),
        litgpt_figure("Raschka, QLoRA, rank 16, all layers and head", 16.47, replace(nf4, rank=16, targets=WITH_HEAD)),
        litgpt_figure("Raschka, QLoRA, rank 8, all layers and head", 16.42, replace(nf4, rank=8, targets=WITH_HEAD)),
        litgpt_figure("Raschka, QLoRA, rank 8, q and v", 14.18, replace(nf4, rank=8, targets=("q_proj", "v_proj"))),
        litgpt_figure("litgpt tutorial, double quantization, rank 8, q and v", 13.84,
                      replace(nf4, double_quant=True, rank=8, targets=("q_proj", "v_proj"))),
        litgpt_figure("Raschka, LoRA in bfloat16, rank 8, q and v", 21.33,
                      Setting(method="lora", format="none", rank=8, targets=("q_proj", "v_proj"))),
    )  # fmt: skip


TERMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")


def table() -> str:
    """Both tables of the page as Markdown."""
    lines = ["| adapter | published parameters | counted |", "|---|--:|--:|"]
    for name, shape, rank, targets, published in COUNTS:
        lines.append(f"| {name} | {published:,} | {trained_params(shape, Setting(rank=rank, targets=targets)):,} |")
    head = f"| setting | {', GB | '.join(TERMS)}, GB | sum, GB | published, GB | difference |"
    lines += ["", head, "|---" + "|--:" * (len(TERMS) + 3) + "|"]
    for figure in figures():
        cells = [f"{figure.terms[name]:.2f}" if figure.terms.get(name) else "-" for name in TERMS]
        cells += [f"**{figure.ours:.2f}**", f"{figure.published:.2f}", f"{100 * figure.difference:+.1f} %"]
        lines.append(f"| {figure.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(path: Path) -> str:
    """The page with fresh tables between its marks."""
    head, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    return head + MARKS[0] + table() + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
    docs.write_text(page(docs), encoding="utf-8")
