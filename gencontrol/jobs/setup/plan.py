"""`--dry-run`: what a fine-tuning would do and need, from configuration and file headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.config import dump_toml, to_table
from gencontrol.errors import UsageError
from gencontrol.jobs.setup.models import folder_of
from gencontrol.jobs.setup.settings import RunConfig

if TYPE_CHECKING:
    from gencontrol.jobs.finetune import Job

_NETWORKS = ("transformer", "unet")
_MAX_HEADER = 100 * 2**20  # bytes; what the safetensors format allows


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: `network` is trained or carries the adapter, `rest` is frozen, `trainable` is what moves."""

    network: int
    rest: int
    trainable: int


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return tensor name → shape from the header of a safetensors file.

    Raises:
        UsageError: not a safetensors file.
    """
    try:
        with open(file, "rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            if size > _MAX_HEADER:
                raise ValueError(f"header of {size} bytes")
            header = json.loads(handle.read(size))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UsageError(f"'{file}' is not a safetensors file ({error}); download or save the model again.") from error


def count_parameters(folder: Path, run: RunConfig) -> Sizes:
    """Count the parameters of a pipeline folder and of the adapter that the configuration asks for.

    Raises:
        UsageError: no network in the folder, or lora_targets that fit no layer.
    """
    network: dict[str, list[int]] = {}
    rest = 0
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(part.rglob("*.safetensors")):
            shapes = read_shapes(file)
            if part.name in _NETWORKS:
                network |= shapes
            else:
                rest += sum(_size(shape) for shape in shapes.values())
    if not network:
        raise UsageError(f"'{folder}' has no weights in {' or '.join(_NETWORKS)}/; it is not a whole pipeline.")
    total = sum(_size(shape) for shape in network.values())
    return Sizes(total, rest, _adapter_size(network, run) if run.lora_rank else total)


def _size(shape: list[int]) -> int:
    product = 1
    for axis in shape:
        product *= axis
    return product


def _adapter_size(shapes: Mapping[str, list[int]], run: RunConfig) -> int:
    """Number of adapter weights: rank·(in + out) of each target layer."""
    from gencontrol.models.roles import lora_targets

    names = lora_targets(_skeleton(shapes), run.lora_targets or None)
    return sum(run.lora_rank * sum(shapes[f"{name}.weight"]) for name in names)


def _skeleton(shapes: Mapping[str, list[int]]) -> Any:
    """A module tree with the file's linear layers and no memory behind them, for choosing targets by name."""
    from torch import nn

    root = nn.Module()
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2:
            *path, last = key.removesuffix(".weight").split(".")
            node = root
            for name in path:
                if name not in dict(node.named_children()):
                    node.add_module(name, nn.Module())
                node = node.get_submodule(name)
            node.add_module(last, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    return root


def print_plan(job: Job) -> None:
    """Print the plan, batch arithmetic, a memory estimate and the merged configuration."""
    for line in plan(job):
        print(line)
    print("\nconfiguration (save it as run.toml for --config)\n")
    print(dump_toml(job.folder.table), end="")


def plan(job: Job) -> Iterator[str]:
    """Yield the lines of the plan."""
    run = job.run
    yield f"plan: {run.algorithm} towards {' + '.join(run.reward)} on {run.model} → {job.folder.path}"
    if any(job.folder.path.glob("checkpoints/step_*")):
        yield "  the run folder holds checkpoints: training goes on from the newest intact one"
    for note in job.folder.notes:
        yield f"  changed since the last start: {note}"
    yield f"  prompts        {len(job.prompts)} to train on, {len(job.eval_prompts)} to judge by"
    yield from _arithmetic(job)
    yield from _memory(job)


def _arithmetic(job: Job) -> Iterator[str]:
    options, train = to_table(job.algorithm), job.train
    groups = next(
        (options[name] for name in ("pairs_per_round", "prompts_per_round", "batch") if name in options), None
    )
    generations = options.get("generations", options.get("group", 1))
    if isinstance(groups, int) and isinstance(generations, int):
        samples = groups * generations
        yield f"  one step       {groups} prompts × {generations} samples = {samples} scored samples"
        updates = options.get("updates_per_round", 1)
        passes = -(-samples // train.micro_batch)
        yield f"                 {updates} optimizer updates, {passes} micro-batches of at most {train.micro_batch}"
        yield f"  whole run      {train.steps} steps = {train.steps * samples} samples, {train.steps * updates} updates"
    else:
        yield f"  whole run      {train.steps} steps, micro-batches of at most {train.micro_batch}"
    steps = [step for step in range(train.steps + 1) if train.eval_every and step % train.eval_every == 0]
    count = len(steps) + bool(train.eval_every and train.steps % train.eval_every)
    yield f"  evaluations    {count}, each {len(job.eval_prompts) * options.get('eval_samples', 1)} samples"
    yield f"  checkpoints    every {train.save_every} steps, {train.keep} kept"


def _memory(job: Job) -> Iterator[str]:
    """Weights in fp32, gradients, two Adam moments, and one copy per further role."""
    folder = folder_of("bundled-image" if (job.run.model, job.run.task) == ("bundled", "image") else job.run.model)
    if folder is None:
        yield f"  memory         {job.run.model} is a hub id: sizes are known after the download"
        return

    sizes = count_parameters(folder, job.run)
    copies = len(job.kind.role_names(job.algorithm)) - 1 - (1 if job.run.lora_rank else 0)
    adapter = sizes.trainable if job.run.lora_rank else 0
    weights = 4 * (sizes.network + sizes.rest + adapter)
    training = 4 * sizes.trainable * (3 + copies)
    kind = f"LoRA rank {job.run.lora_rank}" if job.run.lora_rank else "all weights"
    yield f"  network        {_millions(sizes.network)}, trained {_millions(sizes.trainable)} ({kind})"
    yield f"  frozen parts   {_millions(sizes.rest)}"
    yield (
        f"  memory         {human_bytes(weights)} weights + {human_bytes(training)} gradients, optimizer and averages "
        f"= {human_bytes(weights + training)}"
    )
    yield "                 and activations, which grow with --micro-batch; the reward's network comes on top"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def human_bytes(count: int) -> str:
    """Write a size for people."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
