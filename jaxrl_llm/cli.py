"""`jaxrl train | sft | sample | eval | plan | export | report`: arguments in, exit code out.

Imports no jax until a command needs it.

Exit codes: 0 done; 2 bad input, or a place that cannot be read or written; 3 no checkpoint can be used, or none can be written;
4 stopped by a guard; 75 stopped and saved, start again to go on; 130 stopped at once by Ctrl-C; 141 nobody reads the output any
more. docs/commands.md has the table.
"""

import json
import logging
import os
import select
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_llm.checkpoint.preemption import ending_at_once
from jaxrl_llm.commands.arguments import Reader, one_of, path, take, text, whole_number
from jaxrl_llm.commands.targets import list_values, read_config, read_evaluation, read_run, read_sampled, refusal
from jaxrl_llm.errors import Preempted, UserError, in_words
from jaxrl_llm.metrics.terminal import PrintableFormatter, say
from jaxrl_llm.parallel import job

if TYPE_CHECKING:
    from jaxrl_llm.config.run_config import RunConfig

USAGE = """usage: jaxrl COMMAND TARGET [options] [--section.field value ...]
       jaxrl --version

commands
  train  CONFIG|RUN            train; goes on by itself if the run directory holds checkpoints
         --resume              refuse to start from scratch
  sft    CONFIG|RUN            the supervised training of warm_start alone; train goes on from it
         --resume              refuse to start from scratch
  sample CONFIG|RUN|MODEL      draw responses and show tokens, log-probs, entropy and reward
         --prompt TEXT         the prompt (default: the first held-out one); a MODEL without --task has no other
         --task TASK           whose settings, prompts and answers are taken, as for eval
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
  report RUN                   write one HTML page of curves and responses
         --out FILE            where (default: RUN/report.html)

CONFIG is a YAML file (see configs/), RUN a run directory, MODEL a Hugging Face directory or hub name.
Any value of the config can be set by its path, for example
  jaxrl train configs/arithmetic.yaml --seed 1 --mesh.fsdp 2 --update.optimizer.lr 3e-4
  jaxrl train configs/arithmetic.yaml --help      lists them all
Values are YAML: true, null, 3e-4, '[a, b]', '{kind: lion, lr: 1e-4}'. A section given so keeps what it does not name; a list
or an entry of one (--reward.graders.0.weight 2) is replaced. Another kind starts from its own defaults, and another preset
replaces all parts of the objective. A flag of a part wins over one of its section; of two of one path the last wins.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. What a person can mend is one message without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Names of files and texts of models may hold what the terminal's encoding does not.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (UserError, Preempted) as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # The interpreter flushes at exit, and would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(in_words(error), UserError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(why: str, code: int) -> int:
    with suppress(OSError):
        say(f"jaxrl: {why}", sys.stderr)
    return code


def _nobody_reads() -> bool:
    """Whether the reader of our output has gone, as `head` has after ten lines."""
    with suppress(OSError, ValueError):  # a stream without a file has no reader to lose
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    return False


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] == "help" or (HELP & set(argv) and argv[0] not in COMMANDS):
        print(USAGE)
        return 0 if argv else UserError.exit_code
    if argv[0] in VERSION:
        print(version())
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command{_near(command, [*COMMANDS, *VERSION])}; jaxrl --help lists them")
    if HELP & set(rest):
        known = command not in WITHOUT_VALUES and rest[0] not in HELP
        say(list_values(rest[0]) if known else USAGE)
        return 0
    if not rest or rest[0].startswith("-"):
        wanted = "RUN" if command in ("eval", "export", "report") else "CONFIG"
        raise UserError(f"jaxrl {command}: got no {wanted}; see jaxrl --help")
    shown = logging.StreamHandler()
    shown.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[shown], level=logging.WARNING)
    # That there is no PyTorch is no news here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with job.ends_together():
        return COMMANDS[command](rest[0], rest[1:])


def _near(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f", perhaps you meant {near[0]}" if near else ""


def version() -> str:
    """Versions of what computes, and whether an accelerator's plugin is installed; starts nothing."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    def of(package: str) -> str | None:
        with suppress(PackageNotFoundError):
            return installed(package)
        return None

    plugins = [f"{name} {of(name)}" for name in PLUGINS if of(name)]
    return (
        f"jaxrl_llm {of('jaxrl_llm') or 'not installed'}\n"
        f"jax {of('jax') or 'not installed'}, jaxlib {of('jaxlib') or 'not installed'}, Python {sys.version.split()[0]}\n"
        f"accelerators: {', '.join(plugins) or 'none, CPU alone; see docs/install.md'}"
    )


def start_jax(cfg: "RunConfig") -> None:
    from jaxrl_llm.config import run_config

    job.join(run_config.to_dict(cfg))


def train(target: str, args: list[str]) -> int:
    with ending_at_once():
        return _train(target, args)


def sft(target: str, args: list[str]) -> int:
    with ending_at_once():
        return _train(target, args, only_supervised=True)


def _train(target: str, args: list[str], only_supervised: bool = False) -> int:
    given, overrides = take(args, OPTIONS["train"])
    cfg = read_config(target, overrides, list(OPTIONS["train"]))
    if only_supervised and not cfg.warm_start.steps:
        raise UserError(f"{target}: warm_start.steps: got 0, want 1 or more: the steps of supervised training")
    from jaxrl_llm.roles import sources

    read = sources.read(cfg, trains=True)
    read.refuse()
    start_jax(cfg)
    from jaxrl_llm.train import sft as supervised_training
    from jaxrl_llm.train import train as training

    run = supervised_training if only_supervised else training
    result = run(cfg, "--resume" in given, read, ends_process=True)
    before, after = ("not known" if x != x else f"{x:.4f}" for x in (result.before, result.after))
    found = f"{after} after supervised training" if only_supervised else f"{before} before RL, {after} after"
    print(f"held-out accuracy ({result.measure}): {found}")
    say(f"run directory: {result.run_dir}")
    say(what_next(result.run_dir))
    return 0


def what_next(run_dir: Path) -> str:
    """Commands that look at a finished run, as this shell knows them."""
    with suppress(OSError, ValueError):
        run_dir = run_dir.relative_to(Path.cwd())
    jaxrl, run = _program(), shlex.quote(str(run_dir))
    return f"next: {jaxrl} report {run}   (one page of curves and responses)\n      likewise sample, eval, export"


def _program() -> str:
    """What to type for this program: its name where the shell finds it, else its path."""
    called = Path(sys.argv[0])
    if called.name != "jaxrl" or not called.exists():
        return f"{shlex.quote(sys.executable)} -m jaxrl_llm.cli"
    found = shutil.which("jaxrl")
    return "jaxrl" if found and Path(found).samefile(called) else shlex.quote(str(called))


def sample(target: str, args: list[str]) -> int:
    given, overrides = take(args, OPTIONS["sample"])
    cfg, has_task = read_sampled(target, given.get("--task"), overrides, list(OPTIONS["sample"]))
    if not has_task and "--benchmark" in given:
        raise UserError(f"--benchmark: {target} has no prompts of its own: want --task CONFIG beside it")
    if not has_task and "--prompt" not in given:
        raise UserError(
            f"--prompt: {target} has no prompts of its own: want --prompt TEXT, or --task CONFIG, whose are taken"
        )
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.inspect_run import benchmark_rollouts, sample_prompt

    if "--benchmark" in given:
        benchmark_rollouts(cfg)
    else:
        sample_prompt(cfg, given.get("--prompt"), given.get("-n", 8), has_task)
    return 0


def evaluate(target: str, args: list[str]) -> int:
    given, overrides = take(args, OPTIONS["eval"])
    cfg = read_evaluation(target, given.get("--task"), overrides, list(OPTIONS["eval"]))
    from jaxrl_llm.roles import sources

    sources.refuse_graders(cfg)
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.inspect_run import evaluate_target

    print(json.dumps(evaluate_target(cfg, given.get("-k", 8)), indent=1))
    return 0


def plan(target: str, args: list[str]) -> int:
    given, overrides = take(args, OPTIONS["plan"])
    cfg = read_config(target, overrides, list(OPTIONS["plan"]))
    with ending_at_once():
        from jaxrl_llm.plan import command, show, sweep

    wanted = command.Target(given.get("--topology"), given.get("--chips"), given.get("--prompt-tokens", 0))
    if "--sweep" in given:
        again = [a for a in args if a not in ("--sweep", "--json")]
        line = [sys.executable, "-m", "jaxrl_llm.cli", "plan", target, *again]
        found = sweep.sweep(cfg, wanted, line, given.get("--candidates", 3))
    else:
        found = command.plan(cfg, wanted)
    in_text = show.sweep_table if "--sweep" in given else show.show
    print(json.dumps(found, indent=1) if "--json" in given else in_text(found))
    return 0


def export(target: str, args: list[str]) -> int:
    given, overrides = take(args, OPTIONS["export"])
    if "--out" not in given:
        raise UserError("--out: got nothing, want the directory to write")
    cfg, out = read_run(target, overrides, list(OPTIONS["export"])), Path(given["--out"]).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: got {out}, a place that is taken, want a new or an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out: got {out}, want a place that can be written, which {out.parent} cannot")
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.inspect_run import export_run

    say(str(export_run(cfg, out, given.get("--dtype"), "--adapter" in given)))
    return 0


def report(target: str, args: list[str]) -> int:
    from jaxrl_llm.metrics.report.build import build

    given, others = take(args, OPTIONS["report"])
    if others:
        raise UserError(f"jaxrl report: got {' '.join(others)}, want a run directory and nothing else but --out FILE")
    if not target or not Path(target).is_dir():
        raise refusal(target, "a run directory")
    say(str(build(Path(target), Path(given["--out"]) if "--out" in given else None)))
    return 0


COMMANDS = {
    "train": train,
    "sft": sft,
    "sample": sample,
    "eval": evaluate,
    "plan": plan,
    "export": export,
    "report": report,
}
OPTIONS: dict[str, Mapping[str, Reader | None]] = {
    "train": {"--resume": None},
    "sft": {"--resume": None},
    "sample": {"--prompt": text, "--task": text, "-n": whole_number(1), "--benchmark": None},
    "eval": {"--task": text, "-k": whole_number(1)},
    "plan": {
        "--topology": text, "--chips": whole_number(1), "--prompt-tokens": whole_number(0), "--sweep": None,
        "--candidates": whole_number(1), "--json": None,
    },
    "export": {"--out": path, "--dtype": one_of("float32", "bfloat16"), "--adapter": None},
    "report": {"--out": path},
}  # fmt: skip
WITHOUT_VALUES = ("report",)
"""Commands that read no config."""
HELP = {"-h", "--help"}
VERSION = ("--version", "-V", "version")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")

if __name__ == "__main__":
    sys.exit(main())
