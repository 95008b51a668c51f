"""`jaxrl train | sft | sample | eval | plan | export | report`: arguments in, exit code out.

No command imports jax before it needs it.

Exit codes: 0 done; 2 bad input, or a path that cannot be read or written; 3 no checkpoint can be used, or none can be written;
4 stopped by a guard; 75 stopped and saved, start again to resume; 130 stopped at once by Ctrl-C; 141 the reader of the output has
gone. docs/commands.md has the table.
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
from typing import TYPE_CHECKING, Any

from jaxrl_llm.checkpoint.stopping import ending_at_once
from jaxrl_llm.commands.arguments import Reader, check_out, one_of, path, take, text, whole_number
from jaxrl_llm.commands.control_options import controlled, named_by_option
from jaxrl_llm.commands.targets import list_values, read_config, read_evaluation, read_run, read_sampled, target_error
from jaxrl_llm.errors import Preempted, UserError, describe_os_error
from jaxrl_llm.metrics.terminal import PrintableFormatter, say
from jaxrl_llm.parallel import job

if TYPE_CHECKING:
    from jaxrl_llm.config.run_config import RunConfig

USAGE = """usage: jaxrl COMMAND TARGET [options] [--section.field value ...]
       jaxrl --version

commands
  train  CONFIG|RUN            train; resumes automatically if the run directory holds checkpoints
         --resume              refuse to start from scratch
  sft    CONFIG|RUN            only the supervised training of warm_start; train resumes from it
         --resume              refuse to start from scratch
  sample CONFIG|RUN|MODEL      sample responses; print tokens, log-probs, entropy and reward
         --prompt TEXT         the prompt (default: the first held-out one); required for a MODEL without --task
         --task TASK           source of settings, prompts and answers, as for eval
         -n N                  number of responses (default 8)
         --regex PATTERN       responses match a regular expression, as a whole
         --json-schema FILE    responses are JSON that is valid under the schema in the file
         --out FILE            instead: write N graded responses to each prompt of the task, or to --prompt, to a new
                               .jsonl or .parquet file
         --prompts M           with --out: only the first M prompts
         --split SPLIT         with --out: train (default) or held_out
         --benchmark           instead: tokens per second of the config's own rollouts, beside the ceiling of the machine
  eval   RUN|MODEL             avg@k, pass@k and maj@k with 95 % intervals, as JSON
         --task TASK           the task to evaluate on (default: the run's own): a CONFIG, for its task, reward and rollout,
                               or reasoning_gym:NAME
         -k K                  samples per prompt (default 8)
  plan   CONFIG|RUN            compile a step ahead of time: memory, collectives, predicted speed; does it fit?
         --topology NAME       a TPU slice, as v5e:4x4, or GPUs, as h100:8 or h100:8x4 (of a host x hosts); needs none of them
                               (default: the devices of this machine)
         --chips N             use N of them (default: all)
         --prompt-tokens N     longest prompt (default: task.max_prompt_tokens)
         --sweep               try all meshes and numbers of micro-batches, compile the best, rank those that fit
         --candidates N        with --sweep: number of candidates to compile (default 3)
         --json                print the report as JSON
  export RUN                   write the newest checkpoint as a Hugging Face directory
         --out DIR             the directory to write; must not exist yet
         --dtype DTYPE         float32 or bfloat16 (default: model.compute)
         --adapter             only the adapters, for PEFT (default: the model with its adapters merged)
  report RUN                   write one HTML page of curves and responses
         --out FILE            the file to write (default: RUN/report.html)

CONFIG is a YAML file (see configs/), RUN a run directory, MODEL a Hugging Face directory or hub name.
Any value of the config can be set by its path, for example
  jaxrl train configs/arithmetic.yaml --seed 1 --mesh.fsdp 2 --update.optimizer.lr 3e-4
  jaxrl train configs/arithmetic.yaml --help      lists them all
Values are YAML: true, null, 3e-4, '[a, b]', '{kind: lion, lr: 1e-4}'. A section given so keeps the keys that it does not name;
a list or an entry of one (--reward.graders.0.weight 2) is replaced. Another kind starts from its own defaults, and another preset
replaces all parts of the objective. A flag of a part takes precedence over one of its section; of two for one path, the last.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that the user can correct are one message without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # File names and text from models may hold characters that the terminal's encoding does not have.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except (UserError, Preempted) as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            # The interpreter flushes at exit, and would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(describe_os_error(error), UserError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        say(f"jaxrl: {message}", sys.stderr)
    return code


def _reader_has_gone() -> bool:
    """True if the reader of the output has closed it, as `head` does after ten lines."""
    with suppress(OSError, ValueError):  # a stream without a file has no reader to lose
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    return False


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] == "help" or (HELP & set(argv) and argv[0] not in COMMANDS):
        print(USAGE)
        return 0 if argv else UserError.exit_code
    if argv[0] in VERSION:
        print(version())
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"{command}: no such command{_hint(command, [*COMMANDS, *VERSION])}; jaxrl --help lists them")
    if HELP & set(rest):
        has_target = command not in WITHOUT_CONFIG and rest[0] not in HELP
        say(list_values(rest[0]) if has_target else USAGE)
        return 0
    if not rest or rest[0].startswith("-"):
        wanted = "RUN" if command in ("eval", "export", "report") else "CONFIG"
        raise UserError(f"jaxrl {command}: got no {wanted}; see jaxrl --help")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Transformers warns that PyTorch is missing, which is meant.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with job.ends_together():
        return COMMANDS[command](rest[0], rest[1:])


def _hint(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f", perhaps you meant {near[0]}" if near else ""


def version() -> str:
    """Versions of the package, jax and Python, and the installed accelerator plugins. Imports no jax."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    def version_of(package: str) -> str | None:
        with suppress(PackageNotFoundError):
            return installed(package)
        return None

    plugins = [f"{name} {version_of(name)}" for name in PLUGINS if version_of(name)]
    jax, jaxlib = version_of("jax") or "not installed", version_of("jaxlib") or "not installed"
    return (
        f"jaxrl_llm {version_of('jaxrl_llm') or 'not installed'}\n"
        f"jax {jax}, jaxlib {jaxlib}, Python {sys.version.split()[0]}\n"
        f"accelerators: {', '.join(plugins) or 'none, CPU alone; see docs/install.md'}"
    )


def start_jax(cfg: "RunConfig") -> None:
    """Join the job of several processes that the environment describes, if it does."""
    from jaxrl_llm.config import run_config

    job.join(run_config.to_dict(cfg))


def train(target: str, args: list[str]) -> int:
    with ending_at_once():
        return _train(target, args)


def sft(target: str, args: list[str]) -> int:
    with ending_at_once():
        return _train(target, args, only_supervised=True)


def _train(target: str, args: list[str], only_supervised: bool = False) -> int:
    given, flags = take(args, OPTIONS["train"])
    cfg = read_config(target, flags, list(OPTIONS["train"]))
    if only_supervised and not cfg.warm_start.steps:
        raise UserError(f"{target}: warm_start.steps: got 0, want 1 or more: the steps of supervised training")
    from jaxrl_llm.roles import inputs

    read = inputs.read(cfg, trains=True)
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
    say(next_commands(result.run_dir))
    return 0


def next_commands(run_dir: Path) -> str:
    """Commands that look at a finished run, as they can be typed in this shell."""
    with suppress(OSError, ValueError):
        run_dir = run_dir.relative_to(Path.cwd())
    jaxrl, run = _program(), shlex.quote(str(run_dir))
    return f"next: {jaxrl} report {run}   (one page of curves and responses)\n      likewise sample, eval, export"


def _program() -> str:
    """This program as it can be typed: by its name if the shell finds it, otherwise by its path."""
    called = Path(sys.argv[0])
    if called.name != "jaxrl" or not called.exists():
        return f"{shlex.quote(sys.executable)} -m jaxrl_llm.cli"
    found = shutil.which("jaxrl")
    return "jaxrl" if found and Path(found).samefile(called) else shlex.quote(str(called))


def sample(target: str, args: list[str]) -> int:
    given, flags = take(args, OPTIONS["sample"])
    cfg, has_task = read_sampled(target, given.get("--task"), flags, list(OPTIONS["sample"]))
    check_out(given)
    with named_by_option(given):
        return _sample(target, given, controlled(cfg, given), has_task)


def _sample(target: str, given: Mapping[str, Any], cfg: "RunConfig", has_task: bool) -> int:
    if not has_task and "--benchmark" in given:
        raise UserError(f"--benchmark: got {target}, which has no prompts, want --task CONFIG")
    if not has_task and "--prompt" not in given:
        raise UserError(f"--prompt: got nothing, and {target} has no prompts, want --prompt TEXT or --task CONFIG")
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.benchmark import benchmark_rollouts
        from jaxrl_llm.commands.sample import SampleRequest, sample_prompt, sample_to_file

    asked = SampleRequest(given.get("--prompt"), given.get("-n", 8), has_task)
    if "--benchmark" in given:
        benchmark_rollouts(cfg)
    elif "--out" in given:
        say(sample_to_file(cfg, asked, Path(given["--out"]), given.get("--split", "train"), given.get("--prompts")))
    else:
        sample_prompt(cfg, asked)
    return 0


def evaluate(target: str, args: list[str]) -> int:
    given, flags = take(args, OPTIONS["eval"])
    cfg = read_evaluation(target, given.get("--task"), flags, list(OPTIONS["eval"]))
    from jaxrl_llm.roles import inputs

    inputs.refuse_graders(cfg)
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.evaluate import evaluate_target

    print(json.dumps(evaluate_target(cfg, given.get("-k", 8)), indent=1))
    return 0


def plan(target: str, args: list[str]) -> int:
    given, flags = take(args, OPTIONS["plan"])
    cfg = read_config(target, flags, list(OPTIONS["plan"]))
    with ending_at_once():
        from jaxrl_llm.plan import command, show, sweep

    wanted = command.Target(given.get("--topology"), given.get("--chips"), given.get("--prompt-tokens", 0))
    if "--sweep" in given:
        same_args = [a for a in args if a not in ("--sweep", "--json")]
        line = [sys.executable, "-m", "jaxrl_llm.cli", "plan", target, *same_args]
        found = sweep.sweep(cfg, wanted, line, given.get("--candidates", 3))
    else:
        found = command.plan(cfg, wanted)
    as_text = show.sweep_table if "--sweep" in given else show.show
    print(json.dumps(found, indent=1) if "--json" in given else as_text(found))
    return 0


def export(target: str, args: list[str]) -> int:
    given, flags = take(args, OPTIONS["export"])
    if "--out" not in given:
        raise UserError("--out: got nothing, want the directory to write")
    cfg, out = read_run(target, flags, list(OPTIONS["export"])), Path(given["--out"]).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: got {out}, which exists, want a new or an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out: got {out}, want a writable directory, which {out.parent} is not")
    with ending_at_once():
        start_jax(cfg)
        from jaxrl_llm.commands.export import export_run

    say(str(export_run(cfg, out, given.get("--dtype"), "--adapter" in given)))
    return 0


def report(target: str, args: list[str]) -> int:
    from jaxrl_llm.metrics.report.build import build

    given, others = take(args, OPTIONS["report"])
    if others:
        raise UserError(f"jaxrl report: got {' '.join(others)}, want a run directory, and no option but --out FILE")
    if not target or not Path(target).is_dir():
        raise target_error(target, "a run directory")
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
    "sample": {
        "--prompt": text, "--task": text, "-n": whole_number(1), "--benchmark": None, "--out": path, "--prompts": whole_number(1),
        "--split": one_of("train", "held_out"), "--regex": text, "--json-schema": path,
    },
    "eval": {"--task": text, "-k": whole_number(1)},
    "plan": {
        "--topology": text, "--chips": whole_number(1), "--prompt-tokens": whole_number(0), "--sweep": None,
        "--candidates": whole_number(1), "--json": None,
    },
    "export": {"--out": path, "--dtype": one_of("float32", "bfloat16"), "--adapter": None},
    "report": {"--out": path},
}  # fmt: skip
WITHOUT_CONFIG = ("report",)
"""Commands that read no config."""
HELP = {"-h", "--help"}
VERSION = ("--version", "-V", "version")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")

if __name__ == "__main__":
    sys.exit(main())
