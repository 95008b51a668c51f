"""Reports as text: Markdown tables, which terminals and docs/ both show. Imports no jax."""

from typing import Any

Report = dict[str, Any]
GB = 1e9
# Collectives that receive less than this share of a program's bytes are added up in one line.
SMALL = 0.01


def show(report: Report) -> str:
    """The whole report."""
    mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items())
    slots, tokens = report["slots"]
    head = (
        f"{report['parameters'] / 1e9:.2f} billion parameters on {report['topology']}: {report['chips']} chips of "
        f"{report['chip']['memory'] / GB:.0f} GB ({report['chip']['name']}), jax {report['jax']}\n"
        f"mesh: {mesh}; {report['rows']} rows of {slots} + {tokens} slots a step, {report['minibatches']} minibatches of "
        f"{report['micro_batches']} micro-batches"
    )
    parts = [head, memory_table(report)]
    if report["compiled"]:
        parts += [traffic_table(report), weights_line(report)]
    if report["predicted"]:
        parts.append(predicted_table(report))
    return "\n\n".join([*(p for p in parts if p), verdict(report)])


def memory_table(report: Report) -> str:
    """GB of one chip, a column a phase; MB where all is small."""
    phases = report["phases"]
    unit, write = ("GB", _gb) if report["peak"]["bytes"] >= GB else ("MB", _mb)
    rows = [[f"{unit} a chip", *(p["name"] for p in phases)]]
    for part in phases[0]["parts"]:
        if any(p["parts"][part] for p in phases):
            rows.append([part, *(write(p["parts"][part]) for p in phases)])
    rows.append(["**together**", *(f"**{write(p['total'])}**" for p in phases)])
    note = "" if report["compiled"] else "\n\nNot compiled: temporaries are estimated."
    return table(rows) + note


def traffic_table(report: Report) -> str:
    """Collectives of one run of each program."""
    rows = [
        ["program", "collective", "on the wire", "in loops of", "times a run", "received, MB a chip", "largest, MB"]
    ]
    for name, program in report["programs"].items():
        least = SMALL * program["received"]
        for t in (t for t in program["traffic"] if t["bytes"] > least):
            loops = " x ".join(map(str, t["loops"])) or "-"
            rows.append([name, t["kind"], t["dtype"], loops, str(t["times"]), _mb(t["bytes"]), _mb(t["largest"])])
        small = [t for t in program["traffic"] if t["bytes"] <= least]
        if small:
            times, received = sum(t["times"] for t in small), sum(t["bytes"] for t in small)
            rows.append([name, f"{len(small)} smaller kinds", "", "", str(times), _mb(received), ""])
    return table(rows) if len(rows) > 1 else "No collectives."


def weights_line(report: Report) -> str:
    """Where the update gathers weights."""
    update = report["programs"].get("update", {"traffic": []})
    gathers = [t for t in update["traffic"] if t["kind"] == "all-gather" and t["dtype"] != "s32"]
    if not gathers:
        return ""
    inner, outer = ([t for t in gathers if (len(t["loops"]) > 1) is inside] for inside in (True, False))
    largest = lambda found: f"{max((t['largest'] for t in found), default=0) / 1e6:.0f} MB"  # noqa: E731
    return (
        f"Gathered in the update: inside the loop over layers, at most {largest(inner)} at a time; outside of it at most "
        f"{largest(outer)} (embedding and head)."
    )


def predicted_table(report: Report) -> str:
    """Seconds of a step; every number is predicted."""
    found = report["predicted"]
    rows = [["predicted, s a step", "compute at peak", "memory at peak", "received", "together", "compiler's estimate"]]
    for name in ("rollout", "publish", "update"):
        t = found[name]
        compiler = f"{t['compiler']:.2f}" if t["compiler"] else "-"
        rows.append([name, *(f"{t[key]:.2f}" for key in ("compute", "memory", "wire", "total")), compiler])
    return (
        table(rows) + f"\n\n*predicted*: {found['step_seconds']:.1f} s a step, rollout "
        f"{found['rollout_tokens_per_s']:,.0f} tokens/s, MFU of the update {found['mfu']:.2f}. From published peaks, collectives "
        "not overlapped, every response at its full length; nothing was measured."
    )


def verdict(report: Report) -> str:
    """Fits, or not, and what to change."""
    peak, limit = report["peak"], report["chip"]["memory"]
    if report["fits"]:
        return f"fits: {_gb(peak['bytes'])} GB of {limit / GB:.0f}, most of it in {peak['phase']}"
    refused = any(p["refused"] for p in report["programs"].values()) or not report["compiled"]
    about = "about " if refused else ""
    lines = [
        f"does not fit: needs {about}{_gb(peak['bytes'])} GB of {limit / GB:.0f}, most of it in {peak['phase']}; change"
    ]
    lines += [f"  {a['flags']}    (about {_gb(a['bytes'])} GB)" for a in report["advice"]]
    if not report["advice"]:
        lines.append("  to more chips: nothing in the config saves enough")
    elif all(a["bytes"] > limit for a in report["advice"]):
        lines.append("  and that alone does not do it: take more chips too")
    return "\n".join(lines)


def sweep_table(found: Report) -> str:
    """What was tried, the fastest that fits first."""
    rows = [
        [
            "mesh (data, fsdp, tensor, expert)",
            "micro-batches",
            "GB a chip",
            "fits",
            "s a step, predicted",
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
        f"{found['meshes']} meshes of {found['chips']} chips, of which {found['possible']} go with the config; with their numbers "
        f"of micro-batches {found['tried']} forms, of which {found['estimated']} are estimated to fit. Compiled: the "
        f"{len(found['compiled'])} fastest by prediction, one a mesh."
    )
    best = next((r for r in found["compiled"] if r["fits"]), None)
    end = f"best: {best['flags']}" if best else "none of those compiled fits"
    failed = [f"not compiled: {f['flags']}: {f['reason']}" for f in found["failed"]]
    return "\n\n".join([tried, table(rows), *failed, end])


def table(rows: list[list[str]]) -> str:
    """Markdown, the first row as header, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(rows[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows[1:])])


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
