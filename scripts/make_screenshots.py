#!/usr/bin/env python3
"""Renew the pictures of pages in docs/images.

    make demo                            (for the pictures of the demo)
    python scripts/make_screenshots.py

Needs Chromium. The 13B models are holes with headers (scripts/make_synthetic_checkpoint.py); the
report is that of the demo's merge.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarking.processes import SCRIPTS, lazymerge_environment
from browsing import Tab, browser, find_browser

IMAGES = SCRIPTS.parent / "docs" / "images"

MOST_BYTES = 300_000
"""Of a picture: they are in the repository."""

WIDTH, HEIGHT = 1200, 820

NAMES = ("Platypus2-13B", "orca_mini_v3_13b", "WizardLM-13B-V1.2")

RECIPE = """\
# WizardLM's attention in the middle layers, its feed-forward parts in the first ones
merge_method: task_arithmetic
base_model: Platypus2-13B
models:
  - model: orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM-13B-V1.2
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.3, 0.6, 0.3, 0.1]
        - filter: mlp
          value: [0.5, 0.2, 0]
        - value: 0.3
dtype: float16
"""

SELECT_TENSOR = """(() => {
  const name = 'model.layers.20.self_attn.q_proj.weight';
  const box = document.querySelector('#search');
  box.value = name;
  box.dispatchEvent(new Event('input'));
  document.querySelector('#found li').click();
  document.querySelector('#operations').scrollIntoView();
})()"""


def lazymerge(folder: Path, *arguments: str) -> None:
    """Runs the command in a folder."""
    command = [sys.executable, "-m", "lazymerge", *arguments]
    subprocess.run(
        command, cwd=folder, env=lazymerge_environment(), check=True, stdout=subprocess.DEVNULL
    )


def large_plan(folder: Path) -> Path:
    """The page of a merge of three 13B models with a gradient and filters."""
    for name in NAMES:
        subprocess.run(
            [
                *(sys.executable, str(SCRIPTS / "make_synthetic_checkpoint.py"), name),
                *("--shape", "llama2-13b", "--dtype", "float16", "--shards", "3", "--sparse"),
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    (folder / "wizard.yml").write_text(RECIPE)
    lazymerge(folder, "plan", "wizard.yml", "--dry-run", "--html", "plan.html")
    return folder / "plan.html"


def demo_pages(folder: Path) -> tuple[Path, Path] | None:
    """The pages of the demo's plan after it has run, and of what it did; None where its models are
    not there."""
    root = SCRIPTS.parent
    models = Path(os.environ.get("LAZYMERGE_DEMO", root / "demo"))
    if not (models / "models").is_dir():
        return None
    (folder / "demo").symlink_to(models.resolve())
    (folder / "demo.yml").write_text((root / "plans" / "demo_task_arithmetic.yml").read_text())
    lazymerge(folder, "run", "demo.yml", "-o", "merged", "-q", "--stats")
    lazymerge(folder, "plan", "demo.yml", "-o", "merged", "--dry-run", "--html", "demo.html")
    lazymerge(folder, "report", "merged", "--html", "report.html")
    return folder / "demo.html", folder / "report.html"


def picture(tab: Tab, page: Path, name: str, prepare: Callable[[Tab], object]) -> None:
    """A page in light and in dark."""
    for scheme in ("light", "dark"):
        tab.open(page, width=WIDTH, height=HEIGHT, dark=scheme == "dark")
        prepare(tab)
        file = IMAGES / f"{name}-{scheme}.png"
        tab.screenshot(file)
        size = file.stat().st_size
        print(json.dumps({"file": file.name, "bytes": size, "complaints": tab.complaints}))
        if size > MOST_BYTES:
            raise SystemExit(f"{file} has {size} bytes, more than {MOST_BYTES}")


def scrolled(element: str) -> Callable[[Tab], object]:
    """Looks at a part of the page."""
    return lambda tab: tab.ask(f"document.querySelector('{element}').scrollIntoView()")


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0]).parse_args()
    program = find_browser()
    if program is None:
        raise SystemExit(
            "there is no Chromium; apt-get install chromium, or set LAZYMERGE_CHROMIUM"
        )
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merge-") as scratch, browser(program) as tab:
        folder = Path(scratch)
        large = large_plan(folder)
        picture(tab, large, "plan-parameters", scrolled("#parameters"))
        picture(tab, large, "plan-operations", lambda tab: tab.ask(SELECT_TENSOR))
        demo = demo_pages(folder)
        if demo is not None:
            picture(tab, demo[0], "plan-demo-memory", scrolled("#memory"))
            picture(tab, demo[1], "report", scrolled("#layers"))


if __name__ == "__main__":
    main()
