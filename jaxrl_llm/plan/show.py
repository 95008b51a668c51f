"""Plan reports as Markdown tables, for terminals and docs/. Imports no jax."""

from typing import Any

Report = dict[str, Any]
GB = 1e9
# Collectives below this fraction of a program's received bytes are summed in one line.
SMALL = 0.01


def show(report: Report) -> str:
    """The complete report as text."""
    mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items())
    slots, tokens = report["slots"]
    batches = f"{_count(report['minibatches'], 'minibatch')} of {_count(report['micro_batches'], 'micro-batch')}"
    head = (
        f"{report['parameters'] / 1e9:.2f} billion parameters on {report['topology']}: {_count(report['chips'], 'chip')} of "
        f"{report['chip']['memory'] / GB:.0f} GB ({report['chip']['name']}), jax {report['jax']}\n"
        f"mesh: {mesh}; {report['rows']} rows of {slots} + {tokens} slots per step, {batches}"
    )
    if report["control"] != "none":
        control = report["control"]
        head += f"\nrollout.control: {control} is left out of the rollouts: its tables need a tokenizer, and plan reads none"
    if report["tree"] != "none":
        head += (
            f"\nrollout.tree: {report['tree']}: shown is how its roots are sampled; branches follow, whose prompt caches have the "
            f"{tokens} completion slots too"
        )
    if report["reuse"] != "none":
        head += (
            f"\nrollout.reuse: {report['reuse']}: shown is how responses are sampled from the start; the pass over known ones, as "
            "many rows at once as prompts are prefilled, comes before"
        )
    parts = [head, memory_table(report)]
    if report["compiled"]:
        parts += [traffic_table(report), weights_line(report)]
    if report["predicted"]:
        parts.append(predicted_table(report))
    return "\n\n".join([*(p for p in parts if p), verdict(report)])


def memory_table(report: Report) -> str:
    """Memory per chip, one column per phase; in MB if everything is small."""
    phases = report["phases"]
    unit, write = ("GB", _gb) if report["peak"]["bytes"] >= GB else ("MB", _mb)
    rows = [[f"{unit} per chip", *(p["name"] for p in phases)]]
    for part in phases[0]["parts"]:
        if any(p["parts"][part] for p in phases):
            rows.append([part, *(write(p["parts"][part]) for p in phases)])
    rows.append(["**total**", *(f"**{write(p['total'])}**" for p in phases)])
    note = "" if report["compiled"] else "\n\nNot compiled: temporaries are estimated."
    return table(rows) + note


def traffic_table(report: Report) -> str:
    """Collectives of one run of each program; bytes from other hosts, if there are any."""
    every = [t for program in report["programs"].values() for t in program["traffic"]]
    network = any(t.get("network") for t in every)
    of_hosts = lambda found: [_mb(sum(t.get("network", 0) for t in found))] if network else []  # noqa: E731
    rows = [["program", "collective", "dtype", "in loops of", "times per run", "received, MB per chip"]]
    rows[0] += ["of other hosts, MB"] * network + ["largest, MB"]
    for name, program in report["programs"].items():
        least = SMALL * program["received"]
        for t in (t for t in program["traffic"] if t["bytes"] > least):
            loops = " x ".join(map(str, t["loops"])) or "-"
            times = [str(t["times"]), _mb(t["bytes"]), *of_hosts([t])]
            rows.append([name, t["kind"], t["dtype"], loops, *times, _mb(t["largest"])])
        small = [t for t in program["traffic"] if t["bytes"] <= least]
        if small:
            times, received = sum(t["times"] for t in small), sum(t["bytes"] for t in small)
            rows.append([name, f"{len(small)} smaller kinds", "", "", str(times), _mb(received), *of_hosts(small), ""])
    return table(rows) if len(rows) > 1 else "No collectives."


def weights_line(report: Report) -> str:
    """Largest weights that the update gathers, inside and outside the loop over layers."""
    update = report["programs"].get("update", {"traffic": []})
    gathers = [t for t in update["traffic"] if t["kind"] == "all-gather" and t["dtype"] != "s32"]
    if not gathers:
        return ""
    inner, outer = ([t for t in gathers if (len(t["loops"]) > 1) is inside] for inside in (True, False))
    largest = lambda found: f"{max((t['largest'] for t in found), default=0) / 1e6:.0f} MB"  # noqa: E731
    return (
        f"Weights gathered by the update: at most {largest(inner)} at a time inside the loop over layers, at most "
        f"{largest(outer)} outside of it (embedding and head)."
    )


def predicted_table(report: Report) -> str:
    """Predicted seconds per step."""
    found = report["predicted"]
    rows = [["predicted, s per step", "compute at peak", "memory at peak", "received", "total", "compiler's estimate"]]
    for name in ("rollout", "publish", "update"):
        t = found[name]
        compiler = f"{t['compiler']:.2f}" if t["compiler"] else "-"
        rows.append([name, *(f"{t[key]:.2f}" for key in ("compute", "memory", "wire", "total")), compiler])
    return (
        table(rows) + f"\n\n*predicted*: {found['step_seconds']:.1f} s per step, rollout "
        f"{found['rollout_tokens_per_s']:,.0f} tokens/s, MFU of the update {found['mfu']:.2f}. From published peaks, collectives "
        "not overlapped, every response at its full length; nothing was measured."
    )


def verdict(report: Report) -> str:
    """Verdict on whether the run fits, or the changes needed."""
    peak, whole = report["peak"], report["chip"]["memory"]
    limit = report.get("limit", whole)
    of = f"{limit / GB:.0f}"
    if limit < whole:
        of += f" that JAX takes of {whole / GB:.0f} (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    if report["fits"]:
        return f"fits: {_gb(peak['bytes'])} GB of {of}, largest in {peak['phase']}"
    refused = any(p["refused"] for p in report["programs"].values()) or not report["compiled"]
    about = "about " if refused else ""
    lines = [f"does not fit: needs {about}{_gb(peak['bytes'])} GB of {of}, largest in {peak['phase']}; change"]
    lines += [f"  {a['flags']}    (about {_gb(a['bytes'])} GB)" for a in report["advice"]]
    if not report["advice"]:
        lines.append("  the number of chips: no change of the config saves enough")
    elif all(a["bytes"] > limit for a in report["advice"]):
        lines.append("  and use more chips: that alone does not suffice")
    return "\n".join(lines)


def sweep_table(found: Report) -> str:
    """Compiled candidates of a sweep, the fastest that fits first."""
    rows = [
        [
            "mesh (data, fsdp, tensor, expert)",
            "micro-batches",
            "GB per chip",
            "fits",
            "s per step, predicted",
            "MFU, predicted",
        ]
    ]
    for r in found["compiled"]:
        time = r["predicted"]
        rows.append([
            ", ".join(str(n) for n in r["mesh"].values()), str(r["micro_batches"]), _gb(r["peak"]["bytes"]),
            "yes" if r["fits"] else "no", f"{time['step_seconds']:.1f}" if time else "-", f"{time['mfu']:.2f}" if time else "-",
        ])  # fmt: skip
    tried = (
        f"{found['meshes']} meshes of {_count(found['chips'], 'chip')}, of which {found['possible']} are valid for the config; "
        f"with numbers of micro-batches {found['tried']} candidates, of which {found['estimated']} are estimated to fit. Compiled: "
        f"the {len(found['compiled'])} fastest by prediction, one per mesh."
    )
    best = next((r for r in found["compiled"] if r["fits"]), None)
    end = f"best: {best['flags']}" if best else "none of the compiled candidates fits"
    failed = [f"not compiled: {f['flags']}: {f['reason']}" for f in found["failed"]]
    return "\n\n".join([tried, table(rows), *failed, end])


def table(rows: list[list[str]]) -> str:
    """Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(rows[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows[1:])])


def _count(n: int, noun: str) -> str:
    """The number with the noun in singular or plural."""
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('ch') else 's'}"


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
