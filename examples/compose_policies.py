"""Compose policies while sampling (GPC): two flow policies mixed with several weights, measured on equal seeds.

    python examples/compose_policies.py POLICY_A POLICY_B ENVIRONMENT [episodes]

Folders of `gencontrol train`; examples/robot_policy.py makes one.
"""

import sys

from gencontrol.pipelines import ComposedPolicyPipeline
from gencontrol.robotics.evaluate import evaluate

if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    try:
        import gymnasium_robotics  # noqa: F401  # only to say in one line that it is missing
    except ImportError:
        raise SystemExit('this example needs simulators; run: pip install "gencontrol[robotics]"') from None
    first, second, env = sys.argv[1:4]
    seeds = range(int(sys.argv[4]) if len(sys.argv) > 4 else 20)
    for weight in (0.0, 0.5, 1.0):
        pipeline = ComposedPolicyPipeline({"first": first, "second": second}, [weight, 1 - weight])
        report = evaluate(pipeline.policy, env, seeds=seeds)
        low, high = report.interval
        print(f"weight {weight}: {report.successes} of {len(seeds)} succeed, 95 % {low:.2f} to {high:.2f}")
