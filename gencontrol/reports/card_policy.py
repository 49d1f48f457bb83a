"""The model card of a policy that was trained on demonstrations, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from gencontrol.reports.data import RunData, is_number

_METHODS = {
    "diffusion-policy": ("Diffusion Policy (Chi et al. 2023)", "https://arxiv.org/abs/2303.04137"),
    "flow-policy": ("flow matching (Lipman et al. 2023) on chunks of actions", "https://arxiv.org/abs/2210.02747"),
}


def loading(run: RunData) -> tuple[str, str]:
    """Return lines of Python that load the policy, and a shell command that evaluates it."""
    final = run.path / "final"
    python = (
        "from gencontrol.pipelines import PolicyPipeline\n\n"
        f'policy = PolicyPipeline.from_pretrained("{final}")\npolicy.reset()\n'
        "action = policy.select_action(observation)  # {key: array}, one observation or one per environment"
    )
    env = _env(run) or "ENV_ID"
    return python, f"gencontrol evaluate {final} --env {env} --episodes 100"


def render(run: RunData, parameters: Sequence[str], provenance: Sequence[str]) -> str:
    """Return the card as Markdown.

    Args:
        parameters: lines of the table of options.
        provenance: lines about command and versions.
    """
    settings = run.config.get("run", {})
    method, link = _METHODS.get(str(settings.get("algorithm")), (str(settings.get("algorithm")), ""))
    episodes, windows = run.record.get("episodes", {}), run.record.get("windows", {})
    python, shell = loading(run)
    env = _env(run)
    return "\n".join(
        [
            "---\nlibrary_name: gencontrol\npipeline_tag: robotics\ntags:\n- gencontrol\n- robotics\n---\n",
            f"# {run.path.resolve().name}\n",
            f"A policy{f' for `{env}`' if env else ''}, trained on demonstrations with gencontrol; {run.step} steps.\n",
            "## Method\n",
            f"{method}{f', <{link}>' if link else ''}. The weights are the moving average.\n",
            "## Data\n",
            f"`{settings.get('dataset')}`: {episodes.get('train', '?')} episodes ({windows.get('train', '?')} windows) "
            f"to train on, {episodes.get('held_out', 0)} kept apart.\n",
            "## Measured\n",
            "| metric | value |",
            "|---|---|",
            *(
                f"| {name} | {row:.4g} |"
                for name in run.names()
                if name.startswith("eval/") and is_number(row := run.last(name))
            ),
            "",
            "Losses on held-out episodes do not say whether the robot succeeds: evaluate it in its environment.\n",
            "## Hyper-parameters\n",
            *parameters,
            "## Limits\n",
            "The policy imitates these demonstrations; away from the states that they visited its actions mean little. "
            "The licence of the data set applies.\n",
            "## How to load\n",
            f"```python\n{python}\n```\n\n```sh\n{shell}\n```\n",
            *provenance,
        ]
    )


def _env(run: RunData) -> str:
    """Id of the environment that the data set names, or ""."""
    env = run.record.get("env", {})
    return str(env.get("env_id") or env.get("env_name") or "") if isinstance(env, dict) else ""
