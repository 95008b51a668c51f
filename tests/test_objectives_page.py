"""The table of presets in docs/objectives.md equals the configs and lists each preset once."""

import dataclasses
import re
from pathlib import Path

from pydantic import TypeAdapter

from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import PolicyGradient
from jaxrl_llm.objective.presets import PRESETS, SOURCES, source, with_preset

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
# Fields that presets write only to repeat a default.
QUIET = {"kind", "max_difference", "max_value"}


def described(part) -> str:
    """The kind and what differs from its defaults: `clip high 0.28, dual 10`."""
    words = []
    for field in dataclasses.fields(part):
        x = getattr(part, field.name)
        if field.name not in QUIET and x != field.default:
            words.append(f"{field.name} {x:g}" if type(x) is float else f"{field.name} {str(x).lower()}")
    return f"{part.kind} {', '.join(words)}".strip()


def row(name: str) -> list[str]:
    """advantage, ratio and surrogate, correction, mean over, KL."""
    given = with_preset({"preset": name}, dataclasses.asdict(ObjectiveConfig()))
    cfg = TypeAdapter(ObjectiveConfig).validate_python(given)
    loss, reward_kl = cfg.loss, ""
    if cfg.reward_kl.weight:
        reward_kl = f"{cfg.reward_kl.kind} {cfg.reward_kl.weight:g} in the {cfg.reward_kl.to}"
    if not isinstance(loss, PolicyGradient):
        return [described(cfg.advantage), described(loss), "", "pairs", reward_kl]
    correction = "" if loss.correction.kind == "auto" else described(loss.correction)
    kl = described(loss.kl) if loss.kl.weight else reward_kl
    ratio = {"token": "", "sequence": "sequence: ", "sequence_token": "sequence, by token: ", "product": "product: "}
    return [described(cfg.advantage), ratio[loss.ratio] + described(loss.surrogate), correction, loss.aggregation, kl]


def table(width: int) -> dict[str, list[str]]:
    """Return the rows with `width` cells in the section about presets, by their first cell."""
    rows = {}
    section = PAGE.read_text(encoding="utf-8").split("\n## Presets\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`[a-z]+:[a-z0-9_]*`", cells[0]) and len(cells) == width:
            assert cells[0] not in rows, f"{cells[0]} stands twice"
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def test_the_table_of_presets():
    rows = table(7)
    assert sorted(rows) == sorted(PRESETS)
    for name, cells in rows.items():
        assert cells[:5] == row(name), name
        assert cells[5], f"{name}: no source"


def test_every_preset_names_version_and_date_of_its_source():
    versions = {name.removesuffix(":"): cells[0] for name, cells in table(2).items()}
    assert versions == {name: of for name, of in SOURCES.items() if not name.startswith("paper:")}
    for name, cells in table(7).items():
        assert re.search(r"(19|20)\d\d(-\d\d)?", source(name)), name
        assert not name.startswith("paper:") or cells[5].endswith(source(name)), name
    assert "2026-09-18" in source("prime:rl") and "no recipe's default" in table(7)["tinker:cispo"][5]
