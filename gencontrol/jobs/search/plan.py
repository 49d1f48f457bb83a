"""`gencontrol search --dry-run`: what a search would do and need, from configuration and small files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gencontrol.config import dump_toml
from gencontrol.jobs.search.settings import PARTICLES, TREES, SearchConfig, parse_widening
from gencontrol.jobs.setup.plan import human_bytes

if TYPE_CHECKING:
    from gencontrol.jobs.search.model import Law
    from gencontrol.jobs.search.search import SearchJob

#: bytes per node beside its state, children and rollouts included (measured, tree_nodes)
_NODE = 70


def print_plan(job: SearchJob) -> None:
    """Print what would be done, the budget's arithmetic, memory, and the merged configuration."""
    for line in plan(job):
        print(line)
    print("\nconfiguration (save it as search.toml for --config)\n")
    print(dump_toml(job.folder.table), end="")


def plan(job: SearchJob) -> Iterator[str]:
    """Yield the lines of the plan."""
    source, search = job.source, job.search
    yield f"plan: {search.sampler} towards {' + '.join(source.reward)} on {source.model} → {job.folder.path}"
    if (job.folder.path / "tree.safetensors").exists():
        yield "  the run folder holds a tree: the search goes on from it"
    for note in job.folder.notes:
        yield f"  changed since the last start: {note}"
    yield f"  prompts        {len(job.prompts)}, {search.count} samples written of each"
    if job.law is None:
        yield f"  budget         {search.nfe} model calls per prompt"
        yield "                 steps and sizes are known once the model is loaded"
        return
    yield from _budget(job, job.law)
    yield from _particles(search, job.law) if search.sampler in PARTICLES else _tree(job, job.law)


def _budget(job: SearchJob, law: Law) -> Iterator[str]:
    """Model calls, and what each costs."""
    search, count = job.search, len(job.prompts)
    each = f"{search.nfe} model calls per prompt"
    yield f"  budget         {each}" + (f" × {count} prompts = {search.nfe * count}" if count > 1 else "")
    if law.guidance_scale > 1:
        yield f"                 a call is 2 rows of the network (guidance {law.guidance_scale:g}) and counts one"
    yield f"  one path       {law.steps} steps = {law.steps} model calls, then 1 decoding and 1 reward call"


def _tree(job: SearchJob, law: Law) -> Iterator[str]:
    """Levels, paths, reward calls and memory of the trees."""
    search, count = job.search, len(job.prompts)
    begins = (0, *law.levels)
    segments = [after - before for before, after in zip(begins, begins[1:])]
    fewest, most = search.nfe // law.steps, search.nfe // segments[-1]
    times = ", ".join(f"{law.grid[index]:.3g}" for index in law.levels)
    widening = parse_widening(search.widening or TREES[search.sampler][1])
    yield f"  tree           {len(segments)} levels below the root, at times {times}"
    yield f"                 segments of {', '.join(map(str, segments))} steps; widening {_words(widening)}"
    yield f"  paths          {fewest} whole ones to {most} that only take the last segment, per prompt"
    rounds = math.ceil(fewest / search.leaf_batch)
    yield f"  rounds         {rounds} or more, {search.leaf_batch * count} paths at once"
    yield f"  reward calls   one per path: {fewest * count} to {most * count}"
    nodes = search.nfe * count // min(segments)
    state = 4 * math.prod(law.shape)
    yield f"  states         {'×'.join(map(str, law.shape))} float32 = {human_bytes(state)} per node"
    yield f"  memory         at most {nodes} nodes = {human_bytes(nodes * (state + _NODE))}, beside model and reward"
    if fewest < 8:
        yield "  note           so few paths leave a tree no room to search: raise --nfe or lower --steps"


def _words(widening: str | tuple[float, float]) -> str:
    """The widening as a formula."""
    presets = {"paper": (2.0, 0.8), "text": (2.0, 0.7), "small": (1.0, 0.5)}
    constant, alpha = presets[widening] if isinstance(widening, str) else widening
    return f"{constant:g}·N^{alpha:g}"


def _particles(search: SearchConfig, law: Law) -> Iterator[str]:
    """How many particles the budget pays for, and their memory."""
    from gencontrol.sampling.particles import particles_for_budget

    number = particles_for_budget(search.sampler, search.nfe, law.steps, children=search.children)
    state = 4 * math.prod(law.shape)
    yield f"  particles      {number} per prompt, {search.leaf_batch} rows per model call"
    size = f"{human_bytes(state)} = {human_bytes(number * state)}"
    yield f"  memory         {number} states of {size}, beside model and reward"
