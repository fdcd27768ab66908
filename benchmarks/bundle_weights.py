"""Measure a finished run once on its test split, and put its weights with their card into sdzoo/weights.

    python benchmarks/bundle_weights.py runs/NAME sd_resnet20.cifar10_jpeg --data-dir DIR --data "CIFAR-10 (JPEG)"

Every figure on the card comes from the run's own files or is measured here.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import yaml
from interleaved import hardware

from sdzoo import weights
from sdzoo.deploy.predictor import model_predictor
from sdzoo.digest import file_sha256, state_sha256
from sdzoo.survival import survival_probs
from sdzoo.training.checkpoint import load_model, read_checkpoint
from sdzoo.training.evaluate import DataSplit, evaluate_predictor

CARD = """---
{facts}---

# {name}

{arch} with stochastic depth (Huang et al., 2016), trained from scratch on {data}.

| | |
|---|---|
| data | {data}: {data_note} |
| recipe | `recipes/{name}.yaml` |
| weight decay | {decay} |
| epochs | {epochs}, weights of epoch {best_epoch}, chosen on val |
| top-1 on val | {val_top1_percent:.2f} % of {val_images:,} images |
| top-1 on test | **{test_top1_percent:.2f} %** of {test_images:,} images, measured once |
| runs | {runs} |
| training time | {training_minutes} minutes, {training_note} |
| hardware | {hardware} |
| software | torch {torch} |
| survival probabilities | linear decay, p_1 = {p_first:.4f} to p_L = {p_last:.4f}; they are in the file |

```python
import sdzoo, timm

model = timm.create_model("{arch}", pretrained=True).eval()
```

Measured again with `sdzoo eval {name} --data-dir DIR --split test`.

Limits: stock timm without `import sdzoo` cannot build this model, and its own ResNets would drop the survival
probabilities. The figures hold for this data set as JPEG and are not comparable with the literature's for CIFAR-10.
"""


def main() -> None:
    """Measure, copy and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that sdzoo train wrote")
    parser.add_argument("name", help="model.tag")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--data", required=True, help="what the data set is to be called")
    parser.add_argument("--data-note", required=True, help="what must be known of it")
    parser.add_argument("--training-note", default="two threads")
    arguments = parser.parse_args()

    _, header = read_checkpoint(arguments.run / "best.safetensors")
    _, last = read_checkpoint(arguments.run / "last.pth")
    recipe, progress = last["recipe"], last["progress"]
    if progress["epoch"] != recipe["epochs"]:
        raise SystemExit(f"{arguments.run} stopped after {progress['epoch']} of {recipe['epochs']} epochs")
    model = load_model(arguments.run / "best.safetensors")
    predictor = model_predictor(model)
    results = {
        split: evaluate_predictor(predictor, header["labels"], predictor.config, DataSplit(arguments.data_dir, split))
        for split in (recipe["val_split"], "test")
    }
    val, test = results[recipe["val_split"]], results["test"]
    target = weights.path(arguments.name)
    shutil.copyfile(arguments.run / "best.safetensors", target)
    probs = survival_probs(model)
    facts = {
        "sha256": file_sha256(target),
        "state_sha256": state_sha256(model.state_dict()),
        "data": arguments.data,
        "epochs": recipe["epochs"],
        "best_epoch": progress["best_epoch"],
        "val_top1_percent": round(val.top1_percent, 2),
        "val_images": val.images,
        "test_top1_percent": round(test.top1_percent, 2),
        "test_images": test.images,
        "runs": 1,
        "training_minutes": round(progress["seconds"] / 60),
        "hardware": hardware(),
        "torch": str(torch.__version__),
    }
    text = CARD.format(
        **facts,
        facts=yaml.safe_dump(facts, sort_keys=False),
        name=arguments.name,
        arch=recipe["model"],
        data_note=arguments.data_note,
        training_note=arguments.training_note,
        decay="timm's default: biases and norms do not decay"
        if recipe["opt_kwargs"].get("filter_bias_and_bn", True)
        else "of every parameter",
        p_first=probs[0],
        p_last=probs[-1],
    )
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
