"""The commands: what `gencontrol --help` says of each, its job, and the classes of options that the job takes.

Nothing is imported for this table: a name is "module:attribute", and it is loaded when its command is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One command.

    Args:
        panel: heading in `gencontrol --help`.
        help: one sentence, a blank line, an example.
        job: function called with the merged table of options, {section: {option: value}} without defaults, and a Start.
        sections: section → class of options; each of its fields is an option of the command.
        variants: function that gives the sections of what was chosen by name, as {section: class or classes}; they
            replace those above.
        chooser: option of [run] that chooses the variant, such as "algorithm"; or, in capitals, the first word.
        names: table or list of the names that the first word may have.
        shared: options beside those of the sections; see `generate`.
    """

    panel: str
    help: str
    job: str
    sections: Mapping[str, str] = field(default_factory=dict)
    variants: str = ""
    chooser: str = ""
    names: str = ""
    shared: tuple[str, ...] = ("config", "set", "dry_run")


_RUN = ("config", "set", "dry_run", "resume", "fresh", "allow_change")

COMMANDS = {
    "finetune": Entry(
        "Work",
        "Fine-tune a model towards a reward.\n\n"
        "Example: gencontrol finetune --reward clap --prompts prompts.txt --output runs/a",
        job="gencontrol.jobs.finetune:run",
        sections={"run": "gencontrol.jobs.finetune:RunConfig", "train": "gencontrol.jobs.finetune:TrainOptions"},
        variants="gencontrol.jobs.finetune:variants",
        chooser="algorithm",
        shared=_RUN,
    ),
    "sample": Entry(
        "Work",
        "Draw samples and, with --reward, score them.\n\n"
        'Example: gencontrol sample --prompt "a slow sad piano melody" --num 4 --output samples',
        job="gencontrol.jobs.sample:run",
        sections={"run": "gencontrol.jobs.sample:SampleConfig"},
    ),
    "search": Entry(
        "Work",
        "Search for the samples that a reward likes best, without training: tree search, particles, best of n.\n\n"
        'Example: gencontrol search --reward clap --prompt "a slow sad violin melody" --nfe 4000 --output runs/search',
        job="gencontrol.jobs.search.job:run",
        sections={
            "run": "gencontrol.jobs.search.config:SourceConfig",
            "search": "gencontrol.jobs.search.config:SearchConfig",
        },
        shared=("config", "set", "dry_run", "fresh", "allow_change"),
    ),
    "pretrain": Entry(
        "Work",
        "Make the bundled data and models; or classifiers of labelled images, for CTRL.\n\n"
        "Stages: sound-data, clap, attributes, flow, digits, scenes, scene-readers, classifier; `gencontrol pretrain "
        "STAGE --help` lists the options of one.\n\n"
        "Examples: gencontrol pretrain flow --data data/sound --steps 20000 --output runs/flow; "
        "gencontrol pretrain classifier --data labels.jsonl --output runs/labels",
        job="gencontrol.jobs.pretrain:run",
        variants="gencontrol.jobs.pretrain:variants",
        chooser="STAGE",
        names="gencontrol.jobs.pretrain:STAGES",
        shared=_RUN,
    ),
    "serve-reward": Entry(
        "Work",
        "Serve a reward over HTTP; a run elsewhere uses it as --reward http://HOST:PORT/NAME.\n\n"
        "The token that clients must send is read from GENCONTROL_REWARD_TOKEN, on both sides.\n\n"
        "Example: gencontrol serve-reward --reward clip --reward-model clip-folder --port 8000",
        job="gencontrol.jobs.serve_reward:run",
        sections={"run": "gencontrol.jobs.serve_reward:ServeConfig"},
    ),
    "report": Entry(
        "Look",
        "Write report.html of a run or an evaluation: curves, samples before and after, trees, rates, settings.\n\n"
        "Example: gencontrol report runs/a",
        job="gencontrol.jobs.report:run",
        sections={"run": "gencontrol.jobs.report:ReportConfig"},
        shared=(),
    ),
    "bench": Entry(
        "Look",
        "Run a benchmark of a claim; `gencontrol bench NAME --help` lists its options.\n\n"
        "Example: gencontrol bench dragon --seeds 3",
        job="gencontrol.jobs.bench:run",
        variants="gencontrol.jobs.bench:variants",
        chooser="NAME",
        names="gencontrol.registry:BENCHES",
        shared=("set",),
    ),
    "doctor": Entry(
        "Look",
        "Check this machine: packages, devices, bundled weights.\n\nExample: gencontrol doctor",
        job="gencontrol.jobs.doctor:run",
        sections={"run": "gencontrol.jobs.doctor:DoctorConfig"},
        shared=(),
    ),
    "train": Entry(
        "Robots",
        "Train a policy on demonstrations; the result, final/, is what `evaluate` takes.\n\n"
        "Example: gencontrol train --algorithm diffusion-policy --dataset data/fetch --output runs/fetch",
        job="gencontrol.jobs.train:run",
        sections={"run": "gencontrol.jobs.train:TrainRun", "train": "gencontrol.jobs.train:TrainOptions"},
        variants="gencontrol.jobs.train:variants",
        chooser="algorithm",
        shared=_RUN,
    ),
    "evaluate": Entry(
        "Robots",
        "Measure how often policies succeed, with intervals, videos, and a report page.\n\n"
        "Example: gencontrol evaluate runs/a runs/b --paired --env FetchPickAndPlace-v4 --episodes 200 --output eval",
        job="gencontrol.jobs.evaluate:run",
        sections={"run": "gencontrol.jobs.evaluate:EvaluateConfig"},
    ),
    "collect": Entry(
        "Robots",
        "Record episodes of a scripted expert or a policy as a data set; seeds and counts lie beside it.\n\n"
        "Example: gencontrol collect --env FetchPickAndPlace-v4 --episodes 100 --output data/fetch",
        job="gencontrol.jobs.collect:run",
        sections={"run": "gencontrol.jobs.collect:CollectConfig"},
    ),
    "convert": Entry(
        "Robots",
        "Write a data set of episodes in another format: robomimic, LeRobot v3, Minari, zarr, DPPO.\n\n"
        "Example: gencontrol convert lift/ph/low_dim.hdf5 data/lift --format lerobot",
        job="gencontrol.jobs.convert:run",
        sections={"run": "gencontrol.jobs.convert:ConvertConfig"},
        shared=(),
    ),
    "compose": Entry(
        "Robots",
        "Compose trained policies into one (GPC); weights are given, equal, or fitted and measured on fresh seeds.\n\n"
        "Example: gencontrol compose runs/a runs/b --fit-env FetchPickAndPlace-v4 --output runs/ab",
        job="gencontrol.jobs.compose:run",
        sections={"run": "gencontrol.jobs.compose:ComposeConfig", "fit": "gencontrol.jobs.compose:FitConfig"},
    ),
}
