"""Two gloo processes give the curve of one process at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from tests.conftest import make_tiny_target, make_tiny_drafter
from tests.training.conftest import make_text
from falcon_hf.training.arguments import FalconTrainingArguments
from falcon_hf.training.batches import DialogueDataset
from falcon_hf.training.process_group import end_process_group
from falcon_hf.training.trainer import FalconTrainer
from transformers import TrainerCallback
import torch

torch.set_num_threads(1)
folder, rows, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
target = make_tiny_target(24)
drafter = make_tiny_drafter(target, 2, "linear", tree=[[0], [0, 0], [0, 0, 0]])
args = FalconTrainingArguments(
    output_dir=folder, max_steps=int(sys.argv[5]), per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
    learning_rate=3e-3, warmup_steps=1, logging_steps=1, save_strategy="steps", save_steps=6, report_to="none",
    use_cpu=True, disable_tqdm=True,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    rollout_passes=2, rollout_start=0.0, rollout_share=0.25,
    first_pass_share=share, seed=int(sys.argv[4]),
)
text = make_text(target, 32)
trainer = FalconTrainer(drafter, args, target, DialogueDataset(text), DialogueDataset(make_text(target, 9, seed=4)))
class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == int(sys.argv[6])

trainer.add_callback(StopAt())
trainer.train(resume_from_checkpoint=sys.argv[7] == "resume")
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [float(weight.double().norm()) for weight in trainer.model.parameters()]
    print("RESULT" + json.dumps({"curve": curve, "weights": weights, "world": args.world_size,
                                 "metrics": {k: v for k, v in metrics.items() if isinstance(v, float)}}))
del trainer
end_process_group()  # as `falcon-hf train` does at its end
"""


def run(
    folder: Path,
    processes: int,
    rows: int,
    share: float,
    seed: int = 0,
    steps: int = 6,
    stop: int = 0,
    how: str = "new",
) -> dict:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(script), str(folder), str(rows), str(share), *map(str, (seed, steps, stop)), how]
    if processes > 1:
        port = 29500 + os.getpid() % 2000
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command = [*torchrun, "--master-port", str(port), *command[1:]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "RESULT" in line]
    return json.loads(line[line.index("RESULT") + len("RESULT") :])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 4])
def test_two_processes_are_one(tmp_path, rows):
    """At the command's own shares: two of eight rows go on to further passes, one is measured by the first pass.

    So a process may have a row of each kind or none; no dialogue of nine is evaluated twice.
    """
    one, two = run(tmp_path, 1, rows, 0.125), run(tmp_path, 2, rows // 2, 0.125)
    assert (one["world"], two["world"]) == (1, 2)
    assert two["curve"] == pytest.approx(one["curve"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    assert two["metrics"]["eval_tau"] == pytest.approx(one["metrics"]["eval_tau"], rel=1e-9)
    assert two["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"], rel=1e-4)
    # The controls: other draws, and all rows measured, are another curve.
    assert run(tmp_path, 1, rows, 0.125, seed=1)["curve"] != pytest.approx(one["curve"], rel=1e-2)
    assert run(tmp_path, 1, rows, 1.0)["curve"] != pytest.approx(one["curve"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_in_the_middle_of_an_epoch(tmp_path):
    """With the order that this epoch has: 32 dialogues are four steps, and the checkpoint is of step 6."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run(whole, 2, 4, 0.125, steps=10)
    run(broken, 2, 4, 0.125, steps=10, stop=6)
    resumed = run(broken, 2, 4, 0.125, steps=10, how="resume")
    assert resumed["curve"] == pytest.approx(expected["curve"], rel=1e-6)
    assert resumed["weights"] == pytest.approx(expected["weights"], rel=1e-6)
    assert len(expected["curve"]) == 10
