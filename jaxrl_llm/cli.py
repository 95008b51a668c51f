"""`jaxrl train | sample | eval | plan | export | report`: arguments in, exit code out. Imports no jax until a command needs it.

Exit codes: 0 done; 2 bad input; 3 no checkpoint can be used; 4 stopped by a guard; 75 stopped by SIGTERM and saved, start
again to go on.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_llm.errors import Preempted, UserError
from jaxrl_llm.terminal import PrintableFormatter, say

if TYPE_CHECKING:
    from jaxrl_llm.config import RunConfig

USAGE = """usage: jaxrl COMMAND TARGET [options] [--section.field value ...]

commands
  train  CONFIG|RUN            train; goes on by itself if the run directory holds checkpoints
         --resume              refuse to start from scratch
  sample CONFIG|RUN            draw responses and show tokens, log-probs, entropy and reward
         --prompt TEXT         the prompt (default: the first held-out one)
         -n N                  number of responses (default 8)
         --benchmark           instead: tokens a second of the config's own rollouts, beside what the machine can do
  eval   RUN|MODEL             avg@k, pass@k and maj@k with 95 % intervals, as JSON
         --task TASK           what to evaluate on (default: the run's own task): a CONFIG, whose task, reward and rollout
                               are taken, or reasoning_gym:NAME
         -k K                  samples for each prompt (default 8)
  plan   CONFIG|RUN            compile a step ahead of time: memory, collectives, predicted speed; does it fit?
         --topology NAME       of a TPU slice, as v5e:4x4; needs no TPU (default: the devices of this machine)
         --chips N             use N of them (default: all)
         --prompt-tokens N     longest prompt (default: task.max_prompt_tokens)
         --sweep               try all meshes and numbers of micro-batches, compile the best, rank those that fit
         --candidates N        with --sweep: how many to compile (default 3)
         --json                the report as JSON
  export RUN                   write the newest checkpoint as a Hugging Face directory
         --out DIR             where; must not exist yet
         --dtype DTYPE         float32 or bfloat16 (default: model.compute)
         --adapter             its adapters alone, as PEFT reads them (default: the model with its adapters merged)
  report RUN                   write RUN/report.html

CONFIG is a YAML file (see configs/), RUN a run directory, MODEL a Hugging Face directory or hub name.
Any value of the config can be set by its path, for example
  jaxrl train configs/arithmetic.yaml --seed 1 --mesh.fsdp 2 --update.optimizer.lr 3e-4
  jaxrl train configs/arithmetic.yaml --help      lists them all
Values are YAML: true, null, 3e-4, '[a, b]', '{kind: lion, lr: 1e-4}'. A section given so keeps what it does not name; a list
or an entry of one (--reward.graders.0.weight 2) is replaced. Another kind starts from its own defaults, and another preset
replaces all parts of the objective. A flag of a part wins over one of its section; of two of one path the last wins.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Errors that a person can mend are printed without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"{argv[0]}: no such command{_near(argv[0], COMMANDS)}; jaxrl --help lists them")
        if len(argv) < 2 or (argv[1].startswith("-") and argv[1] not in ("-h", "--help")):
            raise UserError(
                f"jaxrl {argv[0]}: got no {'RUN' if argv[0] in ('eval', 'export', 'report') else 'CONFIG'}; see jaxrl --help"
            )
        if argv[1] in ("-h", "--help"):
            print(USAGE)
            return 0
        shown = logging.StreamHandler()
        shown.setFormatter(PrintableFormatter("%(message)s"))
        logging.basicConfig(handlers=[shown], level=logging.WARNING)
        # That there is no PyTorch is no news here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if argv[0] != "report" and {"-h", "--help"} & set(argv[2:]):
            say(list_values(argv[1]))
            return 0
        return COMMANDS[argv[0]](argv[1], argv[2:])
    except (UserError, Preempted) as error:
        say(f"jaxrl: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("jaxrl: interrupted", file=sys.stderr)
        return 130


def _near(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f", perhaps you meant {near[0]}" if near else ""


def read_config(target: str, args: Sequence[str], own: Sequence[str] = ()) -> "RunConfig":
    """The config of a YAML file or of a run directory, with flags over it; `own`: flags of the command itself."""
    from jaxrl_llm import config

    path = Path(target)
    if path.is_dir():
        return config.load(path / "config.yaml", [f"--run_dir={path}", *args], own)
    return config.load(path, args, own)


def list_values(target: str) -> str:
    """Every value of the config, with those of `target` where that is one."""
    from jaxrl_llm import config
    from jaxrl_llm.options import listing

    cfg = read_config(target, []) if Path(target).exists() else config.RunConfig()
    return listing(config.to_dict(cfg), config.RunConfig)


def read_evaluation(target: str, task: str | None, args: Sequence[str]) -> "RunConfig":
    """What `jaxrl eval` runs: a run directory's config, or that of `task` around a pretrained model."""
    from jaxrl_llm import config
    from jaxrl_llm.model.config import PretrainedModel

    path = Path(target)
    if path.is_file():
        raise UserError(f"{target}: got a file, want a run directory or a Hugging Face model")
    if not path.exists() and target.count("/") != 1:
        raise UserError(f"{target}: got no directory, want a run directory or a Hugging Face model")
    is_run = path.is_dir() and not (path / "config.json").is_file()
    if not is_run and task is None:
        raise UserError(f"--task: got nothing, want what to evaluate {target} on: a config, or reasoning_gym:NAME")
    base = config.load(path / "config.yaml") if is_run else config.RunConfig()
    asked = base if task is None else _read_task(task, target)
    if not is_run:
        compute = {"compute": asked.model.compute} if isinstance(asked.model, PretrainedModel) else {}
        base = dataclasses.replace(base, model=PretrainedModel(target, **compute))
        base = dataclasses.replace(base, tokenizer=config.tokenizer_of(asked, target), mesh=asked.mesh)
    found = dataclasses.replace(
        base, run_dir=target, task=asked.task, reward=asked.reward, rollout=asked.rollout, evaluation=asked.evaluation
    )
    return config.validate(config.to_dict(found), target, args, ["--task"])


def _read_task(task: str, target: str) -> "RunConfig":
    from jaxrl_llm import config

    kind, colon, name = task.partition(":")
    if colon and kind == "reasoning_gym":
        values = {
            "task": {"kind": kind, "name": name, "size": 1, "held_out": 128},
            "reward": kind,
            "rollout": {"max_new_tokens": 256},
            "model": {"path": target},
        }
        return config.validate(values, "--task")
    if not Path(task).is_file():
        raise UserError(f"--task: got {task}, want a config file, or reasoning_gym:NAME")
    return config.load(Path(task))


def start_jax() -> None:
    from jaxrl_llm.parallel.hosts import start_distributed

    start_distributed()


def train(target: str, args: list[str]) -> int:
    must_resume = "--resume" in args
    cfg = read_config(target, [a for a in args if a != "--resume"], ["--resume"])
    start_jax()
    from jaxrl_llm.train import train as run_training

    result = run_training(cfg, must_resume)
    before, after = ("not known" if x != x else f"{x:.4f}" for x in (result.before, result.after))
    print(f"held-out accuracy ({result.measure}): {before} before RL, {after} after")
    say(f"run directory: {result.run_dir}")
    return 0


def sample(target: str, args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jaxrl sample", add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--benchmark", action="store_true")
    given, overrides = parser.parse_known_args(args)
    if given.n < 1:
        raise UserError(f"-n: got {given.n}, want 1 or more")
    cfg = read_config(target, overrides, ["--prompt", "--benchmark"])
    start_jax()
    from jaxrl_llm.inspect_run import benchmark_rollouts, sample_prompt

    if given.benchmark:
        benchmark_rollouts(cfg)
    else:
        sample_prompt(cfg, given.prompt, given.n)
    return 0


def evaluate(target: str, args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jaxrl eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("-k", type=int, default=8)
    given, overrides = parser.parse_known_args(args)
    if given.k < 1:
        raise UserError(f"-k: got {given.k}, want 1 or more")
    cfg = read_evaluation(target, given.task, overrides)
    start_jax()
    from jaxrl_llm.inspect_run import evaluate_target

    print(json.dumps(evaluate_target(cfg, given.k), indent=1))
    return 0


def plan(target: str, args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jaxrl plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--chips", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given, overrides = parser.parse_known_args(args)
    for flag, value, least in (("--candidates", given.candidates, 1), ("--prompt-tokens", given.prompt_tokens, 0)):
        if value < least:
            raise UserError(f"{flag}: got {value}, want {least} or more")
    own = ["--topology", "--chips", "--prompt-tokens", "--sweep", "--candidates", "--json"]
    cfg = read_config(target, overrides, own)
    from jaxrl_llm.plan import command, show, sweep

    wanted = command.Target(given.topology, given.chips, given.prompt_tokens)
    if given.sweep:
        again = [a for a in args if a not in ("--sweep", "--json")]
        found = sweep.sweep(
            cfg, wanted, [sys.executable, "-m", "jaxrl_llm.cli", "plan", target, *again], given.candidates
        )
        print(json.dumps(found, indent=1) if given.json else show.sweep_table(found))
        return 0
    found = command.plan(cfg, wanted)
    print(json.dumps(found, indent=1) if given.json else show.show(found))
    return 0


def export(target: str, args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jaxrl export", add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--adapter", action="store_true")
    given, overrides = parser.parse_known_args(args)
    if not given.out:
        raise UserError("--out: got nothing, want the directory to write")
    if not Path(target).is_dir():
        raise UserError(f"{target}: got no directory, want a run directory")
    cfg = read_config(target, overrides, ["--out", "--dtype", "--adapter"])
    start_jax()
    from jaxrl_llm.inspect_run import export_run

    say(str(export_run(cfg, Path(given.out), given.dtype, given.adapter)))
    return 0


def report(target: str, args: list[str]) -> int:
    from jaxrl_llm.report.build import build

    if args:
        raise UserError(f"jaxrl report: got {' '.join(args)}, want a run directory and nothing else")
    say(str(build(Path(target))))
    return 0


COMMANDS = {"train": train, "sample": sample, "eval": evaluate, "plan": plan, "export": export, "report": report}

if __name__ == "__main__":
    sys.exit(main())
