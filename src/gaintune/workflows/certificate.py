"""The certificate beside a merged model: what was merged, how far it is from its adapter, and what rounding took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from gaintune.storage import run as runs
from gaintune.progress import plural

JSON = "certificate.json"
PAGE = "certificate.md"


@dataclass(frozen=True)
class Certificate:
    """Numbers of one merge. Perplexities are per token on the same blocks; changes and tolerance are in %.

    `share_unmoved` is the share of the weights the adapter changes that rounding puts back to the base's value, and
    `gains_lost` the share of gains that leave more than half of their weights unmoved (None where the adapter is not
    a gain); `gain_error` is how far gains act from what was learnt, relative to their distance from 1, on average.
    """

    adapter: str
    adapter_sha256: str
    method: str
    base: str
    base_fingerprint: str
    merged_fingerprint: str
    dtype: str
    reference: str
    computed_in: str
    blocks: int
    block_size: int
    adapter_perplexity: float
    merged_perplexity: float
    perplexity_change: float
    tolerance: float
    within_tolerance: bool
    forced: bool
    largest_logit_difference: float
    mean_logit_difference: float
    same_first_choice: float
    weights_changed: int
    share_unmoved: float
    gains: int
    gains_lost: float | None
    gain_error: float | None
    versions: dict[str, str]

    @property
    def verdict(self) -> str:
        """One sentence for a person."""
        drift = f"perplexity changes by {self.perplexity_change:+.3f} %, tolerance {self.tolerance:g} %"
        if self.within_tolerance:
            return f"The merged model is within tolerance of its adapter: {drift}."
        return f"The merged model is NOT within tolerance: {drift}{'; written because it was forced' * self.forced}."


def write_certificate(certificate: Certificate, folder: Path) -> None:
    """Write the numbers as JSON, and the same as a page to read."""
    runs.write_json(folder / JSON, asdict(certificate))
    runs.write_text(folder / PAGE, page(certificate))


def page(certificate: Certificate) -> str:
    """The certificate as Markdown."""
    c = certificate
    rows = [
        ("adapter", f"{c.adapter} ({c.method}, SHA-256 {c.adapter_sha256[:16]}...)"),
        ("base", f"{c.base} (fingerprint {c.base_fingerprint[:16]}...)"),
        (
            "merged model",
            f"{c.dtype} (fingerprint {c.merged_fingerprint[:16]}...), absorbed in fp32, then rounded once",
        ),
        ("compared with", c.reference),
        ("merged model computed in", c.computed_in),
        ("text", f"{plural(c.blocks, 'block')} of {c.block_size} tokens"),
        ("perplexity, adapter", f"{c.adapter_perplexity:.4f}"),
        ("perplexity, merged", f"{c.merged_perplexity:.4f} ({c.perplexity_change:+.3f} %)"),
        ("tolerance", f"{c.tolerance:g} %"),
        ("logits, largest difference", f"{c.largest_logit_difference:.4g}"),
        ("logits, mean difference", f"{c.mean_logit_difference:.4g}"),
        ("same first choice", f"{100 * c.same_first_choice:.2f} % of positions"),
        ("weights the adapter changes", f"{c.weights_changed:,}"),
        (f"of these unmoved in {c.dtype}", f"{100 * c.share_unmoved:.2f} %"),
    ]
    if c.gains_lost is not None and c.gain_error is not None:
        rows += [
            ("gains that differ from 1", f"{c.gains:,}"),
            (f"gains lost in {c.dtype}", f"{100 * c.gains_lost:.2f} % (more than half of their weights unmoved)"),
            ("mean error of a gain", f"{100 * c.gain_error:.2f} % of its distance from 1"),
        ]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in sorted(c.versions.items()))))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# Merge certificate\n\n{c.verdict}\n\n| what | value |\n|---|---|\n{table}\n"
