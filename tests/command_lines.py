"""A checkpoint, damaged ones, texts and schedules for the removal command, and its command lines."""

import json

from minute import byte_tokenizer, minute_gpt2

from lnfree_interp.finetune.__main__ import main
from lnfree_interp.schedule import KINDS

# 1 layer gone by step 7 of 12, in steps of 2 sequences of 32 bytes
MINUTE = {"steps": 12, "start": 2, "gaps": {kind: 1 for kind in KINDS}, "position0_gap": 1, "tokens_per_step": 64}
MINUTE |= {"block_size": 32, "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 2}
MINUTE |= {"auxiliary_weight": 0.1}
SECRET = "secret-place"


def make_files(root):
    """A checkpoint, damaged ones, texts, schedules."""
    tokenizer = byte_tokenizer()
    for name in ("model", "no-tokenizer", "other-size", "no-weights", "other-kind"):
        minute_gpt2(256, n_layer=1).save_pretrained(root / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(root / name)
    minute_gpt2(256, n_layer=1, vocab_size=300).save_pretrained(root / "other-size")
    (root / "no-weights" / "model.safetensors").unlink()
    (root / "other-kind" / "config.json").write_text('{"model_type": "bert"}')
    (root / "empty.txt").write_text("\n\n")
    (root / "short.txt").write_text("too short")
    (root / "text.txt").write_text("\n\n".join(f"Chapter {i}. " + "all work and no play " * 20 for i in range(40)))
    for name, value in {
        "minute.json": MINUTE,
        "some.json": {"gaps": {"v": 5}, "momentum": 0.5},
        "list.json": [1],
        "unknown.json": {"stepps": 3},
        "mistyped.json": {"start": "three"},
        "range.json": {"momentum": 2.5},
        "lacking.json": {"steps": 10},
    }.items():
        (root / name).write_text(json.dumps(value))
    (root / "no.json").write_text("{")
    (root / "run" / "checkpoint-5").mkdir(parents=True)
    (root / "run" / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    return root


def words(files, place, **changes):
    """A command line of the minute run; a flag of None is left out, one of "" has no value."""
    given = {"model": files / "model", "schedule": files / "minute.json", "text": files / "text.txt"}
    given |= {"out": place / "out", "device": "cpu", "cache": place / "cache"} | changes
    flagged = {"--" + name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return [word for flag, value in flagged.items() for word in [flag, *str(value).split("|")] if word]


def status_of(arguments):
    try:
        return main([str(word) for word in arguments])
    except SystemExit as exit:  # argparse's own
        return exit.code
