"""Down-sampling of rollouts (PODS): train on 8 of 32 responses per prompt, those of largest variance, or the first 8.

    python -m experiments.down_sampling              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.down_sampling --report     # the plot and the tables alone

16 prompts per step. An update on 8 responses per prompt costs as much whether 8 or 32 were sampled.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.experience.config import ChainConfig, ExperienceConfig, FirstSamples, MaxVariance, Signal

RESULTS = DIRECTORY / "down_sampling.json"
STEPS, SAMPLES, REACHED = 100, 12_800, 0.8


def config(samples: int, *rules: object, baseline_over: str = "sampled") -> RunConfig:
    """16 prompts of so many samples. Groups without signal are dropped, then `rules` apply."""
    return replace(
        SETUP,
        steps=STEPS,
        rollout=replace(SETUP.rollout, prompts=16, samples=samples),
        objective=replace(SETUP.objective, baseline_over=baseline_over),
        experience=ExperienceConfig(filter=ChainConfig((Signal(), *rules))),
    )


ARMS = {
    "8 of 8": Arm(config(8)),
    "first 8 of 32": Arm(config(32, FirstSamples(keep=8), baseline_over="kept")),
    "first 8 of 32, baseline of 32": Arm(config(32, FirstSamples(keep=8))),
    "max variance 8 of 32": Arm(config(32, MaxVariance(keep=8, by="success"), baseline_over="kept")),
    "max variance 8 of 32, baseline of 32": Arm(config(32, MaxVariance(keep=8, by="success"))),
    "32 of 32": Arm(config(32)),
}


def tables(runs: list[dict]) -> str:
    return f"{report.table(runs, list(ARMS), STEPS, SAMPLES)}\n\n{report.reached_table(runs, list(ARMS), REACHED)}"


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"8 of 32": list(ARMS)})
