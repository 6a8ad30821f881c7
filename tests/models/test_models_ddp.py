"""Own layers and lazy logits under DistributedDataParallel: two processes over gloo give the gradients of one."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from halfbyte.models.lazy_logits import make_lazy
from halfbyte.models.structure import fuse
from tests.models.test_models_decoder_layer import adapted, batch, close

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
from halfbyte.models.lazy_logits import LazyLogits, make_lazy
from halfbyte.models.structure import fuse
from tests.models.test_models_decoder_layer import adapted, batch

rank, place, unused = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
model = adapted("llama").train()
assert fuse(model).layers == 3 and make_lazy(model)
wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
for _ in range(2):  # the second pass meets buckets that were arranged anew
    model.zero_grad()
    outputs = wrapped(**{key: value[rank : rank + 1] for key, value in batch("packed").items()})
    assert unused or isinstance(outputs.logits, LazyLogits) and outputs.logits.kept() is None
    outputs.loss.backward()
if rank == 0:
    save_file({name: one.grad for name, one in model.named_parameters() if one.grad is not None}, f"{place}/gradients")
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """Mean over ranks of each rank's mean; both rows have as many trained tokens.  Looking for unused parameters makes the logits."""
    model = adapted("llama").train()
    fuse(model)
    make_lazy(model)
    model(**batch("packed"), use_cache=False).loss.backward()
    for unused in (False, True):
        place = tmp_path / str(unused)
        place.mkdir()
        command = [sys.executable, "-c", PROGRAM]
        ranks = [subprocess.Popen([*command, str(rank), str(place), str(unused)], cwd=ROOT) for rank in range(2)]
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
        found = load_file(place / "gradients")
        wanted = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            close(found[name], gradient, 1e-5, name)
