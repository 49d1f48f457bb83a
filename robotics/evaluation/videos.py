"""Videos of an evaluation: failures and successes in proportion are run again with a renderer.

An episode is a function of its seed, so the second run shows the first one; where it does not (a simulator that drawing
disturbs, a policy that is not deterministic) a note says so.  Nothing in here can fail an evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gencontrol.errors import GencontrolError
from gencontrol.files import replacing
from gencontrol.robotics.datasets.lerobot_video import FrameWriter
from gencontrol.robotics.envs.make import env_name
from gencontrol.robotics.envs.types import Array, EnvSource
from gencontrol.robotics.evaluation.report import EpisodeResult, result_of
from gencontrol.robotics.evaluation.rollout import Actor, Rollout, Rollouts
from gencontrol.robotics.evaluation.settings import Settings

#: longest side of a picture; larger frames are averaged over blocks
SIDE = 360
#: pictures per second that are enough; faster environments are rendered at every second step or less
FPS = 25.0
_DIFFERENT = (
    "filmed episodes have the outcome of the counted ones, but not the last bits of their actions: drawing changes the "
    "state of this simulator, or something is not a function of the seed"
)
_OPTIONS = {"crf": "24", "preset": "fast", "movflags": "+faststart"}


@dataclass(frozen=True)
class Filmed:
    """What came of filming.

    Args:
        paths: (seed, env_id) → path relative to the output folder.
        notes: one line for each thing that went wrong.
    """

    paths: Mapping[tuple[int, str], str]
    notes: tuple[str, ...] = ()


def film(
    policy: Actor,
    settings: Settings,
    env: EnvSource,
    results: Sequence[EpisodeResult],
    output: Path,
    name: str,
    *,
    together: bool,
) -> Filmed:
    """Write mp4 files of at most `settings.videos` episodes below output/videos; files that exist are kept.

    Args:
        results: of this policy in this environment; invalid ones are not filmed.
        name: of the policy.
    """
    env_id = env_name(env)
    folder = Path("videos", safe(name), safe(env_id))
    chosen = choose(results, settings.videos)
    paths = {(r.seed, env_id): folder / f"{_word(r.success)}_seed{r.seed}.mp4" for r in chosen}
    made = {key: path.as_posix() for key, path in paths.items() if (output / path).is_file()}
    missing = {r.seed: r for r in chosen if (r.seed, env_id) not in made}
    notes: list[str] = []
    if not missing:
        return Filmed(made)
    try:
        with settings.envs(env, 1, render=True) as envs:
            spec, every = envs.spec, max(1, round(envs.spec.fps / FPS))
            envs.reset([0], [next(iter(missing))])
            if isinstance(frame := envs.render([0])[0], str):  # before whole episodes are run for nothing
                return Filmed(made, (f"no videos, {env_id} cannot be rendered here: {frame}",))
            for rollout in Rollouts(policy, envs, together=together, render_every=every).run(list(missing)):
                first, path = missing[rollout.seed], paths[rollout.seed, env_id]
                if rollout.fault is not None or rollout.render_fault is not None:
                    notes.append(f"no video of seed {rollout.seed}: {rollout.fault or rollout.render_fault}")
                    continue
                again = result_of(rollout, spec, settings.success_at or spec.success_at)
                if again.success != first.success:
                    notes.append(
                        f"seed {rollout.seed} went differently when it was filmed ({_word(again.success)}; what counts "
                        f"is {_word(first.success)}): drawing changes the simulator, or something is not a function of "
                        "the seed"
                    )
                elif again.actions != first.actions:
                    notes.append(_DIFFERENT)
                try:
                    write_video(output / path, rollout, spec.fps / every)
                except (GencontrolError, OSError, ValueError) as error:
                    notes.append(f"the video of seed {rollout.seed} could not be written: {error}")
                    continue
                made[rollout.seed, env_id] = path.as_posix()
    except (GencontrolError, OSError, ValueError, RuntimeError, ImportError) as error:
        notes.append(f"no further videos of '{name}' in {env_id}: {' '.join(str(error).split())[:300]}")
    return Filmed(made, tuple(dict.fromkeys(notes)))


def choose(results: Sequence[EpisodeResult], most: int) -> list[EpisodeResult]:
    """Return at most `most` valid episodes that show what the rate says.

    Failures come first, then successes, as many of each as their share of all asks for, but one of each kind at least
    where there is room; each kind in the order of the results.
    """
    valid = [result for result in results if result.valid]
    lost, won = ([result for result in valid if result.success == kind] for kind in (False, True))
    count = min(most, len(valid))
    failures = round(count * len(lost) / max(1, len(valid)))
    if count > 1:
        failures = min(max(failures, min(1, len(lost))), count - min(1, len(won)))
    return lost[:failures] + won[: count - failures]


def write_video(path: Path, rollout: Rollout, fps: float) -> None:
    """Write the frames of a rollout as mp4; the file appears whole or not at all.

    Raises:
        OSError, ValueError: it could not be written, or there is no frame.
        EnvironmentMissing: PyAV is not installed.
    """
    if not rollout.frames:
        raise ValueError("nothing was rendered")
    frames = [shrink(frame) for frame in rollout.frames]
    height, width = frames[0].shape[:2]
    with replacing(path) as staged:
        writer = FrameWriter(staged, fps, height, width, _OPTIONS)
        try:
            writer.write(np.stack(frames))
        finally:
            writer.close()


def shrink(frame: Array) -> Array:
    """Return a frame of at most `SIDE` pixels with even sides: blocks averaged, what does not fill one cut off."""
    size = max(1, -(-max(frame.shape[:2]) // SIDE))
    h, w = (side // size // 2 * 2 for side in frame.shape[:2])
    if size == 1:
        return frame[:h, :w]
    blocks = frame[: h * size, : w * size].reshape(h, size, w, size, 3)
    return blocks.mean((1, 3), dtype=np.float32).round().astype(np.uint8)


def safe(name: str) -> str:
    """Return a name for a folder."""
    text = re.sub(r"[^\w.-]+", "_", name).strip("._")
    return text[-80:] or "policy"


def _word(success: bool) -> str:
    return "success" if success else "failure"
