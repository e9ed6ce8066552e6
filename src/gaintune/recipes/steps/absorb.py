"""Steps that absorb adapters into the weights of their base, and compare the result with the adapter."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.config import Plan
from gaintune.data import load_domain
from gaintune.models import load_tokenizer
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.results import Interval, exact
from gaintune.storage import make_folder, write_json
from gaintune.workflows import merge_adapter

COLUMNS = {
    "perplexity_change": "perplexity, %",
    "same_first_choice": "same first choice, share",
    "share_unmoved": "weights that rounding leaves unmoved, share",
    "dtype": "written in",
}


def absorb(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Merge the adapters of the step `of` as `gaintune merge` does, and delete the models; `labels`, `after` pick some.

    Each merged model is judged on the validation text of the last domain. Both models read that text, so the numbers
    have no sampling error: `LABEL.drift`, the change of perplexity against base and adapter, in %.
    """
    trained, plan = context.trained(settings)
    adapters = trained.last_adapters(settings.pop("labels", None), settings.pop("after", None))
    context.refuse_unknown(settings)

    def run() -> StepOutcome:
        make_folder(context.folder)
        certificates = {
            label: _certificate(plan, folder, context.folder / f"{label}.json") for label, folder in adapters.items()
        }
        numbers: dict[str, Interval] = {
            f"{label}.drift": exact(values["perplexity_change"]) for label, values in certificates.items()
        }
        rows = {label: [_shown(values[key]) for key in COLUMNS] for label, values in certificates.items()}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=[*COLUMNS.values()])
        return StepOutcome(numbers, {"Absorbed into the weights, against the adapter on its base": table})

    return PreparedStep(StepOutcome(), run)


def _certificate(plan: Plan, adapter: Path, file: Path) -> dict[str, Any]:
    """Merge an adapter, keep the certificate alone, and return it."""
    domain = load_domain(plan.data.domains[-1], plan.data, load_tokenizer(plan.model))
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".merged-") as folder:
        certificate = merge_adapter(
            adapter,
            Path(folder) / "model",
            blocks=domain.validation,
            bytes_per_block=domain.validation_bytes,
            model=plan.model,
            force=True,
            batch_size=plan.evaluate.batch_size,
        )
    values = asdict(certificate)
    write_json(file, values)
    return values


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
