"""Weights that are being published when the learner is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from rl.weight_sync import WeightFiles


def test_publisher_killed_at_any_moment_leaves_the_old_weights_or_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    program = (
        "import sys, torch; from rl.weight_sync import publish_weights\n"
        "weights = {f'layer.{i}': torch.zeros(200_000) for i in range(20)}\n"
        "print('ready', flush=True)\n"
        "for value in range(1, 10**9):\n"
        "    for tensor in weights.values(): tensor.fill_(value)\n"
        "    publish_weights(weights.items(), sys.argv[1])\n"
    )
    for delay_s in (0.02, 0.07, 0.13):
        publisher = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        assert publisher.stdout is not None
        publisher.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(delay_s)
        publisher.send_signal(signal.SIGKILL)
        publisher.wait()
        publisher.stdout.close()
        with WeightFiles(path) as files:
            values = {float(value) for _, tensor in files for value in (tensor.min(), tensor.max())}
            assert len(files) == 20 and len(values) == 1
