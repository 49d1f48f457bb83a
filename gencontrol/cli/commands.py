"""The commands with their options.  Each function only hands what was given to the module that does the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer

WHAT, TRAINING, SEARCH, RUN = "Model, prompts, rewards", "Training", "Search", "Run"
SEARCHERS = "dts|dts-star|best-of-n|snis|smc|tds|das|beam|dps"


def _option(flag: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Overrides such as algorithm.beta=100.", show_default=False),
]
Text: TypeAlias = str | None
Number: TypeAlias = int | None
Real: TypeAlias = float | None
Flag: TypeAlias = bool | None
Many: TypeAlias = list[str] | None

Set = Annotated[Many, _option("--set", "The same as an option; may be repeated.", RUN, "SECTION.KEY=VALUE")]
Config = Annotated[Text, _option("--config", "Sections run, train and algorithm.", RUN, "FILE.toml")]
Output = Annotated[Text, _option("--output", "The run folder.", RUN, "FOLDER")]
SaveEvery = Annotated[Number, _option("--save-every", "Steps between checkpoints.", RUN)]
Keep = Annotated[Number, _option("--keep", "Checkpoints kept.", RUN)]
EvalEvery = Annotated[Number, _option("--eval-every", "Steps between evaluations; 0 is never.", RUN)]
Track = Annotated[Text, _option("--track", "Tracker beside metrics.jsonl.", RUN, "tensorboard|none")]
Resume = Annotated[
    Flag, _option("--resume", "Require a checkpoint to go on from; the same command resumes anyway.", RUN, " ")
]
Fresh = Annotated[Flag, _option("--fresh", "Refuse a run folder that was used before.", RUN, " ")]
DryRun = Annotated[Flag, _option("--dry-run", "Check all options, print the plan, load no weights.", RUN, " ")]
Online = Annotated[Flag, _option("--online", "Allow downloads from the Hugging Face hub.", RUN, " ")]
Steps = Annotated[Number, _option("--steps", "Training steps.", TRAINING)]
Lr = Annotated[Real, _option("--lr", "Learning rate.", TRAINING)]
LrSchedule = Annotated[
    Text, _option("--lr-schedule", "Shape of the learning rate.", TRAINING, "constant|cosine|linear")
]
Warmup = Annotated[Number, _option("--warmup", "Steps of rising learning rate.", TRAINING)]
MaxGradNorm = Annotated[Real, _option("--max-grad-norm", "Gradient norm is clipped to this.", TRAINING)]
Batch = Annotated[Number, _option("--batch", "Prompts (or data items) of one step.", TRAINING)]
MicroBatch = Annotated[Number, _option("--micro-batch", "Largest number of items in one pass.", TRAINING)]
Precision = Annotated[Text, _option("--precision", "Precision of the network.", TRAINING, "fp32|bf16|fp16")]
Seed = Annotated[Number, _option("--seed", "Seed of everything that is random.", TRAINING)]
Device = Annotated[Text, _option("--device", "Where it runs.", TRAINING, "auto|cpu|cuda")]
Threads = Annotated[Number, _option("--threads", "CPU threads; 0 leaves it to the library.", TRAINING)]
Reward = Annotated[
    Many, _option("--reward", "clap, clip:0.3, package.module:Name, http://…; repeat to sum.", WHAT, "NAME[:WEIGHT]")
]
RewardModel = Annotated[Text, _option("--reward-model", "Network of the reward.", WHAT, "FOLDER|HUB_ID")]
Reference = Annotated[Text, _option("--reference", "What set rewards compare with.", WHAT, "FOLDER|FILE.txt")]
Algorithm = Annotated[Text, _option("--algorithm", "The method, e.g. crd, dragon, flow-grpo, nft, rwr.", WHAT, "NAME")]
Model = Annotated[
    Text, _option("--model", "The base model (default: bundled).", WHAT, "bundled|bundled-image|FOLDER|HUB_ID")
]
Task = Annotated[Text, _option("--task", "What it makes; needed for a hub id without --prompts.", WHAT, "image|audio")]
Checkpointing = Annotated[
    Flag, _option("--gradient-checkpointing", "Less memory for more time in the backward pass.", TRAINING, " ")
]
Compile = Annotated[Flag, _option("--compile", "Run the network through torch.compile.", TRAINING, " ")]
Shard = Annotated[Flag, _option("--shard", "Split weights over the processes of torchrun (FSDP2).", TRAINING, " ")]
Prompts = Annotated[Text, _option("--prompts", "txt, jsonl or csv (default: bundled prompts).", WHAT, "FILE")]
EvalPrompts = Annotated[Text, _option("--eval-prompts", "Fixed prompts for before and after.", WHAT, "FILE")]
EvalSamples = Annotated[Number, _option("--eval-samples", "Samples per evaluation prompt.", RUN)]
LoraRank = Annotated[Number, _option("--lora-rank", "Rank of the adapter; 0 trains all weights.", TRAINING)]
LoraAlpha = Annotated[Real, _option("--lora-alpha", "Scale of the adapter (default: the rank).", TRAINING)]
LoraTargets = Annotated[Many, _option("--lora-targets", "Linear layers by name; may be repeated.", TRAINING)]
AllowChange = Annotated[
    Many, _option("--allow-change", "Go on although this option differs from the run folder's.", RUN, "SECTION.KEY")
]


def finetune(
    ctx: typer.Context,
    overrides: Overrides = None,
    reward: Reward = None,
    algorithm: Algorithm = None,
    model: Model = None,
    task: Task = None,
    prompts: Prompts = None,
    eval_prompts: EvalPrompts = None,
    reward_model: RewardModel = None,
    reference: Reference = None,
    steps: Steps = None,
    lr: Lr = None,
    lr_schedule: LrSchedule = None,
    warmup: Warmup = None,
    max_grad_norm: MaxGradNorm = None,
    batch: Batch = None,
    micro_batch: MicroBatch = None,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_targets: LoraTargets = None,
    precision: Precision = None,
    gradient_checkpointing: Checkpointing = None,
    compile_: Compile = None,
    shard: Shard = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    eval_every: EvalEvery = None,
    eval_samples: EvalSamples = None,
    track: Track = None,
    resume: Resume = None,
    fresh: Fresh = None,
    allow_change: AllowChange = None,
    online: Online = None,
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = None,
) -> None:
    """Fine-tune a model towards a reward.

    Example: gencontrol finetune --reward clap --prompts prompts.txt --output runs/a
    """
    from gencontrol.jobs.finetune import command

    command(ctx.params)


def pretrain(
    ctx: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="STAGE", help="sound-data, clap, attributes, flow, digits, scenes, scene-readers or classifier."
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        Text, _option("--data", "Folder of the sound data; labelled images.", WHAT, "FOLDER|FILE.jsonl")
    ] = None,
    steps: Steps = None,
    lr: Lr = None,
    lr_schedule: LrSchedule = None,
    warmup: Warmup = None,
    max_grad_norm: MaxGradNorm = None,
    batch: Batch = None,
    micro_batch: MicroBatch = None,
    precision: Precision = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    eval_every: EvalEvery = None,
    track: Track = None,
    resume: Resume = None,
    fresh: Fresh = None,
    allow_change: AllowChange = None,
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = None,
) -> None:
    """Make the bundled data and models; or classifiers of labelled images, for CTRL.

    Examples: gencontrol pretrain flow --data data/sound --steps 20000 --output runs/flow;
    gencontrol pretrain classifier --data labels.jsonl --output runs/labels
    """
    from gencontrol.jobs.pretrain import command

    command(ctx.params)


def sample(
    ctx: typer.Context,
    model: Model = None,
    prompt: Annotated[Many, _option("--prompt", "A prompt; may be repeated.", WHAT, "TEXT")] = None,
    prompts: Annotated[Text, _option("--prompts", "Prompts in a txt, jsonl or csv file.", WHAT, "FILE")] = None,
    num: Annotated[int, typer.Option("--num", help="Samples of each prompt.", rich_help_panel=WHAT, min=1)] = 4,
    steps: Annotated[Number, _option("--steps", "Sampler steps (default: the model's own choice).", WHAT)] = None,
    guidance_scale: Annotated[
        Real, _option("--guidance-scale", "Classifier-free guidance (default: the model's own choice).", WHAT)
    ] = None,
    negative_prompt: Annotated[Text, _option("--negative-prompt", "What to steer away from.", WHAT, "TEXT")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first sample.", rich_help_panel=WHAT)] = 0,
    lora: Annotated[Text, _option("--lora", "LoRA weights to load on top.", WHAT, "FOLDER|FILE")] = None,
    y: Annotated[
        Many, _option("--y", "A label of a trained control; repeat for further attributes.", WHAT, "[ATTRIBUTE=]LABEL")
    ] = None,
    y_scale: Annotated[Real, _option("--y-scale", "Strength of the control (default: 1, as trained).", WHAT)] = None,
    control: Annotated[
        Text, _option("--control", "Where the control lies (default: in the model's folder).", WHAT, "FOLDER")
    ] = None,
    reward: Reward = None,
    reward_model: RewardModel = None,
    reference: Reference = None,
    output: Annotated[
        str, typer.Option("--output", help="Folder for wav, png and samples.json.", rich_help_panel=RUN)
    ] = "samples",
    device: Device = None,
    threads: Threads = None,
    online: Online = None,
) -> None:
    """Draw samples and, with --reward, score them.

    Example: gencontrol sample --prompt "a slow sad piano melody" --num 4 --output samples
    """
    from gencontrol.jobs.sample import command

    command(ctx.params)


def search(
    ctx: typer.Context,
    overrides: Overrides = None,
    reward: Reward = None,
    model: Model = None,
    prompt: Annotated[Many, _option("--prompt", "A prompt; may be repeated.", WHAT, "TEXT")] = None,
    prompts: Annotated[Text, _option("--prompts", "Prompts in a txt, jsonl or csv file.", WHAT, "FILE")] = None,
    reward_model: RewardModel = None,
    reference: Reference = None,
    sampler: Annotated[Text, _option("--sampler", "The method (default: dts-star).", SEARCH, SEARCHERS)] = None,
    nfe: Annotated[Number, _option("--nfe", "Model calls per prompt (default: 4000).", SEARCH)] = None,
    temperature: Annotated[
        Real, _option("--temperature", "Of exp(reward/temperature); smaller follows the reward more.", SEARCH)
    ] = None,
    steps: Annotated[Number, _option("--steps", "Sampler steps of a path (default: the model's own).", SEARCH)] = None,
    branch: Annotated[
        Text, _option("--branch", "Segments between levels, or their times (default: 5).", SEARCH, "N|all|T1,T2,…")
    ] = None,
    leaf_batch: Annotated[Number, _option("--leaf-batch", "Leaves per round and prompt.", SEARCH)] = None,
    widening: Annotated[
        Text, _option("--widening", "Children of a node of N visits: C·N^alpha.", SEARCH, "paper|text|small|C,ALPHA")
    ] = None,
    select: Annotated[Text, _option("--select", "How a tree grows.", SEARCH, "boltzmann|uct|tempered|uniform")] = None,
    backup: Annotated[Text, _option("--backup", "How values go up the tree.", SEARCH, "soft|max")] = None,
    guidance_scale: Annotated[
        Real, _option("--guidance-scale", "Classifier-free guidance (default: the model's own).", SEARCH)
    ] = None,
    count: Annotated[Number, _option("--count", "Samples written per prompt (default: 4).", RUN)] = None,
    precision: Annotated[Text, _option("--precision", "Precision of the network.", RUN, "fp32|bf16")] = None,
    seed: Annotated[Number, _option("--seed", "Seed of everything that is random.", RUN)] = None,
    device: Annotated[Text, _option("--device", "Where it runs.", RUN, "auto|cpu|cuda")] = None,
    threads: Annotated[Number, _option("--threads", "CPU threads; 0 leaves it to the library.", RUN)] = None,
    output: Output = None,
    save_every: Annotated[Real, _option("--save-every", "Seconds between saves of the tree (30).", RUN)] = None,
    fresh: Fresh = None,
    allow_change: AllowChange = None,
    online: Online = None,
    config: Annotated[Text, _option("--config", "Sections run and search.", RUN, "FILE.toml")] = None,
    set_: Set = None,
    dry_run: DryRun = None,
) -> None:
    """Search for the samples that a reward likes best, without training: tree search, particles, best of n.

    Example: gencontrol search --reward clap --prompt "a slow sad violin melody" --nfe 4000 --output runs/search
    """
    from gencontrol.jobs.search.search import command

    command(ctx.params)


def serve_reward(
    ctx: typer.Context,
    reward: Reward = None,
    reward_model: RewardModel = None,
    reference: Reference = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen at; others than 127.0.0.1 need a token.", rich_help_panel=RUN),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port; 0 takes a free one.", rich_help_panel=RUN, min=0, max=65535)
    ] = 8000,
    name: Annotated[Text, _option("--name", "Path of the URL (default: the reward's name).", RUN, "NAME")] = None,
    max_mb: Annotated[int, typer.Option("--max-mb", help="Largest request in MiB.", rich_help_panel=RUN, min=1)] = 64,
    merge: Annotated[
        int,
        typer.Option(
            "--merge",
            help="Score waiting requests together, up to so many samples; 0 never.",
            rich_help_panel=RUN,
            min=0,
        ),
    ] = 0,
    device: Device = None,
    threads: Threads = None,
    online: Online = None,
) -> None:
    """Serve a reward over HTTP; a run elsewhere uses it as --reward http://HOST:PORT/NAME.

    The token that clients must send is read from GENCONTROL_REWARD_TOKEN, on both sides.

    Example: gencontrol serve-reward --reward clip --reward-model clip-folder --port 8000
    """
    from gencontrol.jobs.serve_reward import command

    command(ctx.params)


def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The run folder.")],
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show it in a browser.")] = False,
) -> None:
    """Write report.html of a run: curves, samples before and after, trees, configuration.

    Example: gencontrol report runs/a
    """
    from gencontrol.jobs.report import command

    command(run_dir, open_)


def doctor(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Check this machine: packages, devices, bundled weights.

    Example: gencontrol doctor
    """
    from gencontrol.jobs.doctor import command

    return command(as_json=json_)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the benchmark.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Handed to the benchmark.", show_default=False)
    ] = None,
) -> int:
    """Run a benchmark of a claim; its own options follow its name (`gencontrol bench NAME -- --help` lists them).

    Example: gencontrol bench dragon --seeds 3
    """
    from gencontrol.jobs.bench import command

    return command(name, arguments or [])


#: command name → (function, panel of the help)
TABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "finetune": (finetune, "Work"),
    "sample": (sample, "Work"),
    "search": (search, "Work"),
    "pretrain": (pretrain, "Work"),
    "serve-reward": (serve_reward, "Work"),
    "report": (report, "Look"),
    "bench": (bench, "Look"),
    "doctor": (doctor, "Look"),
}
