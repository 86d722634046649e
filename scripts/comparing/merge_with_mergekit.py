#!/usr/bin/env python3
"""Merge with mergekit, as many times as lines come in; runs in mergekit's environment.

    python merge_with_mergekit.py < JOBS

A job is a line of JSON: {"recipe": YAML, "output": folder, "seed": number}. Each is answered by a
line of JSON on stdout: {} or {"error": what went wrong}. Importing mergekit takes longer than a
hundred small merges.
"""

from __future__ import annotations

import json
import os
import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    """Reads jobs until there are none."""
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        answer = {}
        try:
            configuration = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
            options = MergeOptions(
                copy_tokenizer=False,
                write_model_card=False,
                quiet=True,
                random_seed=job["seed"],
                lora_merge_cache=job["output"] + " adapters",
                lazy_unpickle=True,
            )
            run_merge(configuration, job["output"], options)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
