"""Several finetunes in one set of processes: their settings, and what each tells of itself.

`finetuned` and `finetuned_together` run on the ranks (spawn_ranks), so this file's top stays light.
"""

PLAIN = {
    "steps": 3,
    "sequence_length": 32,
    "micro_batch": 2,
    "global_batch": 8,
    "precision": "fp32",
    "lr": 0.01,
    "warmup_steps": 0,
    "eval_steps": 0,
    "save_interval": 1000,
}


def raw_config(world, prefix, **more):
    return {
        "model": str(world),
        "data": str(prefix),
        "steps": 2,
        "sequence_length": 64,
        "micro_batch": 2,
        "global_batch": 4,
        "precision": "fp32",
        "warmup_steps": 0,
        "validation": 0.5,
        "eval_interval": 1,
        "eval_steps": 100,
        "lr": 0.0,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        **more,
    }


def finetuned(raw, variants, folder):
    """Each variant's events, all runs in one set of processes."""
    import os
    from pathlib import Path

    from megatron_mixtral.observability import events
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    told = {}
    for name, change in variants.items():
        run_dir = Path(folder) / name
        run_dir.mkdir(exist_ok=True)
        loop.train(checks.parse(jobs.FinetuneConfig, raw | change, where="config"), run_dir)
        if os.environ["RANK"] == "0":
            told[name] = events.read(run_dir / "events.jsonl")
    return told


def finetuned_together(raw, variants, folder):
    """As `finetuned`, by ranks that stay together; of a run that is refused, why."""
    from megatron_mixtral.errors import JobError
    from megatron_mixtral.mcore import ranks

    ranks.shutdown = lambda: None
    told = {}
    for name, change in variants.items():
        try:
            told |= finetuned(raw, {name: change}, folder)
        except JobError as error:
            told[name] = str(error)
    return told


def of_kind(told, kind, field):
    return [event[field] for event in told if event["event"] == kind]


def losses(told):
    return of_kind(told, "step", "loss")
