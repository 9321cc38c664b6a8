"""The Python of the README, from its first line to its last, does what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from chassis_utils import Adapter, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_runs_as_written(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    code = "\n".join(["import torch", "torch.set_num_threads(1)", *blocks, "print(port.in_use)"])
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT / "notebooks")}}  # as it says of the router
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("math\n{'math': 1.0}\n")
    assert Adapter.load(tmp_path / "math", load("pocket-base", device="cpu")).method == "v2"
    assert (tmp_path / "math-lora" / "adapter_model.safetensors").is_file()
