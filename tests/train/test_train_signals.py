"""The flag that signals raise."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from halfbyte.errors import Interrupted
from halfbyte.lora.tensors import adapter_tensors
from halfbyte.train import checkpoint, loop, metrics, signals
from tests.train.tiny_runs import adapted, assembled, config, data, uneven

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_stops_at_the_next_poll_and_not_before(number: signal.Signals, code: int) -> None:
    with signals.listen() as stop:
        stop.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(signals.StopRequested) as caught:
            stop.poll()
    assert caught.value.number == number
    assert signals.exit_code(caught.value.number) == code
    assert str(caught.value) == number.name


def test_items_are_watched_one_by_one() -> None:
    handed = []
    with signals.listen() as stop, pytest.raises(signals.StopRequested):
        for item in stop.watched(range(10)):
            handed.append(item)
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert handed == [0, 1, 2, 3]


def test_previous_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.WATCHED]
    with signals.listen():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in signals.WATCHED] == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def body() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with signals.listen() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) == before)
            stop.poll()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_second_ctrl_c_quits_at_once_with_130() -> None:
    """In the middle of work that polls nothing."""
    script = (
        "import os, signal, time\nfrom halfbyte.train import signals\n"
        "with signals.listen() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('first', stop.number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)\n    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "first 2\n"
    assert "press Ctrl-C again to quit now" in done.stderr


SCRIPT = """
import sys, time
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
from halfbyte.errors import HalfbyteError
from halfbyte.train import loop
from tests.train.tiny_runs import adapted, assembled, config, data, uneven
out, steps, slow = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
model = adapted(LlamaForCausalLM(LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=512, pad_token_id=0)), dropout=0.2)
model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: time.sleep(slow if torch.is_grad_enabled() else 0))
settings = {"train.max_steps": steps, "optim.schedule": "constant", "train.save_every_steps": 100, "train.eval_every_steps": 100}
try:
    loop.run(config(out, **settings), assembled(model), data(uneven(40), uneven(4, seed=9)), resume=(out / "checkpoints").exists())
except HalfbyteError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(out: Path, steps: int, slow: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), str(steps), str(slow)], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(out, 6)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_saves_exits_with_its_code_and_can_be_resumed(tmp_path: Path, whole: Path, number: signal.Signals, code: int) -> None:
    """The signal comes from outside, in the middle of a slow step; the resumed run ends like one that was never stopped."""
    out = tmp_path / "run"
    process = start(out, 6, slow=0.4)
    read_until(process, "step 2/6")
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == code, rest
    assert f"stopped by {number.name}" in rest
    assert f"halfbyte train --resume --out {out}" in rest
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    (kept,) = checkpoint.scan(out / "checkpoints").valid
    assert 2 <= kept.step < 6
    again = start(out, 6)
    _, rest = again.communicate(timeout=120)
    assert again.returncode == 0, rest
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (whole / "adapter" / "adapter_model.safetensors").read_bytes()


def test_ctrl_c_twice_quits_a_process_at_once(tmp_path: Path) -> None:
    """In a micro-batch of 20 seconds nothing is polled, yet the second Ctrl-C ends the process, with its exit code and no traceback."""
    process = start(tmp_path / "run", 6, slow=20.0)
    read_until(process, "step 0  held-out loss")
    process.send_signal(signal.SIGINT)
    read_until(process, "press Ctrl-C again")
    process.send_signal(signal.SIGINT)
    rest = "".join(text for text in process.communicate(timeout=120) if text)
    assert process.returncode == 130
    assert "Traceback" not in rest


@pytest.mark.parametrize("faults", [
    "train.micro_batch:sigterm:1", "train.micro_batch:sigterm:6", "train.backward_done:sigterm:3", "train.step_done:sigterm:4",
    "train.before_eval:sigterm:1", "train.before_eval:sigterm:3", "train.after_eval:sigterm:2", "train.before_save:sigterm:2",
    "train.after_save:sigint:1", "train.epoch_end:sigint:1",
])
def test_a_stop_anywhere_is_resumed_to_the_bit(
    faults: str, tmp_path: Path, tiny_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between and inside micro-batches, around evaluation and save: weights and log lines as of a run that was never stopped."""
    ends = []
    for out, text in ((tmp_path / "whole", ""), (tmp_path / "run", faults)):
        monkeypatch.setenv("HALFBYTE_FAULTS", text)
        for resume in (False, True):
            model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1), dropout=0.2)
            try:
                result = loop.run(config(out), assembled(model), data(uneven(24), uneven(5, seed=9)), resume=resume, observers=[])
                break
            except Interrupted as stopped:
                assert stopped.exit_code == (130 if "sigint" in faults else 143)
                monkeypatch.setenv("HALFBYTE_FAULTS", "")
        ends.append((adapter_tensors(model), [
            {key: value for key, value in record.items() if key not in metrics.TIME_FIELDS} for record in result.history
        ], resume))
    assert (ends[0][2], ends[1][2]) == (False, True), "the signal must have stopped the second run"
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == ends[1][1]


def test_a_signal_inside_evaluation_does_not_wait_for_its_end(tmp_path: Path, tiny_llama: Callable[..., nn.Module]) -> None:
    model = adapted(tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    seen = []

    def hit(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not module.training and not torch.is_grad_enabled():
            seen.append(inputs[0].shape)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    model.model.layers[0].mlp.register_forward_pre_hook(hit)
    with pytest.raises(Interrupted):
        loop.run(config(tmp_path / "run"), assembled(model), data(uneven(8), uneven(100, seed=9)), observers=[])
    assert len(seen) == 3
    assert model.training
