"""A robot policy from nothing: record an expert, train a flow policy, measure its success with an interval.

    python examples/robot_policy.py [output folder] [episodes] [steps]

The defaults take seconds and are far too small for a good policy; 100 episodes and 8000 steps make one.
"""

import sys
from pathlib import Path

import gencontrol

ENV = "PointMaze_UMaze-v3"

if __name__ == "__main__":
    try:
        import gymnasium_robotics  # noqa: F401  # only to say in one line that it is missing
    except ImportError:
        raise SystemExit('this example needs simulators; run: pip install "gencontrol[robotics]"') from None
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/robot")
    episodes, steps = (int(text) for text in (sys.argv[2:4] if len(sys.argv) > 3 else ("4", "20")))
    gencontrol.collect(ENV, episodes=episodes, output=folder / "data")
    trained = gencontrol.train(
        folder / "data", algorithm="flow-policy", steps=steps, backbone="mlp", output=folder / "run"
    )
    result = gencontrol.evaluate(trained.folder, env=ENV, episodes=4, output=folder / "evaluation")
    print(result)
