"""The model card of a run: what it began with, what was done, what came of it, how to load it. No path is in it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..documents import read_text
from ..files import replace_file
from ..names import known_models
from ..schedule import RemovalSchedule
from .flags import as_fields
from .saving import MANIFEST, STATE

CARD = "README.md"
HERE = "path/to/this/directory"
PAPERS = (
    ("You can remove GPT2's LayerNorm by fine-tuning", "2409.13710"),
    ("Transformers Don't Need LayerNorm at Inference Time", "2507.02559"),
)
WITHOUT = (
    "{base} with all its normalisation removed by fine-tuning. What the config calls norms divides by a constant: an "
    "epsilon so large that what is normalised does not matter. Constants are folded into the weights, so that nothing "
    "but the architecture's own code is needed."
)
CONTROL = "The fine-tuned control: {base} trained just as its LN-free sibling is, with nothing removed."


@dataclass(frozen=True)
class Facts:
    """What a card says of a run.

    Attributes:
        base: hub id of the model it began with, or the name of a directory.
        source: where the schedule comes from, in words.
        data: a dataset's hub id, or names of files.
        dataset: a hub id for the card's metadata.
        fingerprint: of the data's tokens.
        held_out: how many blocks the losses are of.
        before, after, control: losses on them (nats per token): of the model it began with, of this one, and of the
            control, the same training with nothing removed.
    """

    base: str
    base_on_hub: bool
    schedule: RemovalSchedule
    n_layer: int
    source: str
    data: str
    dataset: str | None
    fingerprint: str | None
    held_out: int
    before: float | None
    after: float | None
    control: float | None
    steps: int
    rollbacks: int
    seed: int
    dtype: str
    date: datetime.date = field(default_factory=datetime.date.today)


def base_of(name: str) -> tuple[str, bool]:
    """A model's hub id and True; or what it is called elsewhere, without where it is."""
    if Path(name).exists():
        return Path(name).resolve().name, False
    source = known_models().get(name)
    if source is None:
        return name, True
    return (source.hub_id, True) if source.hub_id else (name, False)


def data_of(text: Sequence[str] | None, data: str | None) -> tuple[str, str | None]:
    """What data is called, without where it is, and a hub id if it has one."""
    if data is not None and not Path(data).exists():
        return data, data
    return ", ".join(Path(name).resolve().name for name in text or [str(data)]), None


def model_card(facts: Facts, name: str | None = None) -> str:
    """A card in Markdown with metadata for the hub.

    Args:
        name: the model's hub id; None: it is loaded from the directory that the card is in.
    """
    schedule, control = facts.schedule, not facts.schedule.order
    tokens = facts.steps * schedule.tokens_per_step
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base_on_hub else f"`{facts.base}`"
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if facts.base_on_hub:
        metadata += [f"base_model: {facts.base}", "base_model_relation: finetune"]
    if facts.dataset is not None:
        metadata += ["datasets:", f"- {facts.dataset}"]
    metadata += ["tags:", "- mechanistic-interpretability", "- layernorm", *([] if control else ["- ln-free"])]
    title, what = f"{facts.base.split('/')[-1]} without LayerNorm", WITHOUT
    if control:
        title, what = f"{facts.base.split('/')[-1]}, control", CONTROL
    title = title if name is None else name.split("/")[-1]
    spent = f"{facts.steps:,} steps of {schedule.tokens_per_step:,} tokens, {tokens:,} in all"
    rows = [
        ("base model", base),
        ("schedule", facts.source),
        ("steps", spent),
        ("data", facts.data),
        ("fingerprint of its tokens", f"`{facts.fingerprint}`" if facts.fingerprint else "not known: a stream"),
        ("precision, seed", f"{facts.dtype}, {facts.seed}"),
        ("rollbacks", str(facts.rollbacks)),
        ("date", facts.date.isoformat()),
    ]
    where = name or HERE
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# {title}",
        "",
        what.format(base=base),
        "",
        *_losses(facts),
        "## Training",
        "",
    ]
    lines += ["| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in rows), ""]
    lines += ["```", schedule.describe(facts.n_layer), "```", "", "All fields of the schedule:", ""]
    lines += ["```json", json.dumps(as_fields(schedule)), "```", "", "## How to load it", ""]
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{where}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        "```",
        "",
        "or, to look inside,",
        "",
        "```python",
        "from lnfree_interp import load_model",
        "",
        f'model = load_model("{where}")  # a model of TransformerLens'
        + ("" if control else " with normalization_type None"),
        "```",
        "",
        "## Papers",
        "",
        *(f"- {paper}, [arXiv {number}](https://arxiv.org/abs/{number})" for paper, number in PAPERS),
    ]
    return "\n".join(lines) + "\n"


def _losses(facts: Facts) -> list[str]:
    if facts.after is None:
        return []
    rows = [("before the fine-tuning", facts.before), ("this model", facts.after)]
    if facts.schedule.order:
        rows.append(("the control, the same training with nothing removed", facts.control))
    known = [(label, loss) for label, loss in rows if loss is not None]
    lines = [f"Loss on {facts.held_out} held-out blocks of {facts.schedule.block_size} tokens, nats per token:", ""]
    lines += ["| | loss |", "| --- | --- |", *(f"| {label} | {loss:.4f} |" for label, loss in known), ""]
    if facts.control is not None and facts.schedule.order:
        lines += [f"What the removal costs, beside the control: {facts.after - facts.control:+.4f} nats.", ""]
    return lines


def write_card(directory: Path, text: str) -> None:
    """Beside, then renamed.

    Raises:
        ValueError: the disk refuses.
    """
    replace_file(directory / CARD, lambda beside: beside.write_text(text, encoding="utf-8"))


def name_card(directory: Path, name: str) -> None:
    """Let a directory's card load the model by a hub id, whatever it said before.

    Raises:
        ValueError: there is no card; the disk refuses.
    """
    text = read_text(directory / CARD, "card")
    named = re.sub(r'(from_pretrained|load_model)\("[^"]*"\)', rf'\1("{name}")', text)
    if named != text:
        write_card(directory, named)


def check_push(repo_id: str) -> None:
    """Whether something can be uploaded, as far as can be known beforehand and without the network.

    Raises:
        ValueError: nobody is logged in; no hub id.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {repo_id}: {error}") from None
    if get_token() is None:
        raise ValueError(f"--push-to-hub {repo_id}: nobody is logged in to the hub (hf auth login)")


def push(directory: Path, repo_id: str) -> str:
    """Upload a final directory; where it is then.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import create_repo, upload_folder

    try:
        create_repo(repo_id, exist_ok=True)
        upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            ignore_patterns=[MANIFEST, STATE, ".*"],
            commit_message="Model, tokenizer and card of a run",
        )
    except Exception as error:  # whatever the network and the hub can raise
        first = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ValueError(
            f"cannot push to {repo_id}: {first}; {directory} is whole: the same command with --resume tries again"
        ) from None
    return f"https://huggingface.co/{repo_id}"
